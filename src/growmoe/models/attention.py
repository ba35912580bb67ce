"""Causal grouped-query attention with rotary positions and a KV cache.

Letters: B batch, T new tokens, S all tokens in the context, H query heads, K key/value heads,
C head dim, D hidden.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from growmoe.models.config import ModelConfig
from growmoe.ops.linear import Linear


class RMSNorm(nn.Module):
    """Root-mean-square norm, computed in float32 at least."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x * rsqrt(mean(x^2) + eps) * weight over the last dimension."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return normed.to(x.dtype) * self.weight.to(x.dtype)


class LayerNorm(nn.LayerNorm):
    """torch's LayerNorm with the signature of RMSNorm."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__(size, eps=eps)


def make_norm(config: ModelConfig, size: int) -> nn.Module:
    """The norm that `config` asks for."""
    kind = RMSNorm if config.norm == "rms" else LayerNorm
    return kind(size, config.norm_eps)


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """Rotary frequencies [C/2] in float32: theta^(-2i/C), scaled as `rope_scaling` says."""
    C = config.head_dim
    exponents = torch.arange(0, C, 2, dtype=torch.int64).to(torch.float32) / C
    frequencies = 1.0 / (config.rope_theta**exponents)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    if scaling["rope_type"] == "linear":
        return frequencies / scaling["factor"]
    return _llama3_frequencies(frequencies, dict(scaling))


def _llama3_frequencies(frequencies: Tensor, scaling: dict[str, float]) -> Tensor:
    """Llama 3.1: long waves slowed by `factor`, short ones kept, a smooth blend between."""
    trained = scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    waves = 2 * math.pi / frequencies
    slowed = frequencies / scaling["factor"]
    blend = (trained / waves - low) / (high - low)
    smooth = (1 - blend) * slowed + blend * frequencies
    result = torch.where(waves > trained / low, slowed, smooth)
    return torch.where(waves < trained / high, frequencies, result)


def rotary_tables(config: ModelConfig, positions_T: Tensor, dtype: torch.dtype) -> Tensor:
    """cos and sin [2,T,C] for the given positions; [2,B,T,C] for positions [B,T]."""
    frequencies = _frequencies_on(config, positions_T.device)
    angles = positions_T.to(torch.float32)[..., None] * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    return torch.stack((angles.cos(), angles.sin())).to(dtype)


def _frequencies_on(config: ModelConfig, device: torch.device) -> Tensor:
    """Made once: a dozen operators a step; and to a GPU the copy would make every step wait, and
    cannot be part of a CUDA graph. (Powers computed there could differ in the last bit, which far
    positions would show.)"""
    key = (config.head_dim, config.rope_theta, str(config.rope_scaling), device)
    found = _FREQUENCIES.get(key)
    if found is None:
        with torch.inference_mode(False):  # training may come after inference
            found = inverse_frequencies(config).to(device)
        if type(found) is Tensor:  # no fake one
            _FREQUENCIES[key] = found
    return found


_FREQUENCIES: dict[tuple[int, float, str, torch.device], Tensor] = {}


def rotate(x_BHTC: Tensor, tables_2TC: Tensor) -> Tensor:
    """Apply rotary positions in the half-split layout (pair i is dims i and i + C/2)."""
    first, second = x_BHTC.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return x_BHTC * tables_2TC[0] + turned * tables_2TC[1]


class Cache:
    """Keys and values of the tokens seen so far, one pair of tensors per layer.

    The model asks only where the new tokens stand and what attending gives, so that an engine can
    keep keys and values elsewhere and in other forms.
    """

    def __init__(self) -> None:
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}

    @property
    def length(self) -> int:
        """Tokens held."""
        return next(iter(self.keys.values())).shape[2] if self.keys else 0

    def positions(self, new: int, device: torch.device) -> Tensor:
        """Positions [T] of the `new` tokens that come next."""
        return torch.arange(self.length, self.length + new, device=device)

    def last_position(self, new: int) -> int:
        """The largest of `positions`, without asking a device."""
        return self.length + new - 1

    def append(self, layer: int, k_BKTC: Tensor, v_BKTC: Tensor) -> tuple[Tensor, Tensor]:
        """Add new keys and values of `layer`; returns all of them [B,K,S,C]."""
        if layer in self.keys:
            k_BKTC = torch.cat((self.keys[layer], k_BKTC), dim=2)
            v_BKTC = torch.cat((self.values[layer], v_BKTC), dim=2)
        self.keys[layer], self.values[layer] = k_BKTC, v_BKTC
        return k_BKTC, v_BKTC

    def attend(
        self,
        layer: int,
        q_BHTC: Tensor,
        k_BKTC: Tensor,
        v_BKTC: Tensor,
        window: int | None,
        real_BS: Tensor | None,
    ) -> Tensor:
        """Keep the new keys and values of `layer`; returns what the queries find [B,H,T,C]."""
        return attend(q_BHTC, *self.append(layer, k_BKTC, v_BKTC), window, real_BS)


def attend(
    q_BHTC: Tensor, k_BKSC: Tensor, v_BKSC: Tensor, window: int | None, real_BS: Tensor | None
) -> Tensor:
    """Causal attention of the last T of S tokens: [B,H,T,C]. Query head h reads key/value head
    h // (H/K); `window` and `real_BS` as in `Attention`."""
    groups = q_BHTC.shape[1] // k_BKSC.shape[1]
    if groups > 1:
        k_BKSC = k_BKSC.repeat_interleave(groups, dim=1)
        v_BKSC = v_BKSC.repeat_interleave(groups, dim=1)
    mask = _mask(q_BHTC.shape[2], k_BKSC.shape[2], window, q_BHTC.device, real_BS)
    return F.scaled_dot_product_attention(
        q_BHTC, k_BKSC, v_BKSC, attn_mask=mask, is_causal=mask is None
    )


