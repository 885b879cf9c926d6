"""Batches to checkpoints.

`run.train(config, workdir)` opens a run: data, parameters, mesh, the newest checkpoint. `loop.train` is
the run itself, straight, in the order things happen, over any iterator of batches. One compiled step
serves a whole curriculum: stages change the ranks in the batch and the learning rate, never a shape.
"""
