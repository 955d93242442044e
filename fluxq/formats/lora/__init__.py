"""LoRA files of every program of the field: read, combined, written."""

from .read import Lora, load_lora
from .write import save_lora

__all__ = ["Lora", "load_lora", "save_lora"]
