"""Every path of the Triton backend's linear layer: forward and backward, every format, against fp64."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from helpers import relative_error
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from fluxq.kernels import Activations, lora_linear, quantize, reference, wants
from fluxq.kernels.chunks import CHUNKS, chunk_of, padding, parts

triton = pytest.importorskip("triton")


from fluxq.kernels.triton import linear, table  # noqa: E402
from fluxq.kernels.triton.shipped import SHIPPED  # noqa: E402

FORMATS = ("nf4", "fp8", "int8", "bf16")
CASES = [  # every format, every dtype, and NF4, which is what most will use, in all
    *[("nf4", dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16)],
    *[("fp8", torch.bfloat16), ("int8", torch.float16), ("bf16", torch.float32), ("bf16", torch.bfloat16)],
]
N, K = 160, 192


@pytest.fixture(autouse=True)
def _on_device(triton_ops, device):
    with torch.device(device):
        yield


class Layer:
    """Random operands, and the results in fp64 and of plain PyTorch in their dtype."""

    def __init__(self, format, dtype, rows=(2, 50), rank=5, bias=True, n=N, k=K):
        self.weight = quantize(torch.randn(n, k) / k**0.5, format)
        if format == "bf16":
            self.weight = self.weight.to(dtype)
        self.x = torch.randn(*rows, k, dtype=dtype)
        self.bias = torch.randn(n, dtype=dtype) if bias else None
        self.down, self.up = torch.randn(rank, k, dtype=dtype) / k**0.5, torch.randn(n, rank, dtype=dtype)
        self.dy = torch.randn(*rows, n, dtype=dtype)
        self.scale = 0.7

    def answers(self, dtype):
        """y, s, dx, d_down, d_up."""
        w = reference.dequantize(self.weight, dtype)
        x, down, up, dy = (t.to(dtype) for t in (self.x, self.down, self.up, self.dy))
        bias = None if self.bias is None else self.bias.to(dtype)
        y, s = reference.lora_linear(x, w, bias, down, up, self.scale)
        return y, s, *reference.lora_linear_backward(dy, w, x, s, down, up, self.scale)

    def padded(self):
        """x with NaN in the padding behind each row."""
        columns = padding(len(self.down))
        wide = self.x.new_full((*self.x.shape[:-1], self.x.shape[-1] + columns), torch.nan)
        wide[..., : self.x.shape[-1]] = self.x
        return wide

    def run(self, x):
        args = (self.down, self.up, self.scale)
        y, s = linear.lora_linear(x, self.weight, self.bias, *args)
        return y, s, *linear.lora_linear_backward(self.dy, self.weight, x, s, *args)


def check(layer, results, slack=2.0):
    """Errors against fp64 at most twice plain PyTorch's."""
    k = layer.x.shape[-1]
    y, s, dx, *rest = results
    assert dx[..., k:].isfinite().all()
    for name, result, truth, plain in zip(
        ("y", "s", "dx", "d_down", "d_up"),
        (y, s, dx[..., :k], *rest),
        layer.answers(torch.float64),
        layer.answers(layer.x.dtype),
        strict=True,
    ):
        assert result.shape == truth.shape, name
        ours, theirs = relative_error(result, truth), relative_error(plain, truth)
        floor = torch.finfo(result.dtype).eps / 8
        assert ours <= slack * theirs + floor, f"{name}: {ours:.2e}, plain {theirs:.2e}"


