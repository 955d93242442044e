"""The settings that PEFT keeps beside an adapter, or diffusers in a file's metadata: where strengths are written."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fluxq.errors import WrongRequest

from ..checkpoint.files import printable, refuse

PEFT_FILES = ("adapter_model.safetensors", "adapter_config.json")
PEFT_METADATA = "lora_adapter_metadata"  # diffusers and SimpleTuner keep PEFT's settings there
GIVE = "give a LoRA that was trained on FLUX.1"


@dataclass(frozen=True)
class PeftSettings:
    """What PEFT's settings say of strengths: alpha, and patterns of modules with others."""

    default: float | None
    patterns: Mapping[str, float]
    rslora: bool

    @classmethod
    def parsed(cls, settings: Any, prefix: str = "") -> PeftSettings:
        """Raises ValueError and TypeError where they are not as PEFT writes them."""
        if not isinstance(settings, dict):
            raise TypeError(f"a {type(settings).__name__} in place of an object")
        own = {key.removeprefix(prefix): value for key, value in settings.items() if key.startswith(prefix)}
        default = own.get("lora_alpha")
        patterns = {key: float(value) for key, value in dict(own.get("alpha_pattern") or {}).items()}
        if slow := next((p for p in patterns if re.search(r"\)[*+{]", p) or len(re.findall(r"[*+{]", p)) > 4), None):
            raise ValueError(f"the pattern {slow} may take for ever")
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


def is_adapter(path: Path) -> bool:
    """Whether `path` is the folder of a PEFT adapter."""
    return (path / PEFT_FILES[0]).is_file()


def adapter_files(path: Path) -> tuple[Path, Path | None]:
    """Where the tensors of the LoRA at `path` are; and its settings, which may be missing, where it is a PEFT adapter:
    a folder, or the file in it.
    """
    if path.is_dir():
        return path / PEFT_FILES[0], path / PEFT_FILES[1]
    return path, path.parent / PEFT_FILES[1] if path.name == PEFT_FILES[0] else None


def read_settings(path: Path) -> PeftSettings:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        settings = PeftSettings.parsed(content)
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
