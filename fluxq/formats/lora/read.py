"""`load_lora` reads a LoRA file of any program as one adapter per module of the original transformer.

In every dialect, a file's tensors are parts: changes of some rows of a module. The parts of a module are stacked into
one adapter (fluxq/formats/lora/algebra.py), with the strength at which the file was trained. CLIP-L's modules are
included, T5's are ignored.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from fluxq.model.config import FluxConfig

from ..checkpoint.files import MALFORMED, listed, printable, refuse
from .algebra import Adapter, Part, split, stacked
from .file import LoraFile
from .keys import SPELLINGS, matrices, split_rows
from .peft import REMEDY


@dataclass
class Lora:
    """The contents of a LoRA file.

    adapters    BFL module -> adapter
    clip        CLIP-L module, named as in transformers 5 -> adapter
    spellings   any of "A/B", "down/up"
    alphas      where the strengths came from: any of "tensors", "settings"
    file_ranks  the ranks of the file's own modules, which may be parts of the modules in `adapters`
    too_weak    whether other programs apply the LoRA weaker than it was trained
    notes       sentences for the user about what was ignored or corrected
    """

    path: Path
    config: FluxConfig
    dialect: str
    adapters: dict[str, Adapter]
    clip: dict[str, Adapter]
    metadata: dict[str, str]
    spellings: frozenset[str] = frozenset()
    alphas: frozenset[str] = frozenset()
    file_ranks: tuple[int, ...] = ()
    too_weak: bool = False
    notes: list[str] = field(default_factory=list)

    @property
    def dtype(self) -> torch.dtype:
        """The narrowest floating-point type that holds all of its tensors."""
        dtype = torch.float8_e4m3fn
        for adapter in self.everything.values():
            for tensor in (adapter.down, adapter.up):
                dtype = tensor.dtype if dtype.itemsize == 1 else torch.promote_types(dtype, tensor.dtype)
        return dtype

    @property
    def everything(self) -> dict[str, Adapter]:
        """The adapters of the transformer and of CLIP-L; CLIP-L's module names get the prefix "clip."."""
        return self.adapters | {f"clip.{module}": adapter for module, adapter in self.clip.items()}

    def check_clip(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise WrongRequest if `clip` does not fit a CLIP-L whose tensors have these shapes."""
        wrong = [
            f"{module} is ({adapter.up.shape[0]}, {adapter.down.shape[1]}), not {shapes.get(f'{module}.weight')}"
            for module, adapter in self.clip.items()
            if (adapter.up.shape[0], adapter.down.shape[1]) != shapes.get(f"{module}.weight")
        ]
        if wrong:
            what = f"has a CLIP-L part for a text encoder of other sizes: {listed(wrong_shape=wrong)}"
            refuse(self.path, what, REMEDY)

    def require_transformer(self) -> None:
        """Raise WrongRequest if it adapts no layer of the transformer."""
        if not self.adapters:
            refuse(self.path, "adapts only CLIP-L, no layer of the transformer", "leave it out, or use another LoRA")

    @property
    def ranks(self) -> list[int]:
        """The different ranks of the transformer's adapters, sorted."""
        return sorted({adapter.rank for adapter in self.adapters.values()})


def load_lora(path: str | Path, config: FluxConfig | None = None) -> Lora:
    """The LoRA in a .safetensors file or a PEFT folder, in any dialect of fluxq/formats/lora/keys.py.

    `config` is the transformer's; by default FLUX.1's or nano's, whichever fits better. Tensors keep their dtype, but
    8-bit ones become bf16. Raises WrongRequest for other kinds of adapters, for LoRAs of other models, and for tensors
    that are missing, unknown, misshapen or not finite.
    """
    file = LoraFile(Path(path))
    config = config or file.guess()
    placed = file.placed(config)
    lora = Lora(
        file.path,
        config,
        Counter(place.dialect for place in placed.values()).most_common(1)[0][0] if placed else "text encoder only",
        {},
        {},
        dict(file.checkpoint.metadata),
        frozenset(name for name, p in SPELLINGS.items() if any(re.search(p, key) for key in file.checkpoint.shapes)),
        file.alphas,
        tuple(sorted({file.rank(base) for base in placed})),
        notes=file.notes,
    )
    parts: dict[str, list[tuple[str, Part]]] = {}
    for base, place in placed.items():
        parts.setdefault(place.module, []).append((base, Part(place.rows, file.adapter(base))))
    for module, out in matrices(config).items():
        if module in parts:
            _refuse_twice(file.path, module, parts[module])
            lora.adapters[module] = stacked([part for _, part in parts[module]], out)
    lora.clip = {module: file.adapter(base) for module, base in file.clip.items()}
    _correct_split_qkv(lora)
    return lora


def described(lora: Lora) -> str:
    """ "304 modules of rank 16", and the ranks of the file's own modules if those are parts."""
    parts = (
        f" (in the file: {_spread(lora.file_ranks)})" if lora.file_ranks and [*lora.file_ranks] != lora.ranks else ""
    )
    if not lora.adapters:
        return f"{len(lora.clip)} modules of {_spread(sorted({a.rank for a in lora.clip.values()}))}, all of CLIP-L"
    clip = f", {len(lora.clip)} of CLIP-L" if lora.clip else ""
    return f"{len(lora.adapters)} modules of {_spread(lora.ranks)}{parts}{clip}"


def _spread(ranks: Sequence[int]) -> str:
    """ "ranks 4 to 16" or "rank 16"."""
    return f"ranks {ranks[0]} to {ranks[-1]}" if len(ranks) > 1 else f"rank {ranks[0]}"


def _refuse_twice(path: Path, module: str, parts: list[tuple[str, Part]]) -> None:
    covered: list[tuple[int, int, str]] = sorted((*r, base) for base, part in parts for r in part.rows)
    for before, after in zip(covered, covered[1:], strict=False):
        if after[0] < before[1]:
            what = f"adapts {module} twice, as {printable(before[2])} and as {printable(after[2])}"
            refuse(path, what, "remove one of them")


def _correct_split_qkv(lora: Lora) -> None:
    """Restore the trained strength of the modules that sd-scripts' split_qkv merged.

    It stacks the n parts of a module into rank n * r but keeps the alpha of a part (networks/lora_flux.py), so every
    reader applies only a third or a quarter of the LoRA.
    """
    try:
        arguments = json.loads(lora.metadata.get("ss_network_args") or "{}")
    except MALFORMED:
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
        lora.too_weak = True
        lora.notes.append(
            f"{corrected} modules were trained with sd-scripts' split_qkv, which saves them too weak; "
            "fluxq uses them at the strength at which they were trained"
        )
