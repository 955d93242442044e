"""Pictures from the model: `fluxq sample`, and the previews that a run makes of itself.

A picture is fixed by its prompt, seed, steps, guidance and size: its noise is addressed by the seed alone. Pictures of
one shape are drawn together, as many as fit the tokens of one large picture.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from fluxq.cache import cache_texts
from fluxq.config import SamplesConfig, TrainConfig, file_and_strength
from fluxq.data.encode import cut_notes
from fluxq.data.randomness import normal
from fluxq.data.store import Text
from fluxq.defaults import side
from fluxq.errors import WrongRequest
from fluxq.flow import conditioning, euler, resolution_shift, schedule, velocity
from fluxq.formats.files import atomic_path
from fluxq.formats.lora import load_lora
from fluxq.formats.lora_algebra import Adapter, combined
from fluxq.model.autoencoder import AutoEncoder
from fluxq.model.flux import Flux
from fluxq.model.lora import set_lora
from fluxq.model.modulation import Lookahead
from fluxq.models import Models
from fluxq.report import console, progress_bar

TOKENS_PER_BATCH = 4608  # of one picture of 1024 x 1024 pixels with 512 text tokens


@dataclass(frozen=True)
class Shot:
    """One picture to draw. cfg above 1 adds a second pass with the `negative` prompt: true classifier-free guidance."""

    prompt: str
    seed: int
    width: int
    height: int
    steps: int = 20
    guidance: float = 3.5
    cfg: float = 1.0
    negative: str = ""

    def describe(self) -> str:
        """The settings in the form that image viewers and UIs read from a PNG's `parameters`."""
        negative = f"\nNegative prompt: {self.negative}" if self.cfg > 1 and self.negative else ""
        return (
            f"{self.prompt}{negative}\nSteps: {self.steps}, Sampler: Euler, CFG scale: {self.cfg:g}, "
            f"Distilled CFG Scale: {self.guidance:g}, Seed: {self.seed}, Size: {self.width}x{self.height}"
        )


def shots(samples: SamplesConfig, prompts: Sequence[str], size: int) -> list[Shot]:
    """One shot a prompt, each with a seed of its own; `size` stands in for sides that `samples` leaves open."""
    width, height = side("width", samples.width or size), side("height", samples.height or size)
    settings = (samples.steps, samples.guidance, samples.cfg, samples.negative)
    return [Shot(prompt, samples.seed + i, width, height, *settings) for i, prompt in enumerate(prompts)]


@torch.no_grad()
def draw(
    flux: Flux,
    autoencoder: AutoEncoder,
    texts: Mapping[str, Text],
    shots: Sequence[Shot],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Image.Image]:
    """The pictures of `shots`, in order; `texts` holds every prompt and negative prompt.

    progress is called with (steps done, of how many) after every step.
    """
    pictures: dict[int, Image.Image] = {}
    total, done = sum(shot.steps for shot in shots), 0

    def count(steps: int) -> None:
        nonlocal done
        done += steps
        progress(done, total)

    for members in _batches(shots, texts):
        latents = _walk(flux, texts, [shots[i] for i in members], partial(count, len(members)))
        for i, latent in zip(members, latents, strict=True):
            pictures[i] = to_picture(decode(autoencoder, latent[None])[0])
    return [pictures[i] for i in range(len(shots))]


