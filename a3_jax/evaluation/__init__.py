"""Checkpoint to tables: tasks as data, models that score and fill, results that say all their settings."""
