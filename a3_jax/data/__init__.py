"""Text to sorted batches.

What fits in memory: `seqio_tasks.open_data` reads a source once, through seqio, into tables of packed rows.
What does not: `prepare` turns files into shards of packed rows, once, and `prepared` opens them for
a run. `feature_converter.stream` turns either into batches, each a function of (seed, step) alone.
seqio and TensorFlow are imported here alone, and only by `tensorflow_host`: all else, preparing
included, works where both are absent.
"""
