"""The tensors of a LoRA file, told apart by their keys and checked before they are read.

A key's base names a module in some dialect (fluxq/formats/lora/keys.py), its suffix one of the module's tensors. Every
tensor must have its place, its shape and its other half; what belongs to other models or is no plain LoRA is refused by
name. Strength is in alpha tensors, in PEFT's settings, or nowhere, which means 1.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from fluxq.model.config import FluxConfig

from ..checkpoint.detect import LORA, kind
from ..checkpoint.files import DTYPE_NAMES, Checkpoint, listed, printable, refuse
from ..checkpoint.shapes import flux_shapes
from .algebra import Adapter
from .keys import (
    CLIP_REST,
    EMBEDDINGS,
    T5_KEYS,
    Place,
    clip_module,
    other_kind,
    other_model,
    places,
    role,
)
from .peft import (
    GIVE,
    PEFT_FILES,
    PEFT_METADATA,
    PeftSettings,
    adapter_files,
    is_adapter,
    read_settings,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2)


class LoraFile:
    """The tensors of a file by the base of their keys: base -> "down" | "up" | "alpha" -> key."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.is_dir() and not is_adapter(path):
            refuse(path, f"is a folder without {PEFT_FILES[0]}", "name a LoRA file or a PEFT adapter's folder")
        path, settings = adapter_files(path)
        self.checkpoint = Checkpoint(path)
        self.notes: list[str] = []
        self.clip: dict[str, str] = {}
        self._refuse_others()
        self._settings = read_settings(settings) if settings and settings.is_file() else self._inside("transformer.")
        self._clip_settings = self._inside("text_encoder.")
        if settings and not self._settings and any(key.startswith("base_model.") for key in self.checkpoint.shapes):
            self.notes.append(f"{settings.name} is not there, so its LoRA counts at full strength (alpha = rank)")
        self._bases: dict[str, dict[str, str]] = {}
        foreign = []
        for key in self.checkpoint.shapes:
            if found := role(key):
                other = self._bases.setdefault(found[0], {}).setdefault(found[1], key)
                if other != key:
                    refuse(path, f"has one tensor under two names ({printable(other)}, {printable(key)})", "remove one")
            elif not re.match(EMBEDDINGS, key):
                foreign.append(printable(key))
        if foreign:
            refuse(path, f"is no plain LoRA: {listed(unexpected=foreign)}", GIVE)
        self._leave_out("T5", T5_KEYS)
        self._leave_out("text projection", CLIP_REST)
        if any(re.match(EMBEDDINGS, key) for key in self.checkpoint.shapes):
            self.notes.append("its textual inversions (bundle_emb) are left out: they belong to the text encoders")
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
        if not wrong:
            return
        own = {b: tuple(self.checkpoint.shape(self._bases[b][part]) for part in ("up", "down")) for b in found}
        if all((up[:1], down[1:2]) == ((sizes[b][0],), (sizes[b][1],)) for b, (up, down) in own.items()):
            refuse(self.path, f"is damaged: {listed(wrong_tensor=wrong)}", "export it again, or use an earlier one")
        what = (
            "FLUX.2 dev, another model" if any(d[1:2] == (6144,) for _, d in own.values()) else "a model of other sizes"
        )
        refuse(self.path, f"was made for {what}: {listed(wrong_shape=wrong)}", GIVE)

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

    def _inside(self, prefix: str) -> PeftSettings | None:
        """What the header's metadata says of the modules that begin with `prefix`."""
        text = self.checkpoint.metadata.get(PEFT_METADATA)
        if text is None:
            return None
        try:
            return PeftSettings.parsed(json.loads(text), prefix)
        except (ValueError, TypeError, RecursionError) as error:
            refuse(self.path, f"has no valid JSON in {PEFT_METADATA} ({printable(str(error))})", "export it again")
