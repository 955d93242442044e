"""What is encoded ahead of training: the content-addressed cache of latents and text embeddings, and its batches."""

from .batches import Batch, Batches
from .store import Store, Text

__all__ = ["Batch", "Batches", "Store", "Text"]
