"""Calibration finds the layers whose inputs have outliers, and only those rotate."""

from __future__ import annotations

import torch
from helpers import randomize, relative_error, tiny_config

from fluxq.model import Flux
from fluxq.model.calibration import calibrate
from fluxq.model.embed import image_ids, text_ids


def test_the_layer_with_outliers_rotates_and_the_error_falls():
    flux = randomize(Flux(tiny_config(depth=0, depth_single_blocks=1, hidden_size=256, num_heads=8, mlp_ratio=1.0)))
    shift = flux.get_submodule("single_blocks.0.modulation.lin").bias[:256]
    shift[5] = 60.0  # one channel of linear1's input
    c = flux.config
    img, txt, y = torch.randn(2, 40, c.in_channels), torch.randn(2, 9, c.context_in_dim), torch.randn(2, c.vec_in_dim)

    def run():
        return flux(img, image_ids(5, 8), txt, text_ids(9), torch.tensor([0.3, 0.8]), y, torch.ones(2))

    exact = run()
    flux.set_compute("int8")
    before = relative_error(run(), exact)
    assert calibrate(flux, run) == ["single_blocks.0.linear1"]
    layers = {path: m for path, m in flux.named_modules() if hasattr(m, "rotation")}
    assert {path: m.rotation for path, m in layers.items() if m.rotation} == {"single_blocks.0.linear1": 256}
    assert layers["single_blocks.0.linear2"].compute == "int8" and layers["img_in"].compute == "bf16"
    assert relative_error(run(), exact) < before / 2
    shift[5] = 0.0
    assert calibrate(flux, run) == []
