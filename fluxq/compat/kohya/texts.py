"""Files that are TOML or JSON."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

from fluxq.errors import WrongRequest


def read_text(path: Path) -> str:
    """What is in the file. Raises WrongRequest if it is missing or not UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise WrongRequest(f"{path} cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise WrongRequest(f"{path} is not text in UTF-8; save it as that") from error


def parsed(text: str, where: str, format: str = "toml") -> Any:
    """The tables of `text`. format: "toml" or "json". Raises WrongRequest, naming `where`, for what is neither."""
    try:
        return json.loads(text) if format == "json" else tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError also for numbers of thousands of digits
        raise WrongRequest(f"{where} is not valid {format.upper()}: {error}") from error
