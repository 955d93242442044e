"""A run directory: how one is begun or gone on with, and what is saved into it.

config.toml   every setting, defaults filled in           samples/   previews
log.jsonl     a line a step                               state/     what --resume needs
loss.png      the loss so far                             <name>.safetensors, <name>-step00000250.safetensors ...
result.json   what came of it
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, cast

from fluxq.config import DataConfig, FolderConfig, TrainConfig, config_from_dict, read_toml, to_toml
from fluxq.data.dataset import Dataset
from fluxq.data.examples import read_caption
from fluxq.data.pictures import picture_files
from fluxq.errors import WrongRequest
from fluxq.formats.files import atomic_path
from fluxq.formats.lora import Adapter, save_lora
from fluxq.formats.metadata import lora_metadata
from fluxq.model.flux import Flux
from fluxq.model.lora import lora_layers
from fluxq.models import Models

Say = Callable[[str], None]


@dataclass(frozen=True)
class Result:
    """What came of a run. Losses are of the flow; validation losses are by folder."""

    steps: int
    seconds: float
    loss_first: float
    loss_last: float
    peak_bytes: int | None
    lora: str
    validation_before: dict[str, float] | None
    validation_after: dict[str, float] | None

    def save(self, folder: Path) -> None:
        with atomic_path(folder / "result.json") as temporary:
            temporary.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")


def resolve(config: TrainConfig, models: Models, say: Say) -> TrainConfig:
    """`config` with every default that depends on the pictures or the card filled in, each said with its reason."""
    lora, training, output = config.lora, config.training, config.output
    data = resolve_data(config.data, models, say)
    if lora.alpha is None:
        lora = replace(lora, alpha=float(lora.rank))
        say(
            f"rank {lora.rank}, alpha {lora.rank}: alpha equal to rank leaves the LoRA unscaled, "
            "which every program reads alike"
        )
    if training.steps is None:
        pictures = sum(len(picture_files(f.path)) for f in data.folders if f.path.is_dir())
        training = replace(training, steps=min(3000, max(1000, 100 * pictures)))
        say(f"steps {training.steps}: about 100 a picture ({pictures} pictures), within 1,000 to 3,000")
        if training.rate == type(training)().rate:
            say(f"rate {training.rate:g}: the usual one for LoRA at alpha equal to rank")
        if training.timesteps == "shift":
            say(
                f"timesteps shift {training.shift:g}: more of them near noise, where the layout of a picture is decided"
            )
    name = output.name or next((f.trigger for f in data.folders if f.trigger), None) or data.folders[0].path.name
    output = replace(output, name=name, out=output.out or Path("runs") / name)
    return replace(config, model=models.resolved(), data=data, lora=lora, training=training, output=output)


def resolve_data(data: DataConfig, models: Models, say: Say) -> DataConfig:
    """`data` with its size, the sides of buckets and absolute paths filled in."""
    if not data.folders:
        raise WrongRequest("no folder of pictures was given; name one: fluxq train FOLDER --trigger WORD")
    if data.size is None:
        size, reason = models.default_size
        data = replace(data, size=size)
        say(f"size {size}: {reason}")
    size = cast(int, data.size)
    if size % 16:
        nearest = " or ".join(str(s) for s in (size // 16 * 16, size // 16 * 16 + 16) if s)
        raise WrongRequest(f"size must be a multiple of 16 pixels, not {size}; {nearest} would do")
    return replace(
        data,
        folders=tuple(_absolute(f, data.trigger) for f in data.folders),
        validation=tuple(_absolute(f, None) for f in data.validation),
        cache=data.cache.resolve(),
        min_side=data.min_side or max(data.step, size // 2 // data.step * data.step),
        max_side=data.max_side or size * 2,
    )


def _absolute(folder: FolderConfig, trigger: str | None) -> FolderConfig:
    return replace(
        folder, path=folder.path.resolve(), trigger=folder.trigger if folder.trigger is not None else trigger
    )


class Run:
    """The directory of one run. `config` is resolved; `folder` is config.output.out."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.folder = cast(Path, config.output.out)
        self.name = cast(str, config.output.name)
        self.state_file = self.folder / "state" / "state.safetensors"

    @classmethod
    def open(cls, config: TrainConfig, resume: bool, overwrite: bool) -> Run:
        """Begin a run, or check that the one that is there can go on.

        Raises WrongRequest for an existing run without `resume` or `overwrite`, and where `resume` would change what is
        computed.
        """
        run = cls(config)
        written = run.folder / "config.toml"
        if resume:
            run._refuse_changes(config_from_dict(read_toml(written), str(written)))
        elif written.exists() and not overwrite:
            raise WrongRequest(
                f"{run.folder} already holds a run; go on with it by --resume {run.folder}, replace it by --overwrite, "
                "or choose another --out"
            )
        try:
            run.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise WrongRequest(f"{run.folder} cannot be made ({error.strerror}); choose another --out") from error
        if not resume:
            stale = (
                run.state_file,
                *(run.folder / name for name in ("log.jsonl", "loss.png", "result.json")),
                *run.steps_saved(),
                run.lora_file(cast(int, config.training.steps)),
            )
            for path in stale:
                path.unlink(missing_ok=True)
        with atomic_path(written) as temporary:
            temporary.write_text(to_toml(config), encoding="utf-8")
        return run

    def _refuse_changes(self, before: TrainConfig) -> None:
        if not self.state_file.is_file():
            raise WrongRequest(
                f"{self.folder} has saved no state yet, so it cannot be resumed; start it anew with --overwrite"
            )
        for section in ("model", "data", "lora", "training"):
            was, now = asdict(getattr(before, section)), asdict(getattr(self.config, section))
            for key in was:
                longer = section == "training" and key == "steps" and was["schedule"] == "constant"
                if was[key] != now[key] and not longer:
                    raise WrongRequest(
                        f"{self.folder} was begun with {section}.{key} = {was[key]}, not {now[key]}; "
                        "resume it without that change, or begin another run with --out"
                    )

    def lora_file(self, step: int) -> Path:
        """<name>.safetensors for the last step, <name>-step00000250.safetensors before."""
        last = step == self.config.training.steps
        return self.folder / (f"{self.name}.safetensors" if last else f"{self.name}-step{step:08}.safetensors")

    def steps_saved(self) -> list[Path]:
        """The LoRAs saved on the way, oldest first."""
        return sorted(self.folder.glob(f"{self.name}-step????????.safetensors"))

    def save_lora(self, flux: Flux, step: int, metadata: Mapping[str, str]) -> Path:
        """Write the LoRA of `flux` as it is after `step` steps; older ones beyond `output.keep` are removed."""
        adapters = {
            path: Adapter(layer.lora_down.detach(), layer.lora_up.detach(), cast(float, self.config.lora.alpha))
            for path, layer in lora_layers(flux).items()
            if layer.lora_down is not None and layer.lora_up is not None
        }
        path = self.lora_file(step)
        save_lora(
            path,
            adapters,
            flux.config,
            cast(Literal["kohya", "diffusers"], self.config.lora.file_format),
            metadata=metadata,
        )
        if self.config.output.keep:
            for old in self.steps_saved()[: -self.config.output.keep]:
                old.unlink()
        return path


