"""What a file is, from its keys."""

import pytest

from fluxq.formats.checkpoint.detect import AUTOENCODER, CLIP, DIFFUSERS_FLUX, FLUX, LORA, T5, kind, models_in
from fluxq.formats.checkpoint.keys import autoencoder_diffusers_shapes, flux_diffusers_shapes
from fluxq.formats.checkpoint.shapes import autoencoder_shapes, flux_shapes
from fluxq.model.config import AutoEncoderConfig, FluxConfig

DEV = FluxConfig.dev()


def test_kind_recognizes_each_model():
    assert kind(flux_shapes(DEV)) == FLUX and kind(autoencoder_shapes(AutoEncoderConfig())) == AUTOENCODER
    assert kind(flux_diffusers_shapes(DEV)) == DIFFUSERS_FLUX


def test_models_in_lists_each_model_whose_marker_is_under_one_of_its_prefixes():
    keys = ["model.diffusion_model.double_blocks.0.x", "vae.decoder.up.0.x", "text_encoders.t5xxl.transformer.x"]
    assert models_in(keys) == [FLUX, AUTOENCODER]
    assert models_in(
        [*keys, "text_encoders.t5xxl.transformer.encoder.block.0.x", "text_model.embeddings.position_embedding.x"]
    ) == [FLUX, AUTOENCODER, CLIP, T5]
    assert models_in(flux_diffusers_shapes(DEV)) == [FLUX]
    assert models_in(autoencoder_diffusers_shapes(AutoEncoderConfig())) == [AUTOENCODER]
    lora = ["double_blocks.0.img_attn.qkv.lora_A.weight"]
    assert kind(lora) == LORA and models_in(lora) == []


@pytest.mark.parametrize("count", [1, 7])
def test_the_closest_kind_is_named_with_the_first_keys_that_differ(count):
    keys = [name for name in autoencoder_shapes(AutoEncoderConfig()) if ".up." not in name]
    found = kind([f"strange.{i}.x" for i in range(count)] + keys)
    assert "closest to a FLUX.1 autoencoder: " in found and " missing (decoder.up." in found
    assert "1 unexpected (strange.0.x)" in found
