"""A dataset config of sd-scripts, resolved: which keys are allowed where, of which type, and which value counts.

The value of a key is that of the subset, else of the dataset, else of [general], else of the command line, else the
default. What the command line calls train_batch_size and dataset_repeats is batch_size and num_repeats here.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fluxq.errors import WrongRequest

from .command import read_command
from .texts import parsed

Kind = tuple[str, Callable[[Any], Any]]
"""What a value must be, in words, and a function that gives the value, or None for another type."""


def _instance(words: str, *types: type) -> Kind:
    return words, lambda value: value if isinstance(value, types) else None


def _two(value: Any, kind: type) -> tuple[Any, Any] | None:
    is_pair = isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(v, kind) for v in value)
    return (value[0], value[1]) if is_pair else None


BOOL, TEXT = _instance("true or false", bool), _instance("text", str)
INT = _instance("a whole number", int)  # sd-scripts takes true for 1
FLOAT = _instance("a number with a decimal point", float)
NUMBER = _instance("a number", int, float)
TABLE = _instance("a table", dict)
FLOATS: Kind = ("two numbers with decimal points", lambda value: _two(value, float))
SIZE: Kind = (
    "a whole number or two, width and height",
    lambda value: (value, value) if isinstance(value, int) else _two(value, int),
)

DATASET = {
    **dict.fromkeys(["batch_size", "bucket_reso_steps", "max_bucket_reso", "min_bucket_reso", "validation_seed"], INT),
    **dict.fromkeys(["bucket_no_upscale", "enable_bucket"], BOOL),
    **dict.fromkeys(["validation_split", "network_multiplier"], FLOAT),
    "resolution": SIZE,
    "resize_interpolation": TEXT,
}
"""Keys of [general] and datasets."""
ANYWHERE = {
    **dict.fromkeys(["color_aug", "flip_aug", "random_crop", "shuffle_caption", "enable_wildcard"], BOOL),
    **dict.fromkeys(["num_repeats", "keep_tokens", "token_warmup_min", "caption_dropout_every_n_epochs"], INT),
    **dict.fromkeys(["keep_tokens_separator", "secondary_separator", "caption_separator", "caption_prefix"], TEXT),
    **dict.fromkeys(["caption_suffix", "resize_interpolation"], TEXT),
    **dict.fromkeys(["token_warmup_step", "caption_dropout_rate", "caption_tag_dropout_rate"], NUMBER),
    "face_crop_aug_range": FLOATS,
    "custom_attributes": TABLE,
}
"""Keys of [general], datasets and subsets."""
STYLES = {
    "dreambooth": (
        {"caption_extension": TEXT, "class_tokens": TEXT, "cache_info": BOOL},
        {"image_dir": TEXT, "is_reg": BOOL, "alpha_mask": BOOL},
        ("image_dir",),
    ),
    "finetuning": ({}, {"metadata_file": TEXT, "image_dir": TEXT, "alpha_mask": BOOL}, ("metadata_file",)),
    "controlnet": (
        {"caption_extension": TEXT, "cache_info": BOOL},
        {"image_dir": TEXT, "conditioning_data_dir": TEXT},
        ("image_dir", "conditioning_data_dir"),
    ),
}
"""Style -> further keys of datasets and subsets, further keys of subsets only, and those that a subset must have."""
GENERAL = {**DATASET, **ANYWHERE, **STYLES["dreambooth"][0]}
COMMAND = {"train_batch_size": "batch_size", "dataset_repeats": "num_repeats"}
"""Options of the command line with another name than the key."""

OF_DATASET = {
    "resolution": None,
    "network_multiplier": 1.0,
    "debug_dataset": False,
    "validation_seed": None,
    "validation_split": 0.0,
    "resize_interpolation": None,
    "batch_size": 1,
    "enable_bucket": False,
    "min_bucket_reso": 256,
    "max_bucket_reso": 1024,
    "bucket_reso_steps": 64,
    "bucket_no_upscale": False,
}
"""Key -> default, of what a dataset has once it is resolved."""
OF_SUBSET = {
    **dict.fromkeys(("image_dir", "secondary_separator", "face_crop_aug_range", "caption_prefix", "caption_suffix")),
    **dict.fromkeys(("custom_attributes", "resize_interpolation")),
    **dict.fromkeys(("shuffle_caption", "enable_wildcard", "color_aug", "flip_aug", "random_crop"), False),
    "num_repeats": 1,
    "caption_separator": ",",
    "keep_tokens": 0,
    "keep_tokens_separator": "",
    "caption_dropout_rate": 0.0,
    "caption_dropout_every_n_epochs": 0,
    "caption_tag_dropout_rate": 0.0,
    "token_warmup_min": 1,
    "token_warmup_step": 0,
    "validation_seed": 0,
    "validation_split": 0.0,
}
"""Key -> default, of what every subset has."""
OF_STYLE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dreambooth": (
        {"prior_loss_weight": 1.0},
        {
            "is_reg": False,
            "class_tokens": None,
            "caption_extension": ".caption",
            "cache_info": False,
            "alpha_mask": False,
        },
    ),
    "finetuning": ({}, {"metadata_file": None, "alpha_mask": False}),
    "controlnet": ({}, {"conditioning_data_dir": None, "caption_extension": ".caption", "cache_info": False}),
}
"""Style -> the same of its datasets, and of its subsets."""


def read_dataset(text: str, argv: Sequence[str] = (), format: str = "toml") -> list[dict[str, Any]]:
    """The datasets of a dataset config, each {"style": ..., "params": {...}, "subsets": [{...}]}, all values filled in.

    style: "dreambooth", "finetuning" or "controlnet". argv: the command line beside it. format: "toml" or "json".
    Raises WrongRequest for unknown keys and wrong types. Folders are not looked at.
    """
    return resolve(parsed(text, "the dataset config", format), prepared(read_command(argv)))


def resolve(config: Any, options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The datasets of the tables `config`; options: as `prepared` gives them."""
    config = _checked(config, {"general": _instance("a table", dict), "datasets": _instance("a list", list)}, "")
    general = _checked(config.get("general", {}), GENERAL, "general.")
    of_command = {COMMAND.get(name, name): value for name, value in _typed_options(options).items()}
    return [
        _dataset(table, f"datasets[{i}].", general, of_command, bool(options["masked_loss"]))
        for i, table in enumerate(config.get("datasets", []))
    ]


