"""`a3 preflight`: whether a run will work on a pod, found out without one.

    config, topology, mesh, flags --> weights and data that are here --> known from before? --> report
                                                                            | no
    the real step, compiled for the pod's chips <---------------------------+
      memory a chip, collectives --> beside the formulas; bounds on time --> verdict, kept for `a3 launch xpk`

Nothing runs: no step, and no chip.
"""

import dataclasses
import json
import pathlib
import sys
from typing import Any

from a3_jax.errors import EXIT_DOES_NOT_FIT, EXIT_OK, InputError, nearest
from a3_jax.model.config import ModelConfig
from a3_jax.paths import as_path, write_json
from a3_jax.pods.spec import check_mesh, config_hash, read_spec
from a3_jax.pods.topologies import Pod, find_topology
from a3_jax.pods.xpk import PREFLIGHT_CACHE
from a3_jax.training.config import RunConfig, model_config, with_mask

PROGRAMS = ("decode", "fingerprint", "restore")
COMPILED_BY_SEARCH = 3


def run_preflight(args) -> int:
    """Runs `a3 preflight`; the exit status says whether everything fits."""
    from a3_jax.pods.preflight_report import show
    from a3_jax.training.config import read_run_config

    path, flags, pod = _what(args)
    config = read_run_config(path, flags)
    check_mesh(dict(config.mesh), _rows(config), pod)
    programs = _programs(args.programs)
    if args.search:
        report = _search(config, path, flags, pod)
    else:
        report = _preflight(config, path, flags, pod, programs, args.again)
    show(report, args.json)
    return EXIT_OK if report["fits"] else EXIT_DOES_NOT_FIT


def cache_file(digest: str) -> pathlib.Path:
    """Returns where the report of a `spec.config_hash` is kept."""
    return PREFLIGHT_CACHE.expanduser() / f"{digest}.json"


def _what(args) -> tuple[str, list[str], Pod]:
    """Returns the config, its overrides and the pod: from the command line, or from a spec."""
    if args.spec:
        for name in ("config", "topology", "slices"):
            if getattr(args, name) is not None:
                raise InputError("the spec says it already", file="preflight", field=f"--{name}")
        spec = read_spec(args.spec)
        return spec.config, [*spec.override_flags, *args.config_flags], spec.pod
    for name in ("config", "topology"):
        if getattr(args, name) is None:
            raise InputError("is needed, or --spec", file="preflight", field=f"--{name}")
    slices = 1 if args.slices is None else args.slices
    if slices < 1:
        raise InputError(f"must be at least 1, got {slices}", file="preflight", field="--slices")
    return args.config, args.config_flags, Pod(find_topology(args.topology), slices)


def _programs(text: str) -> list[str]:
    names = [name for name in text.split(",") if name]
    for name in names:
        if name not in PROGRAMS:
            known = f"known: {', '.join(PROGRAMS)}{nearest(name, PROGRAMS)}"
            raise InputError(f"unknown program {name!r}; {known}", file="preflight", field="--programs")
    return names


def _rows(config) -> int:
    """Rows of a microbatch; whether the numbers can be is `RunConfig`'s to say."""
    from a3_jax.training.config import RunConfig

    run = RunConfig.from_config(config)
    return run.batch_size // run.microbatches


def _preflight(config, path, flags, pod: Pod, programs: list[str], again: bool) -> dict[str, Any]:
    """Returns the report of a config as it is, from the cache if it is there."""
    from a3_jax.pods.preflight import check_inputs
    from a3_jax.training.config import RunConfig

    run = RunConfig.from_config(config)
    inputs = check_inputs(run)
    digest = config_hash(config, pod)
    known = None if again else _known(digest, inputs.model, programs)
    if known:
        return known | {"notes": inputs.notes, "cached": True}
    report = _compiled(run, inputs, pod, programs)
    report |= {"config": path, "overrides": flags, "notes": inputs.notes, "hash": digest}
    _keep(digest, report)
    return report | {"cached": False}


def _compiled(run, inputs, pod: Pod, programs: list[str]) -> dict[str, Any]:
    """Returns the report of what the compiler says now."""
    from a3_jax.pods.aot_compile import (
        check_flags,
        compile_program,
        other_programs,
        topology_devices,
        train_programs,
    )
    from a3_jax.pods.preflight_report import make_report
    from a3_jax.training.setup import open_mesh

    check_flags(pod.slice.name)
    mesh = open_mesh(run, topology_devices(pod.slice.name, pod.slices))
    makers = train_programs(run, inputs.model, mesh) | other_programs(run, inputs.model, mesh, programs)
    compiled = []
    for name, make in makers.items():
        print(f"compiling {name} for {pod}: minutes", file=sys.stderr, flush=True)
        compiled.append(compile_program(name, make))
    return make_report(run, inputs.model, pod, compiled, programs)


