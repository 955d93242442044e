"""The two kinds of block, and the one way in which blocks are run.

`DoubleStreamBlock` keeps text and image apart except in attention; `SingleStreamBlock` runs one joint sequence, text
first. Their `forward` is plain mathematics; `run_block` wraps it for training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fluxq.kernels import (
    Tape,
    attention,
    gated_add,
    gated_add_modulate,
    gelu_tanh,
    modulate,
    qk_norm_rope,
)
from fluxq.kernels.steps import divides_out
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
    """The frozen scale (D/H,) of an RMS norm over the head width."""

    scale: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("scale", torch.empty(width))

    @cached_property
    def divides_out(self) -> bool:
        return divides_out(self.scale)


class QKNorm(nn.Module):
    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.query_norm = Scale(head_dim)
        self.key_norm = Scale(head_dim)


def queries_keys_values(
    streams: Sequence[tuple[Tensor, QKNorm]], cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The streams' projections (B, L, 3 D), normed and turned, joined to q, k, v (B, H, L, D/H)."""
    invertible = all(n.query_norm.divides_out and n.key_norm.divides_out for _, n in streams)
    scaled = [(qkv, norm.query_norm.scale, norm.key_norm.scale) for qkv, norm in streams]
    return qk_norm_rope(scaled, cos, sin, invertible)


class SelfAttention(nn.Module):
    """One stream's share of joint attention: its projections and norms."""

    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        self.qkv = Linear(config.hidden_size, config.hidden_size * 3, bias=config.qkv_bias)
        self.norm = QKNorm(config.head_dim)
        self.proj = Linear(config.hidden_size, config.hidden_size)


class MLP(nn.ModuleDict):
    """Two linear layers under the numbers that the original files give them; 1 is the GELU between, `gelu_tanh`."""

    def __init__(self, config: FluxConfig) -> None:
        inner, outer = Linear(config.hidden_size, config.mlp_hidden), Linear(config.mlp_hidden, config.hidden_size)
        super().__init__({"0": inner, "2": outer})

    @property
    def layers(self) -> tuple[Linear, Linear]:
        return cast(Linear, self["0"]), cast(Linear, self["2"])


