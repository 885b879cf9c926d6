"""Checkpoints behind one interface, `EvaluatedModel`: it scores parts of a text and fills blanks.

`any_order` and `left_to_right` read a two-stream checkpoint, `diffusion` a masked-diffusion one; `scorers`
says which forwards make up a score, `opening` which of the three a checkpoint is.
"""
