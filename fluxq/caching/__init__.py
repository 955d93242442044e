"""The content-addressed cache of latents and text embeddings, and the batches that training reads from it."""

from .batches import Batch, Batches
from .store import Store, Text

__all__ = ["Batch", "Batches", "Store", "Text"]
