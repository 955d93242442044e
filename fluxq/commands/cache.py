"""`fluxq cache`: encode images and captions ahead of training, import, verify and prune the cache."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fluxq.caching.build import prune_cache, verify_cache
from fluxq.caching.folders import cache_folders, import_folders, scan_data
from fluxq.config import TrainConfig
from fluxq.console import console, plural, progress_bar
from fluxq.errors import WrongRequest
from fluxq.memory.phases import gpu_budget
from fluxq.models.parts import Models
from fluxq.training.defaults import resolve_data
from fluxq.training.disk import Need, require_room
from fluxq.training.objective import class_captions


def cache_command(
    config: TrainConfig, verify: bool = False, prune: bool = False, imports: bool = False
) -> dict[str, Any]:
    """Encode the folders of `config.data`. Returns what --json prints.

    imports: first import other programs' caches. verify, prune: instead of encoding, delete damaged records and those
    that no dataset uses. Raises WrongRequest for `imports` together with `verify` or `prune`.
    """
    if imports and (verify or prune):
        raise WrongRequest("--import adds to the cache, --verify and --prune clean it; run them one after the other")
    answer: dict[str, Any] = {}
    if verify:
        report = verify_cache(config.data.cache)
        for path, reason in report.bad.items():
            console.print(f"deleted {path}: {reason}")
        for path, count in report.missing.items():
            console.print(f"{path.name} lacks {plural(count, 'record')}; run fluxq cache on its folders again")
        console.print(f"{plural(report.records, 'record')} read, {len(report.bad):,} damaged")
        if report.imported:
            console.print(report.imported)
        answer |= {"imported": report.imported}
        answer |= {"records": report.records, "damaged": len(report.bad), "incomplete_datasets": len(report.missing)}
    if prune:
        files, nbytes = prune_cache(config.data.cache)
        console.print(f"deleted {plural(files, 'record')} that no dataset uses, {nbytes / 2**20:.1f} MiB")
        answer |= {"deleted": files, "deleted_bytes": nbytes}
    if verify or prune:
        return answer
    models = Models(config.model, notify=console.print)
    data = resolve_data(config.data, models, console.print)
    budget = gpu_budget(config.memory, models.device)
    imported = import_folders(data, models) if imports else (0, 0)

    def room(nbytes: int) -> None:
        require_room([Need("cache", data.cache, nbytes, "another --cache")], console.print)

    scanned = scan_data(data)
    prompts = (*config.samples.prompts, *class_captions(replace(config, data=data), scanned).values())
    with progress_bar() as progress:
        dataset = cache_folders(data, scanned, models, prompts, progress, budget, room)
    for line in (*dataset.notes, *dataset.skipped):
        console.print(line)
    console.print(f"encoded in {data.cache}: {plural(len(dataset.examples), 'image')}")
    answer = {"images": len(dataset.examples), "skipped": list(dataset.skipped), "notes": list(dataset.notes)}
    return answer | {"imported_images": imported[0], "imported_captions": imported[1]}
