"""FLUX.1's two kinds of block, and how they run with streamed weights and gradient checkpointing.

`DoubleStreamBlock` keeps text and image apart except in attention; `SingleStreamBlock` runs one joint sequence, text
first. Their `forward` is plain math; `run_block` wraps it for training. The rows that modulate a block (shift, scale,
gate) are an input: `run_modulation` computes them, right before the block or many steps ahead (modulation.py).

Hints to the kernels: `wants` is the form in which the next layer reads its input; `feeds` is the value that is made
from a layer's output alone, so that a replay that kept the value skips the layer (fluxq/kernels/replay.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import cached_property, partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fluxq.kernels import (
    Tape,
    attention,
    fork_modulate,
    gated_add,
    gated_add_modulate,
    gelu_tanh,
    modulate,
    qk_norm_rope,
)
from fluxq.kernels.block_ops import is_invertible
from fluxq.offload import Pass, Ring

from .config import FluxConfig
from .linear import Linear

Mask = Tensor | None  # (B, L), True for the tokens that are attended to; None: all are
Inside = tuple[list[nn.Module], list[nn.Module]]
NON_STREAMS = 3  # the inputs of a block after its streams: rows, cos, sin


class Modulation(nn.Module):
    """vec (B, D) -> `parts` rows side by side, (B, parts D): shift, scale, gate [, shift, scale, gate]."""

    def __init__(self, width: int, parts: int) -> None:
        super().__init__()
        self.lin = Linear(width, parts * width)

    def forward(self, vec: Tensor) -> Tensor:
        return self.lin(F.silu(vec))


class Scale(nn.Module):
    """The frozen scale (D/H,) of an RMS norm over one head."""

    scale: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("scale", torch.empty(width))

    @cached_property
    def is_invertible(self) -> bool:
        return is_invertible(self.scale)


class QKNorm(nn.Module):
    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.query_norm = Scale(head_dim)
        self.key_norm = Scale(head_dim)


def joint_qkv(streams: Sequence[tuple[Tensor, QKNorm]], cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """qkv projections (B, L, 3 D) and norms -> q, k, v (B, H, L, D/H), joined along L; q and k normed and rotated."""
    invertible = all(n.query_norm.is_invertible and n.key_norm.is_invertible for _, n in streams)
    scaled = [(qkv, norm.query_norm.scale, norm.key_norm.scale) for qkv, norm in streams]
    return qk_norm_rope(scaled, cos, sin, invertible)


class SelfAttention(nn.Module):
    """One stream's projections and norms for attention."""

    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        self.qkv = Linear(config.hidden_size, config.hidden_size * 3, bias=config.qkv_bias)
        self.norm = QKNorm(config.head_dim)
        self.proj = Linear(config.hidden_size, config.hidden_size)


class MLP(nn.ModuleDict):
    """Two linear layers, "0" and "2" as in the original files, where 1 is the GELU between them."""

    def __init__(self, config: FluxConfig) -> None:
        inner, outer = Linear(config.hidden_size, config.mlp_hidden), Linear(config.mlp_hidden, config.hidden_size)
        super().__init__({"0": inner, "2": outer})

    @property
    def layers(self) -> tuple[Linear, Linear]:
        return cast(Linear, self["0"]), cast(Linear, self["2"])


