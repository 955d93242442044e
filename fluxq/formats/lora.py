"""LoRA files, written and read in two dialects; in both, W becomes W + alpha / rank * up @ down.

kohya      lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight, .lora_up.weight, .alpha: the original model's fused
           modules, dots as underscores. The default: ComfyUI, Forge, sd-scripts and diffusers all read it exactly.
diffusers  transformer.transformer_blocks.0.attn.to_q.lora_A.weight, .lora_B.weight: fused modules split, all parts with
           the same lora_A; alpha / rank folded into lora_B; one rank; and neither alpha tensors nor adapter metadata,
           which some programs ignore and others refuse together.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from fluxq.formats.detect import kind
from fluxq.formats.files import Checkpoint, listed, printable, refuse, write_safetensors
from fluxq.formats.keys import module_split
from fluxq.formats.metadata import sshs_hashes
from fluxq.formats.shapes import flux_shapes
from fluxq.model.config import FluxConfig

KOHYA_PREFIX = "lora_unet_"
KOHYA_PARTS = ("lora_down.weight", "lora_up.weight", "alpha")
DIFFUSERS_PREFIX = "transformer."
DIFFUSERS_PARTS = ("lora_A.weight", "lora_B.weight")
READABLE = "a FLUX.1 LoRA that fluxq or sd-scripts has written"


@dataclass(frozen=True)
class Adapter:
    """A LoRA of one module: down (rank, in), up (out, rank), strength alpha / rank."""

    down: torch.Tensor
    up: torch.Tensor
    alpha: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]


def save_lora(
    path: str | Path,
    adapters: Mapping[str, Adapter],
    config: FluxConfig,
    dialect: Literal["kohya", "diffusers"] = "kohya",
    dtype: torch.dtype = torch.bfloat16,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes `adapters`, keyed by the path of a BFL module ("double_blocks.0.img_attn.qkv"), and adds sshs_* hashes.

    alpha is stored in fp32 whatever `dtype` is. Raises WrongRequest if the file cannot be written, and for ranks that
    differ if the dialect is diffusers'.
    """
    if dialect == "diffusers" and len(ranks := sorted({adapter.rank for adapter in adapters.values()})) > 1:
        refuse(path, f"would have ranks {', '.join(map(str, ranks))}, and diffusers wants one", "save it as kohya")
    tensors = _to_kohya(adapters, dtype) if dialect == "kohya" else _to_diffusers(adapters, config, dtype)
    metadata = dict(metadata or {})
    write_safetensors(path, tensors, metadata | sshs_hashes(tensors, metadata))


def load_lora(path: str | Path, config: FluxConfig) -> tuple[dict[str, Adapter], dict[str, str]]:
    """The adapters of a file in either dialect, keyed by BFL module, in the file's dtype; and the file's metadata.

    Raises WrongRequest for any other dialect, a LoRA of another model, and a missing, unmatched or ill-shaped tensor.
    """
    checkpoint = Checkpoint(path)
    modules = [key.removesuffix(".weight") for key, shape in flux_shapes(config).items() if len(shape) == 2]
    if any(key.startswith(KOHYA_PREFIX) for key in checkpoint.shapes):
        adapters = _from_kohya(checkpoint, modules, config)
    elif any(key.startswith(DIFFUSERS_PREFIX) and ".lora_A." in key for key in checkpoint.shapes):
        adapters = _from_diffusers(checkpoint, modules, config)
    elif (found := kind(checkpoint.shapes)) == "a LoRA":
        first = printable(next(iter(checkpoint.shapes)))
        refuse(path, f"is a LoRA in a dialect that fluxq does not read (its first key is {first})", f"give {READABLE}")
    else:
        refuse(path, f"is {found}, where a LoRA is wanted", f"give {READABLE}")
    return adapters, checkpoint.metadata