def _search(config, path, flags, pod: Pod) -> dict[str, Any]:
    """Returns the report of the best layout that the compiler accepts, with the table of candidates."""
    from a3_jax.pods.preflight import check_inputs
    from a3_jax.pods.preflight_report import describe_candidates
    from a3_jax.pods.search import search
    from a3_jax.training.config import RunConfig, read_run_config

    run = RunConfig.from_config(config)
    model = check_inputs(run).model
    candidates = search(run, model, pod, run.stages[-1].objective)
    if not candidates:
        raise InputError(f"no mesh of {pod} suits {run.batch_size} rows and this model", field="batch_size")
    tried, report = [], {"fits": False}
    for candidate in [candidate for candidate in candidates if candidate.fits][:COMPILED_BY_SEARCH]:
        chosen = [*flags, *candidate.layout.flags]
        report = _preflight(read_run_config(path, chosen), path, chosen, pod, [], again=False)
        tried.append({"flags": candidate.layout.flags, "fits": report["fits"]})
        if report["fits"]:
            break
    return report | {"search": {"candidates": describe_candidates(candidates), "compiled": tried}}


def _known(digest: str, model, programs: list[str]) -> dict[str, Any] | None:
    """Returns a report from before, of the same model and with all the programs that are asked for."""
    try:
        report = json.loads(cache_file(digest).read_text())["report"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    is_same = report.get("model") == json.loads(json.dumps(model.to_dict()))  # lists for tuples
    same = is_same and set(programs) <= set(report.get("asked", ()))
    return report if same else None


def _keep(digest: str, report: dict[str, Any]) -> None:
    """Keeps a report; without a place to keep it, it is only told."""
    try:
        write_json(cache_file(digest), {"passed": report["fits"], "report": report})
    except InputError as error:
        print(f"warning: this is not kept: {error}", file=sys.stderr)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What is known before anything is compiled.

    Attributes:
      model: the config of the run's model.
      notes: what was checked, and what was not, a line each.
    """

    model: ModelConfig
    notes: list[str]


def check_inputs(run: RunConfig) -> Inputs:
    """Returns the run's model; checks weights and data that are here, without reading them whole."""
    model, notes = _model(run)
    return Inputs(with_mask(run, model), [*notes, _check_data(run)])


def _model(run: RunConfig) -> tuple[ModelConfig, list[str]]:
    from a3_jax.training.setup import check_context

    if not run.init_from:
        return _new_model(run)
    if _is_here(run.init_from):
        model, note = _check_checkpoint(run.init_from)
        check_context(run, model)
        return model, [note]
    if not run.model:
        raise InputError(f"{run.init_from} is not here, and config.model is empty", field="init_from")
    return model_config(run), [_missing("init_from", run.init_from, "the model is that of config.model")]


def _new_model(run: RunConfig) -> tuple[ModelConfig, list[str]]:
    """Returns the model of a run that begins from nothing: its vocabulary is its tokenizer's."""
    from a3_jax.training.setup import init_from_config

    instead = "the vocabulary is that of config.model"
    if run.tokenizer not in ("", "bytes") and not _is_here(run.tokenizer):
        return model_config(run), [_missing("tokenizer", run.tokenizer, instead)]
    if run.data and not run.tokenizer and not _is_here(run.data):
        return model_config(run), [_missing("tokenizer", f"that of {run.data}", instead)]
    return init_from_config(run, None).model, []


def _check_checkpoint(path: str) -> tuple[ModelConfig, str]:
    """Its model: manifest, sizes and tree of an A3 checkpoint; headers and shapes of a Hugging Face one."""
    from a3_jax.checkpoints.a3_format import load_meta
    from a3_jax.checkpoints.hf_format import open_hf
    from a3_jax.checkpoints.loading import find_checkpoint
    from a3_jax.checkpoints.manifest import PARAMS, raise_damage, read_manifest
    from a3_jax.checkpoints.stored_arrays import check_same_tree
    from a3_jax.model.two_stream import abstract_params

    directory, is_hf = find_checkpoint(path)
    if is_hf:
        return open_hf(directory).config, f"init_from: {path}: headers and shapes are right"
    meta, manifest = load_meta(directory), read_manifest(directory)
    raise_damage(directory, manifest)
    check_same_tree(manifest.item(PARAMS), abstract_params(meta.model), directory / PARAMS)
    return meta.model, f"init_from: {directory}: manifest, sizes and shapes are right"


def _check_data(run: RunConfig) -> str:
    from a3_jax.data.documents import find_files
    from a3_jax.data.prepared import find_prepared
    from a3_jax.data.prepared_manifest import check_shards

    if not run.data:
        return "data: the embedded corpus"
    if not _is_here(run.data):
        return _missing("data", run.data)
    found = find_prepared(run.data)
    for prepared in found:
        if prepared.manifest.seq_len != run.seq_len:
            rows = f"the rows in {prepared.directory} have {prepared.manifest.seq_len} tokens"
            raise InputError(f"{run.seq_len}, but {rows}", field="seq_len")
        check_shards(prepared.directory, prepared.manifest, deep=False)
    if found:
        return f"data: {run.data}: manifests and sizes of shards are right"
    return f"data: {run.data}: {len(find_files(run.data))} files, not read"


def _is_here(name: str) -> bool:
    """Returns whether a path, or one of a list or pattern of them, can be seen from here."""
    try:
        for part in name.split(","):
            path = as_path(part.strip().rpartition("@")[0] or part.strip())
            if path.exists() or as_path(part.strip()).exists():
                return True
            if "*" in path.name and path.parent.exists() and next(path.parent.glob(path.name), None):
                return True
    except InputError:
        raise
    except Exception:  # a bucket's client raises its own kinds where there is no network
        return False
    return False


def _missing(field: str, name: str, instead: str = "") -> str:
    return f"{field}: not checked: not found here: {name}" + (f"; {instead}" if instead else "")
