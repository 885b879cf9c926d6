"""Checkpoint to tables: tasks as data, models that score and fill, results that name all their settings.

tasks/         what is asked, by which protocol, and how answers are graded
models/        what answers: any order, left to right, masked diffusion
runner         tasks x model -> results on disk; an interrupted run continues
lm_eval_run    any task of lm-evaluation-harness, asked of the same models
reproduce      the paper's tables beside the results
"""
