"""`a3 bench`: what the software costs, mostly as ratios to something that runs beside it.

    command      flags to `Settings`, the table of benchmarks, rows to a table or JSON
    a benchmark  `measure(settings) -> rows`; a module of its own: attention, train, memory, scaling, release,
                 decode, compile
    steps        our train step, compiled and ready to call      torch_steps   PyTorch's, the same way
    worker       one step in a fresh process, its peak memory

A ratio is taken between neighbours in time: A, B, A, B, ... in one process, after compilation and a
warm-up, so that whatever else the machine does falls on both. Batches come from `ordering` alone.
"""
