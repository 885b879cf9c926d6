"""The run of `test_multislice`, in each of its processes."""

from tests.training_fixtures import tiny_run


def config_of(data: str):
    heads = {"num_heads": 2, "num_kv_heads": 1, "head_size": 8}
    model = {"d_model": 16, "num_layers": 1, "mlp_size": 16} | heads
    return tiny_run(
        data, tokenizer="", batch_size=8, mesh={"data": 0, "fsdp": -1, "tensor": 1},
        checkpoint_every=2, model=model,
        stages=[{"name": "random", "steps": 4, "orders": [{"order": "random", "group_sizes": [2]}]}],
    )  # fmt: skip
