"""The model card of a Hugging Face directory that we write: only facts that a checkpoint records.

A card is made to be published: it shows only the last part of absolute paths and addresses.
"""

import contextlib
import dataclasses
import importlib.resources
import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from a3_jax.checkpoints.a3_format import Meta
from a3_jax.checkpoints.families import QUERY_LEAF, QUERY_TENSOR, table_names
from a3_jax.checkpoints.fingerprint import tree_names
from a3_jax.checkpoints.hf_format import CARD_FILE, SOURCE_CARD_FILE
from a3_jax.checkpoints.inspect import fingerprint, recorded_stages, size_rows, sizes_of
from a3_jax.checkpoints.loading import CHECKPOINTS
from a3_jax.checkpoints.manifest import PARAMS, read_manifest
from a3_jax.checkpoints.safetensors import TensorSpec
from a3_jax.errors import InputError
from a3_jax.model.two_stream import abstract_params
from a3_jax.ordering.curriculum import Stage
from a3_jax.paths import absolute, read_json, read_json_lines
from a3_jax.tokenizer import Tokenizer

_TEMPLATE = "model_card.md.j2"
_LICENCE = ("license", "license_name", "license_link")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
HELD_OUT = {  # names in a run's eval.jsonl
    "l2r": "query stream, left to right",
    "contiguous": "query stream, contiguous groups",
    "random": "query stream, random groups",
    "ar": "content stream, left to right",
    "masked_diffusion": "masked tokens (a bound)",
}


@dataclasses.dataclass(frozen=True)
class Facts:
    """Facts about a checkpoint that its own description lacks.

    Attributes:
      fingerprint: of its parameters, as `a3 info` gives it.
      held_out: losses by their names in `eval.jsonl`, in nats; after step `held_out_step`.
      data: CRC-32 of the manifest by prepared directory.
    """

    fingerprint: str | None = None
    held_out: Mapping[str, float] = dataclasses.field(default_factory=dict)
    held_out_step: int | None = None
    data: Mapping[str, int] = dataclasses.field(default_factory=dict)


def run_facts(directory, step: int | None) -> Facts:
    """Reads the fingerprint of an A3 checkpoint and, if it is a run's, its data and last held-out losses.

    What can't be read is left out: a run goes on writing these files.

    Args:
      directory: the checkpoint, `WORKDIR/checkpoints/STEP` of a run.
      step: that it says to be of.

    Raises:
      DamagedCheckpoint: its manifest is not what was written.
    """
    directory = absolute(directory)
    found = fingerprint(read_manifest(directory).item(PARAMS))
    if step is None or directory.parent.name != CHECKPOINTS:
        return Facts(found)
    workdir = directory.parent.parent
    rows = [row for row in read_json_lines(workdir / "eval.jsonl") if _step_of(row) <= step]
    last = max(rows, key=_step_of, default={})
    losses = {name: last[name] for name in HELD_OUT if _is_loss(last.get(name))}
    recorded: dict[str, Any] = {}
    with contextlib.suppress(InputError):  # absent, or just being written
        recorded = read_json(workdir / "data.json")
    data = {name: crc32 for name, crc32 in recorded.items() if isinstance(crc32, int)}
    return Facts(found, losses, last["step"] if losses else None, data)


