"""`fluxq check`: whether a run could start, and what one file is. Of models headers alone are read; nothing is written.

`check_run` looks at everything that a run needs and gathers every reason against it, not just the first.
"""

from __future__ import annotations

import math
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

from fluxq.config import DataConfig, TrainConfig
from fluxq.data.examples import Folder, scan
from fluxq.data.imports import imported
from fluxq.data.store import Store
from fluxq.defaults import resolve_data
from fluxq.errors import WrongRequest
from fluxq.formats import detect
from fluxq.formats.files import printable
from fluxq.formats.lora import described, load_lora
from fluxq.formats.lora_peft import PEFT_FILES, is_adapter
from fluxq.formats.lora_programs import programs
from fluxq.formats.quantized import QuantizedFile, cache_folder, stored_bytes
from fluxq.formats.shapes import flux_shapes
from fluxq.formats.shards import Shards
from fluxq.formats.source import OPENERS, Source
from fluxq.hub import NotFetched, hub_cache
from fluxq.kernels import FORMATS
from fluxq.machine import Card, free_on_card, memory, notes, obstacle, read_machine
from fluxq.model.config import FluxConfig
from fluxq.models import FLAGS, PARTS, Models
from fluxq.report import console

KEPT = {  # format -> the precisions that are that already
    "nf4": ("nf4", "nf4, nested"),
    "fp8": ("fp8 e4m3", "fp8 e4m3, scaled"),
    "int8": ("int8",),
    "bf16": ("bf16",),
}
PROGRAM_BYTES = 2 << 30  # Python, torch, activations of the small tensors, one tensor on its way
Answer = dict[str, Any]


def check_command(config: TrainConfig, paths: tuple[Path, ...]) -> Answer:
    """Of one file: what it is. Else: whether a run on the folders `paths` could start. `ready` is the verdict."""
    if len(paths) == 1 and (not paths[0].is_dir() or is_adapter(paths[0])):
        return check_file(paths[0])
    return check_run(config)


# --- a run ---


def check_run(config: TrainConfig) -> Answer:
    """Everything that a run needs: which file serves which part and why, pictures, memory, disk, the card."""
    models, reasons = Models(config.model, say=lambda line: None, fetch=False), []
    parts = {part: _part(models, part, reasons) for part in PARTS}
    fetched = sum(about.get("fetch_bytes", 0) for about in parts.values())
    for part, about in parts.items():
        _print_part(part, about)
    _tokenizers(models, reasons)
    flux = models.flux_config if "precision" in parts["flux"] else None
    data = _data(config.data, models, reasons) if config.data.folders else None
    if data is None and not config.data.folders:
        console.print("pictures     none were named, so the models alone were checked")
    ram = _ram(flux, models.format, models.device.type == "cuda", parts, reasons)
    machine = read_machine()
    card = _card(flux, models.format, machine.card, reasons)
    disk = _disk(flux, config, models, data, fetched, reasons)
    if problem := obstacle(machine):
        reasons.append(problem)
    reasons = list(dict.fromkeys(reasons))
    for reason in reasons:
        console.print(f"missing      {reason}")
    console.print("not ready" if reasons else "ready: a run could start")
    answer = {"ready": not reasons, "reasons": reasons, "parts": parts, "pictures": data, "ram": ram, "card": card}
    return answer | {"disk": disk, "notes": notes(machine)}


def _part(models: Models, part: str, reasons: list[str]) -> Answer:
    """What serves a part and why, its kind, precision and size; what is in the way goes to `reasons`."""
    try:
        served = models.served(part)
        about: Answer = {"path": str(served.path), "why": served.why}
        if part == "flux" and models.quantised is not None:
            return about | _about_quantised(models.quantised)
        source = models.open(part)
        about |= _about(source)
        if part != "flux" and (misfit := models.misfit(part, source.config)):
            raise WrongRequest(f"{source.path} {misfit}; use one model's files")
        return about
    except NotFetched as error:
        return {"path": None, "why": f"{error}; a run fetches them first", "fetch_bytes": error.nbytes}
    except WrongRequest as error:
        reasons.append(str(error))
        return {"path": None, "why": None}


