"""`fluxq sample`: sample images from prompts, with LoRAs.

Only one model is on the GPU at a time: prompts are encoded before the transformer is loaded, and latents wait in CPU
memory until it has denoised all of them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Sequence
from functools import partial
from itertools import count
from pathlib import Path

import torch
from torch import Tensor

from fluxq.caching.encoding import truncation_notes
from fluxq.caching.folders import cache_texts
from fluxq.caching.store import Text
from fluxq.config import TrainConfig
from fluxq.config_files import file_and_strength
from fluxq.console import console, progress_bar
from fluxq.errors import WrongRequest
from fluxq.formats.atomic import made
from fluxq.formats.lora import Lora, load_lora
from fluxq.formats.stream import expect_sampling
from fluxq.memory.phases import gpu_budget, place_sampling
from fluxq.memory.placement import Placement, blocks_units
from fluxq.models import Models
from fluxq.sampling import Request, requests_for
from fluxq.sampling.decoding import decode_images
from fluxq.sampling.denoising import Loras, Texts, attach_loras, denoise, encode_pooled
from fluxq.sampling.sheets import labeled_grid, save_image
from fluxq.training.asked import refuse_without_effect


def sample_command(
    config: TrainConfig,
    loras: Sequence[str],
    strengths: Sequence[float],
    grid: bool,
    out: Path,
    asked: Collection[str] = (),
) -> dict[str, list[str]]:
    """Sample `config.samples.prompts` into `out`; returns {"files": their paths}.

    loras: "FILE" or "FILE=STRENGTH". Several are applied together; with `grid` each has its own row, and each of
    `strengths` a column. asked: keys of settings that are refused if they have no effect. Raises WrongRequest if there
    is no prompt or a LoRA does not fit the model.
    """
    samples = config.samples
    if not samples.prompts:
        raise WrongRequest('nothing to sample; give at least one --prompt "TEXT"')
    _require_writable(out)
    models = Models(config.model, notify=console.print)
    refuse_without_effect(config, models, asked, samples_only=True)
    requests = requests_for(samples, samples.prompts, models.default_resolution[0])
    files_and_strengths = [file_and_strength(lora) for lora in loras]
    read = [(_read(path, models), strength) for path, strength in files_and_strengths]
    adapters = [a for lora, _ in read for a in lora.adapters.values()]
    ranks = [max(lora.ranks, default=0) for lora, _ in read]
    nbytes = sum(4 * (a.down.numel() + a.up.numel()) for a in adapters)
    models.use_captions((*samples.prompts, samples.negative))
    placement, limits = place_sampling(config, models, [(r.width, r.height) for r in requests], ranks, nbytes)
    columns = (list(strengths) or [0.0, 0.5, 1.0]) if grid else [1.0]
    rows = [[pair] for pair in read] or [[]] if grid else [read]
    passes = [[(lora, strength * factor) for lora, strength in row] for row in rows for factor in columns]

    # one model after the other
    texts = _texts_of_passes(models, _encode_prompts(config, models), passes)
    latents = _denoise_passes(models, placement, texts, requests, passes, limits.tokens)
    images = decode_images(models.load_autoencoder, latents, limits.decoding_bytes, console.print)

    files = []
    for i, request in enumerate(requests):
        own = images[i :: len(requests)]  # by row, then by column
        if grid:
            cells = [own[start : start + len(columns)] for start in range(0, len(own), len(columns))]
            labels = [path.stem for path, _ in files_and_strengths] or ["no LoRA"]
            files.append(unused(out / f"grid_{i:02}.png"))
            save_image(labeled_grid(cells, labels, [f"strength {f:g}" for f in columns]), files[-1], request)
        else:
            names = ", ".join(f"{path.stem} ({strength:g})" for path, strength in files_and_strengths)
            files.append(unused(out / f"{i:02}_seed{request.seed}.png"))
            save_image(own[0], files[-1], request, **({"LoRA": names} if names else {}))
    console.print(*map(str, files), sep="\n")
    return {"files": [str(file) for file in files]}


def unused(path: Path) -> Path:
    """`path`, or with -2, -3 ... after its name the first that does not exist."""
    names = (path.with_stem(f"{path.stem}-{n}") if n > 1 else path for n in count(1))
    return next(name for name in names if not name.exists())


def _require_writable(out: Path) -> None:
    try:
        with made(out), tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise WrongRequest(f"cannot write to {out} ({error.strerror}); choose another --out") from error


def _read(path: Path, models: Models) -> Lora:
    lora = load_lora(path, models.flux_config)
    if lora.clip:
        lora.check_clip(models.open("clip_l").shapes)
    if lora.metadata.get("ss_apply_t5_attn_mask") == "True" and not models.config.text_mask:
        console.print(f"{path.name} was trained with the padding of text masked; --text-mask samples like that")
    for note in lora.notes:
        console.print(f"{path.name}: {note}")
    return lora


def _encode_prompts(config: TrainConfig, models: Models) -> dict[str, Text]:
    """The prompts and the negative prompt, encoded. Prints which of them were cut."""
    prompts = list(dict.fromkeys((*config.samples.prompts, config.samples.negative)))
    with progress_bar() as progress:
        texts = cache_texts(config.data.cache, models, prompts, progress, gpu_budget(config.memory, models.device))
    cuts = {prompt: (text.truncated, text.clip_truncated) for prompt, text in texts.items()}
    for line in truncation_notes(cuts, {}, models.t5_length):
        console.print(line)
    return texts


def _texts_of_passes(models: Models, texts: Texts, passes: Sequence[Loras]) -> list[Texts]:
    """For each pass, the prompts as CLIP-L with that pass's LoRAs encodes them.

    CLIP-L is loaded only if a LoRA adapts it, in fp32 as for the cache.
    """
    if not any(lora.clip for loras in passes for lora, _ in loras):
        return [texts] * len(passes)
    clip, result = models.load_clip(torch.float32), list[Texts]()
    for loras in passes:
        attach_loras(clip, [(lora.clip, strength) for lora, strength in loras])
        result.append(encode_pooled(clip, texts))
    return result


def _denoise_passes(
    models: Models,
    placement: Placement,
    texts: Sequence[Texts],
    requests: Sequence[Request],
    passes: Sequence[Loras],
    tokens: int,
) -> list[Tensor]:
    """The latents of all requests, pass by pass. The transformer is freed when this returns."""
    if (resident := placement.resident) is not None:
        units = sum(map(len, blocks_units(models.flux_config)))
        console.print(
            f"{len(resident)} of {units} units of weights stay on the GPU, the rest streams from RAM through "
            f"{placement.slots} slots"
        )
    latents = list[Tensor]()
    with progress_bar() as progress:
        flux = models.load_flux(placement.resident, placement.slots)
        expect_sampling(flux)
        for number, (loras, own_texts) in enumerate(zip(passes, texts, strict=True), start=1):
            attach_loras(flux, [(lora.adapters, strength) for lora, strength in loras])
            stage = f"{number} of {len(passes)}" if len(passes) > 1 else "sampling"
            latents += denoise(flux, own_texts, requests, partial(progress, stage), tokens)
    return latents
