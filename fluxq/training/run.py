"""A run directory: starting or resuming a run, and the files that it saves.

config.toml   every setting, with defaults filled in
log.jsonl     a line per step, one per validation, and one per change that --resume made
loss.png      the loss so far
result.json   steps, seconds, losses, peak memory and the LoRA's path
samples/      previews
state/        what --resume needs
<name>.safetensors, and before the end <name>-step00000250.safetensors ...; for PEFT, folders <name>.peft ...
<name>-best.safetensors   the LoRA with the lowest loss of held-out images
"""

from __future__ import annotations

import glob
import json
import os
import platform
import re
import shutil
import tempfile
import time
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from filelock import FileLock, Timeout
from torch import nn

from fluxq.config import TrainConfig
from fluxq.config_files import config_from_dict, read_toml, to_toml
from fluxq.console import plural
from fluxq.data.dataset import Dataset
from fluxq.errors import WrongRequest
from fluxq.formats.atomic import atomic_path, remove
from fluxq.formats.checkpoint.files import MALFORMED, Checkpoint
from fluxq.formats.lora.algebra import Adapter
from fluxq.formats.lora.peft import PEFT_FILES, is_adapter
from fluxq.formats.lora.write import save_lora
from fluxq.model.clip import Clip
from fluxq.model.flux import Flux
from fluxq.model.lora import lora_layers
from fluxq.models.parts import Models

from .optim import FlatOptimizer
from .state import Progress, saved_settings
from .summary import best_lines, slow_lines

SCHEDULE = ("schedule", "schedule_cycles", "schedule_power", "schedule_decay", "schedule_floor")
MAY_CHANGE = ("steps", "warmup", "learning_rate", "text_learning_rate", *SCHEDULE, "validate_every", "early_stopping")
"""The settings of training that --resume takes over from the command line."""

SAME_RESULT = ("ae_band", "skip_bad", "offline", "recursive", "masks")
"""Settings that change no result, or only by way of the images and captions, which are compared."""

WHY_FIXED = {
    "optimizer": "its state is not that of another optimizer",
    "optimizer_args": "its state is of an optimizer with those",
    "format": "in another format the frozen weights are other numbers",
    "compute": "in another arithmetic the frozen model gives other results",
    "rank": "its LoRA has that rank",
    "alpha": "its LoRA is scaled by that",
    "targets": "its LoRA adapts those layers",
    "text_encoder": "its LoRA adapts those models",
}
"""Why a setting is not taken over."""


@dataclass(frozen=True)
class Result:
    """The result of a run. Losses are flow losses; validation losses are by folder."""

    steps: int
    seconds: float
    loss_first: float
    loss_last: float
    peak_bytes: int | None
    lora: str
    validation_before: dict[str, float] | None
    validation_after: dict[str, float] | None
    slower: list[str]  # why it was slower than it could be
    validation: dict[str, Any] | None  # before, after, best, and why it stopped early

    def summary(self) -> list[str]:
        return [*slow_lines(self.slower), *best_lines(self.validation), f"LoRA: {self.lora}"]

    def save(self, folder: Path) -> None:
        with atomic_path(folder / "result.json") as temporary:
            temporary.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")


