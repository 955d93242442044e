"""Images from the model: what is asked for, denoising, decoding, and sheets that show the result."""

from .decoding import sample_images
from .requests import Request, requests_for

__all__ = ["Request", "requests_for", "sample_images"]
