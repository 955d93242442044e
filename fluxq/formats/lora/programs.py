"""Which programs read a LoRA file without conversion, and what they do with it.

The table comes from ComfyUI's and Forge's key maps, from running diffusers 0.42 with peft 0.21 on files of each kind,
and from sd-scripts' source. "not tried" means that nobody has checked.
"""

from __future__ import annotations

from .read import Lora

PROGRAMS: tuple[str, ...] = ("ComfyUI", "Forge", "diffusers", "sd-scripts")
CONVERT = "no: convert it to kohya"
CONVERT_SCRIPT = "after its convert_flux_lora.py"

SUPPORT = {  # kind of file -> what each of PROGRAMS does with it
    "kohya": ("yes", "yes", "yes", "yes"),
    "diffusers, strength 1": ("yes", "yes", "yes", CONVERT_SCRIPT),
    "diffusers, mixed ranks": (
        "yes",
        "yes",
        "since August 2026; too strong or too weak before",
        CONVERT_SCRIPT,
    ),
    "diffusers, alpha tensors": ("yes", "yes", "yes", "wrong: its convert_flux_lora.py ignores alpha"),
    "diffusers, alpha in metadata": (
        "wrong: ignores the strength",
        "wrong: ignores the strength",
        "yes",
        "wrong: ignores the strength",
    ),
    "diffusers, alpha twice": ("yes", "yes", "no: refuses alpha in two places", CONVERT),
    "diffusers, down/up": ("yes", "yes", "wrong: ignores the strength", CONVERT),
    "comfy, A/B": ("yes", "yes", "no: applies nothing and only warns", CONVERT),
    "comfy, down/up": ("yes", "yes", "yes", CONVERT),
    "onetrainer": ("yes", "yes", "attention only, else an error", CONVERT),
    "peft": (CONVERT, CONVERT, "with PeftModel or load_adapter, not load_lora_weights", CONVERT),
    "xlabs": ("only if it has every block, or with x-flux", "no: applies nothing", "yes", CONVERT),
    "lycoris": ("yes", "yes", "not tried", CONVERT),
    "diffsynth": ("newer versions", "no: applies nothing", "not tried", CONVERT),
    "original": ("not tried", "not tried", "not tried", CONVERT),
}


def programs(lora: Lora) -> dict[str, str]:
    """Program -> "yes", or what it does with this file instead."""
    answer = dict(zip(PROGRAMS, SUPPORT.get(_kind(lora), ("not tried",) * len(PROGRAMS)), strict=True))
    outside = [module for module in lora.adapters if "_blocks." not in module]
    if outside and lora.dialect in ("kohya", "comfy") and answer["diffusers"] == "yes":
        answer["diffusers"] = f"partly: it drops {len(outside)} modules outside the blocks"
    if lora.too_weak:
        weak = "wrong: too weak; convert it to kohya"
        answer = {program: "yes" if program == "sd-scripts" else weak for program in PROGRAMS}
    return answer


def _kind(lora: Lora) -> str:
    """The key in SUPPORT for this file."""
    if lora.dialect == "comfy":
        return "comfy, A/B" if "A/B" in lora.spellings else "comfy, down/up"
    if lora.dialect != "diffusers":
        return lora.dialect
    if len(lora.alphas) > 1:
        return "diffusers, alpha twice"
    if "settings" in lora.alphas:
        return "diffusers, alpha in metadata"
    if "tensors" in lora.alphas:
        return "diffusers, down/up" if "down/up" in lora.spellings else "diffusers, alpha tensors"
    return "diffusers, mixed ranks" if len(lora.file_ranks) > 1 else "diffusers, strength 1"
