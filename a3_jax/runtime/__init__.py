"""The processes of a run: what joins them, keeps them in agreement and alive, and ends them together.

    distributed      joins the processes of a run (`tpu_hosts` finds those of a TPU pod) and ends them
    coordination     a value, an error or a decision shared by all processes, without a device
    lease            one writer per run directory; whether the process that a lease names is alive
    watchdog         ends a process in which nothing happens
    preemption       SIGTERM as a request to save and leave
    compile_cache    compiled programs that outlive the process
    versions         the software that all processes must have in common

Nothing here knows about models, data or checkpoints. `lease` and `watchdog` don't load JAX.
"""
