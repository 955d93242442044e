"""The two kinds of block, and the one way in which blocks are run.

`DoubleStreamBlock` keeps text and image apart except in attention; `SingleStreamBlock` runs one joint sequence, text
first. Their `forward` is plain mathematics; `run_block` wraps it for training.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fluxq.kernels import ops
from fluxq.model.config import FluxConfig
from fluxq.model.linear import Linear
from fluxq.offload import Ring

Rope = tuple[Tensor, Tensor]  # cos, sin


class Modulation(nn.Module):
    """vec (B, D) -> `parts` rows (B, 1, D): shift, scale, gate [, shift, scale, gate]."""

    def __init__(self, width: int, parts: int) -> None:
        super().__init__()
        self.parts = parts
        self.lin = Linear(width, parts * width)

    def forward(self, vec: Tensor) -> tuple[Tensor, ...]:
        return self.lin(F.silu(vec))[:, None].chunk(self.parts, dim=-1)


class Scale(nn.Module):
    """RMS norm over the head width, with a frozen scale (D/H,)."""

    scale: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("scale", torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        return ops().rms_norm(x, self.scale)


class QKNorm(nn.Module):
    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.query_norm = Scale(head_dim)
        self.key_norm = Scale(head_dim)

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return self.query_norm(q), self.key_norm(k)


class SelfAttention(nn.Module):
    """One stream's share of joint attention: its projections and norms."""

    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        self.heads = config.num_heads
        self.qkv = Linear(config.hidden_size, config.hidden_size * 3, bias=config.qkv_bias)
        self.norm = QKNorm(config.head_dim)
        self.proj = Linear(config.hidden_size, config.hidden_size)

    def queries_keys_values(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = split_heads(self.qkv(x), self.heads)  # (B, H, L, D/H)
        q, k = self.norm(q, k)
        return q, k, v


def split_heads(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """(B, L, 3 D) -> q, k, v (B, H, L, D/H)."""
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    return q, k, v


def mlp(config: FluxConfig) -> nn.Sequential:
    return nn.Sequential(
        Linear(config.hidden_size, config.mlp_hidden),
        nn.GELU(approximate="tanh"),
        Linear(config.mlp_hidden, config.hidden_size),
    )


class DoubleStreamBlock(nn.Module):
    def __init__(self, config: FluxConfig, name: str) -> None:
        super().__init__()
        self.units = (f"{name}.img", f"{name}.txt")
        self.img_mod = Modulation(config.hidden_size, 6)
        self.img_attn = SelfAttention(config)
        self.img_mlp = mlp(config)
        self.txt_mod = Modulation(config.hidden_size, 6)
        self.txt_attn = SelfAttention(config)
        self.txt_mlp = mlp(config)

    def forward(self, img: Tensor, txt: Tensor, vec: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """img (B, Li, D), txt (B, Lt, D), vec (B, D); cos, sin (B or 1, 1, Lt + Li, D/H/2), text first."""
        img_shift1, img_scale1, img_gate1, img_shift2, img_scale2, img_gate2 = self.img_mod(vec)
        txt_shift1, txt_scale1, txt_gate1, txt_shift2, txt_scale2, txt_gate2 = self.txt_mod(vec)

        # each stream prepares its queries, keys and values
        img_q, img_k, img_v = self.img_attn.queries_keys_values(ops().modulate(img, img_shift1, img_scale1))
        txt_q, txt_k, txt_v = self.txt_attn.queries_keys_values(ops().modulate(txt, txt_shift1, txt_scale1))

        # both attend to both
        q, k, v = torch.cat([txt_q, img_q], 2), torch.cat([txt_k, img_k], 2), torch.cat([txt_v, img_v], 2)
        attended = ops().attention(ops().rope(q, cos, sin), ops().rope(k, cos, sin), v)  # (B, Lt + Li, D)
        txt_attended, img_attended = attended.split([txt.shape[1], img.shape[1]], dim=1)

        # each stream writes back
        img = img + img_gate1 * self.img_attn.proj(img_attended)
        img = img + img_gate2 * self.img_mlp(ops().modulate(img, img_shift2, img_scale2))
        txt = txt + txt_gate1 * self.txt_attn.proj(txt_attended)
        txt = txt + txt_gate2 * self.txt_mlp(ops().modulate(txt, txt_shift2, txt_scale2))
        return img, txt


class SingleStreamBlock(nn.Module):
    def __init__(self, config: FluxConfig, name: str) -> None:
        super().__init__()
        self.units = (name,)
        self.heads, self.widths = config.num_heads, [3 * config.hidden_size, config.mlp_hidden]
        self.linear1 = Linear(config.hidden_size, sum(self.widths))
        self.linear2 = Linear(config.hidden_size + config.mlp_hidden, config.hidden_size)
        self.norm = QKNorm(config.head_dim)
        self.modulation = Modulation(config.hidden_size, 3)

    def forward(self, x: Tensor, vec: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x (B, L, D) with the text first, vec (B, D); cos, sin (B or 1, 1, L, D/H/2)."""
        shift, scale, gate = self.modulation(vec)
        qkv, hidden = self.linear1(ops().modulate(x, shift, scale)).split(self.widths, dim=-1)
        q, k, v = split_heads(qkv, self.heads)
        q, k = self.norm(q, k)
        attended = ops().attention(ops().rope(q, cos, sin), ops().rope(k, cos, sin), v)
        return x + gate * self.linear2(torch.cat([attended, F.gelu(hidden, approximate="tanh")], dim=-1))


class LastLayer(nn.Module):
    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        self.linear = Linear(config.hidden_size, config.out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(config.hidden_size, 2 * config.hidden_size))

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(vec)[:, None].chunk(2, dim=-1)
        return self.linear(ops().modulate(x, shift, scale))


def run_block(block: nn.Module, ring: Ring, *inputs: Tensor) -> Any:
    """block(*inputs) inside `ring.resident(block.units)`, forward and backward; for backward only the inputs are kept.

    The block's parameters go in as arguments of the autograd Function: captured by closure, they would get no gradient
    where none of the inputs needs one.
    """
    parameters = [p for p in block.parameters() if p.requires_grad]
    units = cast(tuple[str, ...], block.units)
    return _Recomputed.apply(block, lambda: ring.resident(units), len(inputs), *inputs, *parameters)


class _Recomputed(torch.autograd.Function):
    """Policy `recompute`: keep the inputs, run the block again in the backward pass, and return the gradients of
    everything.
    """

    @staticmethod
    def forward(
        ctx: Any, block: nn.Module, resident: Callable[[], AbstractContextManager[None]], count: int, *tensors: Tensor
    ) -> Tensor | tuple[Tensor, ...]:
        ctx.block, ctx.resident, ctx.count = block, resident, count
        ctx.save_for_backward(*tensors)
        with resident():
            return block(*tensors[:count])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[3:]
        saved = ctx.saved_tensors
        inputs = [t.detach().requires_grad_(n) for t, n in zip(saved[: ctx.count], needed, strict=False)]
        with ctx.resident(), torch.enable_grad():
            outputs = ctx.block(*inputs)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            wanted = [t for t, n in zip((*inputs, *saved[ctx.count :]), needed, strict=True) if n]
            found = iter(torch.autograd.grad(outputs, wanted, grad_outputs, allow_unused=True))
        return (None, None, None, *(next(found) if n else None for n in needed))
