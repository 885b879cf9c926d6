"""The config of a run: its fields, their defaults, and what a resumed run may change."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from ml_collections import ConfigDict

from a3_jax.checks import check_seed, from_mapping, number, one_of
from a3_jax.config_file import read_config
from a3_jax.errors import InputError, nearest
from a3_jax.model.attention import IMPLEMENTATIONS
from a3_jax.model.config import PRESETS, ModelConfig
from a3_jax.model.two_stream import REMAT_POLICIES
from a3_jax.ordering.curriculum import SCHEDULES, Stage, stages_from_config, total_steps
from a3_jax.runtime.coordination import differences
from a3_jax.training.optimizer import MOMENT_DTYPES, OPTIMIZERS

DTYPES = ("float32", "bfloat16")
MESH = {"data": 0, "fsdp": -1, "tensor": 1}

# A resumed run may differ in these: where and how it is computed, what it writes and how often.
FREE_FIELDS = (
    "remat", "attention", "mesh", "compilation_cache", "checkpoint_every", "keep", "eval_every",
    "eval_batches", "sample_every", "save_attempts", "hang_seconds", "log_every", "profile_steps",
)  # fmt: skip

PATH_FIELDS = {"init_from", "data", "tokenizer", "compilation_cache"}  # `~` in them is a home directory


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """A whole run: with the code and the data that it names, it gives the same losses.

    Attributes:
      seed: decides parameters, rows and orders.
      init_from: checkpoint to begin with (A3 or Hugging Face); empty for random parameters.
      start_stage: name of the stage to begin at; empty for the first.
      model: name of a preset, or the fields of a `ModelConfig` (vocabulary and context are by default the
        tokenizer's and `seq_len`). It is ignored with `init_from`.
      mask_token: id of the mask token, for objective "masked_diffusion"; the size of the tokenizer's
        vocabulary adds one to a new model; -1: the checkpoint's, if it has one.
      logit_shift: for masked diffusion, as in `ModelConfig`.
      data: text or JSONL file, or a pattern of them; empty for the embedded corpus.
      tokenizer: "bytes", a tokenizer.json or its directory; empty for that of `init_from`, else of the
        embedded corpus, else (with `data`) bytes.
      holdout: share (below 1) or number of the documents kept for held-out losses.
      seq_len: tokens per example.
      packing: several documents per example; otherwise one, cut to `seq_len`.
      batch_size: examples per step, over all devices. microbatches: into how many parts a batch is split.
      stages: the curriculum, see `ordering.curriculum.Stage`.
      learning_rate, warmup_steps, schedule: for stages without their own.
      optimizer: "adamw", or "adafactor" with far less memory, see `training.optimizer`.
      moment_dtype: dtype of AdamW's first moment, "float32" or "bfloat16".
      weight_decay, clip: for either optimiser; clip is the largest gradient norm (0 = no limit).
      b1, b2, eps: AdamW's.
      dtype: that of the computation; parameters are float32.
      remat: what the backward pass recomputes, see `model.two_stream`.
      attention: how attention is computed, see `model.attention`; "auto" is the best available.
      mesh: devices along data, fsdp and tensor; -1 = all that remain, data 0 = the number of slices.
      compilation_cache: directory of compiled programs, so that a run that goes on doesn't compile for
        minutes; empty for one in the user's cache directory (on CPU a launch's own or none), "off": none.
      checkpoint_every, eval_every, sample_every: steps; 0 = at the end of each stage for the first,
        never for the others.
      keep: number of checkpoints kept. eval_batches: held-out batches per evaluation.
      max_skipped: after so many steps in a row without a finite loss and gradient, which therefore changed
        nothing, the run goes back to its last checkpoint before them and skips their rows; after as many
        once more it ends.
      save_attempts: failed saves in a row that end the run.
      hang_seconds: seconds without the end of a step after which the process ends; 0: 20 times the median
        step, at least 120.
      log_every: steps between plain progress lines and TensorBoard points.
      profile_steps: first and last step whose profile is written to `profile/`; () for none.
    """

    stages: tuple[Stage, ...]
    seq_len: int
    batch_size: int
    learning_rate: float
    seed: int = 0
    init_from: str = ""
    start_stage: str = ""
    model: str | Mapping[str, Any] = ""
    mask_token: int = -1
    logit_shift: bool = False
    data: str = ""
    tokenizer: str = ""
    holdout: float = 0.05
    packing: bool = True
    microbatches: int = 1
    warmup_steps: int = 0
    schedule: str = "linear"
    optimizer: str = "adamw"
    moment_dtype: str = "float32"
    weight_decay: float = 0.01
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    clip: float = 1.0
    dtype: str = "float32"
    remat: str = "none"
    attention: str = "auto"
    mesh: Mapping[str, int] = dataclasses.field(default_factory=lambda: dict(MESH))
    compilation_cache: str = ""
    checkpoint_every: int = 0
    keep: int = 2
    eval_every: int = 0
    eval_batches: int = 4
    sample_every: int = 0
    max_skipped: int = 5
    save_attempts: int = 3
    hang_seconds: float = 0.0
    log_every: int = 10
    profile_steps: tuple[int, ...] = ()

    def __post_init__(self):
        check_seed(self.seed)
        for name, least in _LEAST.items():
            number(name, getattr(self, name), least)
        for name in ("b1", "b2"):
            if getattr(self, name) >= 1:
                raise InputError(f"must be below 1, got {getattr(self, name)!r}", field=name)
        for name, choices in _CHOICES.items():
            one_of(name, getattr(self, name), choices)
        if self.batch_size % self.microbatches:
            raise InputError(
                f"{self.microbatches} does not divide batch_size={self.batch_size}", field="microbatches"
            )
        if not self.model and not self.init_from:
            raise InputError("either a model or init_from is needed", field="model")
        if isinstance(self.model, str) and self.model and self.model not in PRESETS:
            raise InputError(f"unknown preset {self.model!r}{nearest(self.model, PRESETS)}", field="model")
        if self.profile_steps and not _is_range(self.profile_steps, 1, self.total_steps):
            raise InputError(
                f"must be the first and the last step to profile, of {self.total_steps}, got"
                f" {self.profile_steps!r}",
                field="profile_steps",
            )
        names = [stage.name for stage in self.stages]
        if self.start_stage and self.start_stage not in names:
            raise InputError(
                f"no such stage: {self.start_stage!r}{nearest(self.start_stage, names)}", field="start_stage"
            )

    @property
    def first_step(self) -> int:
        """Steps that count as done at the start: those of the stages before `start_stage`."""
        names = [stage.name for stage in self.stages]
        return sum(stage.steps for stage in self.stages[: names.index(self.start_stage or names[0])])

    @property
    def total_steps(self) -> int:
        return total_steps(self.stages)

    @property
    def compute_dtype(self):
        return jnp.dtype(self.dtype)

    @property
    def optimizer_options(self) -> dict[str, Any]:
        """The options of `optimizer.make_optimizer`."""
        names = ("b1", "b2", "eps", "weight_decay", "clip", "moment_dtype")
        return {name: getattr(self, name) for name in names}

    def to_dict(self) -> dict[str, Any]:
        """Returns JSON-able fields: `from_config(run.to_dict()) == run`."""
        return _plain(dataclasses.asdict(self))

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "RunConfig":
        """Checks a `ConfigDict` or dictionary; absent fields take their defaults."""
        return from_mapping(cls, _plain(config), convert=_convert)


def default_fields() -> dict[str, Any]:
    """Returns the fields of `RunConfig` that have defaults, with these."""
    defaults: dict[str, Any] = {}
    for field in dataclasses.fields(RunConfig):
        if field.default is not dataclasses.MISSING:
            defaults[field.name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            defaults[field.name] = ConfigDict(field.default_factory())
    return defaults


def read_run_config(path: str, overrides: Sequence[str]) -> Any:
    """Reads the config file of a run, with overrides; see `config_file.read_config`."""
    return read_config(path, overrides, default_fields())


def model_config(run: RunConfig, vocab_size: int | None = None) -> ModelConfig:
    """Returns the model of a run without `init_from`.

    Args:
      run: the run.
      vocab_size: the tokenizer's; None for the preset's.
    """
    if vocab_size is not None and run.mask_token == vocab_size:
        vocab_size += 1
    if isinstance(run.model, str):
        config = PRESETS[run.model]
        return dataclasses.replace(
            config,
            vocab_size=vocab_size or config.vocab_size,
            max_length=max(config.max_length, run.seq_len),
        )
    fields = dict(run.model)
    if vocab_size is not None:
        fields["vocab_size"] = vocab_size
    fields["max_length"] = max(fields.get("max_length", 0), run.seq_len)
    return ModelConfig.from_dict(fields)


def with_mask(run: RunConfig, model: ModelConfig) -> ModelConfig:
    """Returns the model with the run's mask token, if it has one."""
    if run.mask_token >= 0:
        model = dataclasses.replace(model, mask_token=run.mask_token, logit_shift=run.logit_shift)
    masked = [stage.name for stage in run.stages if stage.objective == "masked_diffusion"]
    if masked and model.mask_token is None:
        raise InputError(f"is missing, and stage {masked[0]!r} masks tokens", field="mask_token")
    return model


