"""TensorFlow and seqio, quiet and told that there is no accelerator: JAX owns those."""

import contextlib
import gc
import os
import sys

# Keras, which TensorFlow imports, looks for these and does without: a third of the time to import it all.
_OF_KERAS_ALONE = "matplotlib", "pandas", "sklearn"


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


@contextlib.contextmanager
def _out_of_sight(names):
    """Packages that can't be imported meanwhile; one that already is, is left alone."""
    hidden = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


_looked_for_garbage = gc.isenabled()
gc.disable()  # modules stay: to look through them again and again while more come takes a fifth of the time
with _silent_standard_error(), _out_of_sight(_OF_KERAS_ALONE):
    import tensorflow as tf

    for _kind in ("GPU", "TPU"):
        tf.config.set_visible_devices([], _kind)
    import seqio
if _looked_for_garbage:
    gc.enable()

__all__ = ["seqio", "tf"]
