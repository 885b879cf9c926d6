"""PyTorch's side of a comparison: a `transformers` Llama, and the authors' release from a clone.

A train step is forward, backward, clipping, AdamW and zeroed gradients, in float32, on CPU.
"""

import importlib.util
import logging
import os
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np

from a3_jax.errors import InputError
from a3_jax.model.config import ModelConfig
from benchmarks.settings import Settings, draw_rows, thread_count

LEARNING_RATE, WEIGHT_DECAY, CLIP = 2e-5, 0.01, 1.0  # the paper's
RELEASE_FILE, RELEASE_CLASS = "llama_xlnet.py", "LlamaTwoStreamForCausalLM"


def why_no_torch(settings: Settings | None = None) -> str | None:
    """Returns why PyTorch can't be used, or with settings, why not beside ours; None where it can."""
    for package in ("torch", "transformers"):
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed"
    if settings is not None:
        import jax

        if jax.default_backend() != "cpu" or settings.dtype != "float32":
            return "compared on CPU in float32 only"
    return None


class TorchStep:
    """A call makes one train step of a model, which gives an object with `loss` for arrays and options."""

    def __init__(self, model: Any, arrays: dict[str, np.ndarray], **options):
        import torch

        tensors = {name: torch.from_numpy(np.asarray(array, np.int64)) for name, array in arrays.items()}
        self.model, self._inputs = model.train(), tensors | options
        self._clip = torch.nn.utils.clip_grad_norm_
        self._adamw = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)

    def __call__(self) -> dict[str, float]:
        loss = self.model(**self._inputs).loss
        loss.backward()
        norm = self._clip(self.model.parameters(), CLIP)
        self._adamw.step()
        self._adamw.zero_grad()
        return {"loss": loss.item(), "grad_norm": norm.item()}


def llama_step(settings: Settings, length: int, batch: int) -> TorchStep:
    """Returns the left-to-right step of a `transformers` Llama of our shape."""
    tokens = draw_rows(settings, length, batch, "ar")["tokens"]
    return TorchStep(_make(None, settings, length), {"input_ids": tokens, "labels": tokens}, use_cache=False)


def llama_fill(settings: Settings, length: int, tokens) -> Callable[[], None]:
    """Returns a call in which such a Llama continues tokens [B, T] to `length`: greedy, cached."""
    import torch

    model, tokens = _make(None, settings, length).eval(), torch.from_numpy(np.asarray(tokens, np.int64))
    model.config.use_cache = True
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    options = {"do_sample": False, "use_cache": True, "max_new_tokens": length - tokens.shape[1]}

    def fill():
        with torch.no_grad():
            out = model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)
        assert out.shape[1] == length

    return fill


def load_release(directory: str) -> type:
    """Imports the model's class from `llama_xlnet.py` of a clone of the authors' release."""
    if missing := why_no_torch():
        raise InputError(missing, field="--release")
    path = os.path.join(directory, RELEASE_FILE)
    if not os.path.isfile(path):
        raise InputError(f"no {RELEASE_FILE} there", file=directory, field="--release")
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    def plain_frequencies(config, device=None, **_):
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        exponents = torch.arange(0, size, 2, dtype=torch.float32, device=device) / size
        return config.rope_parameters["rope_theta"] ** -exponents, 1.0

    ROPE_INIT_FUNCTIONS.setdefault("default", plain_frequencies)  # transformers 5 has none; the release looks
    spec = importlib.util.spec_from_file_location("a3_bench_release", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # code from outside: it may raise anything
        raise InputError(f"does not import: {type(error).__name__}: {error}", file=path) from error
    if not hasattr(module, RELEASE_CLASS):
        raise InputError(f"has no class {RELEASE_CLASS}", file=path)
    return getattr(module, RELEASE_CLASS)


def release_model(settings: Settings, length: int) -> Any:
    """Returns the authors' model with random weights.

    Its matrices are wide enough for attention to be sharp: at the usual 0.02 attention averages over nearly
    all keys, and a wrong mask would hardly show in a loss.
    """
    model = _make(load_release(settings.release or ""), settings, length)
    for name, parameter in model.named_parameters():
        mean, spread = (1.0, 0.1) if "norm" in name else (0.0, 2.0 * settings.d_model**-0.5)
        parameter.data.normal_(mean, spread)
    return model.eval()


def release_step(settings: Settings, length: int, batch: int) -> TorchStep:
    """Returns the two-stream step of the authors' model, its masks made in the forward pass."""
    rows = draw_rows(settings, length, batch)
    arrays = {"input_ids": rows["tokens"], "labels": rows["tokens"], "group_ids": rows["ranks"]}
    return TorchStep(release_model(settings, length), arrays, use_cache=False, return_dict=True)


def open_as_ours(model: Any, config: ModelConfig, dtype: str) -> Any:
    """Opens the authors' model as a checkpoint of ours, by way of a Hugging Face directory."""
    from safetensors.torch import save_file

    from a3_jax.checkpoints.hf_config import CONFIG_FILE
    from a3_jax.checkpoints.hf_export import config_to_hf
    from a3_jax.checkpoints.loading import open_checkpoint
    from a3_jax.paths import write_json

    with tempfile.TemporaryDirectory() as directory:
        tensors = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
        save_file(tensors, os.path.join(directory, "model.safetensors"), metadata={"format": "pt"})
        write_json(os.path.join(directory, CONFIG_FILE), config_to_hf(config))
        return open_checkpoint(directory, dtype=dtype)


def _make(model_class: type | None, settings: Settings, length: int) -> Any:
    """Returns a model of our shape of a class, by default the Llama with PyTorch's fused attention."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(thread_count())
    torch.manual_seed(settings.seed)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    config = settings.model(length)
    hf_config = LlamaConfig(
        vocab_size=config.vocab_size, hidden_size=config.d_model, num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads, num_key_value_heads=config.num_kv_heads,
        intermediate_size=config.mlp_size, max_position_embeddings=config.max_length,
        rms_norm_eps=config.norm_eps, tie_word_embeddings=False, use_cache=False,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
    )  # fmt: skip
    hf_config.rope_theta = config.rope_theta  # transformers 5 has moved it; the release reads it here
    if model_class is None:
        hf_config._attn_implementation = "sdpa"
    return (model_class or LlamaForCausalLM)(hf_config)
