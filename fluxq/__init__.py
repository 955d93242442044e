"""Trains LoRAs for FLUX.1 on the GPUs people own. `fluxq/train.py` is the story; start there."""

from fluxq.allocator import use_expandable_segments

use_expandable_segments()  # first of all, before anything imports torch
