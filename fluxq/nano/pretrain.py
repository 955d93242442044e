"""Pretrains nano: `python -m fluxq.nano.pretrain --out DIR --minutes 60`.

It has six stages: the two tokenizers; the autoencoder; a cache of latents and captions; the flow model together with
both text encoders; guidance distillation (one forward pass per step then does what classifier-free guidance does with
two, as in FLUX.1-dev); export with the key names of the original files. A stage whose result is in DIR/work is skipped;
the long ones resume from a checkpoint. Needs torch, diffusers, transformers, sentencepiece, tokenizers and Pillow; two
CPU cores are enough. Runs with the same seed still differ, because the budget is wall-clock time.
"""

import argparse
import copy
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import drawing
from .export import export, fold_latent_scale
from .latents import SCALE, SHIFT, as_tensor, contact_sheet, decode, encode, pack, sample, unpack
from .tokenization import T5_LENGTH, Tokenizers, corpus, train_clip, train_t5
from .trainable import Shape, TrainableFlux
from .trainer import Trainer, save

KL = 2e-3
IMAGES = 20_032
CAPTIONS_EACH = 4
NAMELESS = 1 / 8  # captions whose noun is a nonsense word
CLIP_TRAINED_LENGTH = 32  # enough: CLIP is causal and read at the first end token, so padding changes nothing
BATCH = 64
DROPPED_CAPTIONS = 0.1
TOP_GUIDANCE = 5.0
NANO = Shape()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for the finished files; resumes from its work/ folder"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=60,
        help="minutes to train the flow model (default 60); the autoencoder and the distillation take 20%% each",
    )
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    out, work, minutes = arguments.out, arguments.out / "work", arguments.minutes
    work.mkdir(parents=True, exist_ok=True)

    if not (out / "tokenizer_2" / "spiece.model").exists():
        lines = corpus()
        train_clip(out / "tokenizer", lines)
        train_t5(out / "tokenizer_2", lines)
    tokenizers = Tokenizers(out)
    autoencoder = train_autoencoder(work, minutes * 0.2)
    cache = cache_examples(work, autoencoder, tokenizers)
    model = Nano(vocabularies=(tokenizers.t5.get_piece_size(), len(tokenizers.clip)))
    empty = encode_captions(tokenizers, [""])
    train_flow(work, minutes, model, cache, empty)
    distil(work, minutes * 0.2, model, cache, empty)
    export(out, autoencoder, model)
    captions = [caption for _, caption in drawing.ordinary(5, 32, held_out=True)]
    latents = sample(model.eval(), encode_captions(tokenizers, captions), guidance=3.5, seed=0)
    contact_sheet(decode(autoencoder, unpack(latents))).save(work / "samples.png")


