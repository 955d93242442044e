"""Sample prompts as sd-scripts reads them: a line with options, or a .txt, .toml or .json file of them."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from fluxq.errors import WrongRequest

from .texts import parsed, read_text

OPTIONS: tuple[tuple[str, str, str, Callable[[str], Any]], ...] = (
    ("w", r"\d+", "width", int),
    ("h", r"\d+", "height", int),
    ("d", r"\d+", "seed", int),
    ("s", r"\d+", "sample_steps", lambda text: max(1, min(1000, int(text)))),
    ("l", r"[\d.]+", "scale", float),
    ("g", r"[\d.]+", "guidance_scale", float),
    ("n", ".+", "negative_prompt", str),
    ("ss", ".+", "sample_sampler", str),
    ("cn", ".+", "controlnet_image", str),
    ("ctr", ".+", "cfg_trunc_ratio", float),
    ("rcfg", ".+", "renorm_cfg", float),
    ("fs", ".+", "flow_shift", str),
)
"""Option, pattern of its value, key, and what makes its value."""


def parse_prompt(line: str) -> dict[str, Any]:
    """The prompt and options of a line like "a cat --w 768 --h 1024 --d 1 --s 20 --l 1 --g 3.5 --n text".

    As in sd-scripts: values that cannot be read and unknown options are left out, the last of several values counts,
    and the prompt itself is read as an option too if it looks like one ("w 512").
    """
    parts = line.split(" --")
    found: dict[str, Any] = {"prompt": parts[0]}
    for part in parts:
        for name, pattern, key, kind in OPTIONS:
            if match := re.match(rf"{name} ({pattern})", part, re.IGNORECASE):
                with suppress(ValueError):  # 1.2.3
                    found[key] = kind(match[1])
                break
    return found


def read_prompts(path: Path) -> list[dict[str, Any]]:
    """The prompts of a file: lines of a .txt, `[[prompt.subset]]` with the defaults of `[prompt]` in a .toml, or a list
    of texts or tables in a .json. Raises WrongRequest if it cannot be read or is none of these.
    """
    text = read_text(path)
    if path.suffix == ".txt":
        prompts: Any = [line.strip() for line in text.split("\n") if line.strip() and line[0] != "#"]
    elif path.suffix in (".toml", ".json"):
        prompts = parsed(text, str(path), path.suffix[1:])
    else:
        raise WrongRequest(f"--sample_prompts {path} must be a .txt, .toml or .json file")
    if path.suffix == ".toml":
        try:
            prompts = [{**prompts["prompt"], **own} for own in prompts["prompt"]["subset"]]
        except (KeyError, TypeError) as error:
            raise WrongRequest(f"--sample_prompts {path} has no [[prompt.subset]]") from error
    found = [parse_prompt(item) if isinstance(item, str) else item for item in prompts if isinstance(item, str | dict)]
    if not isinstance(prompts, list) or len(found) != len(prompts):
        raise WrongRequest(f"--sample_prompts {path} must be a list of texts or tables")
    return [{key: value for key, value in prompt.items() if key != "subset"} for prompt in found]
