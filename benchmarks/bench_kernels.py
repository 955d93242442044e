"""The kernels' cases under pytest-benchmark, next to plain PyTorch, bitsandbytes and a copy of as many bytes.

    pytest benchmarks/bench_kernels.py -k "modulate and 2816" [--benchmark-...]

Each case (fluxq/bench/kernel_cases.py) is checked, then timed, the GPU's L2 flushed before each run. Without a GPU the
reference runs on the CPU at the smallest size. `make gpu-kernels` times the same cases against their targets.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import roofline
from fluxq.bench.closeness import twice_rule
from fluxq.bench.kernel_cases import LAYERS, KernelCase, Layer, layer_shape, linear_cases, product_case, step_case
from fluxq.bench.kernels import check
from fluxq.bench.memory_bound import EIGHT_BITS, ROWS, STEPS, STORAGE, Sizes, has_fp8
from fluxq.bench.timing import FLUSH_BYTES, timed
from fluxq.console import quiet_imports
from fluxq.kernels import FORMATS, attention, dequantize, quantize

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GPU = DEVICE.type == "cuda"
TOKENS = (1536, 2816, 4608) if GPU else (1536,)  # 512 of text, and 512, 768 and 1024 px
OF_TOKENS = [layer for layer in LAYERS if layer != "modulation"] if GPU else ["qkv"]  # modulation: a row per image
SHAPES = [*((layer, tokens) for layer in OF_TOKENS for tokens in TOKENS), ("modulation", 1)]
SIDES = ("ours", "plain", "copy") if GPU else ("ours", "copy")
PATHS = ("extended", "plain", "fused") if GPU else ("reference",)
BITS = [bits for bits in EIGHT_BITS if bits == "int8" or has_fp8(DEVICE)]
STEP_CASES = {
    f"{name}, {tokens}": partial(make, Sizes(DEVICE, tokens))
    for name, make in {**STEPS, **ROWS}.items()
    for tokens in TOKENS
} | {
    f"{name}, {layer}": partial(make, Sizes(DEVICE), *layer_shape(Sizes(DEVICE), layer))
    for name, make in STORAGE.items()
    for layer in OF_TOKENS
}


@lru_cache(maxsize=1)
def step(name: str) -> KernelCase:
    case = step_case(STEP_CASES[name]())
    check(case)
    return case


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", STEP_CASES)
def test_memory_bound(benchmark, name, side):
    case = step(name)
    benchmark.group = name
    run(benchmark, {"ours": case.run, "plain": case.plain, "copy": case.against}[side])
    if benchmark.enabled:
        benchmark.extra_info["gb_per_second"] = case.moved / benchmark.stats.stats.median / 1e9


@lru_cache(maxsize=1)
def layer_cases(layer: str, tokens: int, format: str) -> dict[str, KernelCase]:
    made = Layer.random(Sizes(DEVICE), (tokens, *layer_shape(Sizes(DEVICE), layer)), format)
    shape_class = "few" if tokens == 1 else "large"
    return dict(zip(("forward", "backward"), linear_cases(made, format, shape_class), strict=True))


@pytest.mark.parametrize("path", [*PATHS, "plain product"])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize(("layer", "tokens"), SHAPES)
def test_layer(benchmark, layer, tokens, direction, format, path):
    """With LoRA, on each path of the Triton backend; the plain product has a bf16 weight and no LoRA."""
    case = layer_cases(layer, tokens, format)[direction]
    if path == "plain product":
        product(benchmark, case.against, case, direction)
    elif direction == "backward" and path == "plain":
        pytest.skip("backward has no such path")
    else:
        with on_path(case, path):
            check(case)
            product(benchmark, case.run, case, direction)


def on_path(case: KernelCase, path: str) -> Any:
    if path == "reference":
        return nullcontext()
    from fluxq.kernels.triton import table

    return table.using(case.op, replace(table.choose(case.op, DEVICE, case.size), path=path))


@pytest.mark.parametrize("side", ["ours", "torch"])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("layer", "tokens"), SHAPES[:-1])
def test_8_bit_product(benchmark, layer, tokens, bits, side):
    """torch: the library's bare product, without scales by row."""
    shape = (tokens, *layer_shape(Sizes(DEVICE), layer))
    case = product_case(Sizes(DEVICE), bits, shape)
    if side == "ours":
        check(case)
    elif bits == "fp8" and not GPU:
        pytest.skip("PyTorch multiplies fp8 on GPUs only")
    product(benchmark, case.run if side == "ours" else roofline.product(bits, *shape, DEVICE), case, bits)


