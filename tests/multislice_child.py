"""`python -m tests.multislice_child DATA WORKDIR`: one of two processes that train as two slices.

Prints {data index: processes whose devices are there}, in JSON.
"""

import json
import sys

import jax

from a3_jax.training import run
from a3_jax.training.config import RunConfig
from a3_jax.training.processes import join, leave, part
from tests.multislice_run import config_of

if __name__ == "__main__":
    join()
    config = config_of(sys.argv[1])
    mesh = run.open_mesh(RunConfig.from_config(config))
    crossed = [sorted({device.process_index for device in row.flat}) for row in mesh.devices]
    run.train(config, sys.argv[2])
    print(json.dumps({"processes": crossed, "devices": len(jax.devices())}), flush=True)
    part()
    leave(0)
