"""The tensors of a LoRA file, recognized by their keys and checked before they are read.

A key's base names a module in some dialect (fluxq/formats/lora/keys.py), its suffix one of the module's tensors. Every
tensor must belong to a module, have the right shape and have its other half. LoRAs of other models and other kinds of
adapters are refused, and the message names them. The strength is stored in alpha tensors or in PEFT's settings; without
either it is 1.
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

from ..checkpoint.detect import LORA, OTHER_ADAPTERS, kind
from ..checkpoint.files import DTYPE_NAMES, Checkpoint, listed, printable, refuse, well_formed
from ..checkpoint.shapes import flux_shapes
from .algebra import Adapter
from .keys import (
    CLIP_REST,
    EMBEDDINGS,
    PEFT_TEXT,
    T5_KEYS,
    KeyTarget,
    clip_module,
    other_model,
    places,
    role,
)
from .peft import (
    PEFT_FILES,
    PEFT_METADATA,
    REMEDY,
    PeftSettings,
    adapter_files,
    is_adapter,
    read_settings,
)

MAKE_PLAIN = "use a plain LoRA, or make one: save the model with this applied, as ComfyUI can, then fluxq lora extract"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2)


class LoraFile:
    """The tensors of a LoRA file, grouped by the base of their keys: base -> "down" | "up" | "alpha" -> key.

    clip maps CLIP-L modules to bases, filled by `placed`; notes are sentences for the user.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.is_dir() and not is_adapter(path):
            refuse(path, f"is a folder without {PEFT_FILES[0]}", "name a LoRA file or the folder of a PEFT adapter")
        path, settings = adapter_files(path)
        self.checkpoint = Checkpoint(path)
        self.notes: list[str] = []
        self.clip: dict[str, str] = {}
        self._refuse_others()
        self._settings = (
            read_settings(settings) if settings and settings.is_file() else self._metadata_settings("transformer.")
        )
        self._clip_settings = self._metadata_settings("text_encoder.")
        if settings and not self._settings and any(key.startswith("base_model.") for key in self.checkpoint.shapes):
            self.notes.append(f"{settings.name} is missing, so the LoRA is used at full strength (alpha = rank)")
        self._bases: dict[str, dict[str, str]] = {}
        foreign = []
        for key in self.checkpoint.shapes:
            if parsed := role(key):
                other = self._bases.setdefault(parsed[0], {}).setdefault(parsed[1], key)
                if other != key:
                    what = f"has one tensor under two names ({printable(other)}, {printable(key)})"
                    refuse(path, what, "remove one of them")
            elif not re.match(EMBEDDINGS, key):
                foreign.append(printable(key))
        if foreign:
            refuse(path, f"is not a plain LoRA: {listed(unexpected=foreign)}", REMEDY)
        self._leave_out("T5", T5_KEYS)
        self._leave_out("text projection", CLIP_REST)
        if any(re.match(EMBEDDINGS, key) for key in self.checkpoint.shapes):
            self.notes.append("its textual inversions (bundle_emb) are ignored: they belong to the text encoders")
        if len(self.alphas) > 1:
            self.notes.append(f"it has alphas in tensors and in {PEFT_METADATA}; fluxq uses the tensors, like ComfyUI")

    @property
    def alphas(self) -> frozenset[str]:
        """Where the file stores strengths: any of "tensors", "settings"."""
        tensors = {"tensors"} if any("alpha" in parts for parts in self._bases.values()) else set()
        return frozenset(tensors | ({"settings"} if self._settings else set()))

    def guess(self) -> FluxConfig:
        """FLUX.1's sizes, or nano's if more of the file's tensors fit those."""
        return max((FluxConfig.dev(), FluxConfig.nano()), key=self._fitting)

    def _fitting(self, config: FluxConfig) -> int:
        known, shapes = places(config), flux_shapes(config)
        downs = [(known[b].module, parts["down"]) for b, parts in self._bases.items() if b in known and "down" in parts]
        return sum(self.checkpoint.shape(key)[1:2] == shapes[f"{module}.weight"][1:] for module, key in downs)

    def placed(self, config: FluxConfig) -> dict[str, KeyTarget]:
        """base -> its place in the transformer. Raises WrongRequest unless every tensor has a module and fits it."""
        known, placed, unmatched = places(config), {}, []
        for base in self._bases:
            if base in known:
                placed[base] = known[base]
            elif (module := clip_module(base)) and module not in self.clip:
                self.clip[module] = base
            else:
                unmatched.append(printable(base))
        if unmatched and not placed and all(re.match(PEFT_TEXT, base) for base in self._bases):
            refuse(self.path, "is a LoRA of a text encoder alone, as PEFT saves it", REMEDY)
        if unmatched and not placed:
            what = f"is a LoRA for another model: FLUX.1 has none of its {len(unmatched):,} modules"
            refuse(self.path, f"{what} (the first is {unmatched[0]})", REMEDY)
        own = (*placed, *self.clip.values())
        halves = [f"{base} has no {part}" for base in own for part in ("down", "up") if part not in self._bases[base]]
        if problems := listed(halves_missing=[printable(half) for half in halves], unmatched_modules=unmatched):
            refuse(self.path, f"is not a LoRA that fits this model: {problems}", REMEDY)
        if not own:
            left = f" ({self.notes[0].partition(':')[0]})" if self.notes else ""
            refuse(self.path, f"has no adapter for the transformer or for CLIP-L{left}", REMEDY)
        self._check_shapes(placed, config)
        without_alpha = sum("alpha" not in self._bases[base] for base in own)
        if 0 < without_alpha < len(own) and not self._settings:
            self.notes.append(f"{without_alpha} modules have no alpha and are used at full strength, as in ComfyUI")
        return placed

    def _check_shapes(self, placed: Mapping[str, KeyTarget], config: FluxConfig) -> None:
        shapes = flux_shapes(config)
        sizes = {
            base: (sum(end - start for start, end in place.rows), shapes[f"{place.module}.weight"][1])
            for base, place in placed.items()
        }
        wrong = [p for base in (*placed, *self.clip.values()) for p in self._misshapen(base, sizes.get(base))]
        if not wrong:
            return
        own = {b: tuple(self.checkpoint.shape(self._bases[b][part]) for part in ("up", "down")) for b in placed}
        if all((up[:1], down[1:2]) == ((sizes[b][0],), (sizes[b][1],)) for b, (up, down) in own.items()):
            refuse(self.path, f"is damaged: {listed(wrong_tensor=wrong)}", "export it again, or use an earlier version")
        inputs = {self.checkpoint.shape(self._bases[b]["down"])[1:2] for b, p in placed.items() if p.module == "img_in"}
        for width, what in ((128, "Canny or Depth"), (384, "Fill")):
            if (width,) in inputs:
                refuse(self.path, f"was made for FLUX.1 {what}, whose img_in has {width} inputs, not 64", REMEDY)
        is_flux_2 = any(d[1:2] == (6144,) for _, d in own.values())
        what = "FLUX.2 dev, a different model" if is_flux_2 else "a model of other sizes"
        refuse(self.path, f"was made for {what}: {listed(wrong_shape=wrong)}", REMEDY)

    def rank(self, base: str) -> int:
        return self.checkpoint.shape(self._bases[base]["down"])[0]

    def adapter(self, base: str) -> Adapter:
        """The adapter of `base`, with the strength that it was trained at."""
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
        """The tensor of `key`, checked to be finite, without the 1 x 1 kernel dimensions that some programs append."""
        tensor = self.checkpoint.get(key)
        tensor = tensor.to(torch.bfloat16) if tensor.dtype.itemsize == 1 else tensor
        if not tensor.isfinite().all():
            refuse(self.path, f"has NaN or infinite numbers in {printable(key)}", "use an earlier version")
        return tensor.reshape(tensor.shape[:2]) if tensor.ndim == 4 else tensor

    def _misshapen(self, base: str, size: tuple[int, int] | None) -> Iterable[str]:
        """What is wrong with the tensors of `base`; its module has `size` (out, in), or an unknown size."""
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
            self.notes.append(f"its {what} part ({len(left)} modules) is ignored: fluxq leaves {what} unchanged")

    def _refuse_others(self) -> None:
        keys, metadata = list(self.checkpoint.shapes), self.checkpoint.metadata
        own = kind(keys)
        if own != LORA and own not in OTHER_ADAPTERS.values() and not any(role(key) for key in keys):
            refuse(self.path, f"is {own}, not {LORA}", REMEDY)
        if model := other_model(keys, metadata):
            first = next((printable(key) for key in keys if other_model([key], {})), "its metadata says so")
            refuse(self.path, f"is a LoRA for another model, {model} ({first})", REMEDY)
        if own in OTHER_ADAPTERS.values():
            first = next(printable(key) for key in keys if kind([key]) == own)
            refuse(self.path, f"is {own}, not a plain LoRA ({first})", MAKE_PLAIN)
        if not any(role(key) for key in keys):
            refuse(self.path, f"is an adapter of a kind that fluxq does not know ({printable(keys[0])})", MAKE_PLAIN)

    def _metadata_settings(self, prefix: str) -> PeftSettings | None:
        """The settings in the header's metadata for the modules that begin with `prefix`."""
        text = self.checkpoint.metadata.get(PEFT_METADATA)
        if text is None:
            return None
        with well_formed(self.path, f"has invalid JSON in {PEFT_METADATA}", "export it again"):
            return PeftSettings.parsed(json.loads(text), prefix)
