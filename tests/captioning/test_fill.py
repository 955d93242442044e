"""Missing captions are written batch by batch: nothing is replaced or lost, and the same call goes on."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image

from fluxq.captioning.fill import MAX_SIDE, fill, to_fill
from fluxq.captioning.folder import Backup, captioned
from fluxq.errors import WrongRequest

NAMES = ("0", "1", "2", "3", "4")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i, name in enumerate(NAMES):
        Image.new("RGB", (8, 8 + i)).save(tmp_path / f"{name}.png")
    (tmp_path / "3.txt").write_text("mine")
    return tmp_path


class Model:
    """Says how high an image is; fails as often as it is told to."""

    def __init__(self, failures: Sequence[BaseException | None] = ()) -> None:
        self.failures, self.batches = list(failures), []

    def __call__(self, images: Sequence[Image.Image]) -> list[str]:
        self.batches.append(len(images))
        if failure := self.failures.pop(0) if self.failures else None:
            raise failure
        return [". " if image.height == 12 else f"{image.height} high" for image in images]


def texts(folder: Path) -> dict[str, str]:
    return {path.stem: path.read_text().strip() for path in sorted(folder.glob("*.txt"))}


def test_only_missing_captions_are_written_and_silence_is_said(folder):
    model, said, shown = Model(), [], []
    filled = fill(
        to_fill(captioned([folder])), model, "zqx", 3, progress=lambda *now: shown.append(now), notify=said.append
    )
    assert texts(folder) == {"0": "zqx, 8 high", "1": "zqx, 9 high", "2": "zqx, 10 high", "3": "mine"}
    assert filled.captions == {folder / f"{i}.txt": text for i, text in texts(folder).items() if i != "3"}
    assert filled.speechless == [folder / "4.png"] and not filled.unread
    assert model.batches == [3, 1] and shown == [("captions", n, 4) for n in (0, 3, 4)]
    assert said[0] == f"{folder / '0.txt'}: zqx, 8 high"


def test_an_interrupted_call_keeps_what_it_wrote_and_goes_on(folder):
    with pytest.raises(KeyboardInterrupt):
        fill(to_fill(captioned([folder])), Model([None, KeyboardInterrupt()]), batch=2, notify=print)
    assert texts(folder) == {"0": "8 high", "1": "9 high", "3": "mine"}
    model = Model()
    fill(to_fill(captioned([folder])), model, batch=2)
    assert model.batches == [2] and texts(folder)["2"] == "10 high"
    assert not [path for path in folder.iterdir() if path.suffix not in (".png", ".txt")]


def test_the_batch_is_halved_when_memory_runs_out(folder):
    """In torch's allocator or outside it."""
    (folder / "1.png").write_bytes(b"no image")
    model, said = Model([torch.OutOfMemoryError("x"), RuntimeError("CUDA error: out of memory")]), []
    filled = fill(to_fill(captioned([folder])), model, batch=5, notify=said.append)
    assert texts(folder) == {"0": "8 high", "2": "10 high", "3": "mine"}
    assert model.batches == [3, 1, 1, 1, 1] and filled.batch == 1
    assert said[0] == "out of GPU memory with 5 images at a time; going on with 2"
    ((unread, why),) = filled.unread.items()
    assert unread == folder / "1.png" and why.endswith("are not an image in a known format)")
    with pytest.raises(WrongRequest, match="too small for this model with even one image; name a smaller --model"):
        fill(to_fill(captioned([folder])), Model([torch.OutOfMemoryError("x")] * 2))
    with pytest.raises(RuntimeError, match="shapes"):
        fill(to_fill(captioned([folder])), Model([RuntimeError("shapes")]), batch=2)


def test_overwriting_keeps_a_copy_and_goes_on(folder):
    (folder / "0.caption").write_text("also mine")
    with pytest.raises(KeyboardInterrupt):
        backup = Backup("k")
        fill(to_fill(captioned([folder]), backup), Model([None, KeyboardInterrupt()]), batch=4, backup=backup)
    assert texts(folder) == {"1": "9 high", "2": "10 high", "3": "11 high"}
    backup = Backup("k")
    wanted = to_fill(captioned([folder]), backup)
    assert [item.image.name for item in wanted] == ["4.png"], "the others are done, with and without a caption before"
    filled = fill(wanted, Model(), batch=4, backup=backup)
    assert filled.backups == [folder / "captions-backup-1"]
    assert sorted(path.name for path in filled.backups[0].iterdir()) == ["0.caption", "3.txt"], "nothing of the model's"
    assert {name: (folder / "captions-backup-1" / name).read_text() for name in ("3.txt", "0.caption")} == {
        "3.txt": "mine",
        "0.caption": "also mine",
    }
    assert (folder / "0.caption").read_text() == "8 high\n"
    shutil.copy(folder / "captions-backup-1" / "3.txt", folder)
    assert texts(folder)["3"] == "mine"


def test_images_that_share_a_file_of_captions_get_one(folder):
    shutil.copy(folder / "3.png", folder / "3.jpg")
    model, backup = Model(), Backup("k")
    assert len(to_fill(captioned([folder]))) == 4
    fill(to_fill(captioned([folder]), backup), model, batch=9, backup=backup)
    assert model.batches == [5] and not (folder / "3.png.txt").exists()


def test_large_images_are_shrunk_and_keep_their_shape(folder):
    Image.new("RGB", (2000, 500)).save(folder / "0.png")
    seen = []
    fill(to_fill(captioned([folder]))[:1], lambda images: seen.extend(i.size for i in images) or ["x"])
    assert seen == [(MAX_SIDE, MAX_SIDE // 4)]