def metadata_of(
    config: TrainConfig, models: Models, dataset: Dataset, batches: int
) -> Callable[[int, float, float], dict[str, str]]:
    """A function (step, started, finished) -> the metadata of the LoRA at that step; `batches` is micro-batches an
    epoch.
    """
    folders = config.data.folders
    files = {f.path: [Path(e.path) for e in dataset.examples if Path(e.path).parent == f.path] for f in folders}
    tags: dict[str | Path, Mapping[str, int]] = {path: _tag_frequency(pictures) for path, pictures in files.items()}
    buckets = Counter({e.bucket: 0 for e in dataset.examples})
    for example in dataset.examples:
        buckets[example.bucket] += example.repeats

    def at(step: int, started: float, finished: float) -> dict[str, str]:
        training, size = config.training, cast(int, config.data.size)
        return lora_metadata(
            name=cast(str, config.output.name),
            rank=config.lora.rank,
            alpha=cast(float, config.lora.alpha),
            steps=step,
            epochs=-(-step * training.accumulate // batches),
            learning_rate=training.rate,
            seed=training.seed,
            resolution=(size, size),
            variant=models.variant,
            base_model=models.flux_file,
            optimizer=training.optimizer,
            datasets={f.path: (f.repeats, len(files[f.path])) for f in folders},
            tag_frequency=tags,
            buckets=buckets,
            trigger=next((f.trigger for f in folders if f.trigger), None),
            title=cast(str, config.output.name),
            started=started,
            finished=finished,
            timestep_sampling=training.timesteps,
            shift=training.shift,
            guidance=training.guidance,
            precision="bf16",
        )

    return at


def _tag_frequency(pictures: Sequence[Path]) -> dict[str, int]:
    """How often each comma-separated part of the captions occurs, the most frequent first."""
    parts = (part.strip() for picture in pictures for part in read_caption(picture).split(","))
    return dict(Counter(part for part in parts if part).most_common())
