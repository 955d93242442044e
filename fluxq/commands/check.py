"""`fluxq check`: whether a run could start. Reads headers of models, decodes images, and writes nothing.

It checks everything that a run needs and lists all problems, not just the first. For a single file, see
fluxq/models/check_file.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from fluxq.caching.folders import missing_bytes, scan_data
from fluxq.caching.import_foreign import imported_note_for
from fluxq.caching.looks import LOOKS, Looks
from fluxq.caching.store import Store
from fluxq.config import DataConfig, TrainConfig
from fluxq.console import console, plural, silent
from fluxq.data.crops import crop_sheet
from fluxq.data.examples import Scan
from fluxq.data.images import open_image
from fluxq.errors import WrongRequest
from fluxq.formats.atomic import atomic_path, free_bytes
from fluxq.formats.checkpoint.shapes import flux_shapes
from fluxq.formats.lora.peft import is_adapter
from fluxq.formats.quantized import require_widths, stored_bytes
from fluxq.memory.machine import InstalledGPU, free_gpu_bytes, notes, obstacle, ram_bytes, read_machine
from fluxq.memory.placement import place
from fluxq.model.config import FluxConfig
from fluxq.models.check_file import about_quantized, about_source, check_file, check_files, model_files, size
from fluxq.models.hub import NotFetched, hub_cache
from fluxq.models.parts import FLAGS, PARTS, Models
from fluxq.training.asked import refuse_without_effect
from fluxq.training.defaults import caveats, epoch_of, not_full, resolve, resolve_data
from fluxq.training.disk import Need, need_of_cache, need_of_weights, needs_of, room_for
from fluxq.training.from_lora import read_start
from fluxq.training.objective import class_captions
from fluxq.training.previews import preview_prompts
from fluxq.training.run import Run

PROGRAM_BYTES = 2 << 30  # Python, torch, small activations, one tensor in transit
Answer = dict[str, Any]


def check_command(
    config: TrainConfig,
    paths: tuple[Path, ...],
    verbose: bool = False,
    crops: Path | None = None,
    asked: Collection[str] = (),
) -> Answer:
    """What a model file, a LoRA or a folder of models is; for other `paths`, whether a run on them could start.

    "ready" in the answer is the verdict. verbose: name every image that a line is about. crops: where to save a
    sheet of all images. asked: keys, like "output.keep", of settings that are to have an effect.
    """
    if crops is not None and (crops.suffix.lower() != ".png" or crops.exists()):
        raise WrongRequest(f"--crops {crops} must be a new file called .png; name another")
    if crops is not None and not config.data.folders:
        raise WrongRequest("--crops draws the images of folders; name a folder of images")
    if len(paths) == 1 and (not paths[0].is_dir() or is_adapter(paths[0])):
        return check_file(paths[0])
    if len(paths) == 1 and (files := model_files(paths[0])):
        return check_files(files)
    return check_run(config, verbose, crops, asked)


def check_run(
    config: TrainConfig, verbose: bool = False, crops: Path | None = None, asked: Collection[str] = ()
) -> Answer:
    """Everything that a run needs: the model files and why they were chosen, images, RAM, GPU, disk."""
    models, reasons = Models(config.model, notify=silent, fetch=False), []
    parts = {part: _part(models, part, reasons) for part in PARTS}
    fetched = sum(about.get("fetch_bytes", 0) for about in parts.values())
    for part, about in parts.items():
        _print_part(part, about)
    _tokenizers(models, reasons)
    flux = models.flux_config if "precision" in parts["flux"] else None
    for line in caveats(models) if flux else ():
        console.print(f"note         {line}")
    try:
        refuse_without_effect(config, models, asked)
        _ = models.compute
    except WrongRequest as error:
        reasons.append(str(error))
    data, scanned = _data(config.data, models, reasons, verbose, crops) if config.data.folders else (None, None)
    if data is None and not config.data.folders:
        console.print("images       no folder given, so only the models were checked")
    ram = _ram(flux, models.format, models.device.type == "cuda", parts, reasons)
    machine = read_machine()
    gpu = _gpu(flux, models.format, machine.gpu, reasons)
    found = _resolved(config, models, scanned, reasons) if flux and scanned else None
    training = _training(*found, models) if found else None
    disk = _disk(found, models, fetched, reasons) if flux else None
    if problem := obstacle(machine):
        reasons.append(problem)
    reasons = list(dict.fromkeys(reasons))
    for reason in reasons:
        console.print(f"problem      {reason}")
    console.print("not ready" if reasons else "ready: a run could start")
    answer = {"ready": not reasons, "reasons": reasons, "parts": parts, "images": data, "ram": ram, "gpu": gpu}
    return answer | {"training": training, "disk": disk, "notes": notes(machine)}


def _part(models: Models, part: str, reasons: list[str]) -> Answer:
    """The file of a part, why it was chosen, its kind, precision and size. Problems are appended to `reasons`."""
    try:
        served = models.served(part)
        about: Answer = {"path": str(served.path), "why": served.why}
        if part == "flux" and models.quantized is not None:
            return about | about_quantized(models.quantized)
        source = models.open(part)
        about |= about_source(source)
        if part == "flux":
            require_widths(source, models.format)
        if part != "flux" and (misfit := models.misfit(part, source.config)):
            raise WrongRequest(f"{source.path} {misfit}; use one model's files")
        return about
    except NotFetched as error:
        return {"path": None, "why": f"{error}; a run downloads them first", "fetch_bytes": error.nbytes}
    except WrongRequest as error:
        reasons.append(str(error))
        return {"path": None, "why": None}


def _print_part(part: str, about: Answer) -> None:
    name = FLAGS[part].lstrip("-")
    if "precision" in about:
        what = f"{about['what']}, {about['precision']}, {size(about['bytes'])}"
        console.print(f"{name:<12} {about['path']} ({about['why']}): {what}")
    else:
        console.print(f"{name:<12} {about['why'] or 'not found (see below)'}")


def _tokenizers(models: Models, reasons: list[str]) -> None:
    try:
        files = models.tokenizer_files()
        console.print(f"tokenizers   {', '.join(str(path) for kind in files for path in kind)}")
    except NotFetched as error:
        console.print(f"tokenizers   {error}; a run downloads them first")
    except WrongRequest as error:
        reasons.append(str(error))


def _data(
    data: DataConfig, models: Models, reasons: list[str], verbose: bool, crops: Path | None
) -> tuple[Answer | None, Scan | None]:
    """Images, captions and buckets, and what was scanned."""
    try:
        resolved = resolve_data(data, models, silent)
        scanned = scan_data(resolved)
        store = Store(resolved.cache)
        images = {e.path: store.hashes.remembered(e.path) or str(e.path) for e in scanned.examples}
        looks = Looks(store.root / LOOKS).of(images)
        scanned.found.look_at_images(looks)
        _look_at_lengths(scanned, models)
        foreign = imported_note_for(store, scanned.examples, models.t5_length, models.config.text_mask)
    except WrongRequest as error:
        reasons.append(str(error))
        return None, None
    bad = {e.path: str(error) for e in scanned.examples if e.path not in looks and (error := _undecodable(e.path))}
    (scanned.skipped if resolved.skip_bad else reasons).extend(bad.values())
    if resolved.skip_bad:
        scanned = replace(scanned, examples=[example for example in scanned.examples if example.path not in bad])
    findings, captions = scanned.found.all(), {text for example in scanned.examples for text in example.texts}
    buckets = Counter(example.bucket for example in scanned.examples)
    answer = {
        "images": len({example.path for example in scanned.examples}),
        "captions": len(captions),
        "resolution": resolved.resolution,
        "buckets": {f"{w}x{h}": count for (w, h), count in sorted(buckets.items())},
        "latents": sum(len(example.views) for example in scanned.examples),
        "sources": scanned.found.sources,
        "findings": [finding._asdict() for finding in findings],
        "skipped": scanned.skipped,
        "imported": foreign,
    }
    more = f"; variants: {answer['latents']} latents" if answer["latents"] > answer["images"] else ""
    shapes = ", ".join(f"{count} at {bucket}" for bucket, count in answer["buckets"].items())
    console.print(
        f"images       {answer['images']:,}; {plural(answer['captions'], 'different caption')}; buckets: {shapes}{more}"
    )
    sources = ", ".join(
        f"{count} images without" if source == "without" else f"{count} {source}"
        for source, count in scanned.found.sources.items()
    )
    console.print(f"captions     {sources}")
    for finding in findings:
        console.print(f"             {finding.line(finding.count if verbose else 3)}")
    if foreign:
        console.print(f"             {foreign}")
    if crops is not None and looks:
        with atomic_path(crops) as temporary:
            crop_sheet([e for e in scanned.examples if e.path in looks]).save(temporary, format="PNG")
        console.print(f"crops        {crops}")
    for line in scanned.skipped:
        console.print(f"skipped      {line}")
    return answer, scanned


def _look_at_lengths(scanned: Scan, models: Models) -> None:
    """Find captions that the text encoders cut, if their tokenizers are here."""
    longest = {example.name: max(example.texts, key=len) for example in scanned.examples}
    with suppress(WrongRequest):
        for name, (by_t5, by_clip) in zip(longest, models.too_long(longest.values()), strict=True):
            if by_t5:
                scanned.found.add("long", name)
            elif by_clip:
                scanned.found.add("long for CLIP", name)


def _undecodable(image: Path) -> WrongRequest | None:
    try:
        open_image(image)
    except WrongRequest as error:
        return error
    return None


def _ram(
    flux: FluxConfig | None, format: str, on_gpu: bool, parts: dict[str, Answer], reasons: list[str]
) -> Answer | None:
    """The RAM that a run needs: the program, and the larger of the stored frozen weights (0 if they are on the GPU) and
    the largest encoder.
    """
    if flux is None:
        return None
    encoders = max((about.get("bytes", 0) for part, about in parts.items() if part in ("ae", "clip_l")), default=0)
    needed, has = (
        PROGRAM_BYTES + max(0 if on_gpu else stored_bytes(flux_shapes(flux), format), encoders),
        ram_bytes(),
    )
    line = f"memory       needs {size(needed)} of RAM with the transformer in {format}"
    if has is not None:
        line += f"; {size(has[1])} of {size(has[0])} free"
        if needed > has[0]:
            reasons.append(
                f"a run needs {size(needed)} of RAM with the transformer in {format}, and this machine has "
                f"{size(has[0])}; use a smaller --format or another machine"
            )
    console.print(line)
    return {"needed": needed, "all": has and has[0], "free": has and has[1]}


def _gpu(flux: FluxConfig | None, format: str, gpu: InstalledGPU | None, reasons: list[str]) -> Answer | None:
    """The GPU, and the memory that all frozen weights take on it."""
    if gpu is None:
        console.print("GPU          none that torch can use, so training runs on the CPU")
        return None
    free, capability = free_gpu_bytes(), ".".join(map(str, gpu.capability))
    amount = size(gpu.nbytes) if free is None else f"{size(free)} of {size(gpu.nbytes)} free"
    line, needed = f"GPU          {gpu.name}, {amount}, compute capability {capability}", None
    if flux is not None:
        needed = stored_bytes(flux_shapes(flux), format)
        line += f"; the weights alone take {size(needed)} of it in {format}"
        if needed > gpu.nbytes:
            reasons.append(
                f"the {gpu.name} has {size(gpu.nbytes)}, and the transformer's weights alone take {size(needed)} "
                f"in {format}; use {'another GPU' if format == 'nf4' else '--format nf4 or another GPU'}, or hide "
                "it with CUDA_VISIBLE_DEVICES=-1 to train on the CPU"
            )
    console.print(line)
    about = {"name": gpu.name, "capability": list(gpu.capability), "free": free, "all": gpu.nbytes}
    return about | {"weights": needed}


def _resolved(config: TrainConfig, models: Models, scanned: Scan, reasons: list[str]) -> tuple[Run, Scan] | None:
    """The run as training would begin it, with its images."""
    models.use_format(models.format)  # the one that everything here is said for
    try:
        resolved, _ = resolve(config, models, silent, read_start(config.lora, models, silent), scanned)
        return Run(resolved), scanned
    except WrongRequest as error:
        reasons.append(str(error))
        return None


def _training(run: Run, scanned: Scan, models: Models) -> Answer:
    """Steps, epochs, how full batches are, and on a GPU the time that the plan predicts."""
    training, steps = run.config.training, run.config.training.steps or 0
    epoch = epoch_of(run.config.data, scanned, training.batch)
    epochs = steps * training.accumulate / epoch.batches
    console.print(f"training     {plural(steps, 'step')}: {epochs:.3g} epochs of {plural(epoch.batches, 'batch')}")
    for line in not_full(epoch):
        console.print(f"             {line}")
    if models.device.type == "cuda":
        with suppress(WrongRequest):  # no plan fits, which `_gpu` or training says
            planned: list[str] = []
            place(run.config, models, planned.append)
            console.print(f"             {planned[-1]}")
    return {"steps": steps, "epochs": epochs, "batches": epoch.batches, "full_batches": epoch.full}


def _disk(found: tuple[Run, Scan] | None, models: Models, fetched: int, reasons: list[str]) -> Answer | None:
    """The disk space that a run takes, as training works it out, and downloads."""
    needs = [Need("downloads", hub_cache(), fetched, "another HF_HOME")] if fetched else []
    try:
        if found is None:
            needs.append(need_of_weights(models))
        else:
            run, scanned = found
            data = run.config.data
            prompts = preview_prompts(run.config, models, scanned)
            needs += needs_of(run, models, len(prompts))
            texts = (*prompts, *class_captions(run.config, scanned).values())
            needs.append(need_of_cache(data.cache, missing_bytes(data, scanned, models, texts)))
        for line, warning, problem in room_for(needs):
            console.print(f"disk         {line}")
            if warning:
                console.print(f"             {warning}")
            reasons.extend([problem] if problem else [])
        free = [free_bytes(need.place) for need in needs]
    except WrongRequest as error:
        reasons.append(str(error))
        return None
    known = [n for n in free if n is not None]
    takes = {"downloads": 0} | {need.what: need.nbytes for need in needs}
    return {"needed": sum(takes.values()), "free": min(known, default=None), **takes}
