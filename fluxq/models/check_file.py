"""`fluxq check FILE`: one screen on what a file is, and what fluxq does with it or why it refuses it.

For models, only headers are read.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from fluxq.console import console
from fluxq.data.images import SUFFIXES
from fluxq.errors import WrongRequest
from fluxq.formats.checkpoint import detect
from fluxq.formats.checkpoint.files import printable
from fluxq.formats.checkpoint.shards import FOLDERS, SHARD, Shards, refuse_shard, units
from fluxq.formats.checkpoint.sizes import INCOMPLETE, variant
from fluxq.formats.checkpoint.source import OPENERS, Source
from fluxq.formats.lora.peft import PEFT_FILES
from fluxq.formats.lora.programs import programs
from fluxq.formats.lora.read import described, load_lora
from fluxq.formats.quantized import QuantizedFile, stored_bytes
from fluxq.kernels import FORMATS
from fluxq.model.config import FluxConfig

from .finder import FLAGS, PARTS

SAME_FORMAT = {  # format -> the precisions that already have this format
    "nf4": ("nf4", "nf4, nested"),
    "fp8": ("fp8 e4m3", "fp8 e4m3, scaled"),
    "int8": ("int8",),
    "bf16": ("bf16",),
}
USED = f"fluxq has no use for it, only for LoRAs and {', '.join(detect.EXAMPLES.values())}"
TITLES = ("modelspec.title", "ss_output_name", "general.name")
Answer = dict[str, Any]


def model_files(folder: Path) -> list[Path]:
    """The model files in `folder` and in its subfolders of diffusers' layout, or shards that no index lists; none if
    `folder` has images.
    """
    if any(path.suffix.lower() in SUFFIXES for path in folder.iterdir()):
        return []
    places = [folder, *(folder / name for name in FOLDERS.values())]
    found = [unit for place in places if place.is_dir() for unit in units(place)]
    return found or sorted(path for path in folder.glob("*.safetensors") if SHARD.search(path.stem))


def check_files(paths: list[Path]) -> Answer:
    """`check_file` for each path; a file that is not a checkpoint is refused with the reason."""
    answers = {}
    for path in paths:
        try:
            answers[str(path)] = check_file(path)
        except WrongRequest as error:
            console.print(f"refused      {error}")
            answers[str(path)] = {"ready": False, "reasons": [str(error)]}
    return {"ready": all(answer["ready"] for answer in answers.values()), "files": answers}


def check_file(path: Path) -> Answer:
    """Print one screen on a file, an index of shards or a PEFT adapter's folder: its kind, parts and precision, and
    what fluxq does with it or why it refuses it.

    Raises WrongRequest for anything but a complete safetensors or GGUF file.
    """
    shards = Shards(path / PEFT_FILES[0] if path.is_dir() else path)
    if "fluxq" in shards.metadata:
        about = about_quantized(file := QuantizedFile.open(path))
        console.print(f"holds        {detect.FLUX}: {about['what']}, {about['precision']}")
        console.print(f"             use it with --flux and --format {file.format}")
        return {"ready": True, "kind": detect.FLUX, "path": str(path), "parts": {"flux": about}, "reasons": []}
    kind = detect.kind(shards.shapes)
    stored = Counter(tensor.kind for tensor in shards.tensors.values())
    listed = ", ".join(f"{count} {precision}" for precision, count in stored.most_common())
    console.print(f"file         {path}, {size(shards.nbytes)}, {len(shards.shapes)} tensors ({listed})")
    parts, lora, reasons = {}, None, []
    try:
        refuse_shard(path)
        if detect.adapter_kind(shards.shapes):
            lora = _lora(path)
        else:
            parts = _parts(path, detect.models_in(shards.shapes) or [kind], reasons)
    except WrongRequest as error:
        reasons.append(str(error))
    title = next(filter(None, map(shards.metadata.get, TITLES)), None)
    if title:
        console.print(f"title        {printable(title)}")
    if "flux" in parts and is_kontext(path.name, title or ""):
        console.print(
            "note         Kontext, by its name: it edits images, and fluxq trains it on images alone, like dev"
        )
    if not parts and not lora and not reasons:
        reasons.append(f"{path} is {kind}; {INCOMPLETE if kind.startswith(detect.PART) else USED}")
    for reason in reasons:
        console.print(f"refused      {reason}")
    answer = {"ready": bool(parts or lora), "kind": kind, "path": str(path), "stored": dict(stored), "lora": lora}
    return answer | {"bytes": shards.nbytes, "title": title, "parts": parts, "reasons": reasons}


def _parts(path: Path, meant: list[str], reasons: list[str]) -> Answer:
    """The models in the file, out of those that it is `meant` to hold; adds to `reasons` why one cannot be used."""
    parts = {}
    for part, wanted in PARTS.items():
        if wanted not in meant:
            continue
        try:
            source = OPENERS[wanted](path)
        except WrongRequest as error:
            reasons.append(str(error))
            continue
        parts[part] = about = about_source(source) | {"use": _use(part, source)}
        console.print(f"holds        {wanted}: {about['what']}, {about['precision']}; use it with {FLAGS[part]}")
        console.print(f"             {about['use']}")
    return parts


def _lora(path: Path) -> Answer:
    """What a LoRA is, and which programs load it. Reads the whole file. Raises WrongRequest if fluxq cannot load it."""
    lora = load_lora(path)
    verdicts = programs(lora)
    readers = [program for program, verdict in verdicts.items() if verdict == "yes"]
    others = ", ".join(program for program in verdicts if program not in readers)
    limits = f"; not, or not completely, by {others}" if others else ""
    if set(verdicts.values()) == {"not tried"}:
        loaded = "whether other programs load it was not tried"
    else:
        loaded = f"loaded as is by {', '.join(readers) or 'no other program'}{limits}"
    train = ", continue training with --from-lora" if lora.adapters else " (it cannot start a training: --from-lora)"
    console.print(f"holds        a LoRA, {lora.dialect}, {described(lora)}")
    console.print(f"             {loaded}")
    console.print(f"             sample with fluxq sample --lora{train}; more: fluxq lora info")
    about = {"dialect": lora.dialect, "modules": len(lora.adapters), "clip_modules": len(lora.clip)}
    return about | {"ranks": lora.ranks, "programs": verdicts, "notes": lora.notes}


def _use(part: str, source: Source) -> str:
    """What fluxq does with the weights of a part."""
    if part == "ae":
        return "loaded completely, in fp32"
    if part != "flux":
        return "read and dequantized one block at a time"
    kept = next((format for format, like in SAME_FORMAT.items() if source.precision in like), None)
    others = ", ".join(f"{format} {size(stored_bytes(source.shapes, format))}" for format in FORMATS if format != kept)
    if kept is None:
        return f"dequantized a few rows at a time, then stored once in the --format of a run: {others}"
    same = size(stored_bytes(source.shapes, kept))
    return f"--format {kept} keeps the exact bytes of its matrices ({same}); or converts them: {others}"


def about_quantized(file: QuantizedFile) -> Answer:
    about = {"what": _sizes(file.config), "precision": f"{file.format}, by fluxq", "files": [str(file.path)]}
    return about | {"bytes": file.checkpoint.nbytes}


def about_source(source: Source) -> Answer:
    return {
        "what": _sizes(source.config),
        "precision": source.precision,
        "bytes": source.nbytes,
        "files": [str(path) for path in source.files],
    }


def _sizes(config: Any) -> str:
    """The sizes of one of the four models, for humans."""
    if isinstance(config, FluxConfig):
        blocks = f"{config.depth} + {config.depth_single_blocks} blocks"
        return f"{variant(config)}, {blocks}, {config.hidden_size} wide"
    if isinstance(config, dict):
        layers = config.get("num_hidden_layers") or config.get("num_layers")
        return f"{layers} layers, {config.get('hidden_size') or config.get('d_model')} wide"
    return f"{config.z_channels} channels"


def is_kontext(*names: str) -> bool:
    """Whether a FLUX.1 transformer with these names edits images. Its tensors do not tell."""
    return any("kontext" in name.lower() for name in names)


def size(nbytes: int) -> str:
    return f"{nbytes / 2**30:.1f} GiB" if nbytes >= 100 << 20 else f"{nbytes / 2**20:.1f} MiB"
