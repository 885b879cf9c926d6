"""The models of a run and where they are from: what is evaluated, and what judges its texts."""

import dataclasses
from typing import Any

from a3_jax.checkpoints.a3_format import load_meta
from a3_jax.checkpoints.fingerprint import fingerprints, tree_names
from a3_jax.checkpoints.hf_format import open_hf
from a3_jax.checkpoints.info import fingerprint
from a3_jax.checkpoints.loading import find_checkpoint
from a3_jax.checkpoints.manifest import Leaf
from a3_jax.decoding.options import one_of
from a3_jax.errors import InputError
from a3_jax.evaluation.models.opening import open_model
from a3_jax.evaluation.tasks.profiles import A3, AR, DIFFUSION, MODELS


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model with its origin.

    Attributes:
      model: an `EvaluatedModel`.
      path: the checkpoint's directory, None of a model that came as an object.
      fingerprint: of its parameters, as `a3 info` tells it; None where it has none.
    """

    model: Any
    path: str | None
    fingerprint: str | None

    @property
    def origin(self) -> dict[str, Any]:
        """For the result."""
        return {"path": self.path, "fingerprint": self.fingerprint}

    @property
    def identity(self) -> list[Any]:
        """What its numbers depend on, wherever it lies."""
        return [self.fingerprint, self.model.tokenizer.fingerprint]

    @property
    def family(self) -> str | None:
        """Of its checkpoint."""
        checkpoint = getattr(self.model, "checkpoint", None)
        return None if checkpoint is None else checkpoint.config.family


def kind_of(checkpoint, model: str | None) -> str:
    """The kind of model that a checkpoint, or an `EvaluatedModel`, is to be run as; nothing is opened yet.

    Raises:
      InputError: no such kind, no checkpoint.
    """
    if model is not None:
        one_of("model", model, MODELS)
    if not is_path(checkpoint):
        told = checkpoint.describe().get("model")
        return model or (told if told in MODELS else A3)
    directory, is_hf = find_checkpoint(checkpoint)
    config = open_hf(directory).config if is_hf else load_meta(directory).model
    return model or (A3 if config.mask_token is None else DIFFUSION)


def open_subject(checkpoint, kind: str, **options) -> Subject:
    """Opens a checkpoint; an `EvaluatedModel` is taken as it is.

    Args:
      options: of `open_model`.

    Raises:
      InputError: as `open_model`.
    """
    if not is_path(checkpoint):
        return Subject(checkpoint, None, _fingerprint(checkpoint))
    if kind == AR and options.get("scorer_options"):
        raise InputError("a left-to-right model has one scorer, without options", field="scorer")
    model = open_model(checkpoint, kind, **options)
    return Subject(model, str(find_checkpoint(checkpoint)[0]), _fingerprint(model))


def is_path(checkpoint) -> bool:
    """Whether a checkpoint is given by its place."""
    return isinstance(checkpoint, str) or hasattr(checkpoint, "__fspath__")


def _fingerprint(model) -> str | None:
    checkpoint = getattr(model, "checkpoint", None)
    if checkpoint is None:
        return None
    leaves = tree_names(checkpoint.params)
    sums = fingerprints(leaves)
    return fingerprint({name: Leaf(leaf.shape, leaf.dtype.name, sums[name]) for name, leaf in leaves.items()})
