"""Pictures and captions to training batches: files, buckets, the content-addressed cache, addressed randomness."""

from fluxq.data.batches import Batch, Batches
from fluxq.data.buckets import choose_bucket
from fluxq.data.dataset import Dataset, Entry
from fluxq.data.examples import Example, Folder, Scan, scan
from fluxq.data.pictures import open_picture, picture_files, picture_size, prepare
from fluxq.data.randomness import generator, normal
from fluxq.data.store import Store, Text

__all__ = [
    "Batch",
    "Batches",
    "Dataset",
    "Entry",
    "Example",
    "Folder",
    "Scan",
    "Store",
    "Text",
    "choose_bucket",
    "generator",
    "normal",
    "open_picture",
    "picture_files",
    "picture_size",
    "prepare",
    "scan",
]
