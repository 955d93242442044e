"""Norm and RoPE of queries and keys, streams joined: against plain formulas in fp64, on either backend."""

from __future__ import annotations

import pytest
import torch
from closeness import DTYPES, assert_as_close_as_plain

from fluxq.kernels import backend, ops, qk_norm_rope


def angles(batch, length, width, device):
    """cos and sin (B, 1, L, W/2) fp32 of random angles."""
    angle = torch.rand(batch, 1, length, width // 2, device=device) * 7
    return angle.cos(), angle.sin()


def norms(count, width, device):
    """Pairs of scales around 1, of either sign."""
    return [
        [(torch.randn(width) * 0.2 + sign).to(device, torch.bfloat16).float() for sign in (1, -1)] for _ in range(count)
    ]


def by_matrices(qkvs, scales, cos, sin):
    """Each head normed, then each pair of numbers times its own 2 x 2 matrix."""
    turn = torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], -2)  # (B, 1, L, W/2, 2, 2)
    parts = [
        qkv.unflatten(-1, (3, -1, len(pair[0]))).permute(2, 0, 3, 1, 4) for qkv, pair in zip(qkvs, scales, strict=True)
    ]
    joined = []
    for i in range(2):
        x = torch.cat(
            [
                part[i] / (part[i].pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * pair[i]
                for part, pair in zip(parts, scales, strict=True)
            ],
            2,
        )
        joined.append((turn @ x.unflatten(-1, (-1, 2))[..., None])[..., 0].flatten(-2))
    return *joined, torch.cat([part[2] for part in parts], 2)


def faces(scales, cos, sin, invertible=True):
    def run(*qkvs):
        streams = [(qkv, *(s.to(qkv.dtype) for s in pair)) for qkv, pair in zip(qkvs, scales, strict=True)]
        return qk_norm_rope(streams, cos, sin, invertible)

    def plain(*qkvs):
        """As FLUX's own code does it: in fp32, rounded at the end."""
        return [t.to(qkvs[0].dtype) for t in by_matrices([qkv.float() for qkv in qkvs], scales, cos, sin)]

    def exact(*qkvs):
        return by_matrices(qkvs, [[s.double() for s in pair] for pair in scales], cos.double(), sin.double())

    return run, plain, exact


@pytest.mark.parametrize("invertible", [True, False])
@pytest.mark.parametrize(
    ("batch", "lengths", "heads", "width", "shared", "dtype"),
    [
        *((2, (5, 12), 3, 32, False, dtype) for dtype in DTYPES),
        (1, (33,), 3, 32, True, torch.float16),
        (2, (4, 7), 2, 128, True, torch.bfloat16),
        (1, (3, 2), 1, 16, True, torch.float32),
    ],
)
def test_queries_keys_values_and_their_gradients(
    either_backend, device, batch, lengths, heads, width, shared, dtype, invertible
):
    cos, sin = angles(1 if shared else batch, sum(lengths), width, device)
    qkvs = [torch.randn(batch, length, 3 * heads * width, device=device) * 2 for length in lengths]
    run, plain, exact = faces(norms(len(lengths), width, device), cos, sin, invertible)
    slack = 1.5 if invertible else 1.0  # q and k were rounded before they are turned back
    assert_as_close_as_plain(run, plain, exact, qkvs, dtype, slack)


@pytest.mark.slow
def test_gradients_in_fp64():
    cos, sin = (t.double() for t in angles(1, 5, 4, "cpu"))
    qkvs = [torch.randn(2, length, 24, dtype=torch.float64, requires_grad=True) for length in (2, 3)]
    scales = [[s.double() for s in pair] for pair in norms(2, 4, "cpu")]
    for invertible in (True, False):
        run = faces(scales, cos, sin, invertible)[0]
        with backend("reference"):
            assert torch.autograd.gradcheck(lambda *t: torch.cat(run(*t)), qkvs)  # noqa: B023


def test_a_scale_of_zero_needs_the_inputs(either_backend, device):
    cos, sin = angles(1, 9, 32, device)
    scales = norms(1, 32, device)
    scales[0][0][3] = 0
    qkv = torch.randn(2, 9, 192, device=device)
    run, plain, exact = faces(scales, cos, sin, invertible=False)
    assert_as_close_as_plain(run, plain, exact, [qkv], torch.float32)


def test_buffers_are_joint_and_their_rows_hold_all_heads(either_backend, device):
    """As attention reads them: (B, H, L, W) views of (B, L, H, W) memory; and 1 / rms of queries and keys."""
    cos, sin = angles(1, 9, 32, device)
    scales = norms(2, 32, device)
    qkvs = [torch.randn(2, length, 288, device=device) for length in (4, 5)]
    streams = [(qkv, *pair) for qkv, pair in zip(qkvs, scales, strict=True)]
    *joint, rstd = ops(cos).qk_norm_rope(streams, cos, sin)
    assert all(t.shape == (2, 3, 9, 32) and t.transpose(1, 2).is_contiguous() for t in joint)
    heads = torch.cat(qkvs, 1).unflatten(-1, (3, 3, 32)).double()
    expected = (heads.square().mean(-1) + 1e-6).rsqrt()[:, :, :2].permute(2, 0, 1, 3)
    torch.testing.assert_close(rstd.double(), expected, rtol=1e-5, atol=0)
    assert rstd.dtype == torch.float32


def test_rows_and_gradients_of_any_stride_are_accepted(either_backend, device):
    cos, sin = angles(1, 9, 32, device)
    ((q_scale, k_scale),) = norms(1, 32, device)
    wide = torch.randn(2, 11, 400, device=device)
    qkv = wide[:, 2:, 56:344]
    q, k, v, rstd = ops(cos).qk_norm_rope([(qkv, q_scale, k_scale)], cos, sin)
    expected = ops(cos).qk_norm_rope([(qkv.contiguous(), q_scale, k_scale)], cos, sin)
    torch.testing.assert_close((q, k, v, rstd), expected)

    grads = [torch.randn(2, 3, 9, 32, device=device) for _ in range(3)]  # (B, H, L, W) memory
    by_token = [g.transpose(1, 2).contiguous().transpose(1, 2) for g in grads]
    expanded = [torch.ones((), device=device).expand(2, 3, 9, 32)] * 3
    rest = (rstd, [(q_scale, k_scale)], [9], cos, sin, None)
    backward = ops(cos).qk_norm_rope_backward
    torch.testing.assert_close(backward(*grads, q, k, *rest), backward(*by_token, q, k, *rest))
    ones = [torch.ones(2, 3, 9, 32, device=device)] * 3
    torch.testing.assert_close(backward(*expanded, q, k, *rest), backward(*ones, q, k, *rest))
    kept = backward(*grads, q, k, *rest[:-1], [qkv])
    torch.testing.assert_close(kept, backward(*grads, q, k, *rest), atol=1e-5, rtol=1e-4)