class DoubleStreamBlock(nn.Module):
    def __init__(self, config: FluxConfig, name: str) -> None:
        super().__init__()
        self.units, self.policy = (f"{name}.img", f"{name}.txt"), "recompute"
        self.img_mod = Modulation(config.hidden_size, 6)
        self.img_attn = SelfAttention(config)
        self.img_mlp = MLP(config)
        self.txt_mod = Modulation(config.hidden_size, 6)
        self.txt_attn = SelfAttention(config)
        self.txt_mlp = MLP(config)

    def forward(self, img: Tensor, txt: Tensor, vec: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """img (B, Li, D), txt (B, Lt, D), vec (B, D); cos, sin (B or 1, 1, Lt + Li, D/H/2), text first."""
        img_shift, img_scale, *img_rows = self.img_mod(vec)
        txt_shift, txt_scale, *txt_rows = self.txt_mod(vec)
        img_attn, txt_attn = self.img_attn, self.txt_attn

        # each stream makes its queries, keys and values, and both attend to both
        img_qkv = img_attn.qkv(modulate(img, img_shift, img_scale, img_attn.qkv.wants), feeds="qkv")
        txt_qkv = txt_attn.qkv(modulate(txt, txt_shift, txt_scale, txt_attn.qkv.wants), feeds="qkv")
        streams = [(txt_qkv, txt_attn.norm), (img_qkv, img_attn.norm)]
        attended = attention(*queries_keys_values(streams, cos, sin))  # (B, Lt + Li, D)
        txt_attended, img_attended = attended.split([txt.shape[1], img.shape[1]], dim=1)

        # each stream writes back
        img = write_back(img, img_attended, img_rows, img_attn.proj, self.img_mlp)
        txt = write_back(txt, txt_attended, txt_rows, txt_attn.proj, self.txt_mlp)
        return img, txt


def write_back(x: Tensor, attended: Tensor, rows: Sequence[Tensor], proj: Linear, mlp: MLP) -> Tensor:
    """One stream of a double block after attention: x + gate1 proj(attended), then + gate2 mlp(modulated)."""
    (gate1, shift, scale, gate2), (inner, outer) = rows, mlp.layers
    x, modulated = gated_add_modulate(x, gate1, proj(attended, feeds="residual"), shift, scale, inner.wants)
    hidden = inner(modulated, feeds="hidden")
    return gated_add(x, gate2, outer(gelu_tanh(hidden, wants=outer.wants), feeds="end"))


class SingleStreamBlock(nn.Module):
    def __init__(self, config: FluxConfig, name: str) -> None:
        super().__init__()
        self.units, self.policy = (name,), "recompute"
        self.qkv_rows, self.mlp_rows = slice(0, 3 * config.hidden_size), slice(3 * config.hidden_size, None)
        self.linear1 = Linear(config.hidden_size, 3 * config.hidden_size + config.mlp_hidden)
        self.linear2 = Linear(config.hidden_size + config.mlp_hidden, config.hidden_size)
        self.norm = QKNorm(config.head_dim)
        self.modulation = Modulation(config.hidden_size, 3)

    def forward(self, x: Tensor, vec: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x (B, L, D) with the text first, vec (B, D); cos, sin (B or 1, 1, L, D/H/2)."""
        shift, scale, gate = self.modulation(vec)
        modulated = modulate(x, shift, scale, self.linear1.wants)
        qkv = self.linear1(modulated, self.qkv_rows, feeds="qkv")
        hidden = self.linear1(modulated, self.mlp_rows, feeds="hidden")
        attended = attention(*queries_keys_values([(qkv, self.norm)], cos, sin))
        both = gelu_tanh(hidden, beside=attended, wants=self.linear2.wants)
        return gated_add(x, gate, self.linear2(both, feeds="end"))


class LastLayer(nn.Module):
    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        self.linear = Linear(config.hidden_size, config.out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(config.hidden_size, 2 * config.hidden_size))

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(vec)[:, None].chunk(2, dim=-1)
        return self.linear(modulate(x, shift, scale, self.linear.wants))


def run_block(block: nn.Module, ring: Ring, *inputs: Tensor) -> Any:
    """block(*inputs) inside `ring.resident(block.units)`, forward and backward.

    Between the two it keeps the inputs and what the block's policy names (fluxq/kernels/replay.py). The block's
    parameters go in as arguments of the autograd Function: captured by closure, they would get no gradient where none
    of the inputs needs one.
    """
    *_, vec, _, _ = inputs
    parameters = [p for p in block.parameters() if p.requires_grad]
    units = cast(tuple[str, ...], block.units)
    if not torch.is_grad_enabled() or not any(t.requires_grad for t in (*inputs, *parameters)):
        with ring.resident(units):
            return block(*inputs)
    tape = Tape(cast(str, block.policy), gates=vec.requires_grad or _trains_modulation(block))
    return _Block.apply(block, lambda: ring.resident(units), tape, len(inputs), *inputs, *parameters)


class _Block(torch.autograd.Function):
    """Runs the block without gradients, keeping what its policy says; in the backward pass replays it with gradients,
    and returns those of everything.
    """

    @staticmethod
    def forward(
        ctx: Any,
        block: nn.Module,
        resident: Callable[[], AbstractContextManager[None]],
        tape: Tape,
        count: int,
        *tensors: Tensor,
    ) -> Tensor | tuple[Tensor, ...]:
        ctx.block, ctx.resident, ctx.tape, ctx.count = block, resident, tape, count
        ctx.save_for_backward(*tensors)
        with resident(), tape.record():
            return block(*tensors[:count])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[4:]
        saved = ctx.saved_tensors
        inputs = [t.detach().requires_grad_(n) for t, n in zip(saved[: ctx.count], needed, strict=False)]
        with ctx.resident(), torch.enable_grad():
            with ctx.tape.replay():
                outputs = ctx.block(*inputs)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            pairs = zip(outputs, grad_outputs, strict=True)  # a stream that nothing trainable acts on needs no gradient
            outputs, grads = zip(*((out, grad) for out, grad in pairs if out.requires_grad), strict=True)
            wanted = [t for t, n in zip((*inputs, *saved[ctx.count :]), needed, strict=True) if n]
            found = iter(torch.autograd.grad(outputs, wanted, grads, allow_unused=True))
        return (None, None, None, None, *(next(found) if n else None for n in needed))


def _trains_modulation(block: nn.Module) -> bool:
    return any(p.requires_grad for m in block.modules() if isinstance(m, Modulation) for p in m.parameters())