def _batches(shots: Sequence[Shot], texts: Mapping[str, Text]) -> Iterator[list[int]]:
    """Which of `shots` are drawn together, by index."""
    for _, group in groupby(sorted(range(len(shots)), key=lambda i: _shape(shots[i])), key=lambda i: _shape(shots[i])):
        members = list(group)
        first = shots[members[0]]
        tokens = first.width // 16 * (first.height // 16) + texts[first.prompt].t5.shape[0]
        size = max(1, TOKENS_PER_BATCH // tokens)
        yield from (members[start : start + size] for start in range(0, len(members), size))


def _shape(shot: Shot) -> tuple:
    return (shot.width, shot.height, shot.steps, shot.guidance, shot.cfg)


def _walk(flux: Flux, texts: Mapping[str, Text], shots: Sequence[Shot], tick: Callable[[], None]) -> Tensor:
    """Latents (B, 16, H/8, W/8) of shots of one shape; `tick` is called after every step."""
    first, device = shots[0], flux.device
    h, w = first.height // 8, first.width // 8
    times = schedule(first.steps, resolution_shift(h * w // 4) if flux.config.guidance_embed else 1.0)

    def towards(prompts: Sequence[str]) -> Callable[[Tensor, float], Tensor]:
        """The velocity field that leads to pictures of `prompts`."""
        found = [texts[prompt] for prompt in prompts]
        txt, pooled = torch.stack([t.t5 for t in found]).to(device), torch.stack([t.clip for t in found]).to(device)
        at_times = [
            conditioning(flux, torch.full((len(shots),), t, device=device), pooled, first.guidance) for t in times
        ]
        ahead = Lookahead(flux, at_times.__getitem__, len(shots), first.steps)

        def field(x: Tensor, t: float) -> Tensor:
            step = times.index(t)
            return velocity(flux, x, at_times[step][0], txt, pooled, first.guidance, ahead.rows(step))

        return field

    positive = towards([shot.prompt for shot in shots])
    negative = towards([shot.negative for shot in shots]) if first.cfg > 1 else None

    def field(x: Tensor, t: float) -> Tensor:
        v = positive(x, t)
        if negative is None:
            return v
        v_negative = negative(x, t)
        return v_negative + first.cfg * (v - v_negative)

    noise = torch.stack([normal((16, h, w), shot.seed, "sample") for shot in shots]).to(device)
    return euler(field, noise, times, tick)


def decode(autoencoder: AutoEncoder, latents: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) in -1..1 from latents (B, 16, H/8, W/8)."""
    weight = autoencoder.decoder.conv_in.weight
    return autoencoder.decode(latents.to(weight.device, weight.dtype)).float().clamp(-1, 1)


def to_picture(x: Tensor) -> Image.Image:
    """(3, H, W) in -1..1 to a picture."""
    return Image.fromarray(((x + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy())


def save_picture(picture: Image.Image, path: Path, shot: Shot | None = None, **facts: str) -> None:
    """Save as PNG, with the settings and `facts` in its metadata."""
    info = PngInfo()
    if shot is not None:
        info.add_text("parameters", ", ".join([shot.describe(), *(f"{key}: {value}" for key, value in facts.items())]))
    with atomic_path(path) as temporary:
        picture.save(temporary, format="PNG", pnginfo=info)


def labelled_grid(
    rows: Sequence[Sequence[Image.Image]], row_labels: Sequence[str], column_labels: Sequence[str]
) -> Image.Image:
    """Pictures in rows and columns, each row labelled on its left, each column above; labels are wrapped to their
    cell.
    """
    cell_w, cell_h = (max(picture.size[axis] for row in rows for picture in row) for axis in (0, 1))
    scale = max(1, round(160 / cell_w))  # small pictures are shown larger
    cell_w, cell_h, gap = cell_w * scale, cell_h * scale, 6
    font = ImageFont.load_default(max(12, min(cell_w // 12, 28)))
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    margin_w = max(cell_w * 2 // 3, 90)
    columns = [_wrapped(measure, label, font, cell_w) for label in column_labels]
    top = max(int(measure.multiline_textbbox((0, 0), label, font=font)[3]) for label in columns) + 2 * gap
    sheet = Image.new(
        "RGB", (margin_w + len(columns) * (cell_w + gap) + gap, top + len(rows) * (cell_h + gap)), "white"
    )
    pen = ImageDraw.Draw(sheet)
    for c, label in enumerate(columns):
        pen.multiline_text((margin_w + c * (cell_w + gap), gap), label, "black", font)
    for r, (row, label) in enumerate(zip(rows, row_labels, strict=True)):
        y = top + r * (cell_h + gap)
        pen.multiline_text((gap, y + gap), _wrapped(pen, label, font, margin_w - 2 * gap), "black", font)
        for c, picture in enumerate(row):
            shown = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
            sheet.paste(shown, (margin_w + c * (cell_w + gap), y))
    return sheet


def _wrapped(
    pen: ImageDraw.ImageDraw, text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int
) -> str:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and pen.textlength(longer, font=font) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return "\n".join(lines)


def sample_command(
    config: TrainConfig, loras: Sequence[str], strengths: Sequence[float], grid: bool, out: Path
) -> dict[str, list[str]]:
    """Draw `config.samples.prompts` into `out`; returns the files' names.

    loras: "FILE" or "FILE=STRENGTH"; several are applied together, or with `grid` one after the other, a row each, at
    every one of `strengths`. Raises WrongRequest for no prompt, a LoRA that does not fit, or a strength that is no
    number.
    """
    samples = config.samples
    if not samples.prompts:
        raise WrongRequest('nothing to draw: give at least one --prompt "TEXT"')
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise WrongRequest(f"{out} cannot be written to ({error.strerror}); choose another --out") from error
    models = Models(config.model, say=console.print)
    wanted = shots(samples, samples.prompts, models.default_size[0])
    chosen = [file_and_strength(lora) for lora in loras]
    read = [(_adapters(path, models), strength) for path, strength in chosen]
    prompts = list(dict.fromkeys((*samples.prompts, samples.negative)))
    with progress_bar() as progress:
        texts = cache_texts(config.data.cache, models, prompts, progress)
    cuts = {prompt: (text.truncated, text.clip_truncated) for prompt, text in texts.items()}
    for line in cut_notes(cuts, {}, models.t5_length):
        console.print(line)
    flux, autoencoder = models.load_flux(), models.load_autoencoder()
    files: list[str] = []

    def save(picture: Image.Image, name: str, shot: Shot | None = None, **facts: str) -> None:
        save_picture(picture, out / name, shot, **facts)
        files.append(str(out / name))

    with progress_bar() as progress:
        if not grid:
            attach(flux, read)
            names = ", ".join(f"{path.stem} ({strength:g})" for path, strength in chosen)
            pictures = draw(flux, autoencoder, texts, wanted, lambda done, total: progress("sampling", done, total))
            for i, (picture, shot) in enumerate(zip(pictures, wanted, strict=True)):
                save(picture, f"{i:02}_seed{shot.seed}.png", shot, **({"LoRA": names} if names else {}))
        else:
            across = list(strengths) or [0.0, 0.5, 1.0]
            sheets: list[list[list[Image.Image]]] = [[] for _ in wanted]
            for row, (adapters, strength) in enumerate(read or [({}, 1.0)]):
                columns = []
                for column, factor in enumerate(across):
                    attach(flux, [(adapters, strength * factor)])
                    stage = f"{row * len(across) + column + 1} of {len(across) * max(1, len(read))}"
                    columns.append(
                        draw(flux, autoencoder, texts, wanted, lambda d, t, stage=stage: progress(stage, d, t))
                    )
                for sheet, pictures in zip(sheets, zip(*columns, strict=True), strict=True):
                    sheet.append(list(pictures))
            labels = [path.stem for path, _ in chosen] or ["no LoRA"]
            for i, (sheet, shot) in enumerate(zip(sheets, wanted, strict=True)):
                save(labelled_grid(sheet, labels, [f"strength {f:g}" for f in across]), f"grid_{i:02}.png", shot)
    console.print("\n".join(files))
    return {"files": files}


def attach(flux: Flux, loras: Sequence[tuple[Mapping[str, Adapter], float]]) -> None:
    """Give `flux` these LoRAs, each at its strength, added up; they replace what it had."""
    set_lora(flux, {path: (a.down, a.up, a.scale) for path, a in combined(loras).items()})


def _adapters(path: Path, models: Models) -> dict[str, Adapter]:
    """What of the LoRA at `path` is drawn with: what it does to the transformer. The rest is said."""
    lora = load_lora(path, models.flux_config)
    notes = [*lora.notes, f"its CLIP-L part ({len(lora.clip)} modules) is not drawn with"] if lora.clip else lora.notes
    for note in notes:
        console.print(f"{path.name}: {note}")
    return lora.adapters
