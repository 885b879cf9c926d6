"""Weights at rest: the A3 checkpoint directory, and Hugging Face directories in both directions.

    conversion.convert(src, dst, to="a3" | "hf")     converts one into the other, by chunk, without torch
    check.check_conversion(params, ...)              compares the result with transformers
    inspect.describe(path), inspect.verify(path)     describes a checkpoint; checks every byte of it
    loading.open_checkpoint(path)                    opens any of them, or a run's newest checkpoint
    step_writer.StepWriter(directory, keep)          saves and restores the steps of a training run
    a3_format.save_checkpoint, load_meta, load_params, latest_step

Each format has one reader: `stored_arrays` (A3) and `safetensors` with `hf_format` (Hugging Face). A family
of models is a table (`families`): the name of each tensor, the leaf it becomes, its axes.
"""
