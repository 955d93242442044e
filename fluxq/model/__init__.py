"""FLUX.1: the transformer with its LoRA, the autoencoder, the text encoders, and what a training step costs."""

from .autoencoder import AutoEncoder
from .config import AutoEncoderConfig, FluxConfig
from .flux import Flux
from .lora import add_lora

__all__ = ["AutoEncoder", "AutoEncoderConfig", "Flux", "FluxConfig", "add_lora"]