def model_card(
    meta: Meta,
    hf_config: Mapping[str, Any],
    tensors: Mapping[str, TensorSpec],
    tokenizer: Tokenizer | None,
    facts: Facts | None = None,
) -> str:
    """Returns the card as Markdown with YAML front matter.

    Args:
      meta: the checkpoint's.
      hf_config, tensors: of `config.json`, and in the files beside the card.
      tokenizer: the checkpoint's.
      facts: what is known beside `meta`.
    """
    import jinja2

    facts, source, model = facts or Facts(), meta.source or {}, meta.model
    is_release, is_masked = model.residual == "release", model.mask_token is not None
    has_query = QUERY_TENSOR in tensors and not is_masked
    name = source.get("config", {}).get("_name_or_path")
    base = name if isinstance(name, str) and _HUB_NAME.fullmatch(name) else None  # a name on the Hub
    had, losses = table_names(source.get("tensors", {}), model), facts.held_out
    fields = {
        "library": "a3_jax" if has_query or is_release or is_masked else "transformers",
        "base_model": base,
        "licence": _licence(source),
        "tags": ["a3", "any-order", "any-subset"] if has_query else ["text-generation"],
        "title": f"{base} as an A3 model" if base else f"An A3 model, family {model.family}",
        "is_masked": is_masked,
        "has_query": has_query,
        "is_release": is_release,
        "untrained_query": meta.step is None and bool(source) and QUERY_TENSOR not in had,
        "sizes": list(_sizes(model, hf_config, tensors, tokenizer)),
        "files": sorted(_strings(source.get("sha256")).items()),
        "origin": list(_origin(meta, facts)),
        "training": list(_training(meta, facts)),
        "stages": list(_stages(meta)),
        "held_out": [(label, f"{losses[it]:.4f}") for it, label in HELD_OUT.items() if it in losses],
        "held_out_step": facts.held_out_step,
        "blanks": '{"text": "The [[3]] sat."}' if tokenizer else '{"tokens": [3, null, null, 5]}',
        "given": '{"text": "The cat sat."}' if tokenizer else '{"tokens": [3, 1, 4, 5]}',
        "versions": ", ".join(f"{name} {it}" for name, it in _strings(meta.versions).items()),
    }
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"yaml": _yaml, "code": _code, "number": _number}
    template = importlib.resources.files("a3_jax.checkpoints").joinpath(_TEMPLATE).read_text(encoding="utf-8")
    return environment.from_string(template).render(fields).rstrip() + "\n"


def _sizes(model, hf_config, tensors, tokenizer) -> Iterable[tuple[str, str]]:
    """Yields the rows of the table of sizes."""
    without = () if QUERY_TENSOR in tensors else QUERY_LEAF
    leaves = [leaf for name, leaf in tree_names(abstract_params(model)).items() if name not in without]
    yield "architecture", _code(_architecture(hf_config) or model.family)
    yield "parameters", _number(sum(math.prod(leaf.shape) for leaf in leaves))
    yield "dtype", ", ".join(sorted({spec.dtype.name for spec in tensors.values()}))
    yield from size_rows(sizes_of(model), unit=" tokens")
    size = None if tokenizer is None else tokenizer.vocab_size
    yield "tokenizer", "none: token input only" if size is None else f"{_number(size)} tokens"


def _origin(meta: Meta, facts: Facts) -> Iterable[str]:
    """Yields Markdown lines about where the parameters came from."""
    source = meta.source or {}
    config = source.get("config", {})
    if config.get("_name_or_path"):
        yield f"`config.json` of the source calls it {_code(_last_part(config['_name_or_path']))}"
    if architecture := _architecture(config):
        version = config.get("transformers_version")
        by = f", written by transformers {_plain(version)}" if isinstance(version, str) else ""
        yield f"a Hugging Face directory of {_code(architecture)}{by}"
    if meta.run_config and meta.run_config.get("init_from"):
        yield f"the run began with {_code(_last_part(meta.run_config['init_from']))}"
    if facts.fingerprint:
        yield f"fingerprint of the A3 checkpoint (`a3 info`): {_code(facts.fingerprint)}"
    if CARD_FILE in source.get("files", {}):
        yield f"the card of the source is kept beside this one: [{SOURCE_CARD_FILE}]({SOURCE_CARD_FILE})"


