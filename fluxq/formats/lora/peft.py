"""PEFT's settings, which hold a LoRA's strengths: in a file next to the adapter, or in its metadata (diffusers)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.files import printable, refuse, well_formed
from ..checkpoint.shards import read_json

PEFT_FILES = ("adapter_model.safetensors", "adapter_config.json")
PEFT_METADATA = "lora_adapter_metadata"  # diffusers and SimpleTuner keep PEFT's settings there
REMEDY = "use a LoRA that was trained on FLUX.1"


@dataclass(frozen=True)
class PeftSettings:
    """The strengths in PEFT's settings: the default alpha, and patterns of modules with other alphas."""

    default: float | None
    patterns: Mapping[str, float]
    rslora: bool

    @classmethod
    def parsed(cls, settings: Any, prefix: str = "") -> PeftSettings:
        """Raises ValueError, TypeError or OverflowError if the settings are not in PEFT's format."""
        if not isinstance(settings, dict):
            raise TypeError(f"a {type(settings).__name__}, not an object")
        own = {key.removeprefix(prefix): value for key, value in settings.items() if key.startswith(prefix)}
        default = own.get("lora_alpha")
        patterns = {key: float(value) for key, value in dict(own.get("alpha_pattern") or {}).items()}
        if slow := next((p for p in patterns if re.search(r"\)[*+{]", p) or len(re.findall(r"[*+{]", p)) > 4), None):
            raise ValueError(f"the pattern {slow} could take forever to match")
        values = (*patterns.values(), 0.0 if default is None else float(default))
        if not all(map(math.isfinite, values)):
            raise ValueError(f"an alpha that is not finite, in {values}")
        return cls(None if default is None else float(default), patterns, bool(own.get("use_rslora")))

    def alpha(self, base: str, rank: int) -> float:
        """The alpha of the module `base`, times sqrt(rank) with rslora, so that alpha / rank is always the scale."""
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


def is_adapter(path: Path) -> bool:
    """Whether `path` is the folder of a PEFT adapter."""
    return (path / PEFT_FILES[0]).is_file()


def adapter_files(path: Path) -> tuple[Path, Path | None]:
    """The file with the tensors of the LoRA at `path`, and the file with its settings, which may not exist.

    The settings are None unless `path` is a PEFT adapter: its folder, or the file inside it.
    """
    if path.is_dir():
        return path / PEFT_FILES[0], path / PEFT_FILES[1]
    return path, path.parent / PEFT_FILES[1] if path.name == PEFT_FILES[0] else None


def read_settings(path: Path) -> PeftSettings:
    """The settings in an adapter_config.json. Raises WrongRequest if it is damaged or not for a plain LoRA."""
    content = read_json(path)
    with well_formed(path, "is not a valid adapter_config.json", "save the adapter again"):
        settings = PeftSettings.parsed(content)
    if (peft_type := content.get("peft_type", "LORA")) != "LORA":
        refuse(path, f"is for a {printable(str(peft_type))} adapter, not a LoRA", REMEDY)
    if content.get("use_dora"):
        refuse(path, "is for a DoRA, not a plain LoRA", REMEDY)
    return settings
