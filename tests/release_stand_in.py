"""A PyTorch two-stream Llama with the interface of the authors' release, for tests of `a3 bench release`.

Dense, in float32: masks from the group ids, a row that sees nothing gets zeros, the release's residual.
"""

from types import SimpleNamespace

import torch
from torch import nn


class Norm(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * self.weight


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.size, self.theta = config.hidden_size // self.heads, config.rope_theta
        kv = self.kv_heads * self.size
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(config.hidden_size, out, bias=False)
            for out in (config.hidden_size, kv, kv, config.hidden_size)
        )

    def rotated(self, x_BTNH):
        half = self.size // 2
        frequencies = self.theta ** (-torch.arange(half) / half)
        angles = (torch.arange(x_BTNH.shape[1])[:, None] * frequencies)[None, :, None]
        a, b = x_BTNH[..., :half], x_BTNH[..., half:]
        return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)

    def forward(self, x, content, visible_BTS):
        batch, length, _ = x.shape
        q = self.rotated(self.q_proj(x).view(batch, length, self.heads, self.size))
        k = self.rotated(self.k_proj(content).view(batch, length, self.kv_heads, self.size))
        v = self.v_proj(content).view(batch, length, self.kv_heads, self.size)
        k, v = (array.repeat_interleave(self.heads // self.kv_heads, 2) for array in (k, v))
        scores = torch.einsum("btnh,bsnh->bnts", q, k) / self.size**0.5
        weights = torch.softmax(scores.masked_fill(~visible_BTS[:, None], -1e30), -1)
        weights = weights * visible_BTS.any(-1)[:, None, :, None]
        return self.o_proj(torch.einsum("bnts,bsnh->btnh", weights, v).reshape(batch, length, -1))


class Mlp(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.self_attn, self.mlp = Attention(config), Mlp(config)
        self.input_layernorm = Norm(config.hidden_size)
        self.post_attention_layernorm = Norm(config.hidden_size)

    def forward(self, x, content, visible_BTS):
        x = x + self.self_attn(self.input_layernorm(x), self.input_layernorm(content), visible_BTS)
        normed = self.post_attention_layernorm(x)
        residual = normed
        return residual + self.mlp(normed)


class LlamaTwoStreamForCausalLM(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.model.query_embed = nn.Parameter(torch.randn(1, 1, config.hidden_size))
        self.model.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.model.norm = Norm(config.hidden_size)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, input_ids, labels, group_ids, use_cache, return_dict):
        assert return_dict and not use_cache
        own, other = group_ids[:, :, None], group_ids[:, None]
        content = self.model.embed_tokens(input_ids)
        query = self.model.query_embed.expand(content.shape)
        for layer in self.model.layers:
            content, query = layer(content, content, other <= own), layer(query, content, other < own)
        logits = self.lm_head(self.model.norm(query))
        return SimpleNamespace(loss=nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()))