def _training(meta: Meta, facts: Facts) -> Iterable[str]:
    """Yields Markdown lines about the run that saved the checkpoint; none outside of one."""
    if meta.step is None:
        return
    run = meta.run_config or {}
    stage = f", in stage {_code(meta.stage)}" if meta.stage else ""
    yield f"saved after step {_number(meta.step)}{stage}"
    if isinstance(run.get("data"), str):
        names = [_code(_last_part(name)) for name in run["data"].split(",")]
        yield f"data: {', '.join(names) if run['data'] else 'the corpus that a3_jax generates'}"
    for directory, crc32 in facts.data.items():
        yield f"prepared rows {_code(_last_part(directory))}, manifest with CRC-32 {_code(crc32)}"
    for name, field in (
        ("batch size", "batch_size"), ("length", "seq_len"), ("learning rate", "learning_rate"),
        ("optimiser", "optimizer"), ("computed in", "dtype"), ("seed", "seed"),
    ):  # fmt: skip
        if isinstance(run.get(field), int | float | str):
            yield f"{name}: {_code(run[field])}"


def _stages(meta: Meta) -> Iterable[dict[str, Any]]:
    """Yields the stages of the curriculum that this run did or will do; earlier ones are another run's."""
    run, recorded = meta.run_config or {}, recorded_stages(meta)
    names = [stage.name for stage, _ in recorded]
    first = names.index(run["start_stage"]) if run.get("start_stage") in names else 0
    step_sizes = [number for field in ("batch_size", "seq_len") if isinstance(number := run.get(field), int)]
    for stage, done in recorded[first:]:
        yield {
            "name": stage.name,
            "orders": _orders(stage),
            "steps": stage.steps,
            "done": done,
            "tokens": done * math.prod(step_sizes) if len(step_sizes) == 2 else None,
        }


def _orders(stage: Stage) -> str:
    if stage.objective == "ar":
        return "the next token (content stream)"
    parts = []
    for order in stage.orders:
        sizes = " or ".join(map(str, order.group_sizes))
        weight = f" (weight {order.weight:g})" if len(stage.orders) > 1 else ""
        parts.append(f"{order.order}, groups of {sizes}{weight}")
    return "; ".join(parts)


def _architecture(hf_config) -> str | None:
    names = hf_config.get("architectures")
    return names[0] if isinstance(names, list) and names and isinstance(names[0], str) else None


def _licence(source) -> dict[str, str]:
    """Reads the licence fields in the front matter of the source's own card, if each is one line."""
    import yaml

    card = source.get("files", {}).get(CARD_FILE)
    match = re.match(r"---\r?\n(.*?)\n---\s", card + "\n", re.DOTALL) if isinstance(card, str) else None
    front, found = match[1] if match else "", {}
    for name in _LICENCE:
        line = re.search(rf"^{name}:[ \t](.{{1,200}})$", front, re.MULTILINE)
        try:
            value = yaml.safe_load(line[1]) if line else None
        except (yaml.YAMLError, ValueError, RecursionError):
            continue
        if isinstance(value, str) and value:
            found[name] = value
    return found


def _last_part(path) -> str:
    """Returns the last part of an absolute path or an address; anything else as it is."""
    path = str(path).strip()
    is_place = "://" in path or path.startswith(("/", "~", "\\")) or re.match(r"[A-Za-z]:[\\/]", path)
    return re.split(r"[\\/]", path.rstrip("\\/"))[-1] if is_place else path


def _strings(values) -> dict[str, str]:
    """Returns pairs of printable texts: a checkpoint may be untrusted."""
    values = values if isinstance(values, Mapping) else {}
    return {_plain(name): _plain(value) for name, value in values.items() if isinstance(value, str)}


def _plain(text) -> str:
    """Removes from an untrusted text whatever may be Markdown, HTML or a second line."""
    return re.sub(r"[^\w .,:+/-]", "?", str(text)[:200])


def _code(text) -> str:
    """Puts an untrusted text between backticks, also in a table."""
    return f"`{_printable(text, but='`|') or ' '}`"


def _yaml(text) -> str:
    """Quotes a text as a JSON string, which is one of YAML too."""
    return json.dumps(_printable(text), ensure_ascii=False)


def _printable(text, but: str = "") -> str:
    return "".join(one if one.isprintable() and one not in but else "?" for one in str(text)[:200])


def _number(number) -> str:
    return "" if number is None else f"{number:,}"


def _step_of(row) -> float:
    step = row.get("step")
    return step if isinstance(step, int) and not isinstance(step, bool) else math.inf


def _is_loss(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
