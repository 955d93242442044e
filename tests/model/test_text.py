"""The text encoders against transformers, FLUX.1's token rules, and memory."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from helpers import Lazy, randomize, relative_error

from fluxq import nano
from fluxq.errors import WrongRequest
from fluxq.formats.checkpoint.files import write_safetensors
from fluxq.formats.load import load_text_encoders
from fluxq.model.text_layers import TOKENS_PER_BATCH, t5_buckets

transformers = Lazy("transformers")
modeling_t5 = Lazy("transformers.models.t5.modeling_t5")
CPU = torch.device("cpu")
TOKENIZERS = ((nano.CLIP_TOKENIZER / "vocab.json", nano.CLIP_TOKENIZER / "merges.txt"), (nano.T5_TOKENIZER,))
CAPTIONS = ["A red   Circle at the top", "", "a <|endoftext|> of green", "blue </s> and red " * 30]


@pytest.fixture
def files(tmp_path):
    """Random encoders in files with the layout of the real ones, and the modules they came from."""
    clip = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=1000,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=2,
            bos_token_id=None,
            eos_token_id=2,
        )
    )
    t5 = transformers.T5EncoderModel(
        transformers.T5Config(
            vocab_size=1000,
            d_model=64,
            d_kv=16,
            d_ff=96,
            num_layers=3,
            num_heads=3,
            feed_forward_proj="gated-gelu",
            dropout_rate=0,
        )
    )
    clip, t5 = randomize(clip).eval(), randomize(t5).eval()
    state = {f"text_model.{k}": v for k, v in clip.state_dict().items()}
    write_safetensors(tmp_path / "clip_l.safetensors", state)
    doubled = {k: v.clone() for k, v in t5.state_dict().items()}
    write_safetensors(tmp_path / "t5xxl.safetensors", doubled)
    return tmp_path, clip, t5


def loaded(folder, length=24, dtype: torch.dtype | None = torch.float32, masked=False):
    return load_text_encoders(
        folder / "clip_l.safetensors", folder / "t5xxl.safetensors", *TOKENIZERS, length, CPU, dtype, masked=masked
    )


def t5_ids(ours, captions):
    ids = [[*ours.t5_tokenize(caption)[: ours.length - 1], 1] for caption in captions]
    return torch.tensor([row + [0] * (ours.length - len(row)) for row in ids])


def clip_ids(ours, captions):
    begin, end = ours.clip_ids
    ids = [[begin, *ours.clip_tokenize(caption)[:75], end] for caption in captions]
    return torch.tensor([row + [end] * (77 - len(row)) for row in ids])


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("length", [2, 33, 77, 200])
def test_states_equal_transformers(files, length):
    folder, clip, t5 = files
    ours = loaded(folder, length)
    encoded = ours.encode(CAPTIONS)
    assert relative_error(encoded.t5, t5(t5_ids(ours, CAPTIONS)).last_hidden_state) <= 1e-5
    assert relative_error(encoded.clip, clip(clip_ids(ours, CAPTIONS)).pooler_output) <= 1e-5
    assert encoded.tokens == [len(ours.t5_tokenize(caption)) + 1 for caption in CAPTIONS]


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("length", [2, 77])
def test_masked_states_equal_those_of_transformers_attention_mask(files, length):
    """As many as the caption has tokens, whatever other captions are encoded with it."""
    folder, _, t5 = files
    ours = loaded(folder, length, masked=True)
    captions = [*CAPTIONS, *(f"{'red ' * (n % 9)}circle {n}" for n in range(TOKENS_PER_BATCH // length))]
    encoded, ids = ours.encode(captions), t5_ids(ours, captions)
    mask = torch.arange(length) < torch.tensor([len(states) for states in encoded.t5])[:, None]
    assert [len(states) for states in encoded.t5] == [min(n, length) for n in encoded.tokens]
    expected = t5(ids, attention_mask=mask.long()).last_hidden_state
    assert relative_error(torch.cat(encoded.t5), expected[mask]) <= 1e-5
    if length == 77:  # the shorter ones are padded
        assert relative_error(torch.cat(encoded.t5), t5(ids).last_hidden_state[mask]) > 0.01


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize(
    ("dtype", "scaled"),
    [
        (torch.float16, False),
        (torch.bfloat16, False),
        (torch.float8_e4m3fn, False),
        (torch.float8_e5m2, False),
        (torch.float8_e4m3fn, True),
        (torch.float8_e5m2, True),
    ],
)
def test_states_of_stored_weights_equal_transformers_on_their_values(files, dtype, scaled):
    """Scaled as in ComfyUI: the blocks' matrices in 8 bits, everything else in 16."""
    folder, _, t5 = files
    tensors, meant = {}, {}
    for name, weight in t5.state_dict().items():
        if scaled and not name.endswith(("q.weight", "k.weight", "v.weight", "o.weight", "wi_0.weight", "wi_1.weight")):
            tensors[name] = weight.half()
            meant[name] = tensors[name].float()
        else:
            scale = torch.rand(()) + 0.5 if scaled else torch.ones(())
            tensors[name] = (weight / scale).to(dtype)
            meant[name] = tensors[name].float() * scale
            if scaled:
                tensors[f"{name.removesuffix('.weight')}.scale_weight"] = scale
    if scaled:
        tensors["scaled_fp8"] = torch.empty(0).to(dtype)
    write_safetensors(folder / "t5xxl.safetensors", tensors)
    t5.load_state_dict(meant)
    ours = loaded(folder)
    assert relative_error(ours.encode(CAPTIONS).t5, t5(t5_ids(ours, CAPTIONS)).last_hidden_state) <= 1e-5


