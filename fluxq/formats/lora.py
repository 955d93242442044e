"""A LoRA from any program's file, as one adapter a module of the original transformer: `load_lora`.

Whatever a file's dialect is, its tensors are parts: a change of some rows of a module. The parts of a module are
stacked into one adapter (fluxq/formats/lora_algebra.py), at the strength at which the file was trained. That strength
is in alpha tensors, in PEFT's settings, or nowhere, which means 1. CLIP-L's modules come along, T5's are left out.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fluxq.errors import WrongRequest
from fluxq.formats.detect import LORA, kind
from fluxq.formats.files import DTYPE_NAMES, Checkpoint, listed, printable, refuse
from fluxq.formats.lora_algebra import Adapter, Part, split, stacked
from fluxq.formats.lora_keys import (
    EMBEDDINGS,
    SPELLINGS,
    T5_KEYS,
    Place,
    clip_module,
    matrices,
    other_kind,
    other_model,
    places,
    role,
    split_rows,
)
from fluxq.formats.shapes import flux_shapes
from fluxq.model.config import FluxConfig

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2)
PEFT_FILES = ("adapter_model.safetensors", "adapter_config.json")
PEFT_METADATA = "lora_adapter_metadata"  # diffusers and SimpleTuner keep PEFT's settings there
GIVE = "give a LoRA that was trained on FLUX.1"


@dataclass
class Lora:
    """What a LoRA file holds. adapters are by BFL module, `clip` by CLIP-L module as transformers 5 names it.

    alphas tells where the strengths came from: any of "tensors", "settings"; spellings, any of "A/B", "down/up";
    part_ranks, how many ranks the file's own modules have; notes are sentences for the user about what was not taken
    as it stands.
    """

    path: Path
    config: FluxConfig
    dialect: str
    adapters: dict[str, Adapter]
    clip: dict[str, Adapter]
    metadata: dict[str, str]
    spellings: frozenset[str] = frozenset()
    alphas: frozenset[str] = frozenset()
    part_ranks: int = 1
    notes: list[str] = field(default_factory=list)

    @property
    def dtype(self) -> torch.dtype:
        """The narrowest floating-point type that holds all of its tensors."""
        dtype = torch.float8_e4m3fn
        for adapter in (*self.adapters.values(), *self.clip.values()):
            for tensor in (adapter.down, adapter.up):
                dtype = tensor.dtype if dtype.itemsize == 1 else torch.promote_types(dtype, tensor.dtype)
        return dtype

    @property
    def ranks(self) -> list[int]:
        return sorted({adapter.rank for adapter in self.adapters.values()})


def load_lora(path: str | Path, config: FluxConfig | None = None) -> Lora:
    """The LoRA in a .safetensors file or a PEFT folder, in any dialect of `lora_keys`, for a transformer of `config`.

    Without a config it is that of FLUX.1 or of nano, whichever fits. Tensors keep their dtype, 8-bit ones become bf16.
    Raises WrongRequest for adapters of other kinds or of other models, and for missing, unmatched, ill-shaped or
    non-finite tensors.
    """
    file = _LoraFile(Path(path))
    config = config or file.guess()
    found = file.placed(config)
    lora = Lora(
        file.path,
        config,
        Counter(place.dialect for place in found.values()).most_common(1)[0][0] if found else "text encoder only",
        {},
        {},
        dict(file.checkpoint.metadata),
        frozenset(name for name, p in SPELLINGS.items() if any(re.search(p, key) for key in file.checkpoint.shapes)),
        file.alphas,
        len({file.rank(base) for base in found}),
        file.notes,
    )
    parts: dict[str, list[tuple[str, Part]]] = {}
    for base, place in found.items():
        parts.setdefault(place.module, []).append((base, Part(place.rows, file.adapter(base))))
    for module, out in matrices(config).items():
        if module in parts:
            _refuse_twice(file.path, module, parts[module])
            lora.adapters[module] = stacked([part for _, part in parts[module]], out)
    lora.clip = {module: file.adapter(base) for module, base in file.clip.items()}
    _correct_split_qkv(lora)
    return lora


class _LoraFile:
    """The tensors of a file by the base of their keys: base -> "down" | "up" | "alpha" -> key."""

    def __init__(self, path: Path) -> None:
        self.path, settings = path, None
        if path.is_dir():
            path, settings = path / PEFT_FILES[0], path / PEFT_FILES[1]
            if not path.is_file():
                refuse(self.path, f"is a folder without {PEFT_FILES[0]}", "name a LoRA file or a PEFT adapter's folder")
        elif path.name == PEFT_FILES[0]:
            settings = path.parent / PEFT_FILES[1]
        self.checkpoint = Checkpoint(path)
        self.notes: list[str] = []
        self.clip: dict[str, str] = {}
        self._refuse_others()
        self._settings = _read_settings(settings) if settings and settings.is_file() else self._inside("transformer.")
        self._clip_settings = self._inside("text_encoder.")
        if settings and not self._settings and any(key.startswith("base_model.") for key in self.checkpoint.shapes):
            self.notes.append(f"{settings.name} is not there, so its LoRA counts at full strength (alpha = rank)")
        self._bases: dict[str, dict[str, str]] = {}
        foreign = []
        for key in self.checkpoint.shapes:
            if found := role(key):
                self._bases.setdefault(found[0], {})[found[1]] = key
            elif not re.match(EMBEDDINGS, key):
                foreign.append(printable(key))
        if foreign:
            refuse(path, f"is no plain LoRA: {listed(unexpected=foreign)}", GIVE)
        self._leave_out("T5", T5_KEYS)
        if len(self.alphas) > 1:
            self.notes.append(f"its alphas are in tensors and in {PEFT_METADATA}; the tensors count, as in ComfyUI")

    @property
    def alphas(self) -> frozenset[str]:
        tensors = {"tensors"} if any("alpha" in parts for parts in self._bases.values()) else set()
        return frozenset(tensors | ({"settings"} if self._settings else set()))

    def guess(self) -> FluxConfig:
        """FLUX.1's sizes, or nano's where more of the file's tensors fit those."""
        return max((FluxConfig.dev(), FluxConfig.nano()), key=self._fitting)

    def _fitting(self, config: FluxConfig) -> int:
        known, shapes = places(config), flux_shapes(config)
        downs = [(known[b].module, parts["down"]) for b, parts in self._bases.items() if b in known and "down" in parts]
        return sum(self.checkpoint.shape(key)[1:2] == shapes[f"{module}.weight"][1:] for module, key in downs)

    def placed(self, config: FluxConfig) -> dict[str, Place]:
        """base -> where it belongs, once every tensor is found to have its place and its shape."""
        known, found, unmatched = places(config), {}, []
        for base in self._bases:
            if base in known:
                found[base] = known[base]
            elif (module := clip_module(base)) and module not in self.clip:
                self.clip[module] = base
            else:
                unmatched.append(printable(base))
        if unmatched and not found:
            what = f"is a LoRA of another model: none of its {len(unmatched):,} modules (such as {unmatched[0]}) is in"
            refuse(self.path, f"{what} FLUX.1", GIVE)
        own = (*found, *self.clip.values())
        halves = [f"{base} has no {part}" for base in own for part in ("down", "up") if part not in self._bases[base]]
        if problems := listed(halves_missing=[printable(half) for half in halves], unmatched_modules=unmatched):
            refuse(self.path, f"is no LoRA that fits this model: {problems}", GIVE)
        if not own:
            refuse(self.path, "has no adapter of the transformer or of CLIP-L in it", GIVE)
        self._check_shapes(found, config)
        lacking = sum("alpha" not in self._bases[base] for base in own)
        if 0 < lacking < len(own) and not self._settings:
            self.notes.append(f"{lacking} modules have no alpha and count at full strength, as in ComfyUI")
        return found

    def _check_shapes(self, found: Mapping[str, Place], config: FluxConfig) -> None:
        shapes = flux_shapes(config)
        sizes = {
            base: (sum(end - start for start, end in place.rows), shapes[f"{place.module}.weight"][1])
            for base, place in found.items()
        }
        wrong = [p for base in (*found, *self.clip.values()) for p in self._misshapen(base, sizes.get(base))]
        width = {self.checkpoint.shape(self._bases[base]["down"])[1:2] for base in found}
        what = "for FLUX.2 dev, another model" if (6144,) in width else "for a model of other sizes"
        if wrong:
            refuse(self.path, f"was made {what}: {listed(wrong_shape=wrong)}", GIVE)

    def rank(self, base: str) -> int:
        return self.checkpoint.shape(self._bases[base]["down"])[0]

    def adapter(self, base: str) -> Adapter:
        """The adapter of `base`, at its strength."""
        parts = self._bases[base]
        down, up = self._read(parts["down"]), self._read(parts["up"])
        rank = down.shape[0]
        if "alpha" in parts:
            alpha = float(self._read(parts["alpha"]))
        else:
            settings = self._clip_settings if base in self.clip.values() else self._settings
            alpha = settings.alpha(base, rank) if settings else float(rank)
        return Adapter(down, up, alpha)

    def _read(self, key: str) -> Tensor:
        """The tensor of `key`, finite, without the kernel of 1 x 1 that some programs append."""
        tensor = self.checkpoint.get(key)
        tensor = tensor.to(torch.bfloat16) if tensor.dtype.itemsize == 1 else tensor
        if not tensor.isfinite().all():
            refuse(
                self.path, f"holds numbers that are not finite in {printable(key)}", "it is spoilt: use an earlier one"
            )
        return tensor.reshape(tensor.shape[:2]) if tensor.ndim == 4 else tensor

    def _misshapen(self, base: str, size: tuple[int, int] | None) -> Iterable[str]:
        """What is wrong with the shapes of `base`, whose module has `size` (out, in), or any."""
        parts = self._bases[base]
        shapes = {name: self.checkpoint.shape(key) for name, key in parts.items()}
        for name in ("down", "up"):
            if len(shapes[name]) == 4 and shapes[name][2:] == (1, 1):
                shapes[name] = shapes[name][:2]
        rank = max(1, *shapes["down"][:1], 0)
        out, inputs = size or ((*shapes["up"], 0)[0], (*shapes["down"], 0, 0)[1])
        for name, wanted in (("down", (rank, inputs)), ("up", (out, rank))):
            if shapes[name] != wanted or 0 in wanted:
                yield f"{printable(parts[name])} is {shapes[name]}, not {wanted}"
        if math.prod(shapes.get("alpha", ())) != 1:
            yield f"{printable(parts['alpha'])} is {shapes['alpha']}, not one number"
        for key in parts.values():
            if self.checkpoint.dtype(key) not in DTYPES and not key.endswith(".alpha"):
                yield f"{printable(key)} is {DTYPE_NAMES[self.checkpoint.dtype(key)]}, not floating point"

    def _leave_out(self, what: str, pattern: str) -> None:
        left = [base for base in self._bases if re.match(pattern, base)]
        for base in left:
            del self._bases[base]
        if left:
            self.notes.append(f"its {what} part ({len(left)} modules) is left out: fluxq keeps {what} as it is")
        if any(re.match(EMBEDDINGS, key) for key in self.checkpoint.shapes):
            self.notes.append("its textual inversions (bundle_emb) are left out: they belong to the text encoders")

    def _refuse_others(self) -> None:
        keys, metadata = list(self.checkpoint.shapes), self.checkpoint.metadata
        if not any(role(key) for key in keys) and not other_kind(keys):
            refuse(self.path, f"is {kind(keys)}, where {LORA} is wanted", GIVE)
        if model := other_model(keys, metadata):
            first = next((printable(key) for key in keys if other_model([key], {})), "its metadata says so")
            refuse(self.path, f"is a LoRA of another model, {model} ({first})", GIVE)
        if what := other_kind(keys):
            first = next(printable(key) for key in keys if other_kind([key]))
            refuse(self.path, f"is {what}: {first}", "give a plain LoRA, or extract one: fluxq lora extract")

    def _inside(self, prefix: str) -> _PeftSettings | None:
        """What the header's metadata says of the modules that begin with `prefix`."""
        text = self.checkpoint.metadata.get(PEFT_METADATA)
        if text is None:
            return None
        try:
            return _PeftSettings.parsed(json.loads(text), prefix)
        except (ValueError, TypeError, RecursionError) as error:
            refuse(self.path, f"has no valid JSON in {PEFT_METADATA} ({printable(str(error))})", "export it again")


