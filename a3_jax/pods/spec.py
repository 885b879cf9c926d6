"""What is launched where: a frozen spec read from YAML, checked before anything is sent.

Names are checked against the characters that Google Cloud allows, which leaves none that a shell would read.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import math
import os
import pathlib
import re
from collections.abc import Mapping

import yaml

from a3_jax.errors import InputError, nearest
from a3_jax.paths import read_text
from a3_jax.pods.topologies import Pod, Topology, find_topology, mesh_sizes

COMPILER_FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")  # environment variables
_NAME = r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?"
_PATTERNS = {
    "name": _NAME, "project": _NAME, "zone": _NAME, "cluster": _NAME, "tpu": _NAME,
    "config": r"[A-Za-z0-9_][A-Za-z0-9_./-]*\.py",
    "image": r"[a-z0-9][a-z0-9./:_-]*@sha256:[0-9a-f]{64}",
    "workdir": r"gs://[a-z0-9][a-z0-9._-]+(/[A-Za-z0-9._=-]+)*",
}  # fmt: skip
_OVERRIDE = re.compile(r"[A-Za-z_][A-Za-z0-9_.\[\]]*")


@dataclasses.dataclass(frozen=True)
class Spec:
    """A run on TPUs.

    Attributes:
      name: of the workload. config: as of `a3 train`; overrides: values of its fields.
      project, zone: of Google Cloud. cluster: for xpk; tpu: name of the queued resource, for tpu-vm.
      topology: of a slice, e.g. v5e:4x4. slices: how many.
      image: with digest. workdir: gs:// directory of the run.
      grace_seconds: from SIGTERM to SIGKILL. max_restarts: by the cluster.
    """

    name: str
    config: str
    project: str
    zone: str
    topology: str
    workdir: str
    image: str
    cluster: str = ""
    tpu: str = ""
    slices: int = 1
    grace_seconds: int = 600
    max_restarts: int = 50
    overrides: Mapping[str, object] = dataclasses.field(default_factory=dict)

    @property
    def slice(self) -> Topology:
        return find_topology(self.topology)

    @property
    def pod(self) -> Pod:
        return Pod(self.slice, self.slices)

    @property
    def override_flags(self) -> list[str]:
        return [f"--config.{field}={value}" for field, value in self.overrides.items()]

    @property
    def command(self) -> list[str]:
        """The one plain command of every host: nothing stands between it and SIGTERM."""
        return ["a3", "train", f"--config={self.config}", f"--workdir={self.workdir}", *self.override_flags]


def read_spec(path) -> Spec:
    """Returns the spec in a YAML file."""
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise InputError("expected keys and values", file=path)
    fields = {field.name: field for field in dataclasses.fields(Spec)}
    for key in values:
        if key not in fields:
            raise InputError(f"unknown key{nearest(key, fields)}", file=path, field=key)
    for name, field in fields.items():
        if name in values:
            _check(path, name, values[name])
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise InputError("is missing", file=path, field=name)
    find_topology(values["topology"], file=path)
    return Spec(**values)


def _check(path, name, value):
    if name == "overrides":
        if not isinstance(value, dict):
            raise InputError("expected fields and values", file=path, field=name)
        for field, given in value.items():
            fits = isinstance(given, str | int | float | bool) and str(given).isprintable()
            if not fits or not _OVERRIDE.fullmatch(str(field)):
                raise InputError(f"{field!r}: {given!r} is no field with a value", file=path, field=name)
    elif name in ("slices", "grace_seconds", "max_restarts"):
        if type(value) is not int or value < 1:
            raise InputError(f"expected a positive whole number, got {value!r}", file=path, field=name)
    elif not isinstance(value, str):
        raise InputError(f"expected text, got {value!r}", file=path, field=name)
    elif name == "image" and "@" not in value:
        raise InputError(f"{value!r} has no digest (@sha256:...)", file=path, field=name)
    elif name in ("cluster", "tpu") and not value:
        return  # not launched there
    elif name in _PATTERNS and not re.fullmatch(_PATTERNS[name], value):
        raise InputError(f"{value!r} is not of the form {_PATTERNS[name]}", file=path, field=name)


def check_config(spec: Spec, path) -> str:
    """Checks that the config's mesh and batch suit the topology; `config_hash` of the run."""
    from a3_jax.training.config import read_run_config

    if not pathlib.Path(spec.config).exists():
        raise InputError(f"there is no {spec.config}", file=path, field="config")
    try:
        config = read_run_config(spec.config, spec.override_flags)
    except InputError as error:  # an override that the config doesn't have
        raise InputError(str(error), file=path) from error
    check_mesh(dict(config.mesh), config.batch_size // config.microbatches, spec.pod, path)
    return config_hash(config, spec.pod)


def config_hash(config, pod: Pod) -> str:
    """By what a preflight is known: config, slices, this code, its libraries and the compiler's flags.

    Args:
      config: of `training.config.read_run_config`.

    Returns:
      64 hexadecimal digits.
    """
    from a3_jax.runtime.versions import software

    versions: dict[str, str] = software()
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        versions["libtpu"] = importlib.metadata.version("libtpu")
    flags = {name: os.environ[name] for name in COMPILER_FLAGS if os.environ.get(name)}
    known = [json.loads(config.to_json_best_effort()), pod.slice.name, pod.slices, versions, flags]
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


def check_mesh(mesh: Mapping[str, int], rows: int, pod: Pod, path=None) -> None:
    """Refuses a mesh that doesn't suit a pod.

    Args:
      mesh: sizes by axis, as of a config: -1 = all that remain, data 0 = the number of slices.
      rows: of a microbatch.
    """
    sizes = mesh_sizes(mesh, pod)
    if math.prod(sizes.values()) != pod.chips:
        message = f"{pod} has {pod.chips} chips, the config's mesh is {sizes}"
        raise InputError(message, file=path, field="topology")
    if sizes["data"] % pod.slices:
        message = f"{pod}: data alone goes over slices, and {sizes['data']} is no multiple of {pod.slices}"
        raise InputError(message, file=path, field="topology")
    parts = sizes["data"] * sizes["fsdp"]
    if rows % parts:
        message = f"{pod}: the {rows} rows of a microbatch can't be split in {parts}"
        raise InputError(message, file=path, field="topology")


_OCTAL, _BASE_60 = re.compile(r"[-+]?0[0-9_]+"), re.compile(r"[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?")


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which refuses keys given twice and plain scalars of several meanings."""

    def __init__(self, stream):
        super().__init__(stream)
        self._keys = {}  # a value's node -> its key

    def construct_mapping(self, node, deep=False):
        names = set()
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in names:
                    raise InputError("the key is given twice", line=_line(key), field=key.value)
                names.add(key.value)
                self._keys[value] = key.value
        return super().construct_mapping(node, deep)

    def construct_boolean(self, node):
        if node.value.lower() not in ("true", "false"):
            raise self._ambiguous(node, "a truth value", "true or false")
        return self.construct_yaml_bool(node)

    def construct_number(self, node):
        if _OCTAL.fullmatch(node.value):
            raise self._ambiguous(node, "an octal number", "it without the leading 0")
        if _BASE_60.fullmatch(node.value):
            raise self._ambiguous(node, "a number in base 60", "the number itself")
        is_whole = node.tag.endswith(":int")
        return self.construct_yaml_int(node) if is_whole else self.construct_yaml_float(node)

    def _ambiguous(self, node, meaning: str, plain: str) -> InputError:
        message = (
            f"{node.value} is {meaning} to some readers of YAML: write {plain}, or '{node.value}' for text"
        )
        return InputError(message, line=_line(node), field=self._keys.get(node))


_Loader.add_constructor("tag:yaml.org,2002:bool", _Loader.construct_boolean)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_number)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_number)


def read_yaml(path):
    """Returns the value in a YAML file."""
    text = read_text(path)
    try:
        return _Loader(text).get_single_data()
    except InputError as error:
        error.file = path
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"not YAML: {error or type(error).__name__}", file=path) from error


def _line(node) -> int:
    return node.start_mark.line + 1