class Run:
    """The directory of one run. `config` is resolved; `folder` is config.output.out."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.folder = cast(Path, config.output.out)
        self.name = cast(str, config.output.name)
        self.suffix = ".peft" if config.lora.file_format == "peft" else ".safetensors"
        self.best_file = self.folder / f"{self.name}-best{self.suffix}"
        self.last_step = config.training.steps or 0  # less in a run that stops early
        self.state_file = self.folder / "state" / "state.safetensors"
        self._data_file = self.folder / "state" / "data.json"
        self.changes: list[str] = []  # what is not as it was when the run was started

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder, which is made if it does not exist; nobody else can until this ends or the process dies.

        Raises WrongRequest if another process holds it, or if it is not writable. A folder made for nothing is removed.
        """
        made = [path for path in (self.folder, *self.folder.parents) if not path.exists()]
        lock, holder = FileLock(self.folder / ".lock", timeout=0), self.folder / ".lock.json"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        except OSError as error:
            raise WrongRequest(f"cannot write to {self.folder} ({error.strerror}); choose another --out") from error
        try:
            lock.acquire()
        except Timeout as error:
            raise WrongRequest(
                f"{self.folder} is in use by another fluxq{_described(holder)}; wait for its end, or stop it, or "
                "choose another --out"
            ) from error
        except (OSError, NotImplementedError):
            pass  # some network drives have no locks
        try:
            with suppress(OSError):
                about = {"process": os.getpid(), "host": platform.node(), "started": time.strftime("%Y-%m-%d %H:%M:%S")}
                holder.write_text(json.dumps(about), encoding="utf-8")
            yield
        finally:
            with suppress(OSError):
                holder.unlink(missing_ok=True)
            lock.release()
            if made and not [path for path in self.folder.iterdir() if path.name != ".lock"]:
                with suppress(OSError):
                    (self.folder / ".lock").unlink(missing_ok=True)
                    for path in made:  # fails at the first that is not empty
                        path.rmdir()

    def check(self, resume: bool, overwrite: bool, accepts_data: bool) -> None:
        """Raise WrongRequest if the folder has results and neither `resume` nor `overwrite` is set, or if `resume`
        would change what is computed. Results are unchanged. accepts_data: the folders of images may be others.
        """
        if resume:
            self.changes = self._changes(self._settings_so_far(), accepts_data)
        elif not overwrite and (present := [path for path in self._results() if path.exists()]):
            raise WrongRequest(
                f"{self.folder} already has a run ({present[0].name}); continue it with fluxq train --resume "
                f"{self.folder}, replace it with --overwrite, or choose another folder for the run"
            )

    def begin(self, resume: bool) -> None:
        """Write config.toml. Unless `resume`, first remove the results of the run that this one replaces.

        If the run was finished and is to make more steps, its LoRA gets the name of its step.
        """
        for averaged in (False, True):
            final = self.lora_file(self.last_step, averaged)
            if resume and final.exists() and (steps := _metadata(final).get("ss_steps", "")).isdecimal():
                _moved(final, self.lora_file(int(steps), averaged))
        for folder in (self.folder, self.state_file.parent, self.folder / "samples"):
            for left_by_a_crash in folder.glob(".*.tmp-*"):
                remove(left_by_a_crash)
        for path in [] if resume else self._results():
            _remove(path)
        with atomic_path(self.folder / "config.toml") as temporary:
            temporary.write_text(to_toml(self.config), encoding="utf-8", errors="surrogateescape")

    def _results(self) -> list[Path]:
        """The files of a run of this name, which a new one would replace."""
        names = ("config.toml", "log.jsonl", "loss.png", "result.json", f"{self.name}{self.suffix}")
        averages = self.lora_file(self.last_step, averaged=True), *self.steps_saved(averaged=True)
        own = [path for path in averages if path.exists() and "fluxq_ema" in _metadata(path)]  # not a run called so
        return [*(self.folder / name for name in names), self.state_file, self.best_file, *self.steps_saved(), *own]

    def _settings_so_far(self) -> TrainConfig:
        """The settings of the saved state. config.toml may have been edited since, or be of an attempt that saved
        nothing; it counts for states of former versions. Raises WrongRequest without a saved state.
        """
        if not self.state_file.is_file():
            raise WrongRequest(
                f"{self.folder} has no saved state yet, so it cannot be resumed; start it again with --overwrite"
            )
        written, settings = self.folder / "config.toml", saved_settings(self.state_file)
        return config_from_dict(tomllib.loads(settings) if settings else read_toml(written), str(written))

    def _changes(self, before: TrainConfig, accepts_data: bool) -> list[str]:
        """The settings that differ from `before`, in words. Raises WrongRequest for one that may not."""
        found = []
        for section in ("model", "data", "lora", "training"):
            was, now = asdict(getattr(before, section)), asdict(getattr(self.config, section))
            for key in was:
                if _without_paths(was[key]) == _without_paths(now[key]) or key in SAME_RESULT:
                    continue  # files may move, as their contents are compared
                name, values = f"{section}.{key}", (_in_words(was[key]), _in_words(now[key]))
                asked = f"(fluxq train --resume {self.folder} FOLDERS)" if key == "folders" else ""
                if (section == "training" and key in MAY_CHANGE) or (asked and accepts_data):
                    found.append(f"{name} {values[0]} -> {values[1]}")
                    continue
                raise WrongRequest(
                    f"{self.folder} was started with {name} = {values[0]}, not {values[1]}, and "
                    f"{WHY_FIXED.get(key, 'its steps so far were made with that')}; "
                    f"resume it {'with FOLDERS ' + asked if asked else f'without changing {name}'}, or start another "
                    f"run from its LoRA (--from-lora {self._latest_lora()} --out ANOTHER)"
                )
        return found

    def _latest_lora(self) -> Path:
        """The LoRA with the most steps."""
        final = self.folder / f"{self.name}{self.suffix}"
        return final if final.exists() else next(reversed(self.steps_saved()), final)

    def identity(self, models: Models, dataset: Dataset) -> dict[str, str]:
        """What tells this run from others, for its state."""
        return {"data": dataset.digest(), "model": models.fingerprint(), "settings": to_toml(self.config)}

    def resume_from(self, saved: Progress, identity: Mapping[str, str], dataset: Dataset, accepts_data: bool) -> None:
        """Add to `saved` what is not as it was, and since which step; from then on `changes` is that of `saved`.

        Raises WrongRequest if images or captions changed and not `accepts_data`, or if the model did, or if the run is
        over.
        """
        if saved.step > (steps := self.config.training.steps or 0):
            raise WrongRequest(f"{self.folder} has already done {saved.step} steps, more than {steps}; ask for more")
        if saved.identity.get("model") != identity["model"]:
            raise WrongRequest(
                f"the transformer's file is not that with which {self.folder} was started; put it back, or start "
                "another run from its LoRA with --from-lora"
            )
        if saved.identity.get("data") != identity["data"]:
            changed = self._changed_data(dataset)
            if not accepts_data:
                raise WrongRequest(
                    f"since {self.folder} was started, {changed}; restore that, or accept the change "
                    f"(fluxq train --resume {self.folder} FOLDERS), or start another run with --from-lora"
                )
            self.changes.append(changed)
        elif saved.validation.is_over(patience := self.config.training.early_stopping):
            if self.changes:
                raise WrongRequest(
                    f"the last {plural(saved.validation.waited, 'validation')} of {self.folder} had no lower loss, "
                    f"after which --early-stopping {patience} ends a run; to go on, raise it (0: never stop early)"
                )
            self.last_step = saved.step
        saved.changes += [f"after step {saved.step}: {change}" for change in self.changes]
        saved.identity, self.changes = identity, saved.changes

    def _changed_data(self, dataset: Dataset) -> str:
        """How `dataset` differs from that of the run so far, in words."""
        now, parts = dataset.contents(), []
        try:
            before = json.loads(self._data_file.read_text(encoding="utf-8"))
            before = {
                name: [*contents, {}][: len(Dataset.CONTENTS)] for name, contents in before.items()
            }  # of old runs
            both = [name for name in now if len(before.get(name, ())) == len(Dataset.CONTENTS)]
        except (OSError, *MALFORMED):
            return "the images, captions or encoders changed"
        for what, names in (
            ("added", [name for name in now if name not in before]),
            ("removed", [name for name in before if name not in now]),
            *((kind, [n for n in both if now[n][i] != before[n][i]]) for i, kind in enumerate(Dataset.CONTENTS)),
        ):
            if names:
                shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
                parts.append(f"{what} {shown}")
        return f"the images or captions changed ({'; '.join(parts)})"

    def save_data(self, dataset: Dataset) -> None:
        """Save what `resume_from` compares."""
        with atomic_path(self._data_file) as temporary:
            temporary.write_text(json.dumps(dataset.contents()), encoding="utf-8")

    def lora_file(self, step: int, averaged: bool = False) -> Path:
        """<name>.safetensors for the last step, <name>-step00000250.safetensors and so on before. averaged: of the
        LoRA's average, <name>-ema.safetensors and <name>-ema-step00000250.safetensors.
        """
        name, output = f"{self.name}{'-ema' * averaged}", self.config.output
        if step == self.last_step:
            return self.folder / f"{name}{self.suffix}"
        if output.save_every_epochs and step % output.save_every == 0:  # numbered by epoch, but not between two
            path = self.folder / f"{name}-{step // output.save_every * output.save_every_epochs:06}{self.suffix}"
            if not path.exists() or _steps(path) == step:  # else an epoch had another length before the run was resumed
                return path
        return self.folder / f"{name}-step{step:08}{self.suffix}"

    def loras(self) -> list[Path]:
        """All LoRAs of this run that are there."""
        last = [self.lora_file(self.last_step, averaged) for averaged in (False, True)]
        files = (last[0], self.best_file, last[1], *self.steps_saved(), *self.steps_saved(averaged=True))
        return [path for path in files if path.exists()]

    def steps_saved(self, averaged: bool = False) -> list[Path]:
        """The LoRAs saved before the last step, or their averages, oldest first."""
        name = f"{glob.escape(self.name)}{'-ema' * averaged}"
        kinds = ["step????????", *["[0-9]" * 6] * (self.config.output.numbering == "epoch")]
        found = [path for kind in kinds for path in self.folder.glob(f"{name}-{kind}{self.suffix}")]
        return sorted(found, key=lambda path: (_steps(path), path.name))

    def save_loras(
        self,
        flux: Flux,
        clip: Clip | None,
        step: int,
        metadata: Mapping[str, str],
        optimizer: FlatOptimizer,
        best: bool = False,
    ) -> None:
        """`save_lora`, and before it the average if `optimizer` keeps one, but not of the best so far."""
        if optimizer.average is not None and not best:
            with optimizer.averaged():
                self.save_lora(flux, clip, step, metadata, averaged=True)
        self.save_lora(flux, clip, step, metadata, best)

    def save_lora(
        self,
        flux: Flux,
        clip: Clip | None,
        step: int,
        metadata: Mapping[str, str],
        best: bool = False,
        averaged: bool = False,
    ) -> Path:
        """Write the LoRA of `flux`, and of `clip` if it is trained, after `step` steps, and return its path. best: it
        is the best so far; averaged: it is the average of the steps.

        Also removes the oldest LoRAs if there are more than `output.keep`, without those of runs that were finished.
        """
        path = self.best_file if best else self.lora_file(step, averaged)
        if averaged:
            own = {key: value for key, value in metadata.items() if not key.startswith("fluxq_validation_loss")}
            metadata = own | {"fluxq_ema": f"{self.config.lora.ema:g}"}
        if self.last_step != self.config.training.steps and step == self.last_step:
            metadata = {**metadata, "fluxq_stopped_early": "true"}
        if self.changes:
            metadata = {**metadata, "fluxq_changes": json.dumps(self.changes)}
        of_clip = {} if clip is None else adapters_of(clip)
        if is_adapter(path):  # left by a crash; unlike a file, a folder cannot be replaced in one move
            _remove(path)
        adapters = adapters_of(flux, self.config.lora.keep_correction)
        save_lora(path, adapters, flux.config, self.config.lora.file_format, metadata=metadata, clip=of_clip)
        if self.config.output.keep:
            rest = [path for path in self.steps_saved(averaged) if not _is_finished(path)]
            for old in rest[: -self.config.output.keep]:
                _remove(old)
        return path


