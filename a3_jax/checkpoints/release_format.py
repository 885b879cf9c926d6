"""A3 models as directories of the authors' PyTorch release: `LlamaTwoStreamForCausalLM`.

Its block adds the MLP to the normed state, where the paper's and the pretrained model's adds it to the state
before the norm. One set of weights is two models under the two, so only a model that was trained with
`residual="release"` goes there.
"""

from a3_jax.checkpoints import families
from a3_jax.checkpoints.a3_format import Meta
from a3_jax.checkpoints.hf_config import RELEASE_ARCHITECTURE
from a3_jax.checkpoints.hf_export import ExportPlan, config_to_hf, make_target
from a3_jax.errors import InputError


def release_target(meta: Meta, dtype=None) -> ExportPlan:
    """A directory of the authors' class: its state dict whole, with query vector and a tied head.

    Of the source's `config.json` what is not the model's shape goes along, such as ids of special tokens.

    Args:
      dtype: of all tensors; None: the source's, float32 where there is none.

    Raises:
      InputError: a model that the class can't be, with the reason.
    """
    model, source = meta.model, meta.source or {"config": {}, "tensors": {}}
    if model.residual != "release":
        raise InputError(
            f"{model.residual!r}: {RELEASE_ARCHITECTURE} adds the MLP to the normed state, so there these "
            "weights are another model; only those trained with residual='release' can be written for it",
            field="model.residual",
        )
    fields = config_to_hf(model)
    if model.num_heads * model.head_size != model.d_model:
        raise InputError(
            f"{model.head_size}: {RELEASE_ARCHITECTURE} has heads of d_model / num_heads = "
            f"{model.d_model / model.num_heads:g}", field="model.head_size",
        )  # fmt: skip
    had = families.table_names(source["tensors"], model)
    dtypes = {name: source["tensors"][in_file] for name, in_file in had.items()}
    usual = dtypes.get(families.embedding(model), "float32")
    names = [*families.tensor_table(model), families.tied_head(model)]
    tensors = {name: dtypes.get(name, usual) for name in names if name is not None}
    others = {  # transformers 5 has two fields by other names
        name: value for name, value in source["config"].items() if name not in ("dtype", "rope_parameters")
    }  # fmt: skip
    return make_target(model, {**others, **fields, "torch_dtype": usual}, tensors, dtype)
