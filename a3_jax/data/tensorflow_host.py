"""TensorFlow and seqio, quiet and told that there is no accelerator: JAX owns those."""

import contextlib
import os


@contextlib.contextmanager
def _silent_standard_error():
    """Drops what C++ code writes: TensorFlow complains of absent CUDA drivers before one can stop it."""
    saved, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)


with _silent_standard_error():
    import tensorflow as tf

    for _kind in ("GPU", "TPU"):
        tf.config.set_visible_devices([], _kind)
    import seqio

__all__ = ["seqio", "tf"]
