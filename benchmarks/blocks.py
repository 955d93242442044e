"""One double and one single block of FLUX.1 dev, forward and backward: first checked, then timed, with peak bytes.

    python3 -m benchmarks.blocks --out DIR [--rows 1536 4608] [--only "double"]
    python3 -m benchmarks.blocks --device cpu --tiny --out DIR          only to try the script

Ours over NF4 with LoRA of rank 16: every policy and compute, and the reference in plain PyTorch. Compared with
diffusers' block with bitsandbytes' NF4 and peft's LoRA in bf16, eager, checkpointed and under torch.compile, with the
same weights and LoRA. Correct means: in bf16 at most twice the error of plain autograd against fp32, in 8 bits a cosine
of at least 0.99. CPU time counts. `bound_ms` is the time of the products alone at the GPU's best rates.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks.cases import Case, last_only, parser, run_part, target
from benchmarks.kernel_rows.setting import BenchSetup, setting_of, skip_missing_fp8
from benchmarks.peers import diffusers_blocks
from benchmarks.peers.peft_lora import trained
from benchmarks.roofline import KINDS, block_ms, measure_ceilings
from fluxq.bench.closeness import cosine, relative_error
from fluxq.bench.random_model import random_flux
from fluxq.bench.timing import timed
from fluxq.kernels import COMPUTES, POLICIES, backend, dequantize, quantize
from fluxq.model import Flux, FluxConfig
from fluxq.model.blocks import Block, run_block, run_modulation
from fluxq.model.embed import image_ids, rope_angles, text_ids
from fluxq.model.linear import Linear
from fluxq.model.lora import lora_layers
from fluxq.offload import AllResident

SEEN = ("output", "d_input", "d_lora")


@dataclass
class Bench:
    """One block with its inputs: the leading ones (img and txt, or both joined), vec, cos, sin; output gradients."""

    setting: BenchSetup
    kind: str
    rows: int

    def __post_init__(self) -> None:
        s, device = self.setting.sizes, self.setting.device
        torch.manual_seed(0)
        config = FluxConfig.nano() if self.setting.tiny else FluxConfig.dev()
        double, single = (1, 0) if self.kind == "double" else (0, 1)
        config = replace(config, depth=double, depth_single_blocks=single)
        self.flux: Flux = random_flux(config, "bf16", device, s.rank)
        self.config = self.flux.config
        self.block: Block = self.flux.blocks[0]
        self.tensors = {
            name: t for name, t in self.flux.state_dict().items() if "_blocks." in name and "lora" not in name
        }
        for layer in linears(self.block):
            layer.store(quantize(dequantize(layer.frozen, torch.bfloat16), "nf4"))
        image, side = self.rows - s.text, math.isqrt(self.rows - s.text)
        ids = torch.cat([text_ids(s.text, device), image_ids(side, -(-image // side), device)[:image]])
        cos, sin = rope_angles(ids, config.axes_dim, config.theta)
        lengths = (image, s.text) if self.kind == "double" else (self.rows,)
        width = config.hidden_size
        self.leading = [s.randn(1, length, width).requires_grad_() for length in lengths]
        self.rest = (s.randn(1, width), cos, sin)
        self.douts = [s.randn(1, length, width) for length in lengths]

    def step(self, run: Callable[..., Any] | None = None) -> tuple[Tensor, ...]:
        """Outputs, and gradients of the inputs and of every LoRA, by `run`, by default as in training."""
        return forward_backward(run or self.ours, self.leading, self.rest, list(self.block.parameters()), self.douts)

    def ours(self, *inputs: Tensor) -> Any:
        (*leading, vec, cos, sin), ring = inputs, AllResident()
        return run_block(self.block, ring, *leading, run_modulation(self.block, ring, vec), cos, sin)

    def seen(self, found: Sequence[Tensor]) -> dict[str, Tensor]:
        """A step's tensors as three vectors."""
        n = len(self.leading)
        parts = (found[:n], found[n : 2 * n], found[2 * n :])
        return {name: torch.cat([t.flatten().float() for t in part]) for name, part in zip(SEEN, parts, strict=True)}

    @cached_property
    def exact(self) -> dict[str, Tensor]:
        return self._plain(torch.float32)

    @cached_property
    def plain(self) -> dict[str, Tensor]:
        return self._plain(torch.bfloat16)

    def _plain(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """By plain autograd over the decoded weights, with every frozen tensor in `dtype`; returned in fp32."""
        block = copy.deepcopy(self.block)
        for layer in linears(block):
            layer.store(dequantize(layer.frozen, dtype))
            layer.compute = "bf16"
        for module in block.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(dtype))
        leading = [t.detach().to(dtype).requires_grad_() for t in self.leading]
        rest = (self.rest[0].to(dtype), *self.rest[1:])
        with backend("reference"):
            douts = [t.to(dtype) for t in self.douts]

            def plain(*inputs: Tensor) -> Any:
                *leading, vec, cos, sin = inputs
                return block(*leading, block.modulation_rows(vec), cos, sin)

            return self.seen(forward_backward(plain, leading, rest, list(block.parameters()), douts))

    def errors(self, found: dict[str, Tensor]) -> dict[str, dict[str, float]]:
        return {
            name: {
                "relative": relative_error(found[name], self.exact[name]),
                "cosine": cosine(found[name], self.exact[name]),
                "plain_bf16": relative_error(self.plain[name], self.exact[name]),
            }
            for name in found
        }