@pytest.mark.slow
@torch.no_grad()
def test_bf16_states_err_no_more_than_twice_transformers_in_bf16(files):
    folder, _, t5 = files
    ours = loaded(folder, dtype=torch.bfloat16)
    ids = t5_ids(ours, CAPTIONS)
    exact = t5(ids).last_hidden_state
    theirs = relative_error(t5.bfloat16()(ids).last_hidden_state, exact)
    encoded = ours.encode(CAPTIONS)
    assert encoded.t5.dtype == torch.bfloat16
    assert relative_error(encoded.t5, exact) <= 2 * theirs


@pytest.mark.slow
def test_states_do_not_depend_on_other_captions(files):
    ours = loaded(files[0], length=64)
    many = [f"{'red ' * (n % 9)}circle {n}" for n in range(2 * TOKENS_PER_BATCH // 64 + 3)]
    together = ours.encode(many)
    for n in (0, 31, 40, len(many) - 1):
        alone = ours.encode([many[n]])
        assert relative_error(together.t5[n], alone.t5[0]) <= 1e-6
        assert relative_error(together.clip[n], alone.clip[0]) <= 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("buckets", [32, 16])
def test_distance_buckets_equal_transformers(buckets):
    distance = torch.arange(600)[None] - torch.arange(600)[:, None]
    expected = modeling_t5.T5Attention._relative_position_bucket(distance, bidirectional=True, num_buckets=buckets)
    assert torch.equal(t5_buckets(600, buckets), expected)


@pytest.mark.slow
def test_long_captions_are_cut_keep_their_end_token_and_are_reported(files):
    ours = loaded(files[0], length=8)
    encoded = ours.encode(["red " * 100, "red"])
    assert encoded.t5.shape == (2, 8, 64)
    assert encoded.truncated == [True, False]
    assert encoded.tokens[0] >= 100


@pytest.mark.slow
def test_clip_truncation_is_reported_from_the_first_extra_token(files):
    """CLIP takes 77 tokens with begin and end; T5 cuts none of these captions."""
    ours = loaded(files[0], length=200)
    assert len(ours.clip_tokenize("red " * 75)) == 75
    encoded = ours.encode(["red " * 75, "red " * 76, "", "red " * 90])
    assert encoded.clip_truncated == [False, True, False, True]
    assert encoded.truncated == [False] * 4
    assert relative_error(encoded.clip[1], encoded.clip[3]) == 0


@pytest.mark.slow
def test_each_block_is_read_once_per_call_and_reported(files):
    ours = loaded(files[0])
    progress, read = [], []
    source = ours.t5.weights.source
    get = source.get
    source.get = lambda name: read.append(name) or get(name)
    ours.encode(CAPTIONS, lambda done, total: progress.append((done, total)))
    assert progress == [(1, 3), (2, 3), (3, 3)]
    assert len(read) == len(set(read)) == 3 * 9 + 2 and "shared.weight" not in read


@pytest.mark.slow
def test_group_bounds_the_states_of_one_call(files):
    group = loaded(files[0], length=100).group
    assert group * 100 * 64 * 4 <= 128 << 20 < (group + 1) * 100 * 64 * 4


@pytest.mark.slow
def test_swapped_files_are_refused_by_name(files):
    folder, *_ = files
    with pytest.raises(WrongRequest, match=r"t5xxl\.safetensors is a T5 text encoder, not"):
        load_text_encoders(folder / "t5xxl.safetensors", folder / "clip_l.safetensors", *TOKENIZERS, 8, CPU)


@pytest.mark.slow
def test_a_tokenizer_with_a_larger_vocabulary_is_refused(files):
    folder, _, t5 = files
    state = {key: tensor[:9].clone() if key == "shared.weight" else tensor for key, tensor in t5.state_dict().items()}
    del state["encoder.embed_tokens.weight"]
    write_safetensors(folder / "t5xxl.safetensors", state)
    with pytest.raises(
        WrongRequest, match=r"t5xxl\.safetensors has 9 rows in shared.weight, but the tokenizer returns"
    ):
        loaded(folder).encode(["a red circle"])


MEASURE = """
import sys, threading
from pathlib import Path
import torch
from fluxq.formats.load import load_text_encoders

torch.set_num_threads(1)
clip, t5, vocabulary, merges, spiece = map(Path, sys.argv[1:])
peak, done = 0, threading.Event()

def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) * 1024

def sample():
    global peak
    while not done.wait(0.002):
        peak = max(peak, anonymous())

sampler = threading.Thread(target=sample)
before = anonymous()
sampler.start()
ours = load_text_encoders(clip, t5, (vocabulary, merges), (spiece,), 32, torch.device("cpu"), torch.bfloat16)
ours.encode(["a red circle", "a blue square"])
done.set()
sampler.join()
print(peak - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_at_full_width_does_not_grow_with_the_number_of_blocks(files):
    """T5-XXL's width in scaled fp8: a block takes 0.4 GB in bf16, and one layer 0.2 GB in fp32 while loading."""
    folder, *_ = files
    layers = {f"layer.0.SelfAttention.{part}": (4096, 4096) for part in "qkvo"}
    layers |= {f"layer.1.DenseReluDense.{part}": (10240, 4096) for part in ("wi_0", "wi_1")}
    layers["layer.1.DenseReluDense.wo"] = (4096, 10240)
    weights = {name: torch.zeros(shape, dtype=torch.float8_e4m3fn) for name, shape in layers.items()}
    peaks = []
    for blocks in (1, 2):
        tensors = {"shared.weight": torch.randn(500, 4096).half(), "scaled_fp8": torch.empty(0).to(torch.float8_e4m3fn)}
        tensors["encoder.final_layer_norm.weight"] = torch.randn(4096).half()
        tensors["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = torch.randn(32, 64).half()
        for block in (f"encoder.block.{i}." for i in range(blocks)):
            tensors |= {f"{block}{name}.weight": weight for name, weight in weights.items()}
            tensors |= {f"{block}{name}.scale_weight": torch.tensor(1 / 64) for name in weights}
            tensors |= {f"{block}layer.{n}.layer_norm.weight": torch.randn(4096).half() for n in (0, 1)}
        write_safetensors(folder / "t5xxl.safetensors", tensors)
        paths = (folder / "clip_l.safetensors", folder / "t5xxl.safetensors", *TOKENIZERS[0], *TOKENIZERS[1])
        code = [sys.executable, "-c", MEASURE, *map(str, paths)]
        peaks.append(int(subprocess.run(code, check=True, capture_output=True, text=True).stdout))
    assert peaks[1] <= peaks[0] + (128 << 20)  # a third of a block; sampling may miss the exact peak
    assert peaks[1] <= 1 << 30
