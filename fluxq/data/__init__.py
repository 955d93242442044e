"""Images and captions: files, buckets, datasets, and addressed random numbers."""

from fluxq.settings import Folder

from .buckets import choose_bucket
from .dataset import Dataset, Entry
from .examples import Example, Scan, scan
from .images import image_files, image_size, open_image, prepare
from .randomness import generator, normal

__all__ = [
    "Dataset",
    "Entry",
    "Example",
    "Folder",
    "Scan",
    "choose_bucket",
    "generator",
    "normal",
    "open_image",
    "image_files",
    "image_size",
    "prepare",
    "scan",
]
