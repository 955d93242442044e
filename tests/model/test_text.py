"""The text encoders against transformers as its own loader builds them, and the token rules of FLUX.1."""

from __future__ import annotations

import pytest
import torch
from helpers import randomise
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from fluxq import nano
from fluxq.errors import WrongRequest
from fluxq.formats.files import write_safetensors
from fluxq.formats.load import load_text_encoders

CPU = torch.device("cpu")
TOKENIZERS = (nano.CLIP_TOKENIZER, nano.T5_TOKENIZER)


@pytest.fixture
def files(tmp_path):
    """Random encoders in files that are laid out as the real ones are, and the modules they came from."""
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=1000,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=2,
            bos_token_id=None,
            eos_token_id=2,
        )
    )
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=1000,
            d_model=64,
            d_kv=16,
            d_ff=96,
            num_layers=2,
            num_heads=3,
            feed_forward_proj="gated-gelu",
            dropout_rate=0,
        )
    )
    clip, t5 = randomise(clip).eval(), randomise(t5).eval().to(torch.bfloat16)
    state = {f"text_model.{k}": v for k, v in clip.state_dict().items()}
    write_safetensors(tmp_path / "clip_l.safetensors", state)
    doubled = {k: v.clone() for k, v in t5.state_dict().items()}
    write_safetensors(tmp_path / "t5xxl.safetensors", doubled)
    return tmp_path, clip, t5


@torch.no_grad()
def test_states_equal_transformers(files):
    folder, clip, t5 = files
    ours = load_text_encoders(folder / "clip_l.safetensors", folder / "t5xxl.safetensors", *TOKENIZERS, 24, CPU)
    caption = "A red   Circle at the top"
    for text in (caption, ""):
        encoded = ours.encode([text])  # alone: in bf16 the last bits depend on the size of the batch
        ids = [*ours.t5_tokenize(text), 1]
        assert encoded.tokens == [len(ids)]
        expected = t5(torch.tensor([ids + [0] * (24 - len(ids))])).last_hidden_state
        torch.testing.assert_close(encoded.t5, expected, rtol=0, atol=0)
        begin, end = ours.clip_ids
        ids = [begin, *ours.clip_tokenize(text), end]
        pooled = clip(torch.tensor([ids + [end] * (77 - len(ids))])).pooler_output
        torch.testing.assert_close(encoded.clip, pooled, rtol=1e-6, atol=1e-6)


def test_long_captions_are_cut_keep_their_end_token_and_say_so(files):
    folder, *_ = files
    ours = load_text_encoders(folder / "clip_l.safetensors", folder / "t5xxl.safetensors", *TOKENIZERS, 8, CPU)
    encoded = ours.encode(["red " * 100, "red"])
    assert encoded.t5.shape == (2, 8, 64)
    assert encoded.truncated == [True, False]
    assert encoded.tokens[0] >= 100


def test_another_models_file_is_refused_by_name(files):
    folder, *_ = files
    with pytest.raises(WrongRequest, match=r"t5xxl\.safetensors"):
        load_text_encoders(folder / "t5xxl.safetensors", folder / "clip_l.safetensors", *TOKENIZERS, 8, CPU)


def test_every_tensor_lies_on_the_device_that_was_asked_for(files):
    """Non-persistent buffers too, which no state dict mentions."""
    folder, *_ = files
    meta = torch.device("meta")
    ours = load_text_encoders(folder / "clip_l.safetensors", folder / "t5xxl.safetensors", *TOKENIZERS, 8, meta)
    for module in (ours.clip, ours.t5):
        assert {t.device for t in (*module.parameters(), *module.buffers())} == {meta}
