"""Checks that a conversion kept the model, before its destination appears.

With torch and transformers the content stream, from left to right, is compared with the model that
transformers makes of the Hugging Face side: in float32, from weights rounded alike. That means something
only if transformers read every parameter; if it didn't, the reason is reported. In any case every tensor is
compared by its size and norm.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import logging
import math
import os
import pathlib
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from a3_jax.checkpoints.families import QUERY_TENSOR, tensor_table, tied_head
from a3_jax.checkpoints.fingerprint import tree_names
from a3_jax.checkpoints.hf_format import HFModel, open_hf
from a3_jax.checkpoints.stored_arrays import one_line
from a3_jax.errors import EXIT_FAILED, InputError, RunError
from a3_jax.model.config import ModelConfig
from a3_jax.model.flops import parameter_count
from a3_jax.model.two_stream import Block, Rows, TwoStream, logits, prepare_cpu_decode_params, run_rows

TOLERANCE = 1e-4  # of logits: times their largest; of a row of hidden states: of its norm
_EXAMPLES, _LENGTH, _SEED = 2, 64, 0
_AT_ONCE = 1 << 22  # numbers that are in memory as float64
_HIGHEST = jax.lax.Precision.HIGHEST
_BYTES = 8  # per parameter, in float32 on both sides
_CGROUPS = (  # versions 2 and 1: limit, use, and the line of `memory.stat` that can be taken back
    ("memory.max", "memory.current", "memory.stat", "file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_cache"),
)

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Checked:
    """Summary of a successful conversion check.

    Attributes:
      tensors, parameters: how many have the shapes and (finite) norms of the source.
      difference, scale: the largest difference between logits, and the largest logit, over `tokens`;
        None if logits were not compared.
      why_not: the reason for that.
    """

    tensors: int
    parameters: int
    difference: float | None = None
    scale: float | None = None
    tokens: int = 0
    why_not: str = ""

    def __str__(self):
        norms = f"norms of {self.tensors:,} tensors, {self.parameters:,} parameters"
        if self.difference is None:
            return f"checked: {norms}; logits were not compared: {self.why_not}"
        return (
            f"checked: logits of {self.tokens} tokens are those of transformers, largest difference "
            f"{self.difference:.1e} (logits up to {self.scale:.3g}); {norms}"
        )


@dataclasses.dataclass(frozen=True)
class _Run:
    """Hidden states [B, T, D] in the order of computing, by name, and logits [B, T, V]; float32, NumPy."""

    states: dict[str, np.ndarray]
    logits: np.ndarray


class _NotComparable(Exception):
    """The reason why transformers has no logits to compare with."""


def is_checked(check: bool | None, config: ModelConfig, hf_directory, destination) -> bool:
    """Decides, before anything is written, whether a conversion is checked.

    Args:
      check: the user's wish; None: if logits can be compared, in half of the free memory.
      config: the model.
      hf_directory: where the Hugging Face side is or will be; None if both sides are A3.
      destination: names the destination in a warning.
    """
    if not check and check is not None:
        return False
    if _why_not(config, hf_directory):
        return bool(check)  # of sizes and norms
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    needed, free = _BYTES * parameter_count(config), free_memory()
    problem = f"{' and '.join(missing)} not installed (pip install torch transformers)" if missing else ""
    if not problem and needed > (free if check else free / 2):
        problem = f"the model takes {needed:,} bytes of memory on both sides, {free:,.0f} are free"
    if problem and check:
        raise InputError(f"can't be compared with transformers: {problem}", field="check")
    if problem and not missing:
        logger.warning("%s: not checked: %s", destination, problem)
    return not problem


def free_memory(root: str = "/") -> float:
    """Returns the bytes of memory that machine and container still leave this process; 0 if unknown."""
    found, system, groups = [], pathlib.Path(root, "proc/meminfo"), pathlib.Path(root, "sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError, KeyError):
        found.append(1024 * _numbers(system)["MemAvailable:"])
    for limit, used, stat, cache in _CGROUPS:
        with contextlib.suppress(OSError, ValueError, KeyError):  # "max" is no number
            most, now = (int((groups / name).read_text()) for name in (limit, used))
            found.append(most - now + _numbers(groups / stat)[cache])
    if not found:
        with contextlib.suppress(OSError, ValueError):
            found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2)
    return max(0, min(found, default=0))


def _numbers(path) -> dict[str, int]:
    """Reads a file of lines such as "name 3 kB"."""
    return {line.split()[0]: int(line.split()[1]) for line in path.read_text().splitlines()}


def check_conversion(params, config: ModelConfig, hf_directory, dtype, destination) -> Checked:
    """Compares the two sides of a conversion.

    Args:
      params: the parameter tree on the A3 side, of any dtype; read again if that side was written.
      config: its model.
      hf_directory: the Hugging Face side; None if both sides are A3.
      dtype: to which all parameters were converted; None: to none.
      destination: names the destination in errors.

    Raises:
      RunError: the sides differ, naming the first layer or the tensor; `EXIT_FAILED`.
    """
    if hf_directory is None:
        sizes = [
            _checked_size(name, [np.asarray(leaf)], destination) for name, leaf in tree_names(params).items()
        ]
        return Checked(len(sizes), sum(sizes), why_not=_why_not(config, None))
    model = open_hf(hf_directory)
    compared: dict[str, Any] = {"why_not": _why_not(config, hf_directory)}
    if not compared["why_not"]:
        try:
            compared = _compare_logits(params, model, dtype, destination)
        except _NotComparable as reason:
            compared["why_not"] = str(reason)
    table = tensor_table(config)
    sizes = [
        _checked_size(tensor.name, [_slice_of(params, part) for part in table[name]], destination, tensor)
        for name, tensor in model.stored.items()
        if name in table  # which a tied head's second copy is not
    ]
    return Checked(len(sizes), sum(sizes), **compared)


def _why_not(config, hf_directory) -> str:
    """Returns why there is nothing to ask transformers; empty if there is."""
    if hf_directory is None:
        return "both sides are A3"
    if config.residual == "release":
        return "transformers has no model with the residual of the authors' release"
    return "transformers reads local directories only" if "://" in str(hf_directory) else ""


def _compare_logits(params, model: HFModel, dtype, destination) -> dict[str, Any]:
    """Returns the fields of `Checked` about logits.

    Raises:
      _NotComparable: transformers has no logits of this model.
      RunError: its logits are others.
    """
    config = model.config
    length = min(_LENGTH, config.context_length(left_to_right=True))
    tokens = np.random.default_rng(_SEED).integers(0, config.vocab_size, (_EXAMPLES, length), np.int32)
    theirs = _their_run(model, tokens, dtype)
    params = _rounded_as_stored(params, model)
    ours = np.asarray(_our_logits(config)(params, _left_to_right(tokens)))
    difference, scale = float(np.abs(ours - theirs.logits).max()), float(np.abs(theirs.logits).max())
    if not difference <= TOLERANCE * max(scale, 1.0):  # NaN is a difference
        where = _first_difference(_our_states(params, config, tokens), theirs.states)
        raise RunError(
            EXIT_FAILED,
            f"{destination}: not written: logits differ from those of transformers by {difference:.2g} "
            f"(logits up to {scale:.3g}); the first difference is in {where}",
        )
    return {"difference": difference, "scale": scale, "tokens": tokens.size}


def _their_run(model: HFModel, tokens, dtype) -> _Run:
    import torch
    import transformers

    doing = "open"
    with _quiet(transformers.utils.logging):
        try:
            loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
                str(model.directory), dtype=torch.float32, attn_implementation="eager", local_files_only=True,
                trust_remote_code=False, use_safetensors=True, output_loading_info=True,
            )  # fmt: skip
            theirs, info = loaded
            _check_whole(model, info)
            doing = "run"
            return _run_theirs(theirs.eval(), tokens, dtype)
        except _NotComparable:
            raise
        except Exception as error:  # its errors share no type
            why = f"transformers {transformers.__version__} can't {doing} the model: {one_line(error)}"
            raise _NotComparable(why) from error


def _check_whole(model: HFModel, info) -> None:
    """Refuses what transformers filled with random numbers, or left aside, of what we read.

    Args:
      info: the loading info of transformers, sets of names.
    """
    extra = {QUERY_TENSOR, tied_head(model.config)}  # which it doesn't know, or doesn't need
    parameters = {stored.name for name, stored in model.stored.items() if name not in extra}
    for what, names in (
        ("does not find", info["missing_keys"]),
        ("has other shapes for", info["mismatched_keys"]),
        ("leaves aside", parameters & set(info["unexpected_keys"])),
    ):
        if names:
            first = min(str(name if isinstance(name, str) else name[0]) for name in names)
            raise _NotComparable(f"transformers {what} {len(names)} tensors, such as {first}")


def _run_theirs(model: Any, tokens, dtype) -> _Run:
    import torch

    blocks = model.base_model.h if hasattr(model.base_model, "h") else model.base_model.layers
    last = []  # for the last layer transformers itself returns only the state after the final norm
    blocks[-1].register_forward_hook(lambda _, __, out: last.append(out))
    with torch.no_grad():
        for parameter in model.parameters() if dtype is not None else ():
            parameter.copy_(parameter.to(getattr(torch, np.dtype(dtype).name)))
        out = model(torch.from_numpy(tokens).long(), output_hidden_states=True, use_cache=False)
    before_norm = last[0][0] if isinstance(last[0], tuple) else last[0]
    states = [*out.hidden_states[:-1], before_norm, out.hidden_states[-1]]
    names = _state_names(len(blocks))
    return _Run({name: state.numpy() for name, state in zip(names, states, strict=True)}, out.logits.numpy())


@contextlib.contextmanager
def _quiet(their_logging):
    """Silences transformers: progress bars, warnings, and its list of unknown tensors."""
    verbosity, bars = their_logging.get_verbosity(), their_logging.is_progress_bar_enabled()
    their_logging.set_verbosity_error()
    their_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        their_logging.set_verbosity(verbosity)
        if bars:
            their_logging.enable_progress_bar()


def _state_names(layers: int) -> list[str]:
    return ["the embedding", *(f"layer {layer} (of 0 to {layers - 1})" for layer in range(layers)),
            "the final norm"]  # fmt: skip


def _left_to_right(tokens) -> Rows:
    """Returns content rows with rank = position."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    start = jnp.zeros_like(positions)
    return Rows(positions=positions, start=start, limit=positions + 1, tokens=jnp.asarray(tokens))


