"""`a3 bench`: what the software costs, mostly as ratios to something that runs beside it.

    command  settings  measurement     flags; contenders timed in turn; rows as JSON or as a table
    step_costs                         attention, train, memory, scaling, release, score, eval, guards
    fill_times  forward_counts         decode, forwards on a Markov chain
    data_rates  conversion_times  launch_times     data, convert, launch
    train_steps  torch_models  fresh_process       our step, PyTorch's, one in a process of its own

A ratio is taken between neighbours in time: A, B, A, B, ... after compilation and a warm-up, so that whatever
else the machine does falls on both. Only `data_rates` imports TensorFlow and seqio.
"""