def check_unchanged(saved: Mapping[str, Any], run: RunConfig, file) -> None:
    """Checks that a run goes on with the config it began with, except for `FREE_FIELDS` and added steps.

    Steps may be added to the last stage, or as stages after it.
    """
    try:
        old, new = RunConfig.from_config(saved).to_dict(), run.to_dict()
    except InputError as error:
        raise InputError(error.message, file=file, field=error.field) from error
    old["stages"], new["stages"] = _without_added_steps(old["stages"], new["stages"])
    changed = []
    for name in old:
        if name not in FREE_FIELDS:
            changed += differences(name, old[name], new[name])
    if changed:
        raise InputError(
            f"this run began with another config: {'; '.join(changed)} (use another --workdir)", file=file
        )


_CHOICES = {
    "dtype": DTYPES, "remat": tuple(REMAT_POLICIES), "attention": IMPLEMENTATIONS, "schedule": SCHEDULES,
    "optimizer": OPTIMIZERS, "moment_dtype": MOMENT_DTYPES,
}  # fmt: skip
_LEAST = {
    "seq_len": 1, "batch_size": 1, "mask_token": -1, "microbatches": 1, "warmup_steps": 0, "learning_rate": 0,
    "weight_decay": 0, "holdout": 0, "b1": 0, "b2": 0, "eps": 0, "clip": 0, "checkpoint_every": 0, "keep": 1,
    "eval_every": 0, "eval_batches": 1, "sample_every": 0, "log_every": 1,
    "max_skipped": 1, "save_attempts": 1, "hang_seconds": 0,
}  # fmt: skip


