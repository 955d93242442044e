"""Training steps of FLUX.1 dev on the card at hand, with random weights: seconds a step and peak memory, as JSON.

    python3 benchmarks/gpu.py --out DIR [--depth 19 38] [--sizes 512 768 1024] [--steps 12]

The whole model in NF4, everything resident, LoRA of rank 16 on attention and MLP, batch 1, 512 T5 tokens, AdamW.
Weights and inputs are random: speed and memory do not depend on them. Each size prints one line and adds one row.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import statistics
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import torch

from fluxq.flow import flow_loss
from fluxq.kernels import quantize
from fluxq.model import Flux, FluxConfig, add_lora
from fluxq.model.linear import Linear

RANK, T5_LENGTH = 16, 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder for the JSON file")
    parser.add_argument("--device", default="cuda", help="cpu tries the script out, with a small --depth")
    parser.add_argument("--depth", type=int, nargs=2, default=(19, 38), help="double and single blocks; default: dev's")
    parser.add_argument("--sizes", type=int, nargs="+", default=(512, 768, 1024), help="pixels of a side")
    parser.add_argument("--steps", type=int, default=12, help="timed steps a size, after 3 that are not")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA card was found; nothing was measured")
    flux = random_flux(arguments.depth, device)
    rows = [measure(flux, size, arguments.steps) for size in arguments.sizes]
    report = {
        "about": about(device),
        "depth": list(arguments.depth),
        "rank": RANK,
        "t5_length": T5_LENGTH,
        "steps": rows,
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    name = "".join(c if c.isalnum() else "_" for c in report["about"]["card"]).strip("_").lower()
    path = arguments.out / f"{name}_{datetime.now(UTC):%Y-%m-%d}.json"
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(path)


def random_flux(depth: tuple[int, int], device: torch.device) -> Flux:
    """FLUX.1 dev of `depth` with random weights, NF4 in the blocks, LoRA with both halves random."""
    config = FluxConfig(**{**FluxConfig.dev().__dict__, "depth": depth[0], "depth_single_blocks": depth[1]})
    with torch.device("meta"):
        flux = Flux(config)
    generator = torch.Generator(device).manual_seed(0)
    for path, module in flux.named_modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            value = torch.randn(buffer.shape, generator=generator, device=device, dtype=torch.bfloat16)
            if isinstance(module, Linear) and name == "weight":
                module.store(quantize(value * buffer.shape[1] ** -0.5, "nf4" if "_blocks." in path else "bf16"))
            else:
                setattr(module, name, 0.02 * value + (1.0 if name == "scale" else 0.0))
    for layer in add_lora(flux, RANK, RANK).values():
        torch.nn.init.normal_(layer.get_parameter("lora_up"), std=0.01)
    return flux


def measure(flux: Flux, size: int, steps: int) -> dict:
    """Median seconds of `steps` training steps at `size` x `size` pixels, and the peak memory of all."""
    device, cuda = flux.device, flux.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    parameters = list(flux.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    latents, noise = torch.randn(2, 1, 16, size // 8, size // 8, device=device).unbind()
    txt = torch.randn(1, T5_LENGTH, flux.config.context_in_dim, device=device, dtype=torch.bfloat16)
    pooled = torch.randn(1, flux.config.vec_in_dim, device=device)
    seconds = []
    for _ in range(steps + 3):
        start = time.perf_counter()
        loss = flow_loss(flux, latents, noise, torch.full((1,), 0.6), txt, pooled, 1.0).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    timed = sorted(seconds[3:])
    row = {
        "size": size,
        "median_seconds": statistics.median(timed),
        "p10_seconds": timed[len(timed) // 10],
        "p90_seconds": timed[len(timed) * 9 // 10],
        "peak_bytes": torch.cuda.max_memory_allocated() if cuda else None,
        "loss": float(loss.detach()),
    }
    print(
        f"{size} px: {row['median_seconds']:.3f} s a step, peak {(row['peak_bytes'] or 0) / 2**30:.2f} GiB", flush=True
    )
    return row


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def about(device: torch.device) -> dict:
    """What the numbers were measured on and with."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    return {
        "card": torch.cuda.get_device_name() if device.type == "cuda" else f"cpu {platform.machine()}",
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": version("triton"),
        "commit": commit or "unknown",
    }


if __name__ == "__main__":
    main()
