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


def why_no_torch(settings: Settings) -> str | None:
    """Returns why there is no PyTorch model beside ours; None where there is one."""
    import jax

    on_cpu = jax.default_backend() == "cpu" and settings.dtype == "float32"
    return _missing_package() if on_cpu else "compared on CPU in float32 only"


def _missing_package() -> str | None:
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    return f"{missing[0]} is not installed" if missing else None


class TorchStep:
    """A call makes one train step of a model, which gives an object with `loss` for the inputs."""

    def __init__(self, model: Any, **inputs):
        import torch

        self.model, self._inputs = model.train(), inputs
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
    tokens = _tensor(draw_rows(settings, length, batch, "ar")["tokens"])
    return TorchStep(_llama(settings, length), input_ids=tokens, labels=tokens, use_cache=False)


def llama_fill(settings: Settings, length: int, tokens) -> Callable[[], None]:
    """Returns a call in which such a Llama continues tokens [B, T] to `length`: greedy, cached."""
    import torch

    model, tokens = _llama(settings, length).eval(), _tensor(tokens)
    model.config.use_cache = True
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    options = {"do_sample": False, "use_cache": True, "max_new_tokens": length - tokens.shape[1]}

    def fill():
        with torch.no_grad():
            out = model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)
        assert out.shape[1] == length

    return fill


def load_release(directory: str) -> type:
    """Imports the model's class from `llama_xlnet.py` of a clone of the authors' release.

    Raises:
      InputError: torch or transformers is absent, or the clone has no such file, or it can't be imported.
    """
    if missing := _missing_package():
        raise InputError(missing, field="--release")
    path = os.path.join(directory, RELEASE_FILE)
    if not os.path.isfile(path):
        raise InputError(f"no {RELEASE_FILE} there", file=directory, field="--release")
    _add_plain_rope()
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
    assert settings.release is not None
    model = _make(load_release(settings.release), settings, length)
    for name, parameter in model.named_parameters():
        mean, spread = (1.0, 0.1) if "norm" in name else (0.0, 2.0 * settings.d_model**-0.5)
        parameter.data.normal_(mean, spread)
    return model.eval()


def release_step(settings: Settings, length: int, batch: int) -> TorchStep:
    """Returns the two-stream step of the authors' model, its masks made in the forward pass."""
    rows = draw_rows(settings, length, batch)
    tokens, ranks = _tensor(rows["tokens"]), _tensor(rows["ranks"])
    inputs = {"input_ids": tokens, "labels": tokens, "group_ids": ranks}
    return TorchStep(release_model(settings, length), **inputs, use_cache=False, return_dict=True)


def open_as_ours(model: Any, config: ModelConfig, dtype: str) -> Any:
    """Opens the authors' model as a checkpoint of ours, by way of a Hugging Face directory."""
    from safetensors.torch import save_file

    from a3_jax.checkpoints.hf_config import CONFIG_FILE
    from a3_jax.checkpoints.hf_export import config_to_hf
    from a3_jax.checkpoints.opening import open_checkpoint
    from a3_jax.paths import write_json

    with tempfile.TemporaryDirectory() as directory:
        tensors = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
        save_file(tensors, os.path.join(directory, "model.safetensors"), metadata={"format": "pt"})
        write_json(os.path.join(directory, CONFIG_FILE), config_to_hf(config))
        return open_checkpoint(directory, dtype=dtype)


def _tensor(array) -> Any:
    import torch

    return torch.from_numpy(np.asarray(array, np.int64))


def _llama(settings: Settings, length: int) -> Any:
    from transformers import LlamaForCausalLM

    model = _make(LlamaForCausalLM, settings, length)
    model.set_attn_implementation("sdpa")  # PyTorch's fused attention
    return model


def _make(model_class: type, settings: Settings, length: int) -> Any:
    """Returns a model of our shape, of a class that takes a `LlamaConfig`."""
    import torch
    from transformers import LlamaConfig

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
    return model_class(hf_config)


def _add_plain_rope() -> None:
    """Adds the plain rotary frequencies to a table where the release looks and transformers 5 has none."""
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    def frequencies(config, device=None, **_):
        size = config.hidden_size // config.num_attention_heads
        exponents = torch.arange(0, size, 2, dtype=torch.float32, device=device) / size
        return config.rope_parameters["rope_theta"] ** -exponents, 1.0

    ROPE_INIT_FUNCTIONS.setdefault("default", frequencies)