@dataclass(frozen=True)
class _PeftSettings:
    """What PEFT's settings say of strengths: alpha, and patterns of modules with others."""

    default: float | None
    patterns: Mapping[str, float]
    rslora: bool

    @classmethod
    def parsed(cls, settings: Any, prefix: str = "") -> _PeftSettings:
        """Raises ValueError and TypeError where they are not as PEFT writes them."""
        if not isinstance(settings, dict):
            raise TypeError(f"a {type(settings).__name__} in place of an object")
        own = {key.removeprefix(prefix): value for key, value in settings.items() if key.startswith(prefix)}
        default = own.get("lora_alpha")
        patterns = {str(key): float(value) for key, value in (own.get("alpha_pattern") or {}).items()}
        values = (*patterns.values(), 0.0 if default is None else float(default))
        if not all(map(math.isfinite, values)):
            raise ValueError(f"an alpha of {values}")
        return cls(None if default is None else float(default), patterns, bool(own.get("use_rslora")))

    def alpha(self, base: str, rank: int) -> float:
        """What alpha / rank of the module is to be computed from."""
        alpha = self.default if self.default is not None else float(rank)
        for pattern, value in self.patterns.items():  # peft.utils.get_pattern_key
            if base == pattern or base.endswith("." + pattern) or _matches(pattern, base):
                alpha = value
                break
        return alpha * math.sqrt(rank) if self.rslora else alpha


