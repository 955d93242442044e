"""The settings of a run: frozen dataclasses, and the only list of settings.

Every field carries its help text and, if it has one, its command-line option. config_files.py reads and writes them.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxq.settings import Folder, ImageSettings, Resolution, block_numbers, option, sizes_of, type_hints

if TYPE_CHECKING:
    from fluxq.model.lora import Adapted


@dataclass(frozen=True)
class ModelConfig:
    """[model] The model files, and how frozen weights are stored and multiplied."""

    name: str | None = option(
        None,
        "Use the bundled toy model in place of FLUX.1, to try fluxq without any model files.",
        "--model",
        ("nano",),
    )
    models: Path | None = option(
        None,
        "Where to find the model files that are not named: a ComfyUI, Forge, diffusers or other folder, an all-in-one "
        "file, or a hub id like black-forest-labs/FLUX.1-dev; default: the environment variable FLUXQ_MODELS.",
        "--models",
    )
    flux: Path | None = option(
        None, "The FLUX.1 transformer: a .safetensors or .gguf file, a diffusers folder or a hub id.", "--flux"
    )
    ae: Path | None = option(None, "The autoencoder (VAE): ae.safetensors, a diffusers folder or a hub id.", "--ae")
    clip_l: Path | None = option(
        None, "The CLIP-L text encoder: clip_l.safetensors, a diffusers folder or a hub id.", "--clip-l"
    )
    t5xxl: Path | None = option(
        None, "The T5-XXL text encoder: t5xxl_fp16.safetensors, a diffusers folder or a hub id.", "--t5xxl"
    )
    clip_tokenizer: Path | None = option(
        None, "CLIP's tokenizer, a folder with vocab.json; default: searched for near the text encoders."
    )
    t5_tokenizer: Path | None = option(
        None,
        "T5's tokenizer: spiece.model, tokenizer.json or a T5 .gguf; default: searched for near the text encoders.",
    )
    t5_length: int | None = option(
        None,
        "T5 tokens per caption: longer captions are cut, fewer tokens train faster; default: 512 for dev, 256 for "
        "schnell.",
        "--t5-length",
        minimum=2,
        maximum=512,
    )
    text_mask: bool = option(
        False,
        "Mask the padding of text in T5 and the transformer, as sd-scripts' --apply_t5_attn_mask does: short captions "
        "train faster, but FLUX.1 was trained, and most programs sample, with padding that is seen.",
        "--text-mask",
    )
    format: str | None = option(
        None,
        "How frozen weights are stored: nf4 is the smallest (6.3 GiB), int8 and fp8 are more accurate (11.2 GiB), bf16 "
        "is not quantized (22.2 GiB); default: nf4, but a training run on a GPU picks the most accurate format that is "
        "predicted to be as fast.",
        "--format",
        ("nf4", "fp8", "int8", "bf16"),
    )
    compute: str = option(
        "bf16",
        "How frozen weights are multiplied: bf16 is the most accurate; int8 and fp8 are faster, with gradients in "
        "bf16; int8_dx and fp8_dx are the fastest, with gradients in 8 bits too; fp8 needs an RTX 40 or newer.",
        "--compute",
        ("bf16", "int8", "int8_dx", "fp8", "fp8_dx"),
    )
    base_loras: tuple[str, ...] = option((), "LoRAs to merge into the frozen transformer, as FILE or FILE=STRENGTH.")
    ae_band: int | None = option(
        None,
        "Rows of the autoencoder's feature maps to process at a time: fewer rows take less memory but more time, the "
        "result is the same; default: as many as fit.",
        "--ae-band",
        minimum=1,
    )
    offline: bool = option(
        False,
        "Never use the network, which is otherwise used for hub ids and tokenizers that are not on this machine; what "
        "is missing is named.",
        "--offline",
    )


@dataclass(frozen=True)
class DataConfig(ImageSettings):
    """[data] The images, and the shapes they are trained at. What a folder has of its own counts for its images."""

    folders: tuple[Folder, ...] = option((), "Folders of images.")
    validation: tuple[Folder, ...] = option(
        (), "Folders of held-out images; their loss is measured before, during and after training."
    )
    step: int = option(16, "Pixels: the sides of buckets (training shapes) are multiples of this.", minimum=16)
    min_side: int | None = option(None, "Pixels: shortest side of a bucket; default: half of resolution.", minimum=16)
    max_side: int | None = option(None, "Pixels: longest side of a bucket; default: twice resolution.", minimum=16)
    recursive: bool = option(False, "Also read the folders inside FOLDERS.", "--recursive")
    skip_bad: bool = option(
        False,
        "Leave out images that cannot be read, do without captions that cannot be read, and list both, instead of "
        "stopping.",
        "--skip-bad",
    )
    cache: Path = option(
        Path("cache"), "Folder for encoded images and captions; later runs reuse what is in it.", "--cache"
    )
    validation_split: float = option(
        0.0,
        "Hold out this share of the images, 0 to 0.5, and measure their loss during training; chosen by what is in "
        "them, so that renaming or moving images changes nothing, and adding some holds out none that was trained on; "
        "0: none.",
        "--validation-split",
        minimum=0,
        maximum=0.5,
    )

    def filled(self) -> tuple[list[Folder], list[Folder]]:
        """The folders to train on and those of held-out images, each with every setting that it has; held-out images
        have no variants.
        """
        return [f.filled(self) for f in self.folders], [f.filled(self).plain() for f in self.validation]

    @property
    def side(self) -> int:
        """The side of a square as large as the largest images, in pixels, a multiple of 16; 0 if it is not known."""
        return max(
            (side_of(f.resolution) for folders in self.filled() for f in folders), default=side_of(self.resolution)
        )


def side_of(resolution: Resolution | None) -> int:
    areas = [width * height for width, height in sizes_of(resolution or ())]
    return -(-math.isqrt(max(areas)) // 16) * 16 if areas else 0


DEFAULT_RANK, DEFAULT_TARGETS = 16, ("attention+mlp",)  # unless the user or a LoRA to start from sets them


def parse_layers(value: Any, minimum: float) -> tuple[str, ...]:
    """("attention=16", "mlp=8"), also from "attention=16,mlp=8". Raises ValueError for anything else."""
    given = value.split(",") if isinstance(value, str) else value
    wanted = f"LAYERS=NUMBER like mlp=8, with a number from {minimum:g} up, or several of these"
    if not isinstance(given, list | tuple) or not all(isinstance(part, str) for part in given):
        raise ValueError(wanted)
    for layers, equals, number in (part.rpartition("=") for part in given):
        try:
            right = layers and equals and minimum <= float(number) < math.inf and (minimum or float(number) % 1 == 0)
        except ValueError:
            right = False
        if not right:
            raise ValueError(wanted)
    return tuple(part.strip() for part in given)


def parse_blocks(value: Any) -> str | None:
    """Numbers of blocks like "0-3,5", "none", or None for "all". Raises ValueError for anything else."""
    text = str(value).replace(" ", "") if type(value) in (str, int) else ""
    try:
        return None if text == "all" or block_numbers(text) is None else text
    except ValueError:
        raise ValueError("all, none, or numbers of blocks like 0-3,5") from None


@dataclass(frozen=True)
class LoraConfig:
    """[lora] What is trained."""

    rank: int | None = option(
        None,
        "Rank (size) of the LoRA: a higher one can learn more, but makes a larger file and takes more memory; 4 to 64 "
        "are usual; default: 16, or as in --from-lora.",
        "--rank",
        minimum=1,
    )
    alpha: float | None = option(
        None,
        "The LoRA is scaled by alpha / rank, so a smaller alpha weakens it; default: equal to rank, or as in "
        "--from-lora.",
        "--alpha",
        minimum=1e-09,
    )
    targets: tuple[str, ...] | None = option(
        None,
        "Layers to train: attention, attention+mlp, all, or regular expressions on layer paths; default: "
        "attention+mlp, or the layers of --from-lora.",
    )
    from_lora: Path | None = option(
        None, "Start from this LoRA, made by any program, instead of from an empty one; default: none.", "--from-lora"
    )
    text_encoder: str | None = option(
        None,
        "Also train this text encoder: clip_l only, t5xxl is not supported; slower, as captions are then encoded "
        "again in every step; default: none.",
        "--text-encoder",
        ("clip_l", "t5xxl"),
    )
    file_format: str = option(
        "kohya",
        "Key names in the LoRA file: kohya loads in ComfyUI, Forge, sd-scripts and diffusers; diffusers and comfy "
        "use those programs' own names; peft writes a folder, NAME.peft, for PeftModel.",
        "--lora-format",
        ("kohya", "diffusers", "comfy", "peft"),
    )
    ranks: tuple[str, ...] = option(
        (),
        "Ranks of layers that differ from rank, like attention=16,mlp=8,modulation=0: LAYERS=RANK, where LAYERS is "
        "double, single or as in targets; the last that matches counts, 0 leaves a layer out; default: rank for all.",
        parse=partial(parse_layers, minimum=0),
    )
    alphas: tuple[str, ...] = option(
        (),
        "Alphas of layers, as LAYERS=ALPHA; default: what keeps alpha / rank the same in all layers, or with "
        "rank_stabilized alpha for all.",
        parse=partial(parse_layers, minimum=1e-09),
    )
    double_blocks: str | None = option(
        None,
        "Double blocks to train, counted from 0, like 0-3,5, or none; default: all that have targets.",
        parse=parse_blocks,
    )
    single_blocks: str | None = option(
        None,
        "Single blocks to train, counted from 0, like 7,20-37, or none; default: all that have targets.",
        parse=parse_blocks,
    )
    rank_stabilized: bool = option(
        False,
        "Scale the LoRA by alpha / sqrt(rank) instead of alpha / rank (rsLoRA), so that high ranks learn as fast as "
        "low ones; the file has an alpha with which every program scales it so; default: false.",
    )
    dropout: float = option(
        0.0,
        "Chance of each number of a layer's input to be left out for the LoRA, as PEFT's lora_dropout; against "
        "overfitting; takes memory for a copy of the input; 0: none.",
        minimum=0,
        maximum=0.99,
    )
    rank_dropout: float = option(
        0.0,
        "Chance of each rank of each layer to be left out for an image in a step, as in sd-scripts; 0.1 to 0.3 are "
        "usual; 0: none.",
        minimum=0,
        maximum=0.99,
    )
    inner_dropout: float = option(
        0.0,
        "Chance of each number between the LoRA's two matrices to be left out, as sd-scripts' network_dropout; 0: "
        "none.",
        minimum=0,
        maximum=0.99,
    )
    module_dropout: float = option(
        0.0,
        "Chance of each layer to do without its LoRA in a step, as in sd-scripts; 0: none.",
        minimum=0,
        maximum=0.99,
    )
    plus_ratio: float = option(
        1.0,
        "LoRA+: how many times as high the learning rate of each lora_up is as that of its lora_down; 4 to 16 are "
        "usual, with a lower --lr; 1: equal.",
        minimum=0.001,
        maximum=1000,
    )
    max_norm: float = option(
        0.0,
        "Most that a layer's change may be, as its Frobenius norm: after a step, larger ones are scaled down to it, as "
        "by sd-scripts' scale_weight_norms; 1 is usual there; 0: no limit.",
        minimum=0,
    )
    ema: float = option(
        0.0,
        "Also keep a moving average of the LoRA with this decay, like 0.99 or 0.999, saved beside it as NAME-ema; "
        "takes 4 bytes of GPU memory per trained weight; 0: none.",
        minimum=0,
        maximum=0.99999,
    )
    init: str = option(
        "plain",
        "How the LoRA starts: plain is random and zero; loftq corrects part of what quantizing has changed; lora_ga "
        "starts along the gradients of the first batches, and saves twice the rank; default: plain.",
        "--lora-init",
        ("plain", "loftq", "lora_ga"),
    )
    init_batches: int = option(
        16, "For init = lora_ga: how many of the first batches its gradients are averaged over; default: 16.", minimum=1
    )
    keep_correction: bool = option(
        False,
        "For init = loftq: save the LoRA with the correction in it, for use on weights quantized as in training; "
        "default: without it, at twice the rank, for use on any weights.",
    )

    @property
    def drops(self) -> bool:
        """Whether anything is left out at random."""
        return any((self.dropout, self.rank_dropout, self.inner_dropout, self.module_dropout))

    def adapted(self) -> Adapted:
        """The layers that get a LoRA, with ranks and scales, if targets, rank and alpha are set or have a default."""
        from fluxq.model.lora import Adapted  # which imports torch, and --help needs none

        rank, targets = self.rank or DEFAULT_RANK, DEFAULT_TARGETS if self.targets is None else self.targets
        names = ("ranks", "alphas", "double_blocks", "single_blocks", "rank_stabilized")
        return Adapted(rank, self.alpha or float(rank), targets, *(getattr(self, name) for name in names))


OPTIMIZERS = (
    "adamw",
    "adamw8bit",
    "lion8bit",
    "adamw4bit",
    "adamwfp8",
    "adafactor",
    "muon",
    "prodigy",
    "came",
    "schedulefree_adamw",
)


def parse_optimizer(value: Any) -> str:
    """A name of OPTIMIZERS, or package.module.Class. Raises ValueError for anything else."""
    parts = value.split(".") if isinstance(value, str) else []
    if value not in OPTIMIZERS and not (len(parts) > 1 and all(part.isidentifier() for part in parts)):
        raise ValueError(f"one of {', '.join(OPTIMIZERS)}, or package.module.Class")
    return value


PRESET_NAMES = ("person", "style", "product", "concept")


@dataclass(frozen=True)
class TrainingConfig:
    """[training] The loop."""

    steps: int | None = option(
        None,
        "Optimizer steps; default: every image is seen about 100 times, but all together 1,000 to 3,000 times.",
        "--steps",
        minimum=1,
    )
    epochs: int | None = option(
        None,
        "Train for so many epochs, in which each image is seen as often as its folder repeats it, in place of --steps.",
        "--epochs",
        minimum=1,
    )
    batch: int = option(1, "Images per forward pass; more take more memory.", "--batch", minimum=1)
    accumulate: int = option(
        1,
        "Forward passes per optimizer step: acts like a batch that many times larger, without more memory.",
        "--accumulate",
        minimum=1,
    )
    learning_rate: float | None = option(
        None,
        "Learning rate: too high ruins images, too low learns next to nothing; default: 1e-4 for adamw and optimizers "
        "with updates as large, 3e-5 for lion8bit, 1 for prodigy.",
        "--lr",
        minimum=0,
    )
    text_learning_rate: float | None = option(
        None, "Learning rate of --text-encoder; default: half of --lr.", "--text-lr", minimum=0
    )
    optimizer: str = option(
        "adamw8bit",
        "Optimizer. Bytes of memory per trained weight: adamw 8, adamw8bit and adamwfp8 2, lion8bit and adamw4bit 1, "
        "muon 4, adafactor fewer than 1 at usual ranks; with fluxq[optimizers] came 4, schedulefree_adamw 8, and "
        "prodigy, which finds its own learning rate, 16. Also any package.module.Class.",
        "--optimizer",
        parse=parse_optimizer,
    )
    optimizer_args: tuple[str, ...] = option(
        (),
        "A further argument of the optimizer's class, as NAME=VALUE like betas=(0.9,0.95); may be repeated.",
        "--optimizer-args",
    )
    weight_decay: float = option(
        0.01, "How strongly the optimizer pulls trained weights toward 0; 0: not at all.", minimum=0
    )
    schedule: str = option(
        "constant",
        "Learning rate after the warm-up: constant keeps it, so that --resume can add steps; linear, cosine, "
        "polynomial and rex, which falls late, lower it to 0 by the last step; wsd keeps it and lowers it at the end; "
        "inverse_sqrt lowers it ever more slowly, without regard to the last step.",
        "--schedule",
        ("constant", "linear", "cosine", "polynomial", "wsd", "inverse_sqrt", "rex"),
    )
    schedule_cycles: int = option(
        1, "For schedule = cosine: how often it falls, each time from the full learning rate.", minimum=1
    )
    schedule_power: float = option(
        2.0, "For schedule = polynomial: the power of the share of steps that remains; 1: as linear.", minimum=0.001
    )
    schedule_decay: float = option(
        0.2, "For schedule = wsd: the share of steps at the end in which it falls.", minimum=0.001, maximum=1
    )
    schedule_floor: float = option(
        0.0, "The share of the learning rate that a schedule falls to, 0 to 1.", minimum=0, maximum=1
    )
    warmup: float = option(
        0,
        "Optimizer steps over which the learning rate rises from 0; below 1: their share of all steps; 0: none.",
        "--warmup",
        minimum=0,
    )
    clip: float = option(
        1.0, "Largest norm of the gradient: a larger gradient is scaled down to it; 0: no limit.", minimum=0
    )
    loss: str = option(
        "l2",
        "How much an error counts: l2 squared; l1, smooth_l1 and huber count large errors less, so that a few odd "
        "images weigh less.",
        None,
        ("l2", "l1", "huber", "smooth_l1"),
    )
    huber_c: float = option(
        0.1,
        "For loss = huber and smooth_l1: the error up to which it is as l2; larger errors are as in l1.",
        minimum=1e-06,
        maximum=1000,
    )
    huber_schedule: str = option(
        "constant",
        "For loss = huber and smooth_l1: constant takes huber_c at all noise levels, exponential and snr rise to 1 "
        "toward low noise.",
        None,
        ("constant", "exponential", "snr"),
    )
    weighting: str = option(
        "none",
        "How much noise levels count: cosmap medium ones up to twice as much, sigma_sqrt low ones very much more.",
        None,
        ("none", "sigma_sqrt", "cosmap"),
    )
    timesteps: str = option(
        "shift",
        "Which noise levels to train at: uniform samples all alike, sigmoid mostly medium ones, shift more high ones "
        "(by training.shift), flux_shift more high ones the larger the image; sigma, logit_normal, mode and cosmap are "
        "sd-scripts' and SD3's densities, shifted too; keep the default unless you copy another trainer's settings.",
        "--timesteps",
        ("uniform", "sigmoid", "shift", "flux_shift", "sigma", "logit_normal", "mode", "cosmap"),
    )
    shift: float = option(
        3.1582,
        "For timesteps = shift, sigma, logit_normal, mode and cosmap: above 1 trains more at high noise, where an "
        "image's layout is decided; 1: no shift.",
        minimum=0.001,
    )
    sigmoid_scale: float = option(
        1.0,
        "For timesteps = sigmoid, shift, flux_shift: below 1 trains more at medium noise, above 1 more at both ends.",
        minimum=0.001,
        maximum=1000,
    )
    logit_mean: float = option(
        0.0,
        "For timesteps = logit_normal, as in sd-scripts: above 0 trains more at low noise, below 0 more at high.",
        minimum=-100,
        maximum=100,
    )
    logit_std: float = option(
        1.0,
        "For timesteps = logit_normal: below 1 trains more at medium noise, above 1 more at both ends.",
        minimum=0.001,
        maximum=1000,
    )
    mode_scale: float = option(
        1.29,
        "For timesteps = mode: above 0 trains more at medium noise, below 0 more at both ends.",
        minimum=-1,
        maximum=1.75,
    )
    min_timestep: float = option(
        0.0, "The lowest noise level to train at, 0 (the image) to 1 (noise).", minimum=0, maximum=1
    )
    max_timestep: float = option(
        1.0,
        "The highest noise level to train at; all that --timesteps draws is scaled to lie between the two.",
        minimum=0,
        maximum=1,
    )
    stratify: int = option(
        1,
        "Draw the noise levels of so many images in a row from as many equal parts of all, one each; 1: independently.",
        minimum=1,
        maximum=1000,
    )
    guidance: float = option(1.0, "Guidance value given to FLUX.1-dev during training.", minimum=0)
    seed: int = option(
        42, "Random seed of the run: the same seed gives the same noise, noise levels and order of images.", "--seed"
    )
    validate_every: int | None = option(
        None,
        "Optimizer steps between validations, if images are held out; 0: only before and after training; default: "
        "about 12 in a run, fewer where they would take more than a tenth of its time.",
        "--validate-every",
        minimum=0,
    )
    early_stopping: int = option(
        0,
        "End the run after so many validations in a row without a lower loss of held-out images; the LoRA of the "
        "lowest loss is kept beside the last in any case; 0: never.",
        "--early-stopping",
        minimum=0,
    )
    preset: str | None = option(
        None,
        "What the LoRA teaches: it sets resolution, rank, learning rate, steps, timesteps and caption dropout wherever "
        "you do not, and each is printed with its reason; default: none.",
        "--preset",
        PRESET_NAMES,
    )
    preserve_class: str | None = option(
        None,
        "What the trigger is one of, like `person`: each step also holds the output for its captions, with this in "
        "place of the trigger, to that of the base model, so that other persons stay as they are; steps take about 2.4 "
        "times as long; default: none.",
        "--preserve-class",
    )
    preserve_weight: float = option(
        1.0, "How much --preserve-class counts beside the loss of the images.", minimum=0.001, maximum=1000
    )
    prediction: str = option(
        "raw",
        "What is compared with noise - image, as in sd-scripts: raw the velocity v, additive v + x, sigma_scaled x - "
        "t v, at the noisy latents x; only raw fits FLUX.1, keep it unless you copy another trainer's settings.",
        None,
        ("raw", "additive", "sigma_scaled"),
    )
    huber_scale: float = option(
        1.0, "For loss = huber and smooth_l1: huber_c is multiplied by this at every noise level.", minimum=0.001
    )
    input_noise: float = option(
        0.0,
        "Add this much of further noise to the noise that the model sees, not to what it should predict, like "
        "ip_noise_gamma of sd-scripts; 0.05 to 0.1 are usual; 0: none.",
        minimum=0,
        maximum=10,
    )
    input_noise_random: bool = option(
        False, "Draw the strength of input_noise anew in each step, from 0 to its value; default: false."
    )


@dataclass(frozen=True)
class MemoryConfig:
    """[memory] How much memory a run may use, and what it keeps where."""

    vram: str | None = option(
        None,
        "GPU memory to use, like 12GiB, 12GB or 12 (GiB); less leaves room for other programs; default: all that is "
        "free.",
        "--vram",
    )
    ram: str | None = option(None, "RAM to use, like 24GiB, 24GB or 24 (GiB); default: all that is free.", "--ram")
    policy: str | None = option(
        None,
        "What each block keeps for the backward pass, from recompute (least memory, slowest) to keep_all (most memory, "
        "fastest); default: chosen to fit.",
        "--policy",
        ("recompute", "keep_attention", "keep_qkv", "keep_all8", "keep_all"),
    )
    resident_units: int | None = option(
        None,
        "How many of FLUX.1's 76 units of weights stay on the GPU, the rest is streamed from RAM; a unit is a single "
        "block or half a double block; default: chosen to fit.",
        "--resident-units",
        minimum=0,
    )
    blocks_to_swap: int | None = option(
        None,
        "Stream this many blocks (2 units each) from RAM, as in sd-scripts; 38 is the whole model; default: chosen to "
        "fit.",
        "--blocks-to-swap",
        minimum=0,
    )
    slots: int | None = option(
        None,
        "GPU buffers for streamed units: more of them hide transfers better but take memory; default: chosen to fit.",
        "--slots",
        minimum=2,
    )
    offload: bool | None = option(
        None,
        "Keep the inputs of blocks in RAM until the backward pass: takes less GPU memory, adds transfers; default: "
        "chosen to fit.",
        "--offload",
    )


@dataclass(frozen=True)
class SamplesConfig:
    """[samples] Images to sample: previews while training, or with fluxq sample."""

    prompts: tuple[str, ...] = option(
        (), "Prompts; default for previews: the triggers, or without any the first three captions."
    )
    every: int = option(
        0,
        "Optimizer steps between previews, images sampled while training; one more at the end; 0: none.",
        "--sample-every",
        minimum=0,
    )
    width: int | None = option(
        None,
        "Image width in pixels, a multiple of 16; default: the training resolution.",
        "--width",
        minimum=16,
    )
    height: int | None = option(
        None,
        "Image height in pixels, a multiple of 16; default: the training resolution.",
        "--height",
        minimum=16,
    )
    steps: int = option(
        20, "Denoising (Euler) steps per image: about 20 for dev, 4 for schnell.", "--sample-steps", minimum=1
    )
    guidance: float = option(
        3.5,
        "Guidance value given to FLUX.1-dev while sampling: higher follows the prompt more; schnell ignores it.",
        "--guidance",
        minimum=0,
    )
    cfg: float = option(
        1.0,
        "True classifier-free guidance, which the negative prompt needs: above 1 it doubles the time.",
        "--cfg",
        minimum=1,
    )
    negative: str = option(
        "",
        "Negative prompt: what the image should not show; used only if --cfg is above 1; default: none.",
        "--negative",
    )
    seed: int = option(42, "Seed of the first image; each following image adds 1.", "--sample-seed")
    every_epochs: int | None = option(
        None, "Epochs between previews, in place of --sample-every; default: none.", minimum=1
    )


def parse_metadata(value: Any) -> tuple[str, ...]:
    """Texts like NAME=VALUE, or one of them. Raises ValueError for anything else."""
    texts = value if isinstance(value, list | tuple) else [value]
    if not all(isinstance(text, str) and text.partition("=")[0] and "=" in text for text in texts):
        raise ValueError("NAME=VALUE, or a list of such texts")
    return tuple(texts)


@dataclass(frozen=True)
class OutputConfig:
    """[output] Where results go."""

    out: Path | None = option(
        None, "Run directory, for the LoRA, the log and what --resume needs; default: runs/NAME.", "--out"
    )
    name: str | None = option(
        None, "Name of the LoRA file; default: the trigger, or without one the first folder's name.", "--name"
    )
    save_every: int = option(
        250,
        "Optimizer steps between saves of the LoRA and of what --resume needs; 0: only at the end.",
        "--save-every",
        minimum=0,
    )
    save_every_epochs: int | None = option(
        None, "Epochs between these saves, in place of --save-every.", "--save-every-epochs", minimum=1
    )
    keep: int = option(
        0, "How many of the LoRAs saved before the end to keep, newest first; 0: all.", "--keep", minimum=0
    )
    plot_seconds: float = option(20.0, "Seconds between updates of loss.png.", minimum=0)
    numbering: str = option(
        "step",
        "How LoRAs saved before the end are called: NAME-step00000250 by step, or NAME-000002 by epoch as sd-scripts "
        "does, which needs save_every_epochs.",
        None,
        ("step", "epoch"),
    )
    metadata: tuple[str, ...] = option(
        (),
        "What the LoRA's metadata should say too, or instead, as NAME=VALUE like modelspec.author=Me; default: none.",
        parse=parse_metadata,
    )


@dataclass(frozen=True)
class TrainConfig:
    """All settings of a run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    samples: SamplesConfig = field(default_factory=SamplesConfig)
    output: OutputConfig = field(default_factory=OutputConfig)


SECTIONS: dict[str, type] = type_hints(TrainConfig)


def keys() -> dict[str, dataclasses.Field]:
    """Every key, like "lora.rank" -> its field; those of a folder of images are called like "data.folders.repeats"."""
    classes = {**SECTIONS, "data.folders": Folder}
    return {f"{name}.{f.name}": f for name, cls in classes.items() for f in dataclasses.fields(cls)}


def own_names() -> dict[str, str]:
    """Every name of a setting, that of its field or its option -> its key. Sections are names too."""
    names = {section: section for section in SECTIONS}
    for key, f in keys().items():
        names.setdefault(f.name, key)
        if flag := f.metadata.get("flag"):
            names.setdefault(flag.lstrip("-").replace("-", "_"), key)
    return names