class Attention(nn.Module):
    """Grouped-query attention of one layer: query head h reads key/value head h // (H/K)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        D, C = config.hidden_size, config.head_dim
        self.q = Linear(D, config.num_heads * C, bias=config.qkv_bias)
        self.k = Linear(D, config.num_kv_heads * C, bias=config.qkv_bias)
        self.v = Linear(D, config.num_kv_heads * C, bias=config.qkv_bias)
        self.o = Linear(config.num_heads * C, D, bias=config.o_bias)
        if config.qk_norm:
            every = config.qk_norm_scope == "all"
            self.q_norm = RMSNorm(config.num_heads * C if every else C, config.norm_eps)
            self.k_norm = RMSNorm(config.num_kv_heads * C if every else C, config.norm_eps)

    def forward(
        self,
        x_BTD: Tensor,
        rotary: Tensor | None,
        cache: Cache | None,
        real_BS: Tensor | None = None,
    ) -> Tensor:
        """Attend causally to the cached tokens and the new ones, except where `real_BS` says that
        they are padding; returns [B,T,D]."""
        B, T, _ = x_BTD.shape
        config = self.config
        q, k, v = self.q(x_BTD), self.k(x_BTD), self.v(x_BTD)
        if config.qk_norm and config.qk_norm_scope == "all":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (rows.view(B, T, -1, config.head_dim) for rows in (q, k, v))
        if config.qk_norm and config.qk_norm_scope == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        if cache is None:
            y = attend(q, k, v, config.sliding_window, real_BS)
        else:
            y = cache.attend(self.layer, q, k, v, config.sliding_window, real_BS)
        return self.o(y.transpose(1, 2).reshape(B, T, -1))


def _mask(
    T: int, S: int, window: int | None, device: torch.device, real_BS: Tensor | None
) -> Tensor | None:
    """[T,S] (with padding [B,1,T,S]) of True where attention is allowed; None when plain causal
    masking says the same. Padding attends to itself, so that no row is empty."""
    if T == S and (window is None or window >= S) and real_BS is None:
        return None
    query_T1 = torch.arange(S - T, S, device=device)[:, None]
    key_S = torch.arange(S, device=device)
    allowed = key_S <= query_T1
    if window is not None:
        allowed &= key_S > query_T1 - window
    if real_BS is None:
        return allowed
    # a cache may have dropped what lies before the window
    return allowed & (real_BS[:, None, None, -S:] | (key_S == query_T1))