def _is_finished(path: Path) -> bool:
    """Whether this LoRA was the last of its run, before that was resumed to more steps."""
    about = _metadata(path)
    return "fluxq_stopped_early" in about or about.get("ss_steps", "") == about.get("ss_max_train_steps")


def _metadata(path: Path) -> Mapping[str, str]:
    """What a LoRA says of itself; nothing if it is damaged."""
    try:
        return Checkpoint(path / PEFT_FILES[0] if is_adapter(path) else path).metadata
    except WrongRequest:
        return {}


def _steps(path: Path) -> int:
    """The steps that a LoRA saved before the end was trained for; 0 if it does not say."""
    number = re.search(r"-step(\d{8})$", path.stem)
    steps = number[1] if number else _metadata(path).get("ss_steps", "")
    return int(steps) if steps.isdecimal() else 0


def _moved(path: Path, target: Path) -> None:
    """Rename a LoRA, in place of another of that name; a folder cannot replace one that has files."""
    if path != target:
        if is_adapter(target):
            _remove(target)
        path.rename(target)


def _without_paths(value: Any) -> Any:
    """`value` with None for each path in it, and without settings of folders that are in SAME_RESULT."""
    if isinstance(value, Path):
        return None
    if isinstance(value, Mapping):
        return {key: _without_paths(item) for key, item in value.items() if key not in SAME_RESULT}
    return [_without_paths(item) for item in value] if isinstance(value, list | tuple) else value


def _in_words(value: Any) -> str:
    """A setting as a message names it: folders by their paths, repeats and triggers."""
    if isinstance(value, Mapping):
        return " ".join([str(value["path"]), *(f"{k} {v}" for k, v in value.items() if k != "path" and v is not None)])
    return ", ".join(map(_in_words, value)) if isinstance(value, list | tuple) else str(value)


def _described(holder: Path) -> str:
    """Who holds the lock, in words."""
    try:
        about = json.loads(holder.read_text(encoding="utf-8"))
        return f" (process {about['process']} on {about['host']}, started {about['started']})"
    except (OSError, *MALFORMED):
        return ""


def _remove(path: Path) -> None:
    """Delete a file, or the folder of a PEFT adapter, if it exists."""
    if is_adapter(path):
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def adapters_of(model: nn.Module, keep_start: bool = False) -> dict[str, Adapter]:
    """The LoRA of `model`: layer path -> adapter. keep_start: with what it started from, else only what was trained."""
    found = {}
    for path, layer in lora_layers(model).items():
        down, up = layer.factors(keep_start)
        assert down is not None and up is not None, "the layer has LoRA"
        found[path] = Adapter(down.detach(), up.detach(), layer.lora_scale * len(down))
    return found
