"""Writes pretrained modules as the four checkpoint files, bf16, under the names of FLUX.1's own files."""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

LEVELS = 4
_AUTOENCODER_NAMES = (  # diffusers' AutoencoderKL -> the original autoencoder; up blocks are counted the other way
    (r"conv_norm_out", "norm_out"),
    (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
    (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
    (r"mid_block\.attentions\.0\.to_([qkv])", r"mid.attn_1.\1"),
    (r"down_blocks\.(\d+)\.resnets", r"down.\1.block"),
    (r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample"),
    (r"up_blocks\.(\d+)\.resnets", lambda m: f"up.{LEVELS - 1 - int(m[1])}.block"),
    (r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{LEVELS - 1 - int(m[1])}.upsample"),
    (r"conv_shortcut", "nin_shortcut"),
)


def export(out: Path, autoencoder: nn.Module, model: Any) -> None:
    """`model` has the parts flux, t5 and clip; each file is written to a temporary name and renamed."""
    from safetensors.torch import save_file

    files = {
        "flux1-nano.safetensors": model.flux.state_dict(),
        "ae.safetensors": with_small_spread(autoencoder_state(autoencoder)),
        "clip_l.safetensors": clip_state(model.clip),
        "t5xxl.safetensors": t5_state(model.t5),
    }
    for name, state in files.items():
        tensors = {key: value.detach().to(torch.bfloat16).contiguous() for key, value in state.items()}
        save_file(tensors, out / f"{name}.tmp", metadata={"format": "pt"})
        (out / f"{name}.tmp").replace(out / name)


def autoencoder_state(autoencoder: nn.Module) -> dict[str, Tensor]:
    """diffusers' AutoencoderKL under the original names; attention matrices become 1 x 1 kernels."""
    state = {}
    for key, value in autoencoder.state_dict().items():
        for pattern, name in _AUTOENCODER_NAMES:
            key = re.sub(pattern, name, key)
        state[key] = value[:, :, None, None] if ".attn_1." in key and value.ndim == 2 else value
    return state


def with_small_spread(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The encoder's log variance lowered by 8: the flow model learnt the means, so a draw has to be close to its mean,
    as FLUX.1's are."""
    bias = state["encoder.conv_out.bias"].clone()
    bias[len(bias) // 2 :] -= 8
    return state | {"encoder.conv_out.bias": bias}


def clip_state(clip: nn.Module) -> dict[str, Tensor]:
    """transformers' CLIPTextModel with the `text_model.` prefix that its files have, and its state dict may not."""
    state = {f"text_model.{key.removeprefix('text_model.')}": value for key, value in clip.state_dict().items()}
    return {key: value for key, value in state.items() if not key.endswith("position_ids")}


def t5_state(t5: nn.Module) -> dict[str, Tensor]:
    """transformers' T5EncoderModel without the second name of its embedding."""
    return {key: value for key, value in t5.state_dict().items() if key != "encoder.embed_tokens.weight"}


@torch.no_grad()
def fold_latent_scale(autoencoder: Any, deviation: Tensor, scale: float) -> None:
    """Divides each latent channel by `deviation` (C,) and by `scale`, inside the two convolutions around it.

    After it FLUX's own constants give latents of unit deviation. Only a factor is folded: an offset would not agree
    with the zeros that pad the decoder's first convolution.
    """
    factor, channels = deviation * scale, len(deviation)
    last, first = autoencoder.encoder.conv_out, autoencoder.decoder.conv_in
    last.weight[:channels] /= factor[:, None, None, None]
    last.bias[:channels] /= factor
    last.bias[channels:] -= 2 * factor.log()
    first.weight *= factor[None, :, None, None]