def _about_quantised(file: QuantizedFile) -> Answer:
    about = {"what": _sizes(file.config), "precision": f"{file.format}, by fluxq", "files": [str(file.path)]}
    return about | {"bytes": file.checkpoint.nbytes}


def _about(source: Source) -> Answer:
    return {
        "what": _sizes(source.config),
        "precision": source.precision,
        "bytes": source.nbytes,
        "files": [str(path) for path in source.files],
    }


def _sizes(config: Any) -> str:
    """The sizes of one of the four models, for people."""
    if isinstance(config, FluxConfig):
        blocks = f"{config.depth} + {config.depth_single_blocks} blocks"
        return f"{detect.variant(config)}, {blocks}, {config.hidden_size} wide"
    if isinstance(config, dict):
        layers = config.get("num_hidden_layers") or config.get("num_layers")
        return f"{layers} layers, {config.get('hidden_size') or config.get('d_model')} wide"
    return f"{config.z_channels} channels"


def _print_part(part: str, about: Answer) -> None:
    name = FLAGS[part].lstrip("-")
    if "precision" in about:
        what = f"{about['what']}, {about['precision']}, {_size(about['bytes'])}"
        console.print(f"{name:<12} {about['path']} ({about['why']}): {what}")
    else:
        console.print(f"{name:<12} {about['why'] or 'nothing serves it, see below'}")


def _tokenizers(models: Models, reasons: list[str]) -> None:
    try:
        files = models.tokenizer_files()
        console.print(f"tokenizers   {', '.join(str(path) for kind in files for path in kind)}")
    except NotFetched as error:
        console.print(f"tokenizers   {error}; a run fetches them first")
    except WrongRequest as error:
        reasons.append(str(error))