def _to_kohya(adapters: Mapping[str, Adapter], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for module, adapter in adapters.items():
        name = _kohya_name(module)
        tensors[f"{name}.lora_down.weight"] = adapter.down.to("cpu", dtype)
        tensors[f"{name}.lora_up.weight"] = adapter.up.to("cpu", dtype)
        tensors[f"{name}.alpha"] = torch.tensor(adapter.alpha, dtype=torch.float32)  # bf16 would round 10.3 to 10.3125
    return tensors


def _to_diffusers(adapters: Mapping[str, Adapter], config: FluxConfig, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for module, adapter in adapters.items():
        up = (adapter.up.to("cpu", torch.float32) * (adapter.alpha / adapter.rank)).to(dtype)
        for name, start, end in module_split(module, config):
            down_key, up_key = (f"{DIFFUSERS_PREFIX}{name}.{part}" for part in DIFFUSERS_PARTS)
            tensors[down_key] = adapter.down.to("cpu", dtype)
            piece = up[start:end]
            tensors[up_key] = torch.cat([tensors[up_key], piece]) if up_key in tensors else piece
    return tensors


def _from_kohya(checkpoint: Checkpoint, modules: list[str], config: FluxConfig) -> dict[str, Adapter]:
    shapes = flux_shapes(config)
    names = {_kohya_name(module): module for module in modules}
    sizes = {name: shapes[f"{module}.weight"] for name, module in names.items()}
    adapters: dict[str, Adapter] = {}
    for name in _checked_modules(checkpoint, sizes, KOHYA_PARTS):
        down, up, alpha = (checkpoint.get(f"{name}.{part}") for part in KOHYA_PARTS)
        if not math.isfinite(float(alpha)):
            refuse(checkpoint.path, f"has an alpha of {float(alpha)} in {name}", "it is spoilt: use an earlier one")
        adapters[names[name]] = Adapter(down, up, float(alpha))
    return adapters


def _from_diffusers(checkpoint: Checkpoint, modules: list[str], config: FluxConfig) -> dict[str, Adapter]:
    if "lora_adapter_metadata" in checkpoint.metadata:
        refuse(checkpoint.path, "keeps its alpha in metadata, which most programs ignore", f"give {READABLE}")
    shapes = flux_shapes(config)
    splits = {module: module_split(module, config) for module in modules}
    sizes: dict[str, tuple[int, ...]] = {}
    for module, pieces in splits.items():
        for name, start, end in pieces:
            name = DIFFUSERS_PREFIX + name
            sizes[name] = (sizes.get(name, (0,))[0] + end - start, shapes[f"{module}.weight"][1])
    present = _checked_modules(checkpoint, sizes, DIFFUSERS_PARTS)
    adapters: dict[str, Adapter] = {}
    for module, pieces in splits.items():
        names = [name for name, _, _ in pieces if DIFFUSERS_PREFIX + name in present]
        if len(names) == len(pieces):
            adapters[module] = _fused(checkpoint, pieces, shapes[f"{module}.weight"][0])
        elif names:
            absent = [name for name, _, _ in pieces if name not in names]
            refuse(checkpoint.path, f"adapts {names[0]} but not {', '.join(absent)}", f"give {READABLE}")
    return adapters


def _fused(checkpoint: Checkpoint, pieces: list[tuple[str, int, int]], rows: int) -> Adapter:
    """One adapter of the parts that `pieces` names: their common lora_A, their lora_B each in its rows."""
    down_part, up_part = DIFFUSERS_PARTS
    names = list(dict.fromkeys(name for name, _, _ in pieces))
    downs = [checkpoint.get(f"{DIFFUSERS_PREFIX}{name}.{down_part}") for name in names]
    if not all(torch.equal(downs[0], down) for down in downs):
        refuse(checkpoint.path, f"has another lora_A in {names[0]} than in {names[1]}", f"give {READABLE}")
    unread = {name: checkpoint.get(f"{DIFFUSERS_PREFIX}{name}.{up_part}") for name in names}
    rank = downs[0].shape[0]
    up = torch.empty(rows, rank, dtype=unread[names[0]].dtype)
    for name, start, end in pieces:
        up[start:end] = unread[name][: end - start]
        unread[name] = unread[name][end - start :]
    return Adapter(downs[0], up, float(rank))


def _checked_modules(
    checkpoint: Checkpoint, sizes: Mapping[str, tuple[int, ...]], parts: tuple[str, ...]
) -> dict[str, set[str]]:
    """The modules in a file, once all of its tensors are found to be `parts` of modules of these (out, in) sizes."""
    found: dict[str, set[str]] = {}
    foreign: list[str] = []
    for key in checkpoint.shapes:
        part = next((part for part in parts if key.endswith("." + part)), None)
        if part is None:
            foreign.append(printable(key))
        else:
            found.setdefault(key.removesuffix("." + part), set()).add(part)
    unmatched = [printable(name) for name in found if name not in sizes]
    if found and len(unmatched) == len(found):
        what = f"is a LoRA of another model: none of its {len(found):,} modules (such as {unmatched[0]}) is in this one"
        refuse(checkpoint.path, what, "give one that was trained on FLUX.1")
    missing = [f"{name}.{part}" for name in found if name in sizes for part in parts if part not in found[name]]
    if problems := listed(missing=missing, unmatched_modules=unmatched, unexpected=foreign):
        refuse(checkpoint.path, f"is no LoRA that fits this model: {problems}", f"give {READABLE}")
    wrong = [problem for name in found for problem in _shape_problems(checkpoint, name, sizes[name], parts)]
    if wrong:
        refuse(checkpoint.path, f"was made for a model of other sizes: {listed(wrong_shape=wrong)}", f"give {READABLE}")
    return found


def _shape_problems(checkpoint: Checkpoint, name: str, size: tuple[int, ...], parts: tuple[str, ...]) -> list[str]:
    """Of the down, up and alpha of a module of size (out, in), those that are not (r, in), (out, r) and ()."""
    rank = max(1, *checkpoint.shape(f"{name}.{parts[0]}")[:1], 0)
    wanted = ((rank, size[1]), (size[0], rank), ())
    return [
        f"{name}.{part} is {checkpoint.shape(f'{name}.{part}')}, not {shape}"
        for part, shape in zip(parts, wanted, strict=False)
        if checkpoint.shape(f"{name}.{part}") != shape
    ]


def _kohya_name(module: str) -> str:
    return KOHYA_PREFIX + module.replace(".", "_")
