"""`fluxq cache`: encode images and captions ahead of training, and look after what is encoded."""

from __future__ import annotations

from typing import Any

from fluxq.caching.build import prune_cache, verify_cache
from fluxq.caching.folders import cache_folders, import_folders
from fluxq.config import TrainConfig
from fluxq.console import console, progress_bar
from fluxq.errors import WrongRequest
from fluxq.memory.phases import gpu_budget
from fluxq.models.parts import Models
from fluxq.training.defaults import resolve_data


def cache_command(
    config: TrainConfig, verify: bool = False, prune: bool = False, imports: bool = False
) -> dict[str, Any]:
    """Encode what `config.data` names, where `imports` does not take it from other programs' caches; or with `verify`
    and `prune` check the cache and clear it of what nothing uses.
    """
    if imports and (verify or prune):
        raise WrongRequest("--import fills the cache, --verify and --prune look after it; do one after the other")
    answer: dict[str, Any] = {}
    if verify:
        report = verify_cache(config.data.cache)
        for path, reason in report.bad.items():
            console.print(f"deleted {path}: {reason}")
        for path, count in report.missing.items():
            console.print(f"{path.name} lacks {count} records; run fluxq cache on its folders again")
        console.print(f"{report.records} records read, {len(report.bad)} were damaged")
        if report.imported:
            console.print(report.imported)
        answer |= {"imported": report.imported}
        answer |= {"records": report.records, "damaged": len(report.bad), "incomplete_datasets": len(report.missing)}
    if prune:
        files, nbytes = prune_cache(config.data.cache)
        console.print(f"{files} records that nothing uses were deleted, {nbytes / 2**20:.1f} MiB")
        answer |= {"deleted": files, "deleted_bytes": nbytes}
    if verify or prune:
        return answer
    models = Models(config.model, notify=console.print)
    data = resolve_data(config.data, models, console.print)
    budget = gpu_budget(config.memory, models.device)
    imported = import_folders(data, models) if imports else (0, 0)
    with progress_bar() as progress:
        dataset = cache_folders(data, models, config.samples.prompts, progress, budget)
    for line in (*dataset.notes, *dataset.skipped):
        console.print(line)
    console.print(f"{len(dataset.examples)} images are ready in {data.cache}")
    answer = {"images": len(dataset.examples), "skipped": list(dataset.skipped), "notes": list(dataset.notes)}
    return answer | {"imported_images": imported[0], "imported_captions": imported[1]}
