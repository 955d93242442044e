"""Products of 8-bit matrices on both backends: exact sums, scales, LoRA and bias in the epilogue."""

from __future__ import annotations

import importlib
from dataclasses import replace

import pytest
import torch
from helpers import relative_error

from fluxq.kernels import lora_linear, quantize, reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
KINDS = (torch.int8, torch.float8_e4m3fn)


@pytest.fixture(params=["reference", "triton"])
def matmul_8bit(request, device):
    """The op on each backend. On a GPU, torch multiplies int8 only for some shapes; the reference is skipped."""
    if request.param == "triton":
        return request.getfixturevalue("triton_ops").matmul_8bit
    if device.type == "cuda":
        pytest.skip("the reference runs on the CPU")
    return reference.matmul_8bit


@pytest.fixture(params=KINDS, ids=["int8", "fp8"])
def kind(request, device):
    if request.param != torch.int8 and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        pytest.skip("this GPU has no fp8")
    return request.param


def factors(kind, device, m=33, n=97, k=208):
    a, a_scale = reference.row_quantize(torch.randn(m, k), kind)
    b, b_scale = reference.row_quantize(torch.randn(n, k), kind)
    return tuple(t.to(device) for t in (a, a_scale, b, b_scale))


def truth(a, a_scale, b, b_scale, s=None, up=None, bias=None):
    y = a.double() @ b.double().t() * a_scale.double()[:, None]
    y = y if b_scale is None else y * b_scale.double()
    y = y if s is None else y + s.double() @ up.double().t()
    return y if bias is None else y + bias.double()


def bound(dtype, device):
    """A rounding to `dtype`; the interpreter's casts to bf16 truncate, which is twice that."""
    eps = torch.finfo(dtype).eps / 2
    return max(eps, 1e-6) * (2 if dtype == torch.bfloat16 and device.type == "cpu" else 1)


@pytest.mark.parametrize("rank", [1, 5, 16])
def test_up_by_rows_or_columns_is_scaled_and_all_of_it_may_be_added(matmul_8bit, kind, rank, device):
    a, a_scale, b, b_scale = factors(kind, device)
    s, up, before = (torch.randn(n, m, device=device) for n, m in ((33, rank), (97, rank), (33, 97)))
    for given in (up, up.t().contiguous().t()):
        onto = before.clone()
        y = matmul_8bit(a, a_scale, b, b_scale, torch.float32, s, given, None, 0.3, onto)
        assert y.data_ptr() == onto.data_ptr()
        assert relative_error(y, truth(a, a_scale, b, b_scale, s, 0.3 * up) + before) < 1e-3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [192, 208])
def test_sums_are_exact_and_rounded_once(matmul_8bit, kind, dtype, k, device):
    a, a_scale, b, b_scale = factors(kind, device, k=k)
    y = matmul_8bit(a, a_scale, b, b_scale, dtype)
    # Before sm_100, fp8 units keep 22 bits of a sum.
    slack = 2e-4 if kind != torch.int8 and device.type == "cuda" else 0
    assert y.shape == (33, 97) and y.dtype == dtype
    assert relative_error(y, truth(a, a_scale, b, b_scale)) < bound(dtype, device) + slack


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "rank", "s_dtype"),
    [
        *[(torch.float32, rank, None) for rank in (1, 5, 16, 40)],
        *[(dtype, rank, s) for dtype in DTYPES[1:] for rank in (5, 40) for s in (torch.float32, None)],
    ],
)
def test_lora_and_bias_are_added_in_fp32(matmul_8bit, kind, dtype, rank, s_dtype, device):
    """s and up of any float dtype; plain PyTorch rounds them to `dtype`, and a kernel may too."""
    operands = factors(kind, device)
    s = (torch.randn(33, rank) * 9).to(device, s_dtype or dtype)
    up, bias = torch.randn(97, rank).to(device, dtype), torch.randn(97).to(device, dtype)
    y = matmul_8bit(*operands, dtype, s, up, bias)
    slack = 2e-4 if kind != torch.int8 and device.type == "cuda" else 0
    assert relative_error(y, truth(*operands, s, up, bias)) < 3 * bound(dtype, device) + slack


def test_the_gradients_call_has_no_column_scale_and_a_transposed_up(matmul_8bit, kind, device):
    """dx = (dy scale) W + ds down: `up` is down^T, which is not contiguous along the rank."""
    a, a_scale, b, _ = factors(kind, device)
    ds, down = torch.randn(33, 5, device=device), torch.randn(5, 97, device=device)
    y = matmul_8bit(a, a_scale, b, None, torch.float32, ds, down.t())
    assert relative_error(y, truth(a, a_scale, b, None, ds, down.t())) < 2e-4