def prepared(options: Mapping[str, Any]) -> dict[str, Any]:
    """`options` with its resolution and its range of face crops as numbers, and its extension under one name."""
    found = dict(options)
    if found["caption_extention"] is not None:
        found |= {"caption_extension": found["caption_extention"], "caption_extention": None}
    for name, kind, words in (("resolution", int, "WIDTH,HEIGHT or SIDE"), ("face_crop_aug_range", float, "LOW,HIGH")):
        text = found[name]
        if text is None:
            continue
        try:
            numbers = tuple(kind(part) for part in text.split(","))
        except (ValueError, AttributeError):
            numbers = ()
        numbers = numbers * 2 if name == "resolution" and len(numbers) == 1 else numbers
        if len(numbers) != 2 or (name != "resolution" and numbers[0] > numbers[1]):
            raise WrongRequest(f"--{name} must be text like {words}, not {text!r}")
        found[name] = numbers
    return found


def _typed_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """`options`, those that are keys too with their types checked: a --config_file may have others."""
    kinds = {**GENERAL, "debug_dataset": BOOL, "max_token_length": INT, "prior_loss_weight": NUMBER}
    kinds |= {name: GENERAL[key] for name, key in COMMAND.items()}
    return {
        name: _value(value, kinds[name], f"--{name}") if name in kinds and value is not None else value
        for name, value in options.items()
    }


def _dataset(
    table: Any, where: str, general: Mapping[str, Any], of_command: Mapping[str, Any], masked: bool
) -> dict[str, Any]:
    """One dataset. masked: --masked_loss, without which there is no ControlNet style."""
    subsets = table.get("subsets", []) if isinstance(table, dict) else []
    if not isinstance(subsets, list) or not all(isinstance(subset, dict) for subset in subsets):
        raise WrongRequest(f"{where}subsets must be a list of tables, not {subsets!r}")
    described = ["metadata_file" in subset for subset in subsets]
    conditioned = all("conditioning_data_dir" in subset for subset in subsets)
    if any(described) and not all(described) and not (masked and conditioned):
        raise WrongRequest(f"{where}subsets: some have a metadata_file and some have none; make them two datasets")
    rules = "controlnet" if masked and conditioned else "finetuning" if all(described) else "dreambooth"
    both, own, required = STYLES[rules]
    table = _checked(table, {**DATASET, **ANYWHERE, **both, "subsets": _instance("a list", list)}, where)
    subsets = [
        _checked(subset, {**ANYWHERE, **both, **own}, f"{where}subsets[{i}].", required)
        for i, subset in enumerate(subsets)
    ]
    style = "controlnet" if conditioned else rules  # also if there are no subsets
    levels = (table, general, of_command)
    of_dataset, of_subset = OF_STYLE[style]
    return {
        "style": style,
        "params": _filled({**OF_DATASET, **of_dataset}, *levels),
        "subsets": [_filled({**OF_SUBSET, **of_subset}, subset, *levels) for subset in subsets],
    }


def _filled(defaults: Mapping[str, Any], *levels: Mapping[str, Any]) -> dict[str, Any]:
    """Key -> the first value that one of the `levels` has, or the default."""
    return {
        key: next((value for level in levels if (value := level.get(key)) is not None), default)
        for key, default in defaults.items()
    }


def _checked(table: Any, kinds: Mapping[str, Kind], where: str, required: Sequence[str] = ()) -> dict[str, Any]:
    """`table` with its values of their `kinds`. Raises WrongRequest for unknown and missing keys and wrong types."""
    if not isinstance(table, dict):
        raise WrongRequest(f"{where.rstrip('.') or 'the dataset config'} must be a table, not {table!r}")
    for key in table:
        if key not in kinds:
            near = difflib.get_close_matches(key, kinds, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "sd-scripts has no such key"
            raise WrongRequest(f"unknown key '{where}{key}' in the dataset config; {_place(key) or hint}")
    if missing := [key for key in required if key not in table]:
        raise WrongRequest(f"{where}{missing[0]} is missing in the dataset config")
    return {key: _value(value, kinds[key], f"{where}{key}") for key, value in table.items()}


def _value(value: Any, kind: Kind, name: str) -> Any:
    words, read = kind
    found = read(value)
    if found is None:
        raise WrongRequest(f"{name} must be {words}, not {value!r}")
    return found


def _place(key: str) -> str:
    """Where sd-scripts has `key`, in words; "" if nowhere."""
    places = {"[general] and datasets": DATASET, "[general], datasets and subsets": GENERAL}
    own = {f"subsets of the {style} style": keys for style, (_, keys, _) in STYLES.items()}
    found = next((place for place, keys in {**places, **own}.items() if key in keys), "")
    return f"it is for {found}" if found else ""