def _matches(pattern: str, base: str) -> bool:
    try:
        return re.match(rf"(.*\.)?({pattern})$", base) is not None
    except re.error:
        return False


def _read_settings(path: Path) -> _PeftSettings:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        settings = _PeftSettings.parsed(content)
    except OSError as error:
        raise WrongRequest(f"{path} cannot be read ({error.strerror}); check its permissions") from error
    except (ValueError, TypeError, RecursionError) as error:
        raise WrongRequest(
            f"{path} is no valid adapter_config.json ({printable(str(error))}); save it again"
        ) from error
    if (peft_type := content.get("peft_type", "LORA")) != "LORA":
        refuse(path, f"is of a {printable(str(peft_type))} adapter, not a LoRA", GIVE)
    if content.get("use_dora"):
        refuse(path, "is of a DoRA, not a plain LoRA", GIVE)
    return settings


def _refuse_twice(path: Path, module: str, parts: list[tuple[str, Part]]) -> None:
    covered: list[tuple[int, int, str]] = sorted((*r, base) for base, part in parts for r in part.rows)
    for before, after in zip(covered, covered[1:], strict=False):
        if after[0] < before[1]:
            what = f"adapts {module} twice, as {printable(before[2])} and as {printable(after[2])}"
            refuse(path, what, "remove either")


def _correct_split_qkv(lora: Lora) -> None:
    """Give the modules that sd-scripts' split_qkv merged the strength that they were trained at.

    It stacks the n parts of a module into rank n * r and leaves alpha at that of a part (networks/lora_flux.py), so
    that every reader applies a third or a quarter of the LoRA.
    """
    try:
        arguments = json.loads(lora.metadata.get("ss_network_args") or "{}")
    except ValueError:
        return
    if not isinstance(arguments, dict) or str(arguments.get("split_qkv", "")).lower() != "true":
        return
    corrected = 0
    for module, adapter in lora.adapters.items():
        pieces = split_rows(module, lora.config)
        own = split(adapter, pieces)
        equal = adapter.rank % len(pieces) == 0 and adapter.rank >= sum(part.rank for part in own.values())
        if len(pieces) > 1 and equal:
            lora.adapters[module] = replace(adapter, alpha=adapter.alpha * len(pieces))
            corrected += 1
    if corrected:
        del lora.metadata["ss_network_args"]
        lora.notes.append(
            f"{corrected} modules were trained with sd-scripts' split_qkv, whose files are too weak: "
            "they get the strength at which they were trained"
        )