class Nano(nn.Module):
    """The flow model and its two text encoders: everything between token ids and velocity."""

    def __init__(self, vocabularies: tuple[int, int], shape: Shape = NANO):
        from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

        clip_config: Any = CLIPTextConfig
        super().__init__()
        self.flux = TrainableFlux(shape)
        t5, clip = shape.t5_width, shape.clip_width
        self.t5 = T5EncoderModel(
            T5Config(
                vocab_size=vocabularies[0],
                d_model=t5,
                d_kv=32,
                d_ff=2 * t5,
                num_layers=2,
                num_heads=t5 // 32,
                feed_forward_proj="gated-gelu",
                dropout_rate=0.0,
            )
        )
        self.clip = CLIPTextModel(
            clip_config(
                vocab_size=vocabularies[1],
                hidden_size=clip,
                intermediate_size=4 * clip,
                num_hidden_layers=2,
                num_attention_heads=clip // 64,
                max_position_embeddings=77,
                hidden_act="quick_gelu",
                bos_token_id=vocabularies[1] - 2,
                eos_token_id=vocabularies[1] - 1,
                pad_token_id=vocabularies[1] - 1,
                attn_implementation="eager",
            )
        )

    def encode(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """ids (B, T5_LENGTH + CLIP length) -> T5 states (B, T5_LENGTH, 128), pooled CLIP vector (B, 64)."""
        t5_ids, clip_ids = ids[:, :T5_LENGTH].long(), ids[:, T5_LENGTH:].long()
        return self.t5(input_ids=t5_ids).last_hidden_state, self.clip(input_ids=clip_ids).pooler_output

    def forward(self, img: Tensor, ids: Tensor, t: Tensor, guidance: Tensor) -> Tensor:
        """The velocity (B, 36, 64) of packed latents `img` under captions `ids`."""
        return self.flux(img, *self.encode(ids), t, guidance, 6, 6)


def train_autoencoder(work: Path, minutes: float) -> nn.Module:
    """FLUX.1's autoencoder with 1/80 of its weights; with FLUX.1's constants, its latents have unit deviation."""
    from diffusers import AutoencoderKL

    autoencoder: Any = AutoencoderKL
    model = autoencoder(
        block_out_channels=(32, 32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=8,  # 32 groups of one channel each would lose flat colors
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=SCALE,
        shift_factor=SHIFT,
    ).to(memory_format=torch.channels_last)
    if (work / "autoencoder.pt").exists():
        model.load_state_dict(torch.load(work / "autoencoder.pt", weights_only=True))
        return model.eval()
    data = as_tensor([image for image, _ in drawing.ordinary(1, 2500)] + drawing.scribbles(1, 5500))

    def loss(model: Any, fraction: float) -> Tensor:
        side, batch = (48, 16) if fraction < 0.6 else (drawing.SIDE, 8)  # crops first: a quarter of the work per image
        row, column = torch.randint(0, drawing.SIDE - side + 1, (2,)).tolist()
        x = data[torch.randint(len(data), (batch,)), :, row : row + side, column : column + side]
        x = (x / 127.5 - 1).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            mean, log_variance = model.encoder(x).float().chunk(2, dim=1)
            log_variance = log_variance.clamp(-12, 4)
            y = model.decoder(mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)).float()
        error = y - x
        edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        return error.abs().mean() + error.square().mean() + 0.3 * edges + KL * kl

    trainer = Trainer("autoencoder", model, work, minutes, muon_lr=2e-3, adam_lr=2e-3, average=0.995)
    trainer.run(loss, decay_from=0.35)
    with torch.no_grad():
        x = (data[:512] / 127.5 - 1).contiguous(memory_format=torch.channels_last)
        deviation = model.encoder(x).chunk(2, dim=1)[0].std(dim=(0, 2, 3))
        fold_latent_scale(model, deviation, SCALE)
    save(work / "autoencoder.pt", model.state_dict())
    return model.eval()


def cache_examples(work: Path, autoencoder: nn.Module, tokenizers: Tokenizers) -> dict[str, Tensor]:
    """Packed latents (N, 36, 64) and token ids (N, CAPTIONS_EACH, 64); `held_*`: color pairs kept out of training."""
    if (work / "cache.pt").exists():
        return torch.load(work / "cache.pt", weights_only=True)
    cache = {}
    for name, count, held_out in (("", IMAGES, False), ("held_", 256, True)):
        latents, captions = [], []
        for spec, rng in drawing.specs(3, count, drawing.SHAPES, held_out):
            latents.append(drawing.draw(spec))
            nouns = [drawing.nonsense(rng) if rng.random() < NAMELESS else None for _ in range(CAPTIONS_EACH)]
            captions += [drawing.caption(spec, rng, noun) for noun in nouns]
            if len(latents) % 64 == 0:
                latents[-64:] = pack(encode(autoencoder, as_tensor(latents[-64:]))).unbind()
        cache[f"{name}img"] = torch.stack(latents)
        cache[f"{name}ids"] = encode_captions(tokenizers, captions).view(count, CAPTIONS_EACH, -1)
    save(work / "cache.pt", cache)
    return cache


def train_flow(work: Path, minutes: float, model: Nano, cache: dict[str, Tensor], empty: Tensor) -> None:
    """Flow matching at guidance 1, so guidance 1 is the plain conditional model."""
    img, ids = cache["img"], cache["ids"]

    def loss(model: nn.Module, fraction: float) -> Tensor:
        chosen = torch.randint(len(img), (BATCH,))
        captions = ids[chosen, torch.randint(CAPTIONS_EACH, (BATCH,))]
        captions = torch.where(torch.rand(BATCH, 1) < DROPPED_CAPTIONS, empty, captions)
        x0, t = img[chosen], sample_timesteps(BATCH)
        noise = torch.randn_like(x0)
        x = torch.lerp(x0, noise, t[:, None, None])
        return F.mse_loss(model(x, captions, t, torch.ones(BATCH)).float(), noise - x0)

    trainer = Trainer("flow", model, work, minutes, muon_lr=1.5e-3, adam_lr=2e-3, average=0.998, bf16=True)
    trainer.run(loss, decay_from=0.4, validate=lambda model: validation_note(model, cache))


def distil(work: Path, minutes: float, model: Nano, cache: dict[str, Tensor], empty: Tensor) -> None:
    """Train the model to give v_uncond + g (v_cond - v_uncond) at guidance g; the text encoders are frozen."""
    img, ids = cache["img"], cache["ids"]
    teacher = copy.deepcopy(model).bfloat16().requires_grad_(False)
    for encoder in (model.t5, model.clip):
        encoder.requires_grad_(False)

    def loss(model: nn.Module, fraction: float) -> Tensor:
        chosen = torch.randint(len(img), (BATCH,))
        captions = ids[chosen, torch.randint(CAPTIONS_EACH, (BATCH,))]
        captions = torch.where(torch.rand(BATCH, 1) < DROPPED_CAPTIONS, empty, captions)
        x0, t = img[chosen], sample_timesteps(BATCH)
        x = torch.lerp(x0, torch.randn_like(x0), t[:, None, None])
        plain = torch.rand(BATCH) < 0.4  # LoRAs are trained at guidance 1: keep it exact
        guidance = torch.where(plain, torch.ones(BATCH), 1 + (TOP_GUIDANCE - 1) * torch.rand(BATCH))
        with torch.no_grad():
            conditional = teacher(x, captions, t, torch.ones(BATCH)).float()
            unconditional = teacher(x, empty.expand_as(captions), t, torch.ones(BATCH)).float()
            target = unconditional + guidance[:, None, None] * (conditional - unconditional)
        error = (model(x, captions, t, guidance).float() - target).square().mean(dim=(1, 2))
        return (error / guidance).mean()  # unweighted, the strongest guidance would dominate

    trainer = Trainer("distil", model, work, minutes, muon_lr=4e-4, adam_lr=4e-4, average=0.99, bf16=True)
    trainer.run(loss, decay_from=0.3, validate=lambda model: validation_note(model, cache))


def sample_timesteps(count: int) -> Tensor:
    """t (count,): 60 % uniform shifted by 3, 40 % logit-normal; values near 1 decide the background color."""
    uniform = torch.rand(count)
    shifted = 3 * uniform / (1 + 2 * uniform)
    middle = torch.sigmoid(0.4 + torch.randn(count))
    return torch.where(torch.rand(count) < 0.6, shifted, middle)


@torch.no_grad()
def validation_note(model: nn.Module, cache: dict[str, Tensor]) -> str:
    """Mean flow loss on the held-out images at guidance 1, over eight shifted timesteps with fixed noise."""
    img, ids = cache["held_img"], cache["held_ids"][:, 0]
    noise = torch.randn(img.shape, generator=torch.Generator().manual_seed(0))
    uniform = (torch.arange(8) + 0.5) / 8
    losses = []
    for t in (3.1582 * uniform / (1 + 2.1582 * uniform)).tolist():
        t = torch.full((len(img),), t)
        v = model(torch.lerp(img, noise, t[:, None, None]), ids, t, torch.ones(len(img)))
        losses.append(F.mse_loss(v.float(), noise - img).item())
    return f"held-out {sum(losses) / len(losses):.4f}"


def encode_captions(tokenizers: Tokenizers, captions: list[str]) -> Tensor:
    """Token ids (N, 64) int16: T5's, then CLIP's."""
    t5, clip = tokenizers.t5_ids(captions), tokenizers.clip_ids(captions, CLIP_TRAINED_LENGTH)
    return torch.cat((torch.tensor(t5), torch.tensor(clip)), dim=1).short()


if __name__ == "__main__":
    main()
