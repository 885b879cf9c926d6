"""Start it, watch it: runs on several processes, and what became of them.

`local` keeps the processes of one machine going. `goodput` and `status` tell of a run from the files that
it wrote (`records`) and from nothing else: they work beside a live run and after its death alike. Training
never imports this room, and this room never loads JAX: its answers come at once, and what kills a run
can't kill its supervisor.
"""
