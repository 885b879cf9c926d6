"""Text to sorted batches.

`tasks.open_data` reads a source once, through seqio, into tables of packed rows; `batches.stream`
turns a table into batches, each a function of (seed, step) and of nothing else. seqio and TensorFlow
are imported here alone, and only by `tensorflow_host`, so `table`, `batches.batch` and `embedded`
work where both are absent.
"""
