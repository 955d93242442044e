"""Read, combine and write LoRA files of all common programs."""

from .read import Lora, load_lora
from .write import save_lora

__all__ = ["Lora", "load_lora", "save_lora"]
