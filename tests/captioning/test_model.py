"""Image-to-text models: Florence-2 by its tasks, others by a chat template, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from captioning import tiny
from PIL import Image
from skimage import data

from fluxq.captioning.model import Captioner

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models")
    return {"florence2": tiny.florence2(folder / "florence2"), "llava": tiny.llava(folder / "llava")}


@pytest.fixture(scope="module")
def photos() -> list[Image.Image]:
    return [Image.fromarray(array) for array in (data.astronaut(), data.coffee(), data.chelsea())]


def test_x(models, photos):
    for kind, model in models.items():
        c = Captioner(str(model), max_words=20)
        print(kind, c(photos))
        print([c([p])[0] for p in photos])
