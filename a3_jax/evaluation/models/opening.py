"""A checkpoint, opened as the model that an evaluation asks questions of."""

from typing import Any

from a3_jax.checkpoints.loading import check_has_orders, open_checkpoint
from a3_jax.decoding.options import one_of
from a3_jax.errors import InputError
from a3_jax.evaluation.models.any_order import AnyOrder
from a3_jax.evaluation.models.diffusion import MaskedDiffusion
from a3_jax.evaluation.models.interface import EvaluatedModel
from a3_jax.evaluation.models.left_to_right import LeftToRight

MODELS = ("a3", "ar", "masked_diffusion")


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
    """A model under evaluation.

        open_model("runs/tiny", scorer="mc_order", scorer_options={"draws": 32})
        open_model("Llama-3.1-8B", "ar", dtype="bfloat16")

    Args:
      path: what `open_checkpoint` opens.
      model: of `MODELS`; None: "masked_diffusion" where the checkpoint has a mask token, else "a3".
      scorer, scorer_options: of `scorers.SCORERS`, or of the estimators of masked diffusion; None: "chain",
        or the estimator of the checkpoint's family.
      generate: how blanks are filled: `GenerateOptions`, or of masked diffusion its sampler's options and
        the sampler's name as "sampler".
      dtype: of the computation; None: float32 on CPU, bfloat16 on accelerators.
      batch_size: requests a batch at most; None: as many as their rows allow.
      seed: draws the query vector of a checkpoint that has none.
      mesh: where the parameters go; None: the first device.

    Raises:
      InputError: no such checkpoint, a name or option that is unknown or contradicts the model.
    """
    if model is not None:
        one_of("model", model, MODELS)
    checkpoint = open_checkpoint(path, mesh=mesh, seed=seed)
    masked = checkpoint.config.mask_token is not None
    model = model or ("masked_diffusion" if masked else "a3")
    if model == "masked_diffusion":
        if not masked:
            raise InputError(f"{model!r}, but the checkpoint has no mask token", file=path, field="model")
        sampler = dict(generate or {})
        return MaskedDiffusion(
            checkpoint, scorer, scorer_options, sampler.pop("sampler", None), sampler, dtype, batch_size
        )
    check_has_orders(checkpoint, path)
    if model == "ar":
        if scorer not in (None, "chain"):
            raise InputError(f"{scorer!r} is no scorer of a left-to-right model: 'chain' is", field="scorer")
        return LeftToRight(checkpoint, generate, dtype, batch_size)
    return AnyOrder(checkpoint, scorer or "chain", scorer_options, generate, dtype, batch_size)