def main() -> None:
    made = parser(__doc__ or "")
    made.add_argument("--rows", type=int, nargs="+", default=(4608, 2816, 1536), help="text and image tokens together")
    arguments = made.parse_args()
    device = torch.device(arguments.device)

    def prepare(report: dict[str, Any]) -> Iterator[Case]:
        report.setdefault("ceilings", measure_ceilings(device, arguments.tiny))
        setting = setting_of(device, arguments.tiny, report["ceilings"])
        rows, seconds = ((150,), 0.0) if arguments.tiny else (tuple(arguments.rows), 1.0)
        setting = replace(setting, rows=rows, seconds=seconds)
        sizes = setting.sizes
        report |= {"backend": setting.ours.__name__, "rank": sizes.rank, "text_tokens": sizes.text}
        return cases(setting)

    run_part("blocks", arguments, prepare)


def cases(s: BenchSetup) -> Iterator[Case]:
    """The most important cases first, in case time runs out."""

    @last_only
    def bench(kind: str, rows: int) -> Bench:
        return Bench(s, kind, rows)

    exact = [(policy, "bf16") for policy in POLICIES]
    eight = [("keep_all", compute) for compute in COMPUTES[1:]]
    others = [pair for pair in product(POLICIES, COMPUTES) if pair not in exact and pair not in eight]
    places = list(product(s.rows, KINDS))
    for rows, kind in places:
        name = f"blocks: {kind}, M {rows}, against diffusers"
        yield Case(f"{name}, eager", partial(against_eager, bench, kind, rows))
        for policy, compute in (*exact, *eight):
            yield Case(
                f"blocks: {kind}, M {rows}, {compute}, {policy}", partial(alone, bench, kind, rows, policy, compute)
            )
    for rows, kind in places:
        name = f"blocks: {kind}, M {rows}, against diffusers"
        yield Case(f"{name}, compiled", partial(against_compiled, bench, kind, rows))
    for rows, kind in places:
        for policy in ("recompute", "keep_all"):
            yield Case(
                f"blocks: {kind}, M {rows}, bf16, {policy}, on the reference",
                partial(alone, bench, kind, rows, policy, "bf16", True),
            )
        for policy, compute in others:
            yield Case(
                f"blocks: {kind}, M {rows}, {compute}, {policy}", partial(alone, bench, kind, rows, policy, compute)
            )


def alone(
    bench: Callable[[str, int], Bench], kind: str, rows: int, policy: str, compute: str, reference: bool = False
) -> dict[str, Any]:
    """Ours with one policy and one compute."""
    b = bench(kind, rows)
    skip_missing_fp8(b.setting.device, compute)
    set_up(b, policy, compute)
    with backend("reference") if reference else nullcontext():
        checked = check(b, b.seen(b.step()), policy, compute)
        ms = timed({"ours": b.step}, b.setting.device, b.setting.seconds, cold=False)
        peak = peak_bytes(b.step, b.setting.device)
    bound = block_ms(b.setting.ceilings, kind, b.config.hidden_size, rows, policy, compute)
    share = bound / ms["ours"]["median"] if bound else None
    return {**checked, "ms": ms, "peak_bytes": {"ours": peak}, "bound_ms": bound, "share_of_bound": share}


