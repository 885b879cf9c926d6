"""The run of `test_multislice`, in each of its processes."""

import json
import sys

from tests.training_fixtures import tiny_run


def config_of(data: str):
    heads = {"num_heads": 2, "num_kv_heads": 1, "head_size": 8}
    model = {"d_model": 16, "num_layers": 1, "mlp_size": 16} | heads
    return tiny_run(
        data, tokenizer="", batch_size=8, mesh={"data": 0, "fsdp": -1, "tensor": 1},
        checkpoint_every=2, model=model,
        stages=[{"name": "random", "steps": 4, "orders": [{"order": "random", "group_sizes": [2]}]}],
    )  # fmt: skip


def train_as_slice(arguments) -> int:
    """One of two processes that train as two slices.

    Prints {data index: processes whose devices are there}, in JSON.

    Args:
      arguments: data, run directory.
    """
    import jax

    from a3_jax.runtime.distributed import join, shutdown
    from a3_jax.training.config import RunConfig
    from a3_jax.training.setup import open_mesh
    from a3_jax.training.train import train

    data, workdir = arguments
    join()
    config = config_of(data)
    mesh = open_mesh(RunConfig.from_config(config))
    crossed = [sorted({device.process_index for device in row.flat}) for row in mesh.devices]
    train(config, workdir)
    print(json.dumps({"processes": crossed, "devices": len(jax.devices())}))
    shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(train_as_slice(sys.argv[1:]))