@lru_cache(maxsize=1)
def attention_operands(tokens: int, masked: bool) -> tuple[list[Tensor], Tensor | None]:
    """q, k, v and the gradient of the output, (B, H, L, D) with heads joined in memory; and which keys (B, L) exist."""
    torch.manual_seed(0)
    s, batch = Sizes(DEVICE), 1 + masked
    given = [s.randn(batch, tokens, s.heads if GPU else 2, 128).transpose(1, 2) for _ in range(4)]
    exist = torch.arange(tokens, device=DEVICE) >= torch.tensor([[0], [s.text // 2]], device=DEVICE)
    return given, exist if masked else None


def plain_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    out = F.scaled_dot_product_attention(q, k, v, None if mask is None else mask[:, None, None])
    return out.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("side", ["ours", "plain"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("tokens", TOKENS)
def test_attention(benchmark, tokens, masked, direction, side):
    """Next to F.scaled_dot_product_attention. Masked: two images, of which one has half as much text."""
    check_attention(tokens, masked)
    call = attention_passes({"ours": attention, "plain": plain_attention}[side], tokens, masked)[direction]
    benchmark.group = f"attention {'masked ' if masked else ''}{direction}, {tokens}"
    run(benchmark, call, 30)
    (q, *_), _ = attention_operands(tokens, masked)
    products = 2 if direction == "forward" else 5  # of q k^T's size; backward computes it again
    benchmark.extra_info["tflop"] = products * 2 * q.shape[0] * q.shape[1] * tokens**2 * 128 / 1e12


def attention_passes(attend: Callable[..., Tensor], tokens: int, masked: bool) -> dict[str, Callable[[], Any]]:
    """The forward pass with all that it keeps for the gradient; and the backward pass alone."""
    (*inputs, grad), mask = attention_operands(tokens, masked)
    leaves = [t.detach().requires_grad_() for t in inputs]
    out, dout = attend(*leaves, mask), grad.transpose(1, 2).flatten(2)
    return {
        "forward": lambda: attend(*leaves, mask),
        "backward": lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True),
    }


def check_attention(tokens: int, masked: bool, some: slice = slice(7, 39)) -> None:
    """Some rows of the output and of q's gradient, by the twice rule."""
    (*inputs, grad), mask = attention_operands(tokens, masked)
    q, k, v, dout = (t.double() for t in (inputs[0][:, :, some], *inputs[1:], grad[:, :, some]))
    exact = plain_attention(q.requires_grad_(), k, v, mask)
    (dq,) = torch.autograd.grad(exact, q, dout.transpose(1, 2).flatten(2))

    def rows(attend: Callable[..., Tensor]) -> list[Tensor]:
        passes = attention_passes(attend, tokens, masked)
        return [passes["forward"]().detach()[:, some], passes["backward"]()[0][:, :, some]]

    checked = twice_rule(rows(attention), rows(plain_attention), [exact.detach(), dq])
    assert checked["ok"], checked["errors"]


@pytest.fixture(scope="module")
def nf4_weight() -> Tensor:
    return (torch.randn(12288, 3072, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()


def test_nf4_against_bitsandbytes_on_the_cpu(nf4_weight, capsys):
    """The same bytes first; then bitsandbytes' time over ours, of alternating runs."""
    with quiet_imports():
        bnb = pytest.importorskip("bitsandbytes").functional
    theirs, state = bnb.quantize_4bit(nf4_weight, blocksize=64, quant_type="nf4")
    ours = quantize(nf4_weight, "nf4")
    assert torch.equal(ours.codes.flatten(), theirs.flatten()) and torch.equal(ours.absmax.flatten(), state.absmax)
    runs = {
        "quantize": lambda: quantize(nf4_weight, "nf4"),
        "bitsandbytes' quantize": lambda: bnb.quantize_4bit(nf4_weight, blocksize=64, quant_type="nf4"),
        "dequantize": lambda: dequantize(ours, torch.bfloat16),
        "bitsandbytes' dequantize": lambda: bnb.dequantize_4bit(theirs, state),
    }
    ms = {name: row["median"] for name, row in timed(runs, torch.device("cpu"), most=7).items()}
    with capsys.disabled():
        for name in ("quantize", "dequantize"):
            ours_ms, theirs_ms = ms[name], ms[f"bitsandbytes' {name}"]
            print(
                f"\nNF4 {name}, 12288 x 3072 bf16, {torch.get_num_threads()} threads: fluxq {ours_ms:.0f} ms, "
                f"bitsandbytes {theirs_ms:.0f} ms, ratio {theirs_ms / ours_ms:.1f}"
            )


def run(benchmark: Any, call: Callable[[], Any], rounds: int = 50) -> None:
    """Let pytest-benchmark time `call` to the end of its work."""
    rounds = rounds if GPU else 5
    benchmark.pedantic(lambda: (call(), synchronize()), setup=flush, rounds=rounds, warmup_rounds=2 if GPU else 1)


def product(benchmark: Any, call: Callable[[], Any], case: KernelCase, what: str) -> None:
    benchmark.group = f"{' x '.join(map(str, case.shape))}, {what}"
    benchmark.extra_info["tflop"] = case.operations / 1e12
    run(benchmark, call, 30)


def synchronize() -> None:
    if GPU:
        torch.cuda.synchronize()


def flush() -> None:
    """Empty the GPU's L2 cache: nothing of an op's inputs is in it when a step begins."""
    if GPU:
        torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=DEVICE).zero_()
