"""Checkpoints behind one interface, `EvaluatedModel`: it scores parts of a text and fills blanks.

`any_order` and `left_to_right` read a two-stream checkpoint, `diffusion` a masked-diffusion one; `scorers`
says which forwards make up a score, `opening` which of the three a checkpoint is.
"""

A3, AR, DIFFUSION = MODELS = ("a3", "ar", "masked_diffusion")
LOSS_WEIGHTS = ("none", "inv_t")  # of a level of masking
EMPTY_LEVELS = ("zero", "skip")
