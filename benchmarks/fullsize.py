"""The whole path at full width on this machine's CPU, with random weights: does it fit, and how long does it take?

    make fullsize                 the real depth: about 34 GB of files in build/fullsize, kept for the next time
    make fullsize DEPTH="1 2"     one double and two single blocks, one T5 block: minutes

Writes FLUX.1 dev (bf16), T5-XXL (fp16), CLIP-L (fp16) and the autoencoder (fp32) with random weights in the real files'
layouts. Then runs a user's commands: `quantize` to NF4, `cache` of two photographs with captions, `train` for one step
at 256 x 256 pixels, with every unit streamed through a few slots, as on a small GPU; but here slots and arena share the
same RAM. Each command's anonymous resident memory (RssAnon: no mapped files, no page cache) is sampled every 20 ms. The
JSON has peaks, seconds, versions and the commit.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path

import torch

from benchmarks.measure import about, write
from fluxq import nano
from fluxq.formats.atomic import atomic_path
from fluxq.formats.checkpoint.files import DTYPE_NAMES
from fluxq.formats.checkpoint.shapes import autoencoder_shapes, flux_shapes
from fluxq.model import AutoEncoderConfig, FluxConfig

Shapes = Mapping[str, tuple[int, ...]]
STREAMED = ("--resident-units=0", "--slots=4")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("build/fullsize"), help="where the random files go")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder for the JSON file")
    parser.add_argument("--depth", type=int, nargs=2, default=(19, 38), help="double and single blocks")
    parser.add_argument("--t5-length", type=int, default=512)
    parser.add_argument("--resolution", type=int, default=256)
    arguments = parser.parse_args()
    double, single = arguments.depth
    folder = (arguments.folder / f"{double}_{single}").resolve()
    files = write_models(folder, double, single)
    shutil.rmtree(folder / "cache", ignore_errors=True)  # measure encoding, not reading the cache
    quantized = folder / "flux-nf4.safetensors"
    encoders = [f"--ae={files['ae']}", f"--clip-l={files['clip_l']}", f"--t5xxl={files['t5xxl']}"]
    tokenizers = [f"--set=model.clip_tokenizer={nano.CLIP_TOKENIZER}", f"--set=model.t5_tokenizer={nano.T5_TOKENIZER}"]
    common = [
        *encoders,
        *tokenizers,
        f"--t5-length={arguments.t5_length}",
        f"--resolution={arguments.resolution}",
        f"--cache={folder / 'cache'}",
    ]
    common += [str(photographs(folder / "photos")), "--trigger=zqx", f"--flux={quantized}"]
    commands = {
        "quantize": ["quantize", str(files["flux"]), str(quantized), "--format=nf4", "--overwrite"],
        "cache": ["cache", *common],
        "train": ["train", *common, *STREAMED, "--steps=1", f"--out={folder / 'run'}", "--overwrite"],
    }
    stages = {name: measured(command) for name, command in commands.items()}
    report = {
        "about": about(torch.device("cpu")),
        "depth": [double, single],
        "t5_length": arguments.t5_length,
        "pixels": arguments.resolution,
    }
    report |= {
        "train_options": STREAMED,
        "bytes": {name: path.stat().st_size for name, path in files.items()},
        "stages": stages,
    }
    path = arguments.out / f"fullsize_{double}_{single}_{datetime.now(UTC):%Y-%m-%d}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, report)
    print(path)


def measured(command: list[str]) -> dict[str, float]:
    """Run `fluxq` with these arguments; its seconds and the peak of its anonymous resident memory."""
    began, peak = time.monotonic(), 0
    child = subprocess.Popen([sys.executable, "-m", "fluxq", *command], stdout=sys.stderr)
    while child.poll() is None:
        peak = max(peak, anonymous_bytes(child.pid))
        time.sleep(0.02)
    if child.returncode:
        raise SystemExit(f"fluxq {command[0]} failed")
    seconds = time.monotonic() - began
    print(f"{command[0]:10} {seconds:8.1f} s   peak {peak / 2**30:6.2f} GiB", flush=True)
    return {"seconds": round(seconds, 1), "peak_anonymous_bytes": peak}


def anonymous_bytes(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon")), 0)


def write_models(folder: Path, double: int, single: int) -> dict[str, Path]:
    """Write the four files, unless they exist."""
    config = replace(FluxConfig.dev(), depth=double, depth_single_blocks=single)
    models: dict[str, tuple[Shapes, torch.dtype]] = {
        "flux": (flux_shapes(config), torch.bfloat16),
        "t5xxl": (t5_shapes(24 if double == 19 else 1), torch.float16),
        "clip_l": (clip_shapes(), torch.float16),
        "ae": (autoencoder_shapes(AutoEncoderConfig()), torch.float32),
    }
    files = {name: folder / f"{name}.safetensors" for name in models}
    for name, (shapes, dtype) in models.items():
        if not files[name].exists():
            print(f"writing {files[name]}", flush=True)
            write_random(files[name], shapes, dtype)
    return files


def write_random(path: Path, shapes: Shapes, dtype: torch.dtype) -> None:
    """A safetensors file of random weights: matrices by 1/sqrt(fan-in), scales around 1, streamed from a pool of
    noise.
    """
    header, start = {}, 0
    for name, shape in shapes.items():
        end = start + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    pool = torch.randn(1 << 24, generator=torch.Generator().manual_seed(0))
    whole = lru_cache(maxsize=2)(lambda scale, around: (pool * scale + around).to(dtype))  # for large matrices
    with atomic_path(path, start) as temporary, temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for number, (name, shape) in enumerate(shapes.items()):
            scale = math.prod(shape[1:]) ** -0.5 if len(shape) > 1 else 0.1
            around = 1.0 if len(shape) == 1 and ("norm" in name and not name.endswith("bias")) else 0.0
            place, left = number * 7919 % len(pool), math.prod(shape)
            large = left > len(pool) // 2
            while left:
                some = slice(place, place + left)
                piece = whole(scale, around)[some] if large else (pool[some] * scale + around).to(dtype)
                file.write(piece.view(torch.uint8).numpy().data)
                place, left = 0, left - len(piece)


def t5_shapes(blocks: int) -> Shapes:
    """T5 v1.1 XXL's encoder, as t5xxl_fp16.safetensors has it."""
    shapes = {"shared.weight": (32128, 4096)}
    for i in range(blocks):
        layer = f"encoder.block.{i}.layer"
        shapes |= {f"{layer}.0.SelfAttention.{p}.weight": (4096, 4096) for p in "qkvo"}
        if i == 0:
            shapes[f"{layer}.0.SelfAttention.relative_attention_bias.weight"] = (32, 64)
        shapes |= {f"{layer}.{n}.layer_norm.weight": (4096,) for n in (0, 1)}
        shapes |= {f"{layer}.1.DenseReluDense.{p}.weight": (10240, 4096) for p in ("wi_0", "wi_1")}
        shapes[f"{layer}.1.DenseReluDense.wo.weight"] = (4096, 10240)
    return {**shapes, "encoder.final_layer_norm.weight": (4096,)}


