"""Writes pretrained modules as four bf16 checkpoint files, named like FLUX.1's own files."""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

LEVELS = 4
_AUTOENCODER_NAMES = (  # diffusers' AutoencoderKL -> the original autoencoder, which counts up blocks in reverse
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
    """Write the four files into `out`. `model` has the parts flux, t5 and clip. Each file is written, then renamed."""
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
    """The state of diffusers' AutoencoderKL with the original names; attention matrices become 1 x 1 kernels."""
    state = {}
    for key, value in autoencoder.state_dict().items():
        for pattern, name in _AUTOENCODER_NAMES:
            key = re.sub(pattern, name, key)
        state[key] = value[:, :, None, None] if ".attn_1." in key and value.ndim == 2 else value
    return state


def with_small_spread(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Lower the encoder's log variance by 8. The flow model learned the means, so samples must be close to them, as in
    FLUX.1.
    """
    bias = state["encoder.conv_out.bias"].clone()
    bias[len(bias) // 2 :] -= 8
    return state | {"encoder.conv_out.bias": bias}


def clip_state(clip: nn.Module) -> dict[str, Tensor]:
    """The state of transformers' CLIPTextModel with the `text_model.` prefix of its files, which it may lack."""
    state = {f"text_model.{key.removeprefix('text_model.')}": value for key, value in clip.state_dict().items()}
    return {key: value for key, value in state.items() if not key.endswith("position_ids")}


def t5_state(t5: nn.Module) -> dict[str, Tensor]:
    """The state of transformers' T5EncoderModel without the duplicate name of its embedding."""
    return {key: value for key, value in t5.state_dict().items() if key != "encoder.embed_tokens.weight"}


@torch.no_grad()
def fold_latent_scale(autoencoder: Any, deviation: Tensor, scale: float) -> None:
    """Divide each latent channel by `deviation` (C,) and by `scale`, inside the two convolutions around it.

    Then FLUX's own constants give latents of unit deviation. Only the factor is folded: an offset would conflict with
    the zero padding of the decoder's first convolution.
    """
    factor, channels = deviation * scale, len(deviation)
    last, first = autoencoder.encoder.conv_out, autoencoder.decoder.conv_in
    last.weight[:channels] /= factor[:, None, None, None]
    last.bias[:channels] /= factor
    last.bias[channels:] -= 2 * factor.log()
    first.weight *= factor[None, :, None, None]
