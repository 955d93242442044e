"""FLUX as a plain trainable module, for pretraining nano on a CPU.

`fluxq.model.Flux` keeps its weights as frozen buffers, so it cannot be pretrained. This one is the same model with the
same key names (those of the original checkpoint files), but all parameters and no memory tricks. Shapes: B batch, L
tokens (text first), D width, H heads.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """The sizes that pretraining chooses; the rest of FLUX.1's config follows from them."""

    hidden: int = 192
    heads: int = 6
    mlp: int = 768
    depth: int = 2
    depth_single: int = 2
    channels: int = 64
    t5_width: int = 128
    clip_width: int = 64

    @property
    def axes(self) -> tuple[int, int, int]:
        """One head's channels for each of RoPE's three axes; (16, 56, 56) of 128 in FLUX.1."""
        head = self.hidden // self.heads
        return head // 8, 7 * head // 16, 7 * head // 16


class TrainableFlux(nn.Module):
    """Velocity (B, L_img, channels) for packed latents, T5 states and the pooled CLIP vector."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.shape, D = shape, shape.hidden
        self.img_in = nn.Linear(shape.channels, D)
        self.txt_in = nn.Linear(shape.t5_width, D)
        self.time_in = Embedder(256, D)
        self.guidance_in = Embedder(256, D)
        self.vector_in = Embedder(shape.clip_width, D)
        self.double_blocks = nn.ModuleList(DoubleBlock(shape) for _ in range(shape.depth))
        self.single_blocks = nn.ModuleList(SingleBlock(shape) for _ in range(shape.depth_single))
        self.final_layer = FinalLayer(shape)
        for name, parameter in self.named_parameters():
            if "mod" in name or name.startswith("final_layer"):  # each block starts as the identity (DiT)
                nn.init.zeros_(parameter)
            elif parameter.ndim == 2:
                nn.init.xavier_uniform_(parameter)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(
        self, img: Tensor, txt: Tensor, y: Tensor, t: Tensor, guidance: Tensor, rows: int, columns: int
    ) -> Tensor:
        """img (B, rows * columns, channels), txt (B, L_txt, t5_width), y (B, clip_width), t and guidance (B,)."""
        dtype = self.img_in.weight.dtype
        x, c = self.img_in(img.to(dtype)), self.txt_in(txt.to(dtype))
        vec = self.time_in(sinusoids(t).to(dtype)) + self.guidance_in(sinusoids(guidance).to(dtype))
        m = F.silu(vec + self.vector_in(y.to(dtype)))[:, None]
        rotation = rope(txt.shape[1], rows, columns, self.shape.axes)
        rotation = rotation[0].to(dtype), rotation[1].to(dtype)
        for block in self.double_blocks:
            x, c = block(x, c, m, rotation)
        stream = torch.cat((c, x), dim=1)
        for block in self.single_blocks:
            stream = block(stream, m, rotation)
        return self.final_layer(stream[:, txt.shape[1] :], m)


class Embedder(nn.Module):
    def __init__(self, inputs: int, D: int):
        super().__init__()
        self.in_layer, self.out_layer = nn.Linear(inputs, D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(F.silu(self.in_layer(x)))


class Modulation(nn.Module):
    def __init__(self, D: int, parts: int):
        super().__init__()
        self.lin, self.parts = nn.Linear(D, parts * D), parts

    def forward(self, m: Tensor) -> tuple[Tensor, ...]:
        return self.lin(m).chunk(self.parts, dim=-1)


class Scale(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))


class QKNorm(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.query_norm, self.key_norm = Scale(width), Scale(width)

    def forward(self, qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
        """qkv (B, L, 3D) -> q, k, v (B, H, L, D/H), queries and keys RMS-normalized per head."""
        q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        return (
            F.rms_norm(q, q.shape[-1:], self.query_norm.scale, 1e-6),
            F.rms_norm(k, k.shape[-1:], self.key_norm.scale, 1e-6),
            v,
        )


class SelfAttention(nn.Module):
    def __init__(self, D: int, heads: int):
        super().__init__()
        self.qkv, self.norm, self.proj = nn.Linear(D, 3 * D), QKNorm(D // heads), nn.Linear(D, D)


class DoubleBlock(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        D, self.heads = shape.hidden, shape.heads
        self.img_mod, self.txt_mod = Modulation(D, 6), Modulation(D, 6)
        self.img_attn, self.txt_attn = SelfAttention(D, shape.heads), SelfAttention(D, shape.heads)
        self.img_mlp, self.txt_mlp = (
            nn.Sequential(nn.Linear(D, shape.mlp), nn.GELU(approximate="tanh"), nn.Linear(shape.mlp, D))
            for _ in range(2)
        )

    def forward(self, x: Tensor, c: Tensor, m: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x_mod, c_mod = self.img_mod(m), self.txt_mod(m)
        x_q, x_k, x_v = self.img_attn.norm(self.img_attn.qkv(modulate(x, *x_mod[:2])), self.heads)
        c_q, c_k, c_v = self.txt_attn.norm(self.txt_attn.qkv(modulate(c, *c_mod[:2])), self.heads)
        q, k, v = (torch.cat(pair, dim=2) for pair in ((c_q, x_q), (c_k, x_k), (c_v, x_v)))
        c_o, x_o = attention(q, k, v, rotation).split((c.shape[1], x.shape[1]), dim=1)
        x = x + x_mod[2] * self.img_attn.proj(x_o)
        c = c + c_mod[2] * self.txt_attn.proj(c_o)
        x = x + x_mod[5] * self.img_mlp(modulate(x, *x_mod[3:5]))
        c = c + c_mod[5] * self.txt_mlp(modulate(c, *c_mod[3:5]))
        return x, c


class SingleBlock(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        D, self.heads, self.mlp = shape.hidden, shape.heads, shape.mlp
        self.modulation = Modulation(D, 3)
        self.linear1 = nn.Linear(D, 3 * D + shape.mlp)
        self.linear2 = nn.Linear(D + shape.mlp, D)
        self.norm = QKNorm(D // shape.heads)

    def forward(self, stream: Tensor, m: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        shift, scale, gate = self.modulation(m)
        qkv, mlp = self.linear1(modulate(stream, shift, scale)).split((3 * stream.shape[-1], self.mlp), dim=-1)
        q, k, v = self.norm(qkv, self.heads)
        o = attention(q, k, v, rotation)
        return stream + gate * self.linear2(torch.cat((o, F.gelu(mlp, approximate="tanh")), dim=-1))


class FinalLayer(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.linear = nn.Linear(shape.hidden, shape.channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(shape.hidden, 2 * shape.hidden))

    def forward(self, x: Tensor, m: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation[1](m).chunk(2, dim=-1)  # m already went through the SiLU
        return self.linear(modulate(x, shift, scale))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return (1 + scale) * F.layer_norm(x, x.shape[-1:], eps=1e-6) + shift


def attention(q: Tensor, k: Tensor, v: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """(B, H, L, D/H) three times -> (B, L, D).

    Not fused: at 68 tokens, the CPU's fused attention takes ten times as long backward, a third of a whole step.
    """
    scores = rotate(q, rotation) @ rotate(k, rotation).mT * q.shape[-1] ** -0.5
    return (scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2)


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = rotation  # (L, D/H/2)
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((cos * even - sin * odd, sin * even + cos * odd), dim=-1).flatten(-2)


def rope(text: int, rows: int, columns: int, axes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Cosines and sines (L, D/H/2): text tokens at the origin, image tokens at (0, row, column)."""
    ids = torch.zeros(text + rows * columns, 3, dtype=torch.float64)
    ids[text:, 1] = torch.arange(rows).repeat_interleave(columns)
    ids[text:, 2] = torch.arange(columns).repeat(rows)
    angles = torch.cat(
        [
            ids[:, axis, None] * 10000.0 ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
            for axis, width in enumerate(axes)
        ],
        dim=-1,
    )
    return angles.cos().float(), angles.sin().float()


def sinusoids(s: Tensor) -> Tensor:
    """(B,) -> (B, 256), cosines first; s is multiplied by 1000, as FLUX.1 does with t and guidance."""
    frequencies = torch.exp(-math.log(10000) * torch.arange(128) / 128)
    angles = 1000 * s.float()[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1)
