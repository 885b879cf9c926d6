"""Weights at rest: the A3 checkpoint directory, and Hugging Face directories in both directions.

    conversion.convert(src, dst, to="a3" | "hf")     one to the other, tensor by tensor, without torch
    check.check_conversion(params, ...)              whether that kept the model, against transformers
    info.describe(path)                              what a checkpoint is, without reading its parameters
    opening.open_checkpoint(path)                    any of them, or a run's newest checkpoint, ready to use
    a3_format.StepWriter(directory, keep)            what a training run saves to and restores from
    a3_format.save_checkpoint, load_meta, load_params, latest_step
    verify.verify(path)                              whether every byte is what was written (`manifest`)

A family of models is a table (`families`): the name of each tensor, the leaf it becomes, its axes.
"""
