"""FLUX.1: the transformer with its LoRA, the autoencoder, the text encoders."""

from fluxq.model.autoencoder import AutoEncoder
from fluxq.model.config import AutoEncoderConfig, FluxConfig
from fluxq.model.flux import Flux
from fluxq.model.lora import add_lora

__all__ = ["AutoEncoder", "AutoEncoderConfig", "Flux", "FluxConfig", "add_lora"]