def test_rows_may_be_strided(matmul_8bit, kind, device):
    a, a_scale, b, b_scale = factors(kind, device, k=256)
    expected = truth(a[:, :192], a_scale, b[:, :192], b_scale)
    y = matmul_8bit(a[:, :192], a_scale, b[:, :192], b_scale, torch.float32)
    assert relative_error(y, expected) < 2e-4


@pytest.mark.parametrize("k", [512, 1552, 15360])
def test_long_sums_do_not_shrink(matmul_8bit, kind, k, device):
    """All products are positive, so that a sum that is truncated as it grows comes out small."""
    a, b = (reference.row_quantize(torch.rand(n, k), kind) for n in (17, 33))
    operands = [t.to(device) for t in (*a, *b)]
    y, expected = matmul_8bit(*operands, torch.float32), truth(*operands)
    assert abs(float((y.double() / expected).mean()) - 1) < 1e-3


@pytest.mark.parametrize(("every", "low", "high"), [(15360, 0.005, 0.02), (None, 0, 1e-3)], ids=["never", "promoted"])
def test_promotion_keeps_sums_of_22_bits_from_shrinking(every, low, high):
    """The design, simulated: a tensor core adds 32 products at a time and truncates the sum to 13 bits of mantissa."""
    pytest.importorskip("triton")
    every = every or importlib.import_module("fluxq.kernels.triton.matmul_8bit").PROMOTED
    a, b = (torch.rand(64, 15360).to(torch.float8_e4m3fn).double() for _ in range(2))
    total, part = torch.zeros(64), torch.zeros(64)
    for start in range(0, 15360, 32):
        exact = part.double() + (a[:, start : start + 32] * b[:, start : start + 32]).sum(1)
        part = (exact.float().view(torch.int32) & -(1 << 10)).view(torch.float32)  # fp32 has 23 bits
        if (start + 32) % every == 0:
            total, part = total + part, torch.zeros(64)
    shrink = 1 - float(((total + part).double() / (a * b).sum(1)).mean())
    assert low <= shrink < high


@pytest.mark.parametrize("k", [192, 208])
@pytest.mark.parametrize("dx", [False, True])
def test_scaled_blocks_give_the_same_products(triton_ops, device, dx, k):
    """Only RTX 50 and similar GPUs multiply this way; every block's scale is 1."""
    from fluxq.kernels.triton import table

    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (12, 0):
        pytest.skip("this GPU has no products in scaled blocks")
    a, a_scale, b, b_scale = factors(torch.float8_e4m3fn, device, k=k)
    arguments = (a, a_scale, b, None if dx else b_scale, torch.float32)
    arguments += (torch.randn(33, 5, device=device), torch.randn(97, 5, device=device))
    scaled = replace(table.choose("matmul_fp8", device), path="scaled")
    with table.using("matmul_fp8", scaled):
        y = triton_ops.matmul_8bit(*arguments)
    assert relative_error(y, truth(*arguments[:4], *arguments[5:])) < 2e-4
    torch.testing.assert_close(y, triton_ops.matmul_8bit(*arguments), rtol=1e-5, atol=1e-5 * float(y.abs().max()))


@pytest.mark.parametrize("compute", ["int8_dx", "fp8_dx"])
def test_both_backends_agree(triton_ops, compute, device):
    """Forward and every gradient of lora_linear, at batch 2 and more than 64 rows."""
    from fluxq.kernels import backend

    if compute == "fp8_dx" and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        pytest.skip("this GPU has no fp8")
    weight = quantize(torch.randn(40, 192) / 14, "nf4")
    x = torch.randn(2, 40, 192, requires_grad=True)
    down, up = torch.randn(5, 192, requires_grad=True), torch.randn(40, 5, requires_grad=True)
    bias, dy = torch.randn(40), torch.randn(2, 40, 40)
    results = []
    for name, place in (("triton", device), ("reference", torch.device("cpu"))):
        w = type(weight)(weight.codes.to(place), weight.absmax.to(place))
        with backend(name):
            leaves = [t.detach().to(place).requires_grad_() for t in (x, down, up)]
            y = lora_linear(leaves[0], w, bias.to(place), *leaves[1:], 0.7, compute)
            results.append([y.detach(), *torch.autograd.grad(y, leaves, dy.to(place))])
    for ours, theirs in zip(*results, strict=True):
        assert relative_error(ours.cpu(), theirs) < 1e-3


def test_a_gpu_without_fp8_says_so(triton_ops, monkeypatch):
    module = importlib.import_module("fluxq.kernels.triton.matmul_8bit")
    monkeypatch.setattr(module, "generation", lambda device: 86)
    a = torch.zeros(1, 64).to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="cannot multiply in fp8"):
        module.matmul_8bit(a, torch.ones(1), a, None, torch.float32)
