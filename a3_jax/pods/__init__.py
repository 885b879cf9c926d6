"""Prove that a run fits, start it, watch it.

    preflight    compiles the run's step for a pod that is not attached, and compares memory and time with
                 formulas (`aot_compile`, `collectives`, `estimates`, `search`)
    local        keeps the processes of one machine running; `xpk` and `tpu_vm` prepare those of a pod
    status, goodput   report on a run from the files that it wrote (`run_records`), during it and afterwards

Training never imports this room. `local`, `status` and `goodput` don't load JAX: they answer at once, and
what kills a run can't kill its supervisor.
"""
