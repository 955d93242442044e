"""Images and captions: files, buckets, datasets, and randomness that is addressed."""

from .buckets import choose_bucket
from .dataset import Dataset, Entry
from .examples import Example, Folder, Scan, scan
from .images import open_picture, picture_files, picture_size, prepare
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
    "open_picture",
    "picture_files",
    "picture_size",
    "prepare",
    "scan",
]
