import json

import pytest
import torch
from safetensors import safe_open

from fluxq.nano import WEIGHTS

HIDDEN, MLP, HEAD, CHANNELS, T5, CLIP, CLIP_VOCABULARY = 192, 768, 32, 64, 128, 64, 770


def shapes(name: str) -> dict[str, tuple[int, ...]]:
    with safe_open(WEIGHTS / name, "pt") as file:
        return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118


def linear(key: str, out: int, inputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{key}.weight": (out, inputs), f"{key}.bias": (out,)}


def test_bundle_is_small():
    assert sum(path.stat().st_size for path in WEIGHTS.rglob("*") if path.is_file()) <= 12_000_000


def test_bundle_has_exactly_its_files():
    names = {str(path.relative_to(WEIGHTS)) for path in WEIGHTS.rglob("*") if path.is_file()}
    checkpoints = {"flux1-nano.safetensors", "ae.safetensors", "clip_l.safetensors", "t5xxl.safetensors"}
    assert names == checkpoints | {"tokenizer/vocab.json", "tokenizer/merges.txt", "tokenizer_2/spiece.model"}


@pytest.mark.parametrize("name", ["flux1-nano", "ae", "clip_l", "t5xxl"])
def test_weights_are_finite_bf16(name):
    with safe_open(WEIGHTS / f"{name}.safetensors", "pt") as file:
        for key in file.keys():  # noqa: SIM118
            tensor = file.get_tensor(key)
            assert tensor.dtype == torch.bfloat16 and tensor.isfinite().all(), key


def test_flow_model_has_the_original_keys():
    expected = linear("img_in", HIDDEN, CHANNELS) | linear("txt_in", HIDDEN, T5)
    for name, width in (("time_in", 256), ("guidance_in", 256), ("vector_in", CLIP)):
        expected |= linear(f"{name}.in_layer", HIDDEN, width) | linear(f"{name}.out_layer", HIDDEN, HIDDEN)
    for i in range(2):
        for stream in ("img", "txt"):
            block = f"double_blocks.{i}.{stream}"
            expected |= linear(f"{block}_mod.lin", 6 * HIDDEN, HIDDEN)
            expected |= linear(f"{block}_attn.qkv", 3 * HIDDEN, HIDDEN) | linear(f"{block}_attn.proj", HIDDEN, HIDDEN)
            expected |= linear(f"{block}_mlp.0", MLP, HIDDEN) | linear(f"{block}_mlp.2", HIDDEN, MLP)
            expected |= {f"{block}_attn.norm.{part}_norm.scale": (HEAD,) for part in ("query", "key")}
        block = f"single_blocks.{i}"
        expected |= linear(f"{block}.linear1", 3 * HIDDEN + MLP, HIDDEN)
        expected |= linear(f"{block}.linear2", HIDDEN, HIDDEN + MLP)
        expected |= linear(f"{block}.modulation.lin", 3 * HIDDEN, HIDDEN)
        expected |= {f"{block}.norm.{part}_norm.scale": (HEAD,) for part in ("query", "key")}
    expected |= linear("final_layer.linear", CHANNELS, HIDDEN)
    expected |= linear("final_layer.adaLN_modulation.1", 2 * HIDDEN, HIDDEN)
    assert shapes("flux1-nano.safetensors") == expected


def test_clip_has_the_original_keys():
    expected = {
        "text_model.embeddings.token_embedding.weight": (CLIP_VOCABULARY, CLIP),
        "text_model.embeddings.position_embedding.weight": (77, CLIP),
    }
    for norm in ("encoder.layers.0.layer_norm1", "encoder.layers.0.layer_norm2", "final_layer_norm"):
        for key in {norm, norm.replace("layers.0", "layers.1")}:
            expected |= {f"text_model.{key}.weight": (CLIP,), f"text_model.{key}.bias": (CLIP,)}
    for i in range(2):
        layer = f"text_model.encoder.layers.{i}"
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            expected |= linear(f"{layer}.self_attn.{projection}", CLIP, CLIP)
        expected |= linear(f"{layer}.mlp.fc1", 4 * CLIP, CLIP) | linear(f"{layer}.mlp.fc2", CLIP, 4 * CLIP)
    assert shapes("clip_l.safetensors") == expected


def test_t5_has_the_original_keys():
    expected = {"shared.weight": (500, T5), "encoder.final_layer_norm.weight": (T5,)}
    expected["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = (32, 4)
    for i in range(2):
        block = f"encoder.block.{i}"
        expected |= {f"{block}.layer.0.SelfAttention.{part}.weight": (T5, T5) for part in "qkvo"}
        expected |= {f"{block}.layer.{part}.layer_norm.weight": (T5,) for part in (0, 1)}
        feed_forward = f"{block}.layer.1.DenseReluDense"
        expected |= {f"{feed_forward}.{part}.weight": (2 * T5, T5) for part in ("wi_0", "wi_1")}
        expected[f"{feed_forward}.wo.weight"] = (T5, 2 * T5)
    assert shapes("t5xxl.safetensors") == expected


def test_autoencoder_has_the_original_keys():
    assert shapes("ae.safetensors") == _autoencoder_shapes(ch=32, multipliers=(1, 1, 2, 2), blocks=1, z=16)


def _autoencoder_shapes(ch: int, multipliers: tuple[int, ...], blocks: int, z: int) -> dict[str, tuple[int, ...]]:
    """The original autoencoder's keys, in the order of its constructor."""
    expected: dict[str, tuple[int, ...]] = {}

    def conv(key: str, inputs: int, out: int, kernel: int = 3) -> None:
        expected.update({f"{key}.weight": (out, inputs, kernel, kernel), f"{key}.bias": (out,)})

    def norm(key: str, width: int) -> None:
        expected.update({f"{key}.weight": (width,), f"{key}.bias": (width,)})

    def block(key: str, inputs: int, out: int) -> int:
        norm(f"{key}.norm1", inputs), conv(f"{key}.conv1", inputs, out)
        norm(f"{key}.norm2", out), conv(f"{key}.conv2", out, out)
        if inputs != out:
            conv(f"{key}.nin_shortcut", inputs, out, 1)
        return out

    def middle(key: str, width: int) -> None:
        block(f"{key}.block_1", width, width), block(f"{key}.block_2", width, width)
        norm(f"{key}.attn_1.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            conv(f"{key}.attn_1.{part}", width, width, 1)

    width = ch
    conv("encoder.conv_in", 3, width)
    for level, multiplier in enumerate(multipliers):
        for j in range(blocks):
            width = block(f"encoder.down.{level}.block.{j}", width, ch * multiplier)
        if level < len(multipliers) - 1:
            conv(f"encoder.down.{level}.downsample.conv", width, width)
    middle("encoder.mid", width)
    norm("encoder.norm_out", width), conv("encoder.conv_out", width, 2 * z)
    conv("decoder.conv_in", z, width)
    middle("decoder.mid", width)
    for level in reversed(range(len(multipliers))):
        for j in range(blocks + 1):
            width = block(f"decoder.up.{level}.block.{j}", width, ch * multipliers[level])
        if level > 0:
            conv(f"decoder.up.{level}.upsample.conv", width, width)
    norm("decoder.norm_out", width), conv("decoder.conv_out", width, 3)
    return expected


def test_clip_vocabulary_ends_with_start_and_end():
    vocabulary = json.loads((WEIGHTS / "tokenizer" / "vocab.json").read_text())
    assert sorted(vocabulary.values()) == list(range(CLIP_VOCABULARY))
    assert vocabulary["<|startoftext|>"] == CLIP_VOCABULARY - 2
    assert vocabulary["<|endoftext|>"] == CLIP_VOCABULARY - 1
    merges = (WEIGHTS / "tokenizer" / "merges.txt").read_text().splitlines()[1:]
    assert all("".join(merge.split()) in vocabulary for merge in merges)


def test_t5_pieces_start_with_pad_end_unknown():
    sentencepiece = pytest.importorskip("sentencepiece")
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(WEIGHTS / "tokenizer_2" / "spiece.model"))
    assert tokenizer.get_piece_size() == 500
    assert (tokenizer.pad_id(), tokenizer.eos_id(), tokenizer.unk_id()) == (0, 1, 2)
    assert tokenizer.encode("A Large RED zqx") == tokenizer.encode("a large red zqx")
