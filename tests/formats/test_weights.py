"""Tensors out of files in 32, 16 and 8 bits, with and without scales."""

import pytest
import torch

from fluxq.errors import WrongRequest
from fluxq.formats.files import Checkpoint, write_safetensors
from fluxq.formats.weights import StoredWeights

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
CPU = torch.device("cpu")


def stored(path, tensors, dtype=torch.float32, prefix="t5."):
    write_safetensors(path, {prefix + key: tensor for key, tensor in tensors.items()})
    names = {key: prefix + key for key in tensors if key.endswith(".weight")}
    return StoredWeights(Checkpoint(path), names, CPU, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, E4M3, E5M2])
def test_plain_weights_are_their_own_values(tmp_path, dtype):
    weight = torch.randn(6, 4).to(dtype)
    weights = stored(tmp_path / "x.safetensors", {"a.weight": weight, "norm.weight": weight[0].clone()})
    assert torch.equal(weights.read("a.weight"), weight.float())
    assert torch.equal(weights.read("norm.weight"), weight[0].float())
    assert torch.equal(weights.rows("a.weight", torch.tensor([5, 0, 5])), weight.float()[[5, 0, 5]])


@pytest.mark.parametrize("leaf", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("fp8", [E4M3, E5M2])
@pytest.mark.parametrize("shape", [(), (1,), (6,), (6, 1), (6, 2, 1)])
def test_scaled_weights_are_value_times_scale(tmp_path, leaf, fp8, shape):
    weight, scale = torch.randn(6, 4).to(fp8), torch.rand(shape) + 0.5
    other = {"norm.weight": torch.randn(4).half(), "a.scale_input": torch.tensor(9.0)}
    tensors = {"a.weight": weight, f"a.{leaf}": scale, **other}
    weights = stored(tmp_path / "x.safetensors", tensors)
    columns = scale.expand(6, 2, 1).repeat(1, 1, 2).flatten(1) if scale.ndim == 3 else scale.reshape(-1, 1)
    expected = weight.float() * columns
    assert torch.equal(weights.read("a.weight"), expected)
    assert torch.equal(weights.rows("a.weight", torch.tensor([4, 1])), expected[[4, 1]])
    assert torch.equal(
        stored(tmp_path / "x.safetensors", tensors, torch.bfloat16).read("a.weight"), expected.bfloat16()
    )


BAD = {
    "lacking": (
        {"a.weight": torch.zeros(2, 2).to(E4M3), "scaled_fp8": torch.empty(0).to(E4M3)},
        "1 without a scale (t5.a.weight)",
    ),
    "half": (
        {"a.weight": torch.zeros(2, 2).to(E4M3), "a.scale_weight": torch.ones(()), "b.weight": torch.zeros(2).to(E4M3)},
        "1 without a scale (t5.b.weight)",
    ),
    "shape": (
        {"a.weight": torch.zeros(2, 4).to(E4M3), "a.weight_scale": torch.ones(4)},
        "1 wrong scale (t5.a.weight_scale is (4,) for (2, 4))",
    ),
    "blocks": (
        {"a.weight": torch.zeros(2, 4).to(E4M3), "a.weight_scale": torch.ones(2, 3, 1)},
        "1 wrong scale (t5.a.weight_scale is (2, 3, 1) for (2, 4))",
    ),
    "mxfp8": (
        {"a.weight": torch.zeros(2, 4).to(E4M3), "a.weight_scale": torch.ones(()).to(torch.float8_e8m0fnu)},
        "1 wrong scale",
    ),
    "int8": (
        {"a.weight": torch.zeros(2, 4).to(torch.int8), "a.weight_scale": torch.ones(())},
        "1 of a type that fluxq does not read (t5.a.weight is int8)",
    ),
    "scaled16": (
        {"a.weight": torch.zeros(2, 4).half(), "a.weight_scale": torch.ones(())},
        "1 of a type that fluxq does not read (t5.a.weight is float16)",
    ),
    "nvfp4": ({"a.weight": torch.zeros(2, 4).byte()}, "1 of a type that fluxq does not read (t5.a.weight is uint8)"),
}


@pytest.mark.parametrize("what", BAD)
def test_unreadable_weights_are_named_before_any_is_read(tmp_path, monkeypatch, what):
    tensors, sentence = BAD[what]
    monkeypatch.setattr(Checkpoint, "get", lambda self, key: pytest.fail("was read"))
    with pytest.raises(WrongRequest, match=r"^.*x\.safetensors has weights that cannot be read: ") as caught:
        stored(tmp_path / "x.safetensors", tensors)
    assert sentence in str(caught.value) and str(caught.value).endswith("; give a 16-bit version")


def test_another_models_scales_do_not_count(tmp_path):
    """An all-in-one file may scale its transformer and leave T5 plain."""
    tensors = {"t5.a.weight": torch.zeros(2, 2).to(E4M3), "model.b.weight": torch.zeros(2, 2).to(E4M3)}
    tensors |= {"model.b.scale_weight": torch.ones(()), "model.scaled_fp8": torch.empty(0).to(E4M3)}
    write_safetensors(tmp_path / "x.safetensors", tensors)
    weights = StoredWeights(Checkpoint(tmp_path / "x.safetensors"), {"a.weight": "t5.a.weight"}, CPU, torch.float32)
    assert torch.equal(weights.read("a.weight"), torch.zeros(2, 2))


def test_rows_beyond_the_last_are_refused_with_both_numbers(tmp_path):
    weights = stored(tmp_path / "x.safetensors", {"a.weight": torch.zeros(6, 4)})
    with pytest.raises(WrongRequest, match=r"has 6 rows in t5\.a\.weight, but the tokenizer gives the number 6; use"):
        weights.rows("a.weight", torch.tensor([0, 6]))
