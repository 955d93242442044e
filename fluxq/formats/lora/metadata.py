"""The metadata of a LoRA file, under the keys that ComfyUI, Forge, SwarmUI and sd-scripts read.

`ss_*` and `sshs_*` follow kohya-ss/sd-scripts, `modelspec.*` follows github.com/Stability-AI/ModelSpec. All values are
text, and equal arguments give equal metadata. Only the last names of the user's folders and files are included.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

import torch

from ..checkpoint.files import MALFORMED, safetensors_data, safetensors_header

IMPLEMENTATION = "https://github.com/black-forest-labs/flux"  # Forge recognizes a FLUX LoRA by this address


def lora_metadata(
    *,
    name: str,
    rank: int | str,
    alpha: float | str,
    steps: int,
    last_step: int,
    epochs: int,
    learning_rate: float,
    seed: int,
    resolution: tuple[int, int],
    variant: str,
    base_model: str | Path,
    optimizer: str,
    datasets: Mapping[str | Path, tuple[int, int]],
    tag_frequency: Mapping[str | Path, Mapping[str, int]],
    buckets: Mapping[tuple[int, int], int],
    trigger: str | None,
    title: str,
    started: float,
    finished: float,
    timestep_sampling: str,
    shift: float,
    guidance: float,
    precision: str,
    text_learning_rate: float | None = None,
    text_mask: bool = False,
) -> dict[str, str]:
    """The metadata of a trained LoRA, without the hashes, which `save_lora` adds.

    rank, alpha          or "Dynamic" if layers differ
    last_step            with which the run is finished
    variant              "dev" or "schnell"
    datasets             folder -> (repeats, images)
    tag_frequency        folder -> part of a caption -> count
    buckets              (width, height) -> images
    started, finished    seconds since 1970
    precision            as in sd-scripts, e.g. "bf16"
    text_learning_rate   CLIP-L's learning rate if it was trained, else None
    text_mask            whether the padding of captions was masked
    """
    labels = _folder_labels(datasets)
    dirs = {labels[folder]: {"n_repeats": n, "img_count": count} for folder, (n, count) in datasets.items()}
    tags = {labels[folder]: dict(counts) for folder, counts in tag_frequency.items()}
    bucket_info = {
        "buckets": {
            str(i): {"resolution": list(size), "count": count}
            for i, (size, count) in enumerate(sorted(buckets.items()))
        }
    }
    size = f"{resolution[0]}x{resolution[1]}"
    values: dict[str, object] = {
        "ss_v2": False,
        "ss_base_model_version": "flux1",
        "ss_model_type": "flux",
        "ss_network_module": "networks.lora_flux",
        "ss_network_dim": rank,
        "ss_network_alpha": alpha,
        "ss_network_args": json.dumps({}),
        "ss_output_name": name,
        "ss_sd_model_name": Path(base_model).name,
        "ss_clip_skip": None,
        "ss_resolution": f"({resolution[0]}, {resolution[1]})",
        "ss_training_started_at": float(started),
        "ss_training_finished_at": float(finished),
        "ss_steps": steps,
        "ss_max_train_steps": last_step,
        "ss_epoch": epochs,
        "ss_num_epochs": epochs,
        "ss_num_train_images": sum(repeats * count for repeats, count in datasets.values()),
        "ss_learning_rate": learning_rate,
        "ss_optimizer": optimizer,
        "ss_seed": seed,
        "ss_mixed_precision": precision,
        "ss_dataset_dirs": json.dumps(dirs),
        "ss_tag_frequency": json.dumps(tags),
        "ss_bucket_info": json.dumps(bucket_info),
        "ss_timestep_sampling": timestep_sampling,
        "ss_discrete_flow_shift": shift,
        "ss_guidance_scale": guidance,
        "ss_model_prediction_type": "raw",
        "ss_apply_t5_attn_mask": text_mask,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"flux-1-{variant}/lora",
        "modelspec.implementation": IMPLEMENTATION,
        "modelspec.title": title,
        "modelspec.resolution": size,
        "modelspec.date": datetime.fromtimestamp(finished, UTC).isoformat(timespec="seconds"),
    }
    if text_learning_rate is not None:
        values |= {"ss_unet_lr": learning_rate, "ss_text_encoder_lr": text_learning_rate}
    if trigger:
        values["modelspec.trigger_phrase"] = trigger
    return {key: str(value) for key, value in values.items()}


def converted_metadata(metadata: Mapping[str, str], ranks: set[int], alphas: set[float]) -> dict[str, str]:
    """The metadata of a LoRA made from another file: that file's metadata, with rank, alpha and module updated.

    The keys by which sd-scripts and Forge recognize a FLUX LoRA are added if missing. As in sd-scripts, ranks or alphas
    that differ become "Dynamic". `save_lora` adds the hashes.
    """
    kept = {key: value for key, value in metadata.items() if not key.startswith("sshs_")}
    known = {
        "ss_v2": "False",
        "ss_base_model_version": "flux1",
        "ss_network_args": "{}",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "flux-1-dev/lora",
        "modelspec.implementation": IMPLEMENTATION,
    }
    now = {
        "ss_network_module": "networks.lora_flux",
        "ss_network_dim": str(*ranks) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": str(*alphas) if len(alphas) == 1 else "Dynamic",
    }
    return known | kept | now


def trigger_of(metadata: Mapping[str, str]) -> str | None:
    """A LoRA's trigger: the phrase in its metadata, else the most frequent part of its captions."""
    if phrase := metadata.get("modelspec.trigger_phrase"):
        return phrase
    counts: Counter[str] = Counter()
    try:
        for tags in json.loads(metadata.get("ss_tag_frequency") or "{}").values():
            counts.update({str(tag).strip(): int(count) for tag, count in tags.items()})
    except MALFORMED:
        return None  # not in sd-scripts' format
    return counts.most_common(1)[0][0] if counts else None


def sshs_hashes(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """The two hashes by which UIs recognize a LoRA even after its metadata was edited.

    sshs_model_hash is the SHA-256 of the tensors' bytes in the file. sshs_legacy_hash is the first 8 digits of the
    SHA-256 of bytes 0x100000 to 0x110000 of the file as it would be with only the ss_* entries as metadata.
    """
    model, legacy = hashlib.sha256(), hashlib.sha256()
    ss_entries = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    position = len(header := safetensors_header(tensors, ss_entries))
    legacy.update(header[0x100000:0x110000])
    for data in safetensors_data(tensors):
        model.update(data)
        legacy.update(data[max(0x100000 - position, 0) : max(0x110000 - position, 0)])
        position += len(data)
    return {"sshs_model_hash": model.hexdigest(), "sshs_legacy_hash": legacy.hexdigest()[:8]}


def _folder_labels(folders: Mapping[str | Path, object]) -> dict[str | Path, str]:
    """Folder -> its last name, with a number if two are equal."""
    labels: dict[str | Path, str] = {}
    for folder in folders:
        label = base = Path(folder).name or "images"
        number = 1
        while label in labels.values():
            number += 1
            label = f"{base} {number}"
        labels[folder] = label
    return labels
