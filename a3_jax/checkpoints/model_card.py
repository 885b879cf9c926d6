"""The model card of a Hugging Face directory that we write: facts that a checkpoint records, no others.

A card is made to be published. Of absolute paths and addresses only the last part is told.
"""

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
from a3_jax.checkpoints.safetensors_writer import TensorSpec
from a3_jax.errors import InputError
from a3_jax.model.two_stream import abstract_params
from a3_jax.ordering.curriculum import Stage, stages_done, stages_from_config
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
    """What is known of a checkpoint beside what it says of itself.

    Attributes:
      fingerprint: of its parameters, as `a3 info` gives it.
      held_out: losses by their names in `eval.jsonl`, in nats; after step `held_out_step`.
      data: CRC-32 of the manifest by prepared directory.
    """

    fingerprint: str | None = None
    held_out: Mapping[str, float] = dataclasses.field(default_factory=dict)
    held_out_step: int | None = None
    data: Mapping[str, int] = dataclasses.field(default_factory=dict)


def model_card(
    meta: Meta,
    hf_config: Mapping[str, Any],
    tensors: Mapping[str, TensorSpec],
    tokenizer: Tokenizer | None,
    facts: Facts | None = None,
) -> str:
    """The card as Markdown with YAML front matter.

    Args:
      hf_config, tensors: of `config.json` and in the files that the card stands beside.
    """
    import jinja2

    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"yaml": _yaml, "code": _code, "number": _number}
    template = importlib.resources.files("a3_jax.checkpoints").joinpath(_TEMPLATE).read_text(encoding="utf-8")
    facts = facts or Facts()
    text = environment.from_string(template).render(
        _fields(meta, hf_config, tensors, tokenizer)
        | {"origin": list(_origin(meta, facts)), "training": list(_training(meta, facts))}
        | {"held_out": _losses(facts), "held_out_step": facts.held_out_step}
    )
    return text.rstrip() + "\n"


def _fields(meta: Meta, hf_config, tensors, tokenizer) -> dict[str, Any]:
    """What the template asks for, but for origin, training and figures."""
    source = meta.source or {}
    is_release, is_masked = meta.model.residual == "release", meta.model.mask_token is not None
    has_query = QUERY_TENSOR in tensors and not is_masked
    base = _base_model(source)
    ours = has_query or is_release or is_masked
    had = table_names(source.get("tensors", {}), meta.model)
    return {
        "library": "a3_jax" if ours else "transformers",
        "base_model": base,
        "licence": _licence(source),
        "tags": ["a3", "any-order", "any-subset"] if has_query else ["text-generation"],
        "title": f"{base} as an A3 model" if base else f"An A3 model, family {meta.model.family}",
        "is_masked": is_masked,
        "has_query": has_query,
        "is_release": is_release,
        "untrained_query": meta.step is None and bool(source) and QUERY_TENSOR not in had,
        "sizes": list(_sizes(meta, hf_config, tensors, tokenizer)),
        "files": sorted(_strings(source.get("sha256")).items()),
        "stages": list(_stages(meta)),
        "blanks": '{"text": "The [[3]] sat."}' if tokenizer else '{"tokens": [3, null, null, 5]}',
        "given": '{"text": "The cat sat."}' if tokenizer else '{"tokens": [3, 1, 4, 5]}',
        "versions": ", ".join(f"{name} {it}" for name, it in _strings(meta.versions).items()),
    }


def _sizes(meta: Meta, hf_config, tensors, tokenizer) -> Iterable[tuple[str, str]]:
    model = meta.model
    without = () if QUERY_TENSOR in tensors else QUERY_LEAF
    leaves = [leaf for name, leaf in tree_names(abstract_params(model)).items() if name not in without]
    yield "architecture", _code(_architecture(hf_config) or model.family)
    yield "parameters", _number(sum(math.prod(leaf.shape) for leaf in leaves))
    yield "dtype", ", ".join(sorted({spec.dtype.name for spec in tensors.values()}))
    yield "layers", _number(model.num_layers)
    yield "width", f"{_number(model.d_model)}, MLP {_number(model.mlp_size)}"
    yield "heads", f"{model.num_heads} of {model.head_size}, {model.num_kv_heads} of keys and values"
    left = model.context_length(left_to_right=True)
    more = f", {_number(left)} from left to right" if left != model.context_length() else ""
    yield "context", f"{_number(model.context_length())} tokens{more}"
    yield "vocabulary", _number(model.vocab_size)
    size = None if tokenizer is None else tokenizer.vocab_size
    yield "tokenizer", "none: token input only" if size is None else f"{_number(size)} tokens"