def _is_range(steps, least, most) -> bool:
    """Returns whether `steps` are two whole numbers, least <= first <= last <= most."""
    whole = all(isinstance(step, int) and not isinstance(step, bool) for step in steps)
    return len(steps) == 2 and whole and least <= steps[0] <= steps[1] <= most


def _convert(name: str, value: Any, expected) -> Any:
    """Returns a field's value as the run keeps it: stages built, home directories written out."""
    if name == "stages":
        return stages_from_config(value)
    value = _typed(name, value, expected)
    if name in PATH_FIELDS:  # `data` may name several, with commas between them
        return (
            ",".join(os.path.expanduser(part.strip()) for part in value.split(",")) if "~" in value else value
        )
    return value


def _typed(name: str, value: Any, expected) -> Any:
    """Returns the value in its field's type; whole numbers become floats where the field is one."""
    if expected is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if expected in (int, float, bool, str):
        if not isinstance(value, expected) or (isinstance(value, bool) and expected is not bool):
            shown = value[0] if isinstance(value, list) and len(value) == 1 else value
            raise InputError(f"must be {expected.__name__}, got {shown!r}", field=name)
    elif name == "mesh" and not isinstance(value, dict):
        raise InputError(f"must be a mapping, got {value!r}", field=name)
    elif name == "model" and not isinstance(value, str | dict):
        raise InputError(f"must be a name or a mapping, got {value!r}", field=name)
    elif name == "profile_steps":
        if not isinstance(value, list):
            raise InputError(f"must be two step numbers or (), got {value!r}", field=name)
        value = tuple(value)
    return value


def _plain(value) -> Any:
    """Turns ConfigDicts and mappings into dictionaries and tuples into lists, all the way down."""
    if isinstance(value, Stage):
        return _plain(dataclasses.asdict(value))
    if hasattr(value, "items"):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value


def _without_added_steps(old, new):
    """Returns the saved stages, and the new ones without what was added to them."""
    new = new[: len(old)]
    if len(new) == len(old) and new[-1]["steps"] > old[-1]["steps"]:
        new = new[:-1] + [new[-1] | {"steps": old[-1]["steps"]}]
    return old, new