@functools.cache
def _our_logits(config: ModelConfig):
    """Compiles a function of parameters and rows: logits [B, T, V], float32."""

    @jax.jit
    def run(params, rows):
        out = run_rows(TwoStream(config, precision=_HIGHEST), params, rows, outputs="content")
        return logits(params, config, out.content, _HIGHEST)

    return run


def _our_states(params, config: ModelConfig, tokens) -> dict[str, np.ndarray]:
    """Computes hidden states as in `_Run`, from the layers one by one: a scan keeps only the last."""
    params = {**params, **prepare_cpu_decode_params(params, config)}
    model = TwoStream(config, precision=_HIGHEST, few_rows=True)
    out, variables = model.apply(
        {"params": params}, _left_to_right(tokens), outputs="content", mutable=["intermediates"],
        capture_intermediates=lambda module, method: isinstance(module, Block) or method == "embedded",
    )  # fmt: skip
    kept = variables["intermediates"]
    layers = [f"layer_{layer}" for layer in range(config.num_layers - 1)] + ["last_layer"]
    states = [kept["embedded"][0]]
    for layer in layers:
        (state, _), _ = kept[layer]["__call__"][0]
        states.append(state)
    states.append(out.content)
    return dict(zip(_state_names(config.num_layers), map(np.asarray, states), strict=True))