class DoubleStreamBlock(nn.Module):
    """Text and image in separate streams that attend to each other."""

    def __init__(self, config: FluxConfig, name: str) -> None:
        super().__init__()
        self.units, self.modulation_unit, self.policy = (f"{name}.img", f"{name}.txt"), f"{name}.mod", "recompute"
        self.inside: Inside | None = None
        self.img_mod = Modulation(config.hidden_size, 6)
        self.img_attn = SelfAttention(config)
        self.img_mlp = MLP(config)
        self.txt_mod = Modulation(config.hidden_size, 6)
        self.txt_attn = SelfAttention(config)
        self.txt_mlp = MLP(config)

    def modulation_rows(self, vec: Tensor) -> Tensor:
        """(B, D) -> (B, 12 D): shift, scale, gate for attention, then for the MLP; first of the image, then of text."""
        return torch.cat([self.img_mod(vec), self.txt_mod(vec)], dim=-1)

    def forward(
        self, img: Tensor, txt: Tensor, rows: Tensor, cos: Tensor, sin: Tensor, mask: Mask = None
    ) -> tuple[Tensor, Tensor]:
        """img (B, Li, D), txt (B, Lt, D), rows (B, 12 D); cos, sin (B or 1, 1, Lt + Li, D/H/2), text first."""
        img_rows, txt_rows = rows[:, None].chunk(2, dim=-1)
        img_shift, img_scale, *img_rest = img_rows.chunk(6, dim=-1)
        txt_shift, txt_scale, *txt_rest = txt_rows.chunk(6, dim=-1)
        img_attn, txt_attn = self.img_attn, self.txt_attn

        # joint attention: all tokens attend to all tokens, or to those in the mask
        img, img_qkv = fork_qkv(img, img_shift, img_scale, img_attn.qkv)
        txt, txt_qkv = fork_qkv(txt, txt_shift, txt_scale, txt_attn.qkv)
        streams = [(txt_qkv, txt_attn.norm), (img_qkv, img_attn.norm)]
        attended = attention(*joint_qkv(streams, cos, sin), mask)  # (B, Lt + Li, D)
        txt_attended, img_attended = attended.split([txt.shape[1], img.shape[1]], dim=1)

        # each stream adds its attention output and its MLP
        img = add_attention_and_mlp(img, img_attended, img_rest, img_attn.proj, self.img_mlp)
        txt = add_attention_and_mlp(txt, txt_attended, txt_rest, txt_attn.proj, self.txt_mlp)
        return img, txt


def fork_qkv(x: Tensor, shift: Tensor, scale: Tensor, layer: Linear) -> tuple[Tensor, Tensor]:
    """One stream before attention: x, and `layer` of x modulated."""
    x, modulated = fork_modulate(x, shift, scale, layer.wants("qkv"))
    return x, layer(modulated, feeds="qkv")


def add_attention_and_mlp(x: Tensor, attended: Tensor, rows: Sequence[Tensor], proj: Linear, mlp: MLP) -> Tensor:
    """One stream after attention: x += gate1 proj(attended), then x += gate2 mlp(modulate(x))."""
    (gate1, shift, scale, gate2), (inner, outer) = rows, mlp.layers
    x, modulated = gated_add_modulate(x, gate1, proj(attended, feeds="residual"), shift, scale, inner.wants("hidden"))
    hidden = inner(modulated, feeds="hidden")
    return gated_add(x, gate2, outer(gelu_tanh(hidden, wants=outer.wants("end")), feeds="end"))


class SingleStreamBlock(nn.Module):
    """One joint stream, attention and MLP in parallel: `linear1` makes q, k, v and hidden, `linear2` takes both."""

    def __init__(self, config: FluxConfig, name: str) -> None:
        super().__init__()
        self.units, self.modulation_unit, self.policy = (name,), f"{name}.mod", "recompute"
        self.inside: Inside | None = None
        qkv, both = 3 * config.hidden_size, 3 * config.hidden_size + config.mlp_hidden
        self.linear1_parts = slice(0, qkv), slice(qkv, both)
        self.linear1 = Linear(config.hidden_size, both)
        self.linear2 = Linear(config.hidden_size + config.mlp_hidden, config.hidden_size)
        self.norm = QKNorm(config.head_dim)
        self.modulation = Modulation(config.hidden_size, 3)

    def modulation_rows(self, vec: Tensor) -> Tensor:
        """(B, D) -> (B, 3 D): shift, scale, gate."""
        return self.modulation(vec)

    def forward(self, x: Tensor, rows: Tensor, cos: Tensor, sin: Tensor, mask: Mask = None) -> Tensor:
        """x (B, L, D), text first; rows (B, 3 D); cos, sin (B or 1, 1, L, D/H/2); mask (B, L)."""
        shift, scale, gate = rows[:, None].chunk(3, dim=-1)
        x, modulated = fork_modulate(x, shift, scale, self.linear1.wants("qkv", "hidden"))
        qkv, hidden = self.linear1(modulated, ("qkv", "hidden"), self.linear1_parts)
        attended = attention(*joint_qkv([(qkv, self.norm)], cos, sin), mask)
        both = gelu_tanh(hidden, prepend=attended, wants=self.linear2.wants("end"))
        return gated_add(x, gate, self.linear2(both, feeds="end"))