def against_eager(bench: Callable[[str, int], Bench], kind: str, rows: int) -> dict[str, Any]:
    """Both keeping everything, and both recomputing from their inputs."""
    b = bench(kind, rows)
    block, run = diffusers_blocks.twin(kind, b.config, b.tensors, lora_layers(b.flux))
    theirs = partial(peer_step, b, block, run)
    checkpointed = partial(peer_step, b, block, lambda *i: checkpoint(run, *i, use_reentrant=False))
    pairs = {"keep_all": ("diffusers", theirs), "recompute": ("diffusers, checkpointed", checkpointed)}
    row = against(b, pairs)
    row["errors_of_diffusers"] = b.errors(peer_seen(b, theirs()))
    row["ok"] = row["ok"] and all(e["relative"] < 0.03 for e in row["errors_of_diffusers"].values())
    return row


def against_compiled(bench: Callable[[str, int], Bench], kind: str, rows: int) -> dict[str, Any]:
    b = bench(kind, rows)
    block, _ = diffusers_blocks.twin(kind, b.config, b.tensors, lora_layers(b.flux))
    torch._dynamo.reset()
    run = diffusers_blocks.caller(torch.compile(block))
    return against(b, {"keep_all": ("diffusers, compiled", partial(peer_step, b, block, run))})


def against(b: Bench, pairs: dict[str, tuple[str, Callable[[], Any]]]) -> dict[str, Any]:
    """pairs: policy -> an opponent's name and step. Times ours under that policy and theirs, alternating."""
    device, runs = b.setting.device, {}

    def ours(policy: str) -> tuple[Tensor, ...]:
        set_up(b, policy, "bf16")
        return b.step()

    for policy, (name, step) in pairs.items():
        runs |= {f"ours, {policy}": partial(ours, policy), name: step}
    checks = [check(b, b.seen(ours(policy)), policy, "bf16") for policy in pairs]
    ms = timed(runs, device, 3 * b.setting.seconds, cold=False)
    ratios = {name: ms[name]["median"] / ms[f"ours, {policy}"]["median"] for policy, (name, _) in pairs.items()}
    return {
        "ok": all(c["ok"] for c in checks),
        "errors": [c["errors"] for c in checks],
        "ms": ms,
        "peak_bytes": {name: peak_bytes(run, device) for name, run in runs.items()},
        "targets": [target(f"{name} over ours", ">= 2", ratio) for name, ratio in ratios.items()],
    }


def set_up(b: Bench, policy: str, compute: str) -> None:
    b.flux.set_policy(policy)
    b.flux.set_compute(compute)


def check(b: Bench, found: dict[str, Tensor], policy: str, compute: str) -> dict[str, Any]:
    """keep_all8 keeps the hidden layer in 8 bits: 0.02 more are allowed."""
    errors = b.errors(found)
    slack = 0.02 if policy == "keep_all8" else 1e-6
    if compute == "bf16":
        ok = all(e["relative"] <= 2 * e["plain_bf16"] + slack for e in errors.values())
    else:
        ok = all(e["cosine"] >= 0.99 for e in errors.values())
    return {"ok": ok, "errors": errors}


def forward_backward(
    run: Callable[..., Any],
    leading: Sequence[Tensor],
    rest: Sequence[Tensor],
    parameters: Sequence[Tensor],
    douts: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    outputs = run(*leading, *rest)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return *(t.detach() for t in outputs), *torch.autograd.grad(outputs, [*leading, *parameters], douts)


def peer_step(b: Bench, block: nn.Module, run: Callable[..., Any]) -> tuple[Tensor, ...]:
    """diffusers' single block takes text and image separately."""
    leading, douts = b.leading, b.douts
    if b.kind == "single":
        leading, douts = apart(b, leading[0]), apart(b, douts[0])
    leading = [t.detach().requires_grad_() for t in leading]
    return forward_backward(run, leading, b.rest, trained(block), douts)


def apart(b: Bench, joined: Tensor) -> list[Tensor]:
    """(B, L, D), text first -> image, text."""
    txt, img = joined.split([b.setting.sizes.text, b.rows - b.setting.sizes.text], dim=1)
    return [img, txt]


def peer_seen(b: Bench, found: Sequence[Tensor]) -> dict[str, Tensor]:
    """A step of diffusers' block in our layout. Its LoRA is split differently, and left out."""
    outputs, inputs = found[:2], found[2:4]
    if b.kind == "single":
        outputs, inputs = ((torch.cat([txt, img], dim=1),) for img, txt in (outputs, inputs))
    return {name: part for name, part in b.seen((*outputs, *inputs, *outputs)).items() if name != "d_lora"}


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int | None:
    """Peak bytes of one run, beyond what was allocated before it."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    return torch.cuda.max_memory_allocated(device) - before


def linears(module: nn.Module) -> list[Linear]:
    return [m for m in module.modules() if isinstance(m, Linear)]


if __name__ == "__main__":
    main()
