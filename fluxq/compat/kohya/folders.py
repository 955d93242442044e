"""Datasets of sd-scripts -> folders of fluxq."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fluxq.data.captions import TEXT_SUFFIXES
from fluxq.errors import WrongRequest

from .dataset import resolve
from .setup import Setup
from .texts import parsed, read_text

SHARED = ("enable_bucket", "min_bucket_reso", "max_bucket_reso", "bucket_reso_steps", "bucket_no_upscale")
"""What all datasets must have in common: fluxq has one table of buckets."""
REFUSED = {
    "secondary_separator": "fluxq has no second separator of tags",
    "face_crop_aug_range": "fluxq does not crop around faces",
    "token_warmup_step": "fluxq does not add tags step by step",
    "resize_interpolation": "fluxq resizes as sd-scripts does by default",
    "custom_attributes": "differential output preservation is not read",
}
"""Keys of subsets."""


def read_folders(setup: Setup) -> None:
    """Set data.folders and what goes with them."""
    options = setup.options
    if isinstance(config := options["dataset_config"], Mapping):
        pass
    elif config:
        path = Path(setup.path(str(options["dataset_config"])) or "")
        if not path.exists():
            return
        config = parsed(read_text(path), str(path), "json" if path.suffix.lower() == ".json" else "toml")
        for name in ("train_data_dir", "reg_data_dir", "in_json"):
            if options[name] is not None:
                setup.note(name, "--dataset_config is given, so it has no effect, as in sd-scripts")
    elif options["in_json"]:
        subset = {"image_dir": options["train_data_dir"], "metadata_file": options["in_json"]}
        config = {"datasets": [{"subsets": [subset]}]}
    else:
        named = [*_named(setup, "train_data_dir", False), *_named(setup, "reg_data_dir", True)]
        config = {"datasets": [{"subsets": named}]}
    datasets = resolve(config, options)
    if not any(dataset["subsets"] for dataset in datasets):
        raise WrongRequest("no folder of images was given; name them with --dataset_config or --train_data_dir")
    _read_buckets(setup, datasets)
    _read_validation(setup, datasets)
    folders = []
    for dataset in datasets:
        seen: set[str] = set()
        for subset in dataset["subsets"]:
            where = subset["image_dir"] or subset.get("metadata_file")
            if subset["num_repeats"] < 1 or where in seen:
                why = "is there twice in a dataset" if where in seen else f"has {subset['num_repeats']} repeats"
                setup.note("dataset_config", f"{where} {why}, so it is left out, as in sd-scripts")
                continue
            seen.add(where)
            folders.append(_folder(setup, dataset, subset))
    setup.set("data", folders=folders)


def _named(setup: Setup, option: str, is_reg: bool) -> list[dict[str, Any]]:
    """The subsets of the folders called 10_zqx man in the folder that `option` names."""
    path = setup.path(setup.options[option])
    found = []
    for folder in sorted(Path(path).iterdir()) if path and Path(path).is_dir() else ():
        repeats, _, words = folder.name.partition("_")
        if folder.is_dir() and repeats.isdecimal() and int(repeats):
            about = {"image_dir": str(folder), "num_repeats": int(repeats), "is_reg": is_reg, "class_tokens": words}
            found.append(about)
        elif folder.is_dir():
            setup.note(option, f"{folder} is left out, since its name is not REPEATS_CLASS, as in sd-scripts")
    return found


def _read_buckets(setup: Setup, datasets: list[dict[str, Any]]) -> None:
    kinds = {tuple(dataset["params"][name] for name in SHARED) for dataset in datasets if dataset["subsets"]}
    if len(kinds) > 1:
        setup.refuse("dataset_config", f"datasets must have the same {', '.join(SHARED)}")
    enabled, low, high, step, no_upscale = min(kinds)
    sizes = {dataset["params"]["resolution"] for dataset in datasets if dataset["subsets"]}
    if None in sizes:
        raise WrongRequest("a dataset has no resolution; give --resolution, or set it in --dataset_config")
    if enabled:
        sides = {} if no_upscale else {"min_side": low, "max_side": high}
        setup.set("data", step=step, upscale=not no_upscale, **sides)
    elif len(sizes) == 1 and len(set(*sizes)) == 1:
        side = next(iter(sizes))[0]
        setup.set("data", step=16, min_side=side, max_side=side)  # a table of one bucket
        setup.note("enable_bucket", "without it all images are cut to one shape; with it, they keep their own")
    else:
        setup.refuse("enable_bucket", "without it only one square resolution is read; add it, or enable_bucket = true")


def _read_validation(setup: Setup, datasets: list[dict[str, Any]]) -> None:
    """Set data.validation_split and training.validate_every."""
    steps, epochs = setup.options["validate_every_n_steps"], setup.options["validate_every_n_epochs"]
    shares = {float(dataset["params"]["validation_split"]) for dataset in datasets if dataset["subsets"]}
    share = max(shares)
    if len(shares) > 1:
        setup.refuse("validation_split", "datasets must have the same: fluxq holds one share of all images out")
    elif not 0 <= share <= 0.5:
        setup.refuse("validation_split", f"it must be from 0 to 0.5, not {share:g}")
    elif share:
        setup.set("data", validation_split=share)
        setup.set("training", validate_every=steps)
        setup.note("validation_split", "the images are chosen by what is in them, not by --validation_seed")
        if epochs and not steps:
            setup.refuse(
                "validate_every_n_epochs", "give --validate_every_n_steps: epochs, times the steps of an epoch"
            )
    elif steps or epochs:
        name = "validate_every_n_steps" if steps else "validate_every_n_epochs"
        setup.note(name, "it has no effect without --validation_split, as in sd-scripts")


def _folder(setup: Setup, dataset: Mapping[str, Any], subset: Mapping[str, Any]) -> dict[str, Any]:
    """One of fluxq's folders, with all settings that it has."""
    params, path = dataset["params"], setup.path(subset["image_dir"])
    for name, reason in REFUSED.items():
        if subset[name]:
            setup.refuse(name, reason)
    if params["network_multiplier"] != 1:
        setup.refuse("network_multiplier", "fluxq trains a LoRA at its full strength")
    if (metadata := subset.get("metadata_file")) and (not path or Path(metadata).parent != Path(path)):
        setup.refuse("metadata_file", f"{metadata} must be in the image_dir of its images")
    extension = subset.get("caption_extension", TEXT_SUFFIXES[0])
    if extension not in TEXT_SUFFIXES:
        setup.refuse("caption_extension", f"captions are read from {' and '.join(TEXT_SUFFIXES)}, not {extension}")
    elif extension != TEXT_SUFFIXES[0]:
        setup.note("caption_extension", f"{extension} it is; but where there is a .txt file too, that is read")
    varied = subset["shuffle_caption"] or subset["caption_tag_dropout_rate"]
    folder = {
        "path": path or "",
        "repeats": subset["num_repeats"],
        "resolution": [list(params["resolution"])],
        "batch": params["batch_size"],
        "class_tokens": subset.get("class_tokens"),
        "caption_line": "each" if subset["enable_wildcard"] else "first",
        "wildcards": subset["enable_wildcard"],
        "caption_prefix": subset["caption_prefix"],
        "caption_suffix": subset["caption_suffix"],
        "caption_separator": subset["caption_separator"],
        "shuffle_tags": subset["shuffle_caption"],
        "keep_tokens": subset["keep_tokens"] if varied else 0,
        "keep_tokens_separator": subset["keep_tokens_separator"] or None,
        "tag_dropout": float(subset["caption_tag_dropout_rate"]),
        "caption_dropout": float(subset["caption_dropout_rate"]),
        "caption_dropout_epochs": subset["caption_dropout_every_n_epochs"],
        "flip": subset["flip_aug"],
        "random_crop": subset["random_crop"],
        "color_augment": subset["color_aug"],
    }
    if subset.get("is_reg"):
        folder |= {"regularization": True, "prior_weight": float(params["prior_loss_weight"])}
    if subset.get("alpha_mask"):
        folder["masks"] = "alpha"
    if dataset["style"] == "controlnet":
        folder["masks"] = setup.path(subset["conditioning_data_dir"])
    return {key: value for key, value in folder.items() if value is not None}
