"""Sampling images: requests, denoising, decoding, and sheets of labeled images."""

from .decoding import sample_images
from .requests import Request, requests_for

__all__ = ["Request", "requests_for", "sample_images"]
