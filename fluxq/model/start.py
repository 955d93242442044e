"""Where a LoRA starts: fixed factors A0 (R, K) and B0 (N, R), from which its trained factors dA and dB count.

The LoRA is (B0 + dB)(A0 + dA). What training has changed is that less B0 A0, which is dB (A0 + dA) + B0 dA: a LoRA of
rank 2 R with down [A0 + dA; dA] and up [dB, B0]. Written so, nothing is subtracted: it is exactly zero at the start,
and rounding it to bf16 loses no more than in any other LoRA.

In that form a start also shows the gradient G (N, K) of the weight itself: at dA = dB = 0 the output does not depend
on A0 and B0, and the gradients of dB and dA are G A0^T and B0^T G, times the LoRA's scale. With random factors an
ordinary backward pass makes sketches of G from both sides (Halko, Martinsson and Tropp 2011), and G is never made.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

INITS = ("plain", "loftq", "lora_ga")
GAMMA = 16.0  # LoRA-GA's stable scale
EXTRA = 8  # how much wider than the factors sought a sketch is
ROUNDS = 2  # how often a sketch is improved by another product with its matrix


def counted_from(
    down: Tensor, up: Tensor, start_down: Tensor, start_up: Tensor, corrects: bool
) -> tuple[Tensor, Tensor]:
    """down and up of the LoRA whose trained factors `down` (R, K) and `up` (N, R) count from the start.

    corrects: the start counts too, so the rank is R; else only what training has changed, of rank 2 R.
    """
    if corrects:
        return start_down + down, start_up + up
    return torch.cat([start_down + down, down]), torch.cat([up, start_up.to(up.dtype)], 1)


def takes_start(init: str, path: str, shape: tuple[int, ...], rank: int) -> bool:
    """Whether the LoRA of the weight (N, K) at `path` can have the start that `init` names: LoftQ only if the weight is
    quantized, LoRA-GA if it has twice as many singular vectors as the rank.
    """
    if init == "loftq":
        return "_blocks." in path and rank <= min(shape)
    return init == "lora_ga" and 2 * rank <= min(shape)


def saved_ranks(init: str, keep_correction: bool) -> int:
    """How many times its rank a LoRA with a start has in the file: twice if it is the difference from the start."""
    return 1 if init == "plain" or keep_correction else 2


def planned_rank(init: str, rank: int) -> int:
    """The rank with which memory is planned: that of LoRA-GA's sketches is the highest of the run."""
    return sketch_rank(rank) if init == "lora_ga" else rank


def sketch_rank(rank: int) -> int:
    return 2 * rank + EXTRA


def lora_ga(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """LoRA-GA's down (R, K) and up (N, R) for a weight whose gradient G has the sketches left (N, Q) = G V and
    right (Q, K) = U^T G with random V and U, Q >= 2 R.

    down has the first R right singular vectors of G, up the next R left ones, so that the two do not undo each other;
    both in the paper's stable scale (Wang, Yu and Li 2024, algorithm 1).
    """
    size = len(left) ** 0.25 / math.sqrt(GAMMA)
    down, up = singular_vectors(right.t())[:, :rank].t(), singular_vectors(left)[:, rank : 2 * rank]
    return (down * size).contiguous(), (up * size).contiguous()


def singular_vectors(sketch: Tensor) -> Tensor:
    """The left singular vectors (N, Q) of `sketch` (N, Q), the most important first, fp32 on the CPU."""
    q, r = torch.linalg.qr(sketch.cpu().double())
    return (q @ torch.linalg.svd(r)[0]).float()


def low_rank(matrix: Tensor, rank: int, normal: Callable[..., Tensor]) -> tuple[Tensor, Tensor, float]:
    """down (R, K) and up (N, R) whose product is nearly the best of `rank` for `matrix` (N, K), fp32 on the CPU, and
    the share of its sum of squares that they have. normal(shape) draws standard normal numbers.
    """
    width = min(rank + EXTRA, *matrix.shape)
    vectors = normal((matrix.shape[1], width))
    for _ in range(ROUNDS):
        vectors = singular_vectors(matrix.t() @ (matrix @ vectors.to(matrix.device)))
    basis = singular_vectors(matrix @ vectors.to(matrix.device))
    left, values, right = torch.linalg.svd((basis.to(matrix.device).t() @ matrix).cpu(), full_matrices=False)
    root = values[:rank].sqrt()
    share = float(values[:rank].norm() / matrix.norm().clamp(min=1e-30)) ** 2
    return right[:rank] * root[:, None], (basis @ left[:, :rank]) * root, share