def clip_shapes() -> Shapes:
    """CLIP-L's text model, as clip_l.safetensors has it."""
    shapes: dict[str, tuple[int, ...]] = {
        "text_model.embeddings.token_embedding.weight": (49408, 768),
        "text_model.embeddings.position_embedding.weight": (77, 768),
    }
    for i in range(12):
        layer = f"text_model.encoder.layers.{i}"
        matrices = {f"self_attn.{p}_proj": (768, 768) for p in ("k", "v", "q", "out")}
        matrices |= {"mlp.fc1": (3072, 768), "mlp.fc2": (768, 3072)}
        for name, shape in matrices.items():
            shapes |= {f"{layer}.{name}.weight": shape, f"{layer}.{name}.bias": shape[:1]}
        shapes |= {f"{layer}.layer_norm{n}.{p}": (768,) for n in (1, 2) for p in ("weight", "bias")}
    return shapes | {f"text_model.final_layer_norm.{p}": (768,) for p in ("weight", "bias")}


def photographs(folder: Path) -> Path:
    """Two photographs with captions."""
    from PIL import Image
    from skimage import data

    folder.mkdir(parents=True, exist_ok=True)
    for name, caption in (
        ("astronaut", "zqx, a woman in an orange suit"),
        ("coffee", "a cup of coffee beside a spoon"),
    ):
        Image.fromarray(getattr(data, name)()).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(caption + "\n", encoding="utf-8")
    return folder


if __name__ == "__main__":
    main()
