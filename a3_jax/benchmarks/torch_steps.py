"""PyTorch train steps to stand beside ours: a `transformers` Llama, and the authors' release from a clone.

A step is forward, backward, clipping, AdamW and zeroed gradients, in float32, on CPU.
"""

import importlib.util
import logging
import os
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import numpy as np

from a3_jax.errors import InputError
from a3_jax.model.config import ModelConfig

LEARNING_RATE, WEIGHT_DECAY, CLIP = 2e-5, 0.01, 1.0
RELEASE_FILE, RELEASE_CLASS = "llama_xlnet.py", "LlamaTwoStreamForCausalLM"


class TorchStep:
    """A call makes one train step.

    Args:
      model: gives an object with `loss` when called with `inputs`.
      inputs: keyword arguments of every call.
      threads: of PyTorch.
    """

    def __init__(self, model: Any, inputs: Mapping[str, Any], threads: int):
        import torch

        torch.set_num_threads(threads)
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


def llama_step(config: ModelConfig, tokens, threads: int, seed: int) -> TorchStep:
    """The left-to-right step of a `transformers` Llama of our shape, with PyTorch's fused attention.

    Args:
      tokens: int [B, T].
    """
    import torch
    from transformers import LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(_hf_config(config))
    model.set_attn_implementation("sdpa")
    tokens = torch.from_numpy(np.asarray(tokens, np.int64))
    return TorchStep(model, {"input_ids": tokens, "labels": tokens, "use_cache": False}, threads)


def load_release(directory: str) -> ModuleType:
    """The module `llama_xlnet.py` of a clone of the authors' release.

    Raises:
      InputError: torch or transformers is absent, or the clone has no such file, or it can't be imported.
    """
    for package in ("torch", "transformers"):
        if importlib.util.find_spec(package) is None:
            raise InputError(f"{package} is not installed", field="--release")
    path = os.path.join(directory, RELEASE_FILE)
    if not os.path.isfile(path):
        raise InputError(f"no {RELEASE_FILE} there", file=directory, field="--release")
    _add_plain_rope()
    spec = importlib.util.spec_from_file_location("a3_bench_release", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # code from outside: it may raise anything
        raise InputError(f"does not import: {type(error).__name__}: {error}", file=path) from error
    if not hasattr(module, RELEASE_CLASS):
        raise InputError(f"has no class {RELEASE_CLASS}", file=path)
    return module


def release_step(
    module: ModuleType, config: ModelConfig, rows: Mapping, threads: int, seed: int
) -> TorchStep:
    """The two-stream step of the authors' model with random weights, masks made in the forward pass.

    Args:
      module: what `load_release` gives.
      rows: tokens and ranks, int [B, T], in reading order.
    """
    import torch

    model = release_model(module, config, threads, seed)
    tokens, group_ids = (torch.from_numpy(np.asarray(rows[name], np.int64)) for name in ("tokens", "ranks"))
    inputs = {"input_ids": tokens, "labels": tokens, "group_ids": group_ids, "use_cache": False}
    return TorchStep(model, inputs | {"return_dict": True}, threads)


def release_model(module: ModuleType, config: ModelConfig, threads: int, seed: int) -> Any:
    """The authors' model with random weights."""
    import torch

    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    model = getattr(module, RELEASE_CLASS)(_hf_config(config))
    _draw_weights(model, config.d_model)
    return model.eval()


def llama_fill(config: ModelConfig, tokens, length: int, threads: int, seed: int):
    """A call in which a `transformers` Llama goes on from tokens [B, T] to `length`: greedy, cached."""
    import torch
    from transformers import LlamaForCausalLM

    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    hf_config = _hf_config(config)
    hf_config.use_cache = True
    model: Any = LlamaForCausalLM(hf_config).eval()
    model.set_attn_implementation("sdpa")
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    tokens = torch.from_numpy(np.asarray(tokens, np.int64))
    more = length - tokens.shape[1]

    generate = model.generate

    def fill():
        with torch.no_grad():
            out = generate(
                tokens, attention_mask=torch.ones_like(tokens), do_sample=False, use_cache=True,
                min_new_tokens=more, max_new_tokens=more,
            )  # fmt: skip
        assert out.shape[1] == length

    return fill


def save_release(model: Any, config: ModelConfig, directory: str) -> None:
    """The model as a Hugging Face directory, which `a3_jax.open_checkpoint` opens."""
    from safetensors.torch import save_file

    from a3_jax.checkpoints.hf_config import CONFIG_FILE
    from a3_jax.checkpoints.hf_export import config_to_hf
    from a3_jax.paths import write_json

    tensors = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, os.path.join(directory, "model.safetensors"), metadata={"format": "pt"})
    write_json(os.path.join(directory, CONFIG_FILE), config_to_hf(config))


def _hf_config(config: ModelConfig):
    from transformers import LlamaConfig

    logging.getLogger("transformers").setLevel(logging.ERROR)
    hf_config = LlamaConfig(
        vocab_size=config.vocab_size, hidden_size=config.d_model, num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads, num_key_value_heads=config.num_kv_heads,
        intermediate_size=config.mlp_size, max_position_embeddings=config.max_length,
        rms_norm_eps=config.norm_eps, tie_word_embeddings=False, use_cache=False,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
    )  # fmt: skip
    hf_config.rope_theta = config.rope_theta  # transformers 5 has moved it; the release reads it here
    return hf_config


def _add_plain_rope() -> None:
    """The release reads the plain rotary frequencies from a table where transformers 5 has none."""
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    def frequencies(config, device=None, **_):
        size = config.hidden_size // config.num_attention_heads
        exponents = torch.arange(0, size, 2, dtype=torch.float32, device=device) / size
        return config.rope_parameters["rope_theta"] ** -exponents, 1.0

    ROPE_INIT_FUNCTIONS.setdefault("default", frequencies)


def _draw_weights(model, d_model) -> None:
    """Matrices wide enough for attention to be sharp, so that a loss depends on what each row sees.

    At the usual 0.02 attention averages over nearly all keys, and a wrong mask would hardly show.
    """
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.normal_(1.0, 0.1)
            else:
                parameter.normal_(0.0, 2.0 * d_model**-0.5)