def _first_difference(ours, theirs) -> str:
    """Returns the name of the first state with a row that differs by more than the tolerance."""
    for name, expected in theirs.items():
        distance = np.linalg.norm(ours[name] - expected, axis=-1)
        if not np.all(distance <= TOLERANCE * np.linalg.norm(expected, axis=-1)):
            return name
    return "the head"


def _rounded_as_stored(params, model: HFModel):
    """Returns the parameters in float32, each rounded as it is in the files."""
    rounded = jax.tree.map(lambda leaf: np.array(leaf, np.float32), params)
    table = tensor_table(model.config)
    for name, stored in model.stored.items():
        for part in table.get(name, ()) if stored.dtype != np.float32 else ():
            leaf = _slice_of(rounded, part)
            leaf[...] = leaf.astype(stored.dtype)
    return rounded


def _slice_of(params, part) -> np.ndarray:
    leaf = functools.reduce(lambda tree, key: tree[key], part.leaf, params)
    return np.asarray(leaf if part.layer is None else leaf[part.layer])


def _checked_size(name, arrays, destination, stored=None) -> int:
    """Returns the size of a tensor, after comparing its parts, `arrays`, with what is in the file."""
    size, norm = sum(array.size for array in arrays), _norm(arrays)
    problem = "" if math.isfinite(norm) else "its norm is not finite"
    if stored is not None and not problem:
        expected = _norm([stored.read()])
        same_dtype = all(array.dtype == stored.dtype for array in arrays)
        if size != math.prod(stored.shape):
            problem = f"{size} parameters, {math.prod(stored.shape)} on the other side"
        elif not math.isclose(norm, expected, rel_tol=1e-6 if same_dtype else 1e-2):
            problem = f"norm {norm:.6g}, {expected:.6g} on the other side"
    if problem:
        raise RunError(EXIT_FAILED, f"{destination}: not written: {name}: {problem}")
    return size


def _norm(arrays) -> float:
    total = 0.0
    for array in arrays:
        flat = array.reshape(-1)
        for begin in range(0, flat.size, _AT_ONCE):
            piece = flat[begin : begin + _AT_ONCE].astype(np.float64)
            total += float(piece @ piece)
    return math.sqrt(total)
