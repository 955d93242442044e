"""Pictures from the model: `fluxq sample`, and the previews that a run makes of itself.

A picture is fixed by its prompt, seed, steps, guidance and size: its noise is addressed by the seed alone. Pictures of
one shape are drawn together, as many as fit the tokens of one large picture. Text encoders, transformer and autoencoder
take turns: prompts are encoded before the transformer is loaded, and latents wait on the host until it has drawn all.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor, nn

from fluxq.cache import cache_texts
from fluxq.config import SamplesConfig, TrainConfig, file_and_strength
from fluxq.data.encode import cut_notes
from fluxq.data.randomness import normal
from fluxq.data.store import Text
from fluxq.defaults import side
from fluxq.errors import WrongRequest
from fluxq.flow import conditioning, euler, resolution_shift, schedule, velocity
from fluxq.formats.atomic import atomic_path
from fluxq.formats.lora import Lora, load_lora
from fluxq.formats.lora_algebra import Adapter, combined
from fluxq.formats.stream import expect_sampling
from fluxq.memory import Placement, blocks_units
from fluxq.model.autoencoder import AutoEncoder, within_memory
from fluxq.model.clip import Clip
from fluxq.model.flux import Flux
from fluxq.model.lora import set_lora
from fluxq.model.modulation import Lookahead
from fluxq.models import Models
from fluxq.report import console, progress_bar
from fluxq.turns import TOKENS_PER_BATCH, Turns, band_for, place_drawing, room_of

Say = Callable[[str], None]
Texts = Mapping[str, Text]


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


def draw(
    flux: Flux,
    load: Callable[[int | None], AutoEncoder],
    texts: Mapping[str, Text],
    shots: Sequence[Shot],
    progress: Callable[[int, int], None] = lambda done, total: None,
    turns: Turns | None = None,
    say: Say = lambda line: None,
) -> list[Image.Image]:
    """The pictures of `shots`, in order; `texts` holds every prompt and negative prompt.

    progress is called with (steps done, of how many) after every step. `load` gives the autoencoder, working on so many
    rows at a time, once the transformer has done its part.
    """
    turns = turns or Turns()
    return develop(load, walk(flux, texts, shots, progress, turns.tokens), turns.room, say)


@torch.no_grad()
def walk(
    flux: Flux,
    texts: Mapping[str, Text],
    shots: Sequence[Shot],
    progress: Callable[[int, int], None] = lambda done, total: None,
    tokens: int = TOKENS_PER_BATCH,
) -> list[Tensor]:
    """The latents (16, H/8, W/8) of `shots`, on the host; as many at once as have `tokens` tokens, but at least one."""
    found: dict[int, Tensor] = {}
    total, done = sum(shot.steps for shot in shots), 0

    def count(steps: int) -> None:
        nonlocal done
        done += steps
        progress(done, total)

    for members in _batches(shots, texts, tokens):
        latents = _walk(flux, texts, [shots[i] for i in members], partial(count, len(members)))
        found |= zip(members, latents.cpu(), strict=True)
    return [found[i] for i in range(len(shots))]


@torch.no_grad()
def develop(
    load: Callable[[int | None], AutoEncoder], latents: Iterable[Tensor], room: int | None, say: Say
) -> list[Image.Image]:
    """The pictures of latents (16, H/8, W/8), one at a time, within `room` bytes of the card if any are said."""
    latents = list(latents)
    autoencoder = load(band_for(max(x[0].numel() for x in latents) * 64, room))
    return [to_picture(within_memory(autoencoder, partial(decode, autoencoder, x[None]), say)[0]) for x in latents]


def _batches(shots: Sequence[Shot], texts: Mapping[str, Text], most: int) -> Iterator[list[int]]:
    """Which of `shots` are drawn together, by index."""
    for _, group in groupby(sorted(range(len(shots)), key=lambda i: _shape(shots[i])), key=lambda i: _shape(shots[i])):
        members = list(group)
        first = shots[members[0]]
        tokens = first.width // 16 * (first.height // 16) + texts[first.prompt].t5.shape[0]
        size = max(1, most // tokens)
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
    _require_writable(out)
    models = Models(config.model, say=console.print)
    wanted = shots(samples, samples.prompts, models.default_size[0])
    chosen = [file_and_strength(lora) for lora in loras]
    read = [(_read(path, models), strength) for path, strength in chosen]
    adapters = [a for lora, _ in read for a in lora.adapters.values()]
    ranks = [max(lora.ranks, default=0) for lora, _ in read]
    nbytes = sum(4 * (a.down.numel() + a.up.numel()) for a in adapters)
    placement, turns = place_drawing(config, models, [(s.width, s.height) for s in wanted], ranks, nbytes)
    across = (list(strengths) or [0.0, 0.5, 1.0]) if grid else [1.0]
    rows = [[pair] for pair in read] or [[]] if grid else [read]
    passes = [[(lora, strength * factor) for lora, strength in row] for row in rows for factor in across]

    # the turns
    texts = _told(models, _encoded(config, models), passes)
    latents = _drawn(models, placement, texts, wanted, passes, turns.tokens)
    pictures = develop(models.load_autoencoder, latents, turns.room, console.print)

    files = []
    for i, shot in enumerate(wanted):
        own = pictures[i :: len(wanted)]  # by row, then by column
        if grid:
            cells = [own[start : start + len(across)] for start in range(0, len(own), len(across))]
            labels = [path.stem for path, _ in chosen] or ["no LoRA"]
            files.append(out / f"grid_{i:02}.png")
            save_picture(labelled_grid(cells, labels, [f"strength {f:g}" for f in across]), files[-1], shot)
        else:
            names = ", ".join(f"{path.stem} ({strength:g})" for path, strength in chosen)
            files.append(out / f"{i:02}_seed{shot.seed}.png")
            save_picture(own[0], files[-1], shot, **({"LoRA": names} if names else {}))
    console.print("\n".join(map(str, files)))
    return {"files": [str(file) for file in files]}


def _require_writable(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise WrongRequest(f"{out} cannot be written to ({error.strerror}); choose another --out") from error


def _encoded(config: TrainConfig, models: Models) -> dict[str, Text]:
    """The prompts and the negative one, encoded; what was cut of them is said."""
    prompts = list(dict.fromkeys((*config.samples.prompts, config.samples.negative)))
    with progress_bar() as progress:
        texts = cache_texts(config.data.cache, models, prompts, progress, room_of(config.memory, models.device))
    cuts = {prompt: (text.truncated, text.clip_truncated) for prompt, text in texts.items()}
    for line in cut_notes(cuts, {}, models.t5_length):
        console.print(line)
    return texts


Loras = Sequence[tuple[Lora, float]]
"""LoRAs that are applied together, each at its strength."""


def _told(models: Models, texts: Texts, passes: Sequence[Loras]) -> list[Texts]:
    """For each pass the prompts as CLIP-L tells them with its LoRAs; CLIP-L is loaded only where one adapts it, in
    fp32, in which `texts` were encoded.
    """
    if not any(lora.clip for loras in passes for lora, _ in loras):
        return [texts] * len(passes)
    clip, told = models.load_clip(torch.float32), list[Texts]()
    for loras in passes:
        attach(clip, [(lora.clip, strength) for lora, strength in loras])
        told.append(told_by(clip, texts))
    return told


@torch.no_grad()
def told_by(clip: Clip, texts: Texts) -> Texts:
    """`texts` with the pooled vectors that `clip` gives as it is now."""
    return {prompt: replace(text, clip=clip.pooled([prompt])[0].cpu()) for prompt, text in texts.items()}


def _drawn(
    models: Models,
    placement: Placement,
    texts: Sequence[Texts],
    wanted: Sequence[Shot],
    passes: Sequence[Loras],
    tokens: int,
) -> list[Tensor]:
    """The latents of all shots with the LoRAs of each pass, one pass after the other; then the transformer is gone."""
    if (resident := placement.resident) is not None:
        units = sum(map(len, blocks_units(models.flux_config)))
        console.print(f"{len(resident)} of {units} units stay, the others stream through {placement.slots} slots")
    latents = list[Tensor]()
    with progress_bar() as progress:
        flux = models.load_flux(placement.resident, placement.slots)
        expect_sampling(flux)
        for number, (loras, told) in enumerate(zip(passes, texts, strict=True), start=1):
            attach(flux, [(lora.adapters, strength) for lora, strength in loras])
            stage = f"{number} of {len(passes)}" if len(passes) > 1 else "sampling"
            latents += walk(flux, told, wanted, partial(progress, stage), tokens)
    return latents


def attach(model: nn.Module, loras: Sequence[tuple[Mapping[str, Adapter], float]]) -> None:
    """Give `model` these LoRAs, each at its strength, added up; they replace what it had."""
    set_lora(model, {path: (a.down, a.up, a.scale) for path, a in combined(loras).items()})


def _read(path: Path, models: Models) -> Lora:
    """The LoRA at `path`; what of it is not drawn with is said."""
    lora = load_lora(path, models.flux_config)
    if lora.clip:
        lora.check_clip(models.open("clip_l").shapes)
    for note in lora.notes:
        console.print(f"{path.name}: {note}")
    return lora