class LastLayer(nn.Module):
    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        self.linear = Linear(config.hidden_size, config.out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(config.hidden_size, 2 * config.hidden_size))

    def modulation_rows(self, vec: Tensor) -> Tensor:
        """(B, D) -> (B, 2 D): shift, scale."""
        return self.adaLN_modulation(vec)

    def forward(self, x: Tensor, rows: Tensor) -> Tensor:
        """x (B, L, D), rows (B, 2 D) -> (B, L, out_channels)."""
        shift, scale = rows[:, None].chunk(2, dim=-1)
        return self.linear(modulate(x, shift, scale, self.linear.wants()))


Block = DoubleStreamBlock | SingleStreamBlock


def run_block(block: Block, ring: Ring, *inputs: Tensor, mask: Mask = None, offload: Pass | None = None) -> Any:
    """block(*inputs, mask) inside `ring.resident(block.units)`, forward and backward. inputs: streams, rows, cos, sin.

    For the backward pass it keeps the inputs and what the block's policy names (fluxq/kernels/replay.py). `offload`
    keeps the streams in host memory meanwhile (fluxq/offload/inputs.py).
    """
    tape = Tape(block.policy, gates=inputs[-NON_STREAMS].requires_grad)
    run = block if mask is None else partial(block, mask=mask)
    return _run(run, ring, block.units, _inside(block)[0], tape, inputs, offload)


def run_modulation(block: Block, ring: Ring, vec: Tensor) -> Tensor:
    """block.modulation_rows(vec) with the block's modulation unit resident, forward and backward."""
    return _run(block.modulation_rows, ring, (block.modulation_unit,), _inside(block)[1], Tape("recompute"), (vec,))


def _inside(block: Block) -> Inside:
    """Every module in the block with parameters of its own, without its modulation and within it; found once."""
    if block.inside is None:
        inner: Inside = [], []
        for child in block.children():
            inner[isinstance(child, Modulation)].extend(m for m in child.modules() if m._parameters)
        block.inside = inner
    return block.inside


def _run(
    run: Callable[..., Any],
    ring: Ring,
    units: Sequence[str],
    modules: Sequence[nn.Module],
    tape: Tape,
    inputs: tuple[Tensor, ...],
    offload: Pass | None = None,
) -> Any:
    """run(*inputs), which computes with the parameters of `modules` themselves, and with `units` of frozen weights.

    Parameters are arguments of the Function: captured by closure, they would get no gradient if no input needs one.
    """
    own = (p for module in modules for p in module._parameters.values())
    parameters = [p for p in own if p is not None and p.requires_grad]
    if not torch.is_grad_enabled() or not any(t.requires_grad for t in (*inputs, *parameters)):
        with ring.resident(units):
            return run(*inputs)
    return _Checkpoint.apply(run, lambda: ring.resident(units), tape, offload, len(inputs), *inputs, *parameters)


class _Checkpoint(torch.autograd.Function):
    """Gradient checkpointing: forward keeps the inputs and what the policy names; backward replays with gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        block: Callable[..., Any],
        resident: Callable[[], AbstractContextManager[None]],
        tape: Tape,
        offload: Pass | None,
        count: int,
        *tensors: Tensor,
    ) -> Tensor | tuple[Tensor, ...]:
        ctx.block, ctx.resident, ctx.tape, ctx.count = block, resident, tape, count
        streams = 0 if offload is None else count - NON_STREAMS
        ctx.take_back = tuple if offload is None else offload.store(tensors[:streams])
        ctx.save_for_backward(*tensors[streams:])
        with resident(), tape.record():
            return block(*tensors[:count])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[5:]
        saved = (*ctx.take_back(), *ctx.saved_tensors)
        inputs = [t.detach().requires_grad_(n) for t, n in zip(saved[: ctx.count], needed, strict=False)]
        with ctx.resident(), torch.enable_grad():
            with ctx.tape.replay():
                outputs = ctx.block(*inputs)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            pairs = zip(outputs, grad_outputs, strict=True)  # a stream that nothing trainable feeds has no gradient
            outputs, grads = zip(*((out, grad) for out, grad in pairs if out.requires_grad), strict=True)
            wanted = [t for t, n in zip((*inputs, *saved[ctx.count :]), needed, strict=True) if n]
            gradients = iter(torch.autograd.grad(outputs, wanted, grads, allow_unused=True))
        return (None, None, None, None, None, *(next(gradients) if n else None for n in needed))