def _origin(meta: Meta, facts: Facts) -> Iterable[str]:
    """Markdown lines of where the parameters came from."""
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
    """Markdown lines of the run that saved the checkpoint; none outside of one."""
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
    """The rows of the curriculum that this run did or will do; stages before its first are another's."""
    run = meta.run_config or {}
    if meta.step is None or "stages" not in run:
        return
    try:
        stages = stages_from_config(run["stages"])
    except InputError as error:
        raise InputError(error.message, field=f"run_config.{error.field}") from error
    names = [stage.name for stage in stages]
    first = names.index(run["start_stage"]) if run.get("start_stage") in names else 0
    a_step = [number for field in ("batch_size", "seq_len") if isinstance(number := run.get(field), int)]
    for stage, done in list(zip(stages, stages_done(stages, meta.step)))[first:]:
        yield {
            "name": stage.name,
            "orders": _orders(stage),
            "steps": stage.steps,
            "done": done,
            "tokens": done * math.prod(a_step) if len(a_step) == 2 else None,
        }


def _orders(stage: Stage) -> str:
    if stage.objective == "ar":
        return "the next token (content stream)"
    told = []
    for order in stage.orders:
        sizes = " or ".join(map(str, order.group_sizes))
        weight = f" (weight {order.weight:g})" if len(stage.orders) > 1 else ""
        told.append(f"{order.order}, groups of {sizes}{weight}")
    return "; ".join(told)


def _losses(facts: Facts) -> list[tuple[str, str]]:
    found = facts.held_out
    return [(label, f"{found[name]:.4f}") for name, label in HELD_OUT.items() if name in found]


def _architecture(hf_config) -> str | None:
    names = hf_config.get("architectures")
    return names[0] if isinstance(names, list) and names and isinstance(names[0], str) else None


def _base_model(source) -> str | None:
    """A name on the Hub, where the source's config says one."""
    name = source.get("config", {}).get("_name_or_path")
    return name if isinstance(name, str) and _HUB_NAME.fullmatch(name) else None


def _licence(source) -> dict[str, str]:
    """The licence fields in the front matter of the source's own card, where each is one line."""
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


def _last_part(place) -> str:
    """Of an absolute path or an address; anything else as it is."""
    place = str(place).strip()
    is_place = "://" in place or place.startswith(("/", "~", "\\")) or re.match(r"[A-Za-z]:[\\/]", place)
    return re.split(r"[\\/]", place.rstrip("\\/"))[-1] if is_place else place


def _strings(values) -> dict[str, str]:
    """Pairs of printable texts: a checkpoint may come from outside."""
    values = values if isinstance(values, Mapping) else {}
    return {_plain(name): _plain(value) for name, value in values.items() if isinstance(value, str)}


def _plain(text) -> str:
    """A text from outside, in which nothing is Markdown, HTML or a second line."""
    return re.sub(r"[^\w .,:+/-]", "?", str(text)[:200])


def _code(text) -> str:
    """A text from outside between backticks, also in a table."""
    return f"`{_printable(text, but='`|') or ' '}`"


def _yaml(text) -> str:
    """A JSON string is one of YAML too."""
    return json.dumps(_printable(text), ensure_ascii=False)


def _printable(text, but: str = "") -> str:
    return "".join(one if one.isprintable() and one not in but else "?" for one in str(text)[:200])


def _number(number) -> str:
    return "" if number is None else f"{number:,}"
