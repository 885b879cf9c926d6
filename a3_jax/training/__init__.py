"""Batches to checkpoints.

`train.train(config, workdir)` is a run from top to bottom: config, processes, mesh, model, rows, optimiser,
restore, loop. `setup` makes its parts, `step` and `loss` compute one step, `saving` and `run_log` write.
One compiled step serves a whole curriculum: stages change the ranks in the batch and the learning rate,
never a shape.
"""
