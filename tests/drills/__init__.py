"""Faults, injected into real runs of real processes."""
