"""The sheet of crops: what is cut off is darkened, and every name and caption fits."""

import numpy as np
from PIL import Image

from fluxq.data import Folder, scan
from fluxq.data.crops import CELL, GAP, crop_sheet


def test_what_is_cut_off_is_darkened_and_long_names_end(tmp_path):
    for name, size in (("a" * 200, (64, 64)), ("b", (100, 64))):
        Image.new("RGB", size, "white").save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text("word " * 300 + "x" * 900)
    examples = scan([Folder(tmp_path)], resolution=64, min_side=32, max_side=128).examples
    sheet = np.asarray(crop_sheet(examples), int)
    whole, cut = sheet[GAP : GAP + CELL, GAP : GAP + CELL], sheet[GAP : GAP + CELL, 2 * GAP + CELL : 2 * (GAP + CELL)]
    assert (whole == 255).all(), "a square fits its bucket"
    dark = (cut[:, CELL // 2] < 255).any(-1)  # 80 x 51, of which 48 rows stay; above it the sheet is empty
    height = round(51 * CELL / 80)
    assert dark[-1] and dark[-height + 1] and not dark[-height // 2] and 0.03 < dark.mean() < 0.06
