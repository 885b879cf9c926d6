"""Each config of `configs/` as text: resolved fields; every parameter's shape, dtype, axes and mesh axes.

python -m tests.golden_configs      writes tests/golden/configs/*.txt anew
"""

import json
import pathlib

import jax

from a3_jax.model.sharding import partition_spec
from a3_jax.model.two_stream import abstract_params, logical_axes
from a3_jax.training.config import RunConfig, model_config, read_run_config

ROOT = pathlib.Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.py"))
GOLDEN = ROOT / "tests" / "golden" / "configs"
EMBEDDED_VOCABULARY = 128  # stands for the tokenizer's where a config leaves the vocabulary to it


def load(path) -> RunConfig:
    return RunConfig.from_config(read_run_config(str(path), []))


def model_of(run: RunConfig):
    return model_config(run, None if isinstance(run.model, str) else EMBEDDED_VOCABULARY)


def golden_text(path) -> str:
    run = load(path)
    model = model_of(run)
    fields = run.to_dict()
    lines = [f"stage: {json.dumps(stage)}" for stage in fields.pop("stages")]
    lines += [f"{name}: {json.dumps(value)}" for name, value in fields.items()]
    lines += [f"model config: {json.dumps(model.to_dict())}", ""]
    axes = dict(jax.tree_util.tree_leaves_with_path(logical_axes(model), is_leaf=_is_axes))
    for key, leaf in jax.tree_util.tree_leaves_with_path(abstract_params(model)):
        name = jax.tree_util.keystr(key, simple=True, separator="/")
        spec = tuple(partition_spec(axes[key]))
        lines.append(f"{name}: {leaf.shape} {leaf.dtype} {tuple(axes[key])} {spec}")
    return "\n".join(lines) + "\n"


def _is_axes(node):
    return isinstance(node, jax.sharding.PartitionSpec)


if __name__ == "__main__":
    GOLDEN.mkdir(parents=True, exist_ok=True)
    for config in CONFIGS:
        (GOLDEN / f"{config.stem}.txt").write_text(golden_text(config))