def _data(data: DataConfig, models: Models, reasons: list[str]) -> Answer | None:
    """Pictures, captions and what they take in the cache."""
    try:
        resolved = resolve_data(data, models, lambda line: None)
        assert resolved.size and resolved.min_side and resolved.max_side, "resolve_data fills these in"
        folders = [Folder(f.path, f.repeats, f.trigger) for f in (*resolved.folders, *resolved.validation)]
        sides = (resolved.size, resolved.min_side, resolved.max_side, resolved.step)
        found = scan(folders, *sides, upscale=resolved.upscale, skip_bad=resolved.skip_bad)
        foreign = imported(Store(resolved.cache), found.examples, models.t5_length)
    except WrongRequest as error:
        reasons.append(str(error))
        return None
    captions = {example.caption for example in found.examples}
    buckets = Counter(example.bucket for example in found.examples)
    answer = {
        "pictures": len(found.examples),
        "captions": len(captions),
        "size": resolved.size,
        "buckets": {f"{w}x{h}": count for (w, h), count in sorted(buckets.items())},
        "latents_bytes": sum(count * 2 * 16 * (w // 8) * (h // 8) * 4 for (w, h), count in buckets.items()),
        "text_records": len(captions | {""}),
        "skipped": found.skipped,
        "imported": foreign,
    }
    shapes = ", ".join(f"{count} at {bucket}" for bucket, count in answer["buckets"].items())
    console.print(f"pictures     {answer['pictures']}, {answer['captions']} different captions; {shapes}")
    if foreign:
        console.print(f"             {foreign}")
    for line in found.skipped:
        console.print(f"skipped      {line}")
    return answer


def _ram(
    flux: FluxConfig | None, format: str, on_card: bool, parts: dict[str, Answer], reasons: list[str]
) -> Answer | None:
    """The RAM that a run needs: frozen weights as they are stored, unless they lie on the card, or the largest other
    part, and the program."""
    if flux is None:
        return None
    encoders = max((about.get("bytes", 0) for part, about in parts.items() if part in ("ae", "clip_l")), default=0)
    needed, has = (
        PROGRAM_BYTES + max(0 if on_card else stored_bytes(flux_shapes(flux), format), encoders),
        memory(),
    )
    line = f"memory       {_size(needed)} of RAM needed, the transformer in {format}"
    if has is not None:
        line += f"; {_size(has[1])} of {_size(has[0])} are free"
        if needed > has[0]:
            reasons.append(
                f"{_size(needed)} of RAM are needed with the transformer in {format}, this machine has "
                f"{_size(has[0])}; use a leaner --format or another machine"
            )
    console.print(line)
    return {"needed": needed, "all": has and has[0], "free": has and has[1]}


def _card(flux: FluxConfig | None, format: str, card: Card | None, reasons: list[str]) -> Answer | None:
    """The card, and the least that training needs on it: the frozen weights, all of which stay there."""
    if card is None:
        console.print("card         none that torch can use, so training runs on the processor")
        return None
    free, capability = free_on_card(), ".".join(map(str, card.capability))
    room = f"{_size(card.nbytes)}" if free is None else f"{_size(free)} of {_size(card.nbytes)} free"
    line, needed = f"card         {card.name}, {room}, compute capability {capability}", None
    if flux is not None:
        needed = stored_bytes(flux_shapes(flux), format)
        line += f"; training in {format} needs {_size(needed)} of it for the weights alone"
        if needed > card.nbytes:
            reasons.append(
                f"the {card.name} has {_size(card.nbytes)}, and the transformer's weights alone take {_size(needed)} "
                f"in {format}; use {'another card' if format == 'nf4' else '--format nf4 or another card'}, or hide "
                "it with CUDA_VISIBLE_DEVICES=-1 and train on the processor"
            )
    console.print(line)
    about = {"name": card.name, "capability": list(card.capability), "free": free, "all": card.nbytes}
    return about | {"weights": needed}


def _disk(
    flux: FluxConfig | None, config: TrainConfig, models: Models, data: Answer | None, fetched: int, reasons: list[str]
) -> Answer | None:
    """The room that cache, stored weights and downloads take, all of it counted as if nothing were there yet."""
    if flux is None:
        return None
    weights = 0 if models.is_quantised else stored_bytes(flux_shapes(flux), models.format)
    needed = {"weights": weights, "downloads": fetched, "cache": 0}
    if data is not None:
        caption = models.t5_length * flux.context_in_dim * 2 + flux.vec_in_dim * 4
        needed["cache"] = data["latents_bytes"] + caption * data["text_records"]
    places = {"weights": cache_folder(), "downloads": hub_cache(), "cache": config.data.cache.absolute()}
    free = math.inf
    for place, names in _by_disk(places).items():
        total, left = sum(needed[name] for name in names), shutil.disk_usage(place).free
        free = min(free, left)
        listed = ", ".join(f"{name} {_size(needed[name])}" for name in names if needed[name])
        console.print(f"disk         {_size(total)} needed ({listed or 'nothing'}), {_size(left)} free at {place}")
        if total > left:
            reasons.append(
                f"{_size(total)} of disk are needed at {place}, {_size(left)} are free; "
                "make room, or choose another --cache, FLUXQ_CACHE or HF_HOME"
            )
    return {"needed": sum(needed.values()), "free": free, **needed}


def _by_disk(places: dict[str, Path]) -> dict[Path, list[str]]:
    """A folder on each disk -> the names of those `places` that lie there, or would."""
    disks: dict[int, tuple[Path, list[str]]] = {}
    for name, place in places.items():
        folder = next((f for f in (place, *place.absolute().parents) if f.is_dir()), None)
        if folder is None:
            raise WrongRequest(f"{place} lies on a drive that is not there; choose another place")
        disks.setdefault(folder.stat().st_dev, (folder, []))[1].append(name)
    return dict(disks.values())


# --- a file ---


def check_file(path: Path) -> Answer:
    """One screen about one file, the index of shards, or a PEFT adapter's folder: its kind, parts and precision, and
    what fluxq does with it or why it refuses. A LoRA is read whole.

    Raises WrongRequest for what is no complete safetensors or GGUF file.
    """
    shards = Shards(path / PEFT_FILES[0] if path.is_dir() else path)
    if "fluxq" in shards.metadata:
        about = _about_quantised(file := QuantizedFile.open(path))
        console.print(f"holds        {detect.FLUX}: {about['what']}, {about['precision']}")
        console.print(f"             use it by --flux with --format {file.format}")
        return {"ready": True, "kind": detect.FLUX, "path": str(path), "parts": {"flux": about}, "reasons": []}
    kind, meant, nbytes = detect.kind(shards.shapes), detect.meant(shards.shapes), shards.nbytes
    stored = Counter(tensor.kind for tensor in shards.tensors.values())
    listed = ", ".join(f"{count} {precision}" for precision, count in stored.most_common())
    console.print(f"file         {path}, {_size(nbytes)}, {len(shards.shapes)} tensors ({listed})")
    parts, reasons = {}, []
    for part, wanted in PARTS.items():
        if wanted in meant:
            try:
                source = OPENERS[wanted](path)
            except WrongRequest as error:
                reasons.append(str(error))
                continue
            parts[part] = about = _about(source) | {"use": _use(part, source)}
            console.print(f"holds        {wanted}: {about['what']}, {about['precision']}; use it by {FLAGS[part]}")
            console.print(f"             {about['use']}")
    titles = (shards.metadata.get(name) for name in ("modelspec.title", "ss_output_name", "general.name"))
    title = next(filter(None, titles), None)
    if title:
        console.print(f"title        {printable(title)}")
    if kind == detect.LORA:
        try:
            parts["lora"] = _lora(path)
        except WrongRequest as error:
            reasons.append(str(error))
    elif not meant:
        reasons.append(f"{path} is {kind}; fluxq has no use for it")
    for reason in reasons:
        console.print(f"refused      {reason}")
    answer = {"ready": bool(parts), "kind": kind, "path": str(path), "stored": dict(stored)}
    return answer | {"bytes": nbytes, "title": title, "parts": parts, "reasons": reasons}


def _lora(path: Path) -> Answer:
    """What a LoRA is, and who reads it. Raises WrongRequest where fluxq does not."""
    lora = load_lora(path)
    verdicts = programs(lora)
    readers = [program for program, verdict in verdicts.items() if verdict == "yes"]
    others = ", ".join(program for program in verdicts if program not in readers)
    console.print(
        f"holds        a LoRA, {lora.dialect}, {described(lora)}; use it by --lora, --from-lora or --base-lora"
    )
    limits = f"; not, or not all of it, by {others}" if others else ""
    console.print(f"             read as it is by {', '.join(readers) or 'no other program'}{limits}")
    console.print(f"             more: fluxq lora info {path}")
    about = {"what": described(lora), "dialect": lora.dialect, "ranks": lora.ranks, "modules": len(lora.adapters)}
    return about | {"programs": verdicts, "use": "fluxq lora info"}


def _use(part: str, source: Source) -> str:
    """What fluxq does with the weights of a part."""
    if part == "ae":
        return "all of it is read, in fp32"
    if part != "flux":
        return "a block at a time is read and decoded"
    kept = next((format for format, like in KEPT.items() if source.precision in like), None)
    others = ", ".join(f"{format} {_size(stored_bytes(source.shapes, format))}" for format in FORMATS if format != kept)
    if kept is None:
        return f"it is decoded in bands of rows, and stored once in the --format of a run: {others}"
    size = _size(stored_bytes(source.shapes, kept))
    return f"--format {kept} keeps its matrices' very bytes ({size}); made from their values: {others}"


def _size(nbytes: int) -> str:
    return f"{nbytes / 2**30:.1f} GiB" if nbytes >= 100 << 20 else f"{nbytes / 2**20:.1f} MiB"
