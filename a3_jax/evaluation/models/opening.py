"""A checkpoint opened as the model that an evaluation asks, and where that model came from."""

import dataclasses
from typing import Any

from a3_jax.checkpoints.a3_format import load_meta
from a3_jax.checkpoints.fingerprint import fingerprints, tree_names
from a3_jax.checkpoints.hf_format import open_hf
from a3_jax.checkpoints.inspect import fingerprint
from a3_jax.checkpoints.loading import check_has_orders, find_checkpoint, open_checkpoint
from a3_jax.checkpoints.manifest import Leaf
from a3_jax.checks import one_of
from a3_jax.errors import InputError
from a3_jax.evaluation.models import A3, AR, DIFFUSION, MODELS
from a3_jax.evaluation.models.any_order import AnyOrder
from a3_jax.evaluation.models.diffusion import MaskedDiffusion
from a3_jax.evaluation.models.interface import EvaluatedModel
from a3_jax.evaluation.models.left_to_right import LeftToRight


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model with its origin.

    Attributes:
      model: an `EvaluatedModel`.
      path: the checkpoint's directory; None for a model that came as an object.
      fingerprint: fingerprint of its parameters, as `a3 info` prints it; None where it has none.
    """

    model: Any
    path: str | None
    fingerprint: str | None

    @property
    def origin(self) -> dict[str, Any]:
        """Path and fingerprint, for the result."""
        return {"path": self.path, "fingerprint": self.fingerprint}

    @property
    def identity(self) -> list[Any]:
        """All that its numbers depend on, wherever its files are."""
        return [self.fingerprint, self.model.tokenizer.fingerprint]

    @property
    def family(self) -> str | None:
        """The checkpoint's family of models."""
        checkpoint = getattr(self.model, "checkpoint", None)
        return None if checkpoint is None else checkpoint.config.family


def kind_of(checkpoint, model: str | None) -> str:
    """Returns the kind of model that a checkpoint, or an `EvaluatedModel`, will be run as; opens nothing."""
    if model is not None:
        one_of("model", model, MODELS)
    if not _is_path(checkpoint):
        described = checkpoint.describe().get("model")
        return model or (described if described in MODELS else A3)
    directory, is_hf = find_checkpoint(checkpoint)
    config = open_hf(directory).config if is_hf else load_meta(directory).model
    return model or (A3 if config.mask_token is None else DIFFUSION)


def load_model(checkpoint, kind: str, **options) -> LoadedModel:
    """Opens a checkpoint with the options of `open_model`; an `EvaluatedModel` is taken as it is."""
    is_path = _is_path(checkpoint)
    model = open_model(checkpoint, kind, **options) if is_path else checkpoint
    found = getattr(model, "checkpoint", None)
    digest = None
    if found is not None:
        leaves = tree_names(found.params)
        sums = fingerprints(leaves)
        digest = fingerprint(
            {name: Leaf(leaf.shape, leaf.dtype.name, sums[name]) for name, leaf in leaves.items()}
        )
    return LoadedModel(model, str(find_checkpoint(checkpoint)[0]) if is_path else None, digest)


def open_model(
    path,
    model: str | None = None,
    *,
    scorer: str | None = None,
    scorer_options: dict[str, Any] | None = None,
    generate: dict[str, Any] | None = None,
    dtype: str | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    mesh=None,
) -> EvaluatedModel:
    """Opens a model under evaluation.

        open_model("runs/tiny", scorer="mc_order", scorer_options={"draws": 32})
        open_model("Llama-3.1-8B", "ar", dtype="bfloat16")

    Args:
      path: as `open_checkpoint` takes it.
      model: one of `MODELS`; None: "masked_diffusion" where the checkpoint has a mask token, else "a3".
      scorer, scorer_options: of `scorers.SCORERS`, for masked diffusion of `scorers.ESTIMATORS`; None:
        "chain", or the estimator of the checkpoint's family.
      generate: how blanks are filled: `GenerateOptions`; for masked diffusion its sampler's options, and
        the sampler's name as "sampler".
      dtype: dtype of the computation; None: float32 on CPU, bfloat16 on accelerators.
      batch_size: the most requests per batch; None: as many as their rows allow.
      seed: seed of the query vector of a checkpoint that has none.
      mesh: where the parameters go; None: the first device.
    """
    if model is not None:
        one_of("model", model, MODELS)
    if model == AR and scorer_options:
        raise InputError("a left-to-right model has one scorer, without options", field="scorer")
    checkpoint = open_checkpoint(path, mesh=mesh, seed=seed)
    is_masked = checkpoint.config.mask_token is not None
    model = model or (DIFFUSION if is_masked else A3)
    if model == DIFFUSION:
        if not is_masked:
            raise InputError(f"{model!r}, but the checkpoint has no mask token", file=path, field="model")
        options = dict(generate or {})
        sampler = options.pop("sampler", None)
        return MaskedDiffusion(checkpoint, scorer, scorer_options, sampler, options, dtype, batch_size)
    check_has_orders(checkpoint, path)
    if model == AR:
        if scorer not in (None, "chain"):
            raise InputError(f"{scorer!r} is no scorer of a left-to-right model: 'chain' is", field="scorer")
        return LeftToRight(checkpoint, generate, dtype, batch_size)
    return AnyOrder(checkpoint, scorer or "chain", scorer_options, generate, dtype, batch_size)


def _is_path(checkpoint) -> bool:
    return isinstance(checkpoint, str) or hasattr(checkpoint, "__fspath__")