class Launches(TorchDispatchMode):
    """Counts the GPU's launches inside it: kernels, and PyTorch operations that are not views."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.counts = Counter()
        run = triton.runtime.interpreter.GridExecutor.__call__

        def counted(executor, *args, **kwargs):
            self.counts[executor.fn.__name__] += 1
            with _disable_current_modes():
                return run(executor, *args, **kwargs)

        monkeypatch.setattr(triton.runtime.interpreter.GridExecutor, "__call__", counted)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not view and "empty" not in name:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def taking(path, format, **changes):
    """The table row for large shapes, with that path."""
    op = f"lora_linear_{format}"
    choice = table.choose(op, torch.empty(0).device, 1000)
    return table.using(op, replace(choice, path=path, **changes))


@pytest.mark.parametrize(("format", "dtype", "rank"), [*((*case, 40) for case in CASES), (*CASES[0], 32)])
def test_extended(format, dtype, rank):
    """One product for base, LoRA and bias."""
    layer = Layer(format, dtype, rank=rank)
    with taking("extended", format, chunk=64 * K):
        check(layer, layer.run(layer.padded()))


def test_extended_launches_only_products_decoding_and_extension(monkeypatch, device):
    """In three parts forward and three backward, with a LoRA in fp32. On a CPU, d_down and d_up are also cast."""
    if device.type == "cuda":
        pytest.skip("the interpreter counts")
    layer = Layer("nf4", torch.bfloat16)
    layer.up, x, launches = layer.up.float(), layer.padded(), Launches(monkeypatch)
    args = (layer.down, layer.up, layer.scale)
    with taking("extended", "nf4", chunk=64 * K), launches:
        _, s = linear.lora_linear(x, layer.weight, layer.bias, *args)
        forward, launches.counts = launches.counts, Counter()
        linear.lora_linear_backward(layer.dy, layer.weight, x, s, *args)
    assert forward == {"mm": 4, "_fill_padding": 1, "_convert": 3}
    del launches.counts["_to_copy"]
    assert launches.counts == {"mm": 5, "_convert": 3, "addmm_": 1, "mul_": 1}


@pytest.mark.parametrize("up", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("path", ["extended", "plain", "fused"])
def test_up_may_be_wider_than_the_input(path, up):
    layer = Layer("nf4", torch.bfloat16)
    exact = layer.up.float() + 2**-12 * torch.randn_like(layer.up.float())
    with taking(path, "nf4"):
        layer.up = exact.to(up)
        x = layer.padded() if path == "extended" else layer.x
        y, _, dx, *_ = layer.run(x)
        layer.up = exact.bfloat16()
        expected, _, dx_expected, *_ = layer.run(x)
    assert y.dtype == dx.dtype == torch.bfloat16
    assert relative_error(y, expected) < 2**-7 and relative_error(dx[..., :K], dx_expected[..., :K]) < 2**-7


@pytest.mark.parametrize(("format", "dtype", "padding"), [*((*case, True) for case in CASES), (*CASES[0], False)])
def test_plain(format, dtype, padding):
    layer = Layer(format, dtype)
    with taking("plain", format, chunk=64 * K):
        check(layer, layer.run(layer.padded() if padding else layer.x))


@pytest.mark.parametrize(
    ("format", "dtype", "rank", "k"), [*((*case, 40, K) for case in CASES), *((*case, 3, 320) for case in CASES[::6])]
)
def test_fused(format, dtype, rank, k, device):
    layer = Layer(format, dtype, rows=(2, 33), rank=rank, n=97, k=k)
    with taking("fused", format, block_m=32, block_n=32, block_k=128 if k == 320 else 64):
        check(layer, layer.run(layer.padded()), slack=2.0 if device.type == "cuda" else 4.0)  # casts truncate there


def test_fused_reads_a_ragged_end_of_k_as_zeros():
    """The padding behind K holds NaN."""
    layer = Layer("int8", torch.float32, rows=(33,), n=97, k=200)
    with taking("fused", "int8", block_m=32, block_n=32, block_k=64):
        check(layer, layer.run(layer.padded()))


@pytest.mark.parametrize(("format", "rows"), [*((format, 33) for format in FORMATS), ("nf4", 1)])
def test_few_rows(format, rows, device):
    layer = Layer(format, torch.bfloat16, rows=(rows,), n=97)
    check(layer, layer.run(layer.x), slack=2.0 if device.type == "cuda" else 4.0)


@pytest.mark.parametrize(
    ("format", "rows", "bias"),
    [*((format, (2, 50), True) for format in FORMATS), ("nf4", (20,), True), ("nf4", (2, 50), False)],
)
def test_without_lora(format, rows, bias):
    layer = Layer(format, torch.float32, rows=rows, bias=bias)
    y, s = linear.lora_linear(layer.x, layer.weight, layer.bias, None, None, 1.0)
    dx, *none = linear.lora_linear_backward(layer.dy, layer.weight, None, None, None, None, 1.0)
    w = reference.dequantize(layer.weight, torch.float64)
    torch.testing.assert_close(
        y.double(),
        torch.nn.functional.linear(layer.x.double(), w, None if not bias else layer.bias.double()),
        atol=1e-5,
        rtol=1e-5,
    )
    torch.testing.assert_close(dx.double(), layer.dy.double() @ w, atol=1e-5, rtol=1e-5)
    assert s is None and none == [None, None]


@pytest.mark.parametrize("path", ["extended", "plain", "fused"])
def test_rows_may_be_strided_and_gradients_expanded(path):
    """x as a part of a joint sequence, dy as columns of a wider matrix, dy expanded from one number."""
    layer = Layer("nf4", torch.float32)
    joint = torch.full((2, 70, K + 32), torch.nan)
    joint[:, 20:, :K] = layer.x
    layer.dy = torch.randn(2, 50, N + 9)[..., 4 : 4 + N]
    with taking(path, "nf4"):
        check(layer, layer.run(joint[:, 20:]))
        layer.dy = torch.randn(1, 1, 1).expand(2, 50, N)
        check(layer, layer.run(layer.padded()))


@pytest.mark.parametrize("path", ["extended", "plain"])
def test_chunk_zero_is_everything(path):
    layer = Layer("bf16", torch.float32)
    with taking(path, "bf16", chunk=0):
        check(layer, layer.run(layer.padded()))


def test_operands_may_be_transposed():
    layer = Layer("nf4", torch.float32, rows=(40,))
    layer.up = layer.up.t().contiguous().t()
    with taking("fused", "nf4"):
        check(layer, layer.run(layer.x.t().contiguous().t()))


def test_gradients_of_lora_alone():
    """If nothing upstream is trained, the input's gradient is not computed."""
    layer = Layer("nf4", torch.bfloat16)
    _, s, _, *expected = layer.answers(torch.float64)
    x = layer.padded()
    _, s = linear.lora_linear(x, layer.weight, layer.bias, layer.down, layer.up, layer.scale)
    dx, *grads = linear.lora_linear_backward(layer.dy, None, x, s, layer.down, layer.up, layer.scale)
    assert dx is None
    for grad, truth in zip(grads, expected, strict=True):
        assert grad.dtype == torch.float32
        assert relative_error(grad, truth) < 2**-7


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_both_backends_have_the_same_gradients(format):
    """Through autograd, with the padding that the layer wants."""
    layer = Layer(format, torch.float32, rank=6)
    down, up = layer.down.requires_grad_(), layer.up.requires_grad_()
    asked = wants("bf16", down, layer.x)
    assert asked.padding == 32

    def gradients(x):
        leaf = x.requires_grad_()
        y = lora_linear(Activations(leaf * 1), layer.weight, layer.bias, down, up, layer.scale)
        return torch.autograd.grad((y * layer.dy).sum(), (leaf, down, up))

    wide, *ours = gradients(layer.padded().nan_to_num())
    x, *theirs = gradients(layer.x)
    for a, b in zip((wide[..., :K], *ours), (x, *theirs), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_layers_may_share_a_padded_input():
    """The single block's first layer is called twice on one input, for two parts of its rows; here the second has a
    LoRA of its own, too, so that each call's x down^T must outlive the other's.
    """
    first, second = Layer("nf4", torch.float32, rank=6), Layer("nf4", torch.float32, rank=9)
    loras = [t.requires_grad_() for layer in (first, second) for t in (layer.down, layer.up)]

    def gradients(x):
        leaf = x.requires_grad_()
        shared = Activations(leaf * 1)
        a = lora_linear(shared, first.weight, first.bias, *loras[:2], 0.7)
        b = lora_linear(shared, second.weight, second.bias, *loras[2:], 0.7)
        return torch.autograd.grad((a * first.dy).sum() + (b * second.dy).sum(), (leaf, *loras))

    wide, *ours = gradients(first.padded().nan_to_num())
    x, *theirs = gradients(first.x)
    for a, b in zip((wide[..., :K], *ours), (x, *theirs), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("n", "k"), [(9216, 3072), (12288, 3072), (3072, 15360), (18432, 3072), (160, 192), (33, 64)])
def test_parts_are_even_and_of_about_one_size(n, k):
    chunk = 9 << 20
    for length, width in ((n, k), (k, n)):
        cut = list(parts(length, width, chunk))
        assert [p.start for p in cut] == [0, *(p.stop for p in cut[:-1])] and cut[-1].stop == length
        sizes = [p.stop - p.start for p in cut]
        assert all(size % 64 == 0 for size in sizes[:-1])
        assert max(sizes) * width <= chunk + 64 * width and min(sizes) >= max(sizes) // 2
        assert list(parts(length, width, 0)) == [slice(0, length)]


def test_there_is_one_scratch_and_it_grows():
    linear._scratches.clear()
    like = torch.empty(1)
    small = linear._scratch(10, 64, like)
    assert linear._scratch(5, 128, like).data_ptr() == small.data_ptr()
    assert linear._scratch(20, 64, like).shape == (20, 64)
    assert [memory.numel() for memory, _ in linear._scratches.values()] == [20 * 64]


def test_padding_is_a_multiple_of_32_and_has_a_column_for_the_bias():
    assert [padding(rank) for rank in (1, 16, 31, 32, 64, 100, 128)] == [32, 32, 32, 64, 96, 128, 160]


@pytest.mark.parametrize(("path", "products"), [("extended", 1), ("plain", 3)])
def test_a_bias_without_lora_takes_one_product_unless_the_table_says_otherwise(path, products, monkeypatch):
    layer, calls, product = Layer("nf4", torch.float32), [], linear._product
    monkeypatch.setattr(linear, "_product", lambda *a: calls.append(1) or product(*a))
    with taking(path, "nf4", chunk=64 * K):
        linear.lora_linear(layer.x, layer.weight, layer.bias, None, None, 1.0)
    assert len(calls) == products


def test_memory_predictions_use_the_chunks_of_the_table():
    for generation, chunk in CHUNKS.items():
        for op in ("lora_linear_nf4", "lora_linear_int8", "lora_linear_backward_nf4", "lora_linear_backward_fp8"):
            assert SHIPPED[op, generation, "large"].chunk == chunk
        assert chunk_of(generation) == chunk
    assert [chunk_of(capability) for capability in (75, 88, 100, 121)] == [CHUNKS[c] for c in (80, 89, 90, 120)]
