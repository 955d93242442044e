"""How pytest-benchmark measures the cases of fluxq/bench/kernel_cases.py: what every benchmarks/bench_*.py is made of.

Each case is checked, then timed with the GPU's L2 emptied before each run. Without a GPU the reference runs on the
CPU, at the smallest size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import pytest
import torch

from fluxq.bench.kernel_cases import Case, case_of
from fluxq.bench.kernel_steps import Sizes, Step
from fluxq.bench.kernels import check
from fluxq.bench.timing import FLUSH_BYTES, timed

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GPU = DEVICE.type == "cuda"
TOKENS = (1536, 2816, 4608) if GPU else (1536,)  # 512 of text, and 512, 768 and 1024 px
SIZES = Sizes(DEVICE)
LAYERS = {  # (N, K)
    "qkv": (9216, 3072),
    "mlp_up": (12288, 3072),
    "mlp_down": (3072, 12288),
    "linear1": (21504, 3072),
    "linear2": (3072, 15360),
    "modulation": (18432, 3072),
}
OF_TOKENS = [layer for layer in LAYERS if layer != "modulation"] if GPU else ["qkv"]  # modulation has one row an image
SHAPES = [(layer, tokens) for layer in OF_TOKENS for tokens in TOKENS]
SIDES = ("ours", "reference", "copy") if GPU else ("ours", "copy")


def measured(
    makers: Mapping[str, Callable[[int], Step]], lengths: Sequence[int] = TOKENS
) -> tuple[Callable[..., None], Callable[..., None]]:
    """Two tests of the steps that `makers` make for a number of tokens: each side under pytest-benchmark; and all sides
    by turns, printed as shares of a copy of as many bytes.
    """

    @lru_cache(maxsize=1)
    def made(name: str, tokens: int) -> Case:
        case = case_of(makers[name](tokens))
        check(case)
        return case

    @pytest.mark.parametrize("side", SIDES)
    @pytest.mark.parametrize("name", makers)
    @pytest.mark.parametrize("tokens", lengths)
    def test_speed(benchmark: Any, tokens: int, name: str, side: str) -> None:
        benchmark.group = f"{name}, {tokens}"
        run(benchmark, sides(made(name, tokens))[side])
        benchmark.extra_info["gb_per_second"] = made(name, tokens).moved / benchmark.stats.stats.median / 1e9

    @pytest.mark.parametrize("name", makers)
    @pytest.mark.parametrize("tokens", lengths)
    def test_share_of_a_copy(tokens: int, name: str, capsys: Any) -> None:
        case = made(name, tokens)
        ms = {side: row["median"] for side, row in timed(sides(case), DEVICE).items()}
        with capsys.disabled():
            print(
                f"\n{name:40} {tokens} {ms['ours']:9.3f} ms, {case.moved / ms['ours'] / 1e6:7.1f} GB/s, "
                f"{ms['copy'] / ms['ours']:5.0%} of a copy's speed, {ms['reference'] / ms['ours']:5.2f}x plain PyTorch",
                end="",
            )

    return test_speed, test_share_of_a_copy


def of_weights(
    storage: Mapping[str, Callable[[Sizes, int, int], Step]], layers: Sequence[str]
) -> tuple[Callable[..., None], Callable[..., None]]:
    """The same of layers' weights, for which tokens do not matter."""
    makers = {f"{name}, {layer}": (make, LAYERS[layer]) for layer in layers for name, make in storage.items()}
    return measured({name: lambda _, m=make, w=weight: m(SIZES, *w) for name, (make, weight) in makers.items()}, (0,))


def of_tokens(make: Callable[[Sizes], Step]) -> Callable[[int], Step]:
    return lambda tokens: make(Sizes(DEVICE, tokens))


def sides(case: Case) -> dict[str, Callable[[], Any]]:
    return {"ours": case.run, "reference": case.expected, "copy": case.plain}


def run(benchmark: Any, call: Callable[[], Any], rounds: int = 50) -> None:
    """Let pytest-benchmark time `call` to the end of its work."""
    rounds = rounds if GPU else 5
    benchmark.pedantic(lambda: (call(), synchronize()), setup=flush, rounds=rounds, warmup_rounds=2 if GPU else 1)


def product(benchmark: Any, call: Callable[[], Any], layer: str, tokens: int, what: str) -> None:
    n, k = LAYERS[layer]
    benchmark.group = f"{layer} {tokens} tokens, {what}"
    benchmark.extra_info["tflop"] = 2 * tokens * n * k / 1e12
    run(benchmark, call, 30)


def synchronize() -> None:
    if GPU:
        torch.cuda.synchronize()


def flush() -> None:
    """Empty the GPU's L2 cache: nothing of a block's inputs is in it when a step begins."""
    if GPU:
        torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=DEVICE).zero_()
