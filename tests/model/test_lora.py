"""Which layers get a LoRA, of which rank and scale."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from helpers import randomize, tiny_config

from fluxq.config import LoraConfig
from fluxq.config_files import config_from_dict, set_values
from fluxq.errors import WrongRequest
from fluxq.formats.lora import load_lora
from fluxq.formats.lora.keys import matrices
from fluxq.formats.lora.write import WRITTEN_DIALECTS, save_lora
from fluxq.model import Flux, FluxConfig, add_lora
from fluxq.model.lora import Adapted, Size, add_adapted
from fluxq.model.modulation import is_known_ahead
from fluxq.training.run import adapters_of

DEV = [*matrices(FluxConfig.dev())]


def layers(**changes) -> dict[str, Size]:
    return Adapted(16, 8.0, **changes).layers(DEV)


def counted(**changes) -> Counter[Size]:
    return Counter(layers(**changes).values())


def test_the_last_expression_that_matches_counts_and_rank_0_leaves_a_layer_out():
    found = layers(ranks=("attention=4", r"double_blocks\.0\..*=32", "mlp=0", r"double_blocks\.1\.img_mlp\.2=6"))
    assert found["double_blocks.0.img_attn.qkv"] == Size(32, 16.0) == found["double_blocks.0.txt_attn.proj"]
    assert found["double_blocks.1.img_attn.qkv"] == Size(4, 2.0) == found["single_blocks.37.linear2"]
    assert found["double_blocks.1.img_mlp.2"] == Size(6, 3.0)
    assert "double_blocks.0.img_mlp.0" not in found
    assert len(found) == 19 * 4 + 38 * 2 + 1


def test_without_an_alpha_of_its_own_every_layer_has_the_same_scale():
    assert counted(ranks=("mlp=4",)) == {Size(16, 8.0): 152, Size(4, 2.0): 76}
    assert counted(ranks=("mlp=4",), alphas=("double=8",)) == {Size(16, 8.0): 152, Size(4, 8.0): 76}


def test_a_rank_stabilized_alpha_is_one_that_every_reader_scales_alike():
    sizes = counted(ranks=("mlp=4",), rank_stabilized=True)
    assert sizes == {Size(16, 32.0): 152, Size(4, 16.0): 76}
    assert {size.alpha / size.rank: 8 / size.rank**0.5 for size in sizes} == {2.0: 2.0, 4.0: 4.0}


def test_blocks_are_chosen_by_number_and_what_is_outside_blocks_stays():
    found = layers(targets="all", double_blocks="0-2,7", single_blocks="none")
    assert {path.split(".")[1] for path in found if path.startswith("double")} == {"0", "1", "2", "7"}
    assert not [path for path in found if path.startswith("single")] and "img_in" in found


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"double_blocks": "3-19"}, "no layer of double block 19 is a target; the blocks that have some are 0 to 18"),
        ({"double_blocks": "none", "single_blocks": "none"}, "no layer is left to train"),
        ({"ranks": (".*=0",)}, "no layer is left to train: lora.ranks gives each of them rank 0"),
        ({"ranks": ("modulation=4",)}, "lora.ranks: modulation is not among lora.targets"),
        ({"alphas": ("mlp=4",), "targets": "attention"}, "lora.alphas: mlp is not among lora.targets"),
        ({"alphas": ("double=4",), "double_blocks": "none"}, "lora.alphas: double is .* or not in the blocks"),
        ({"ranks": ("mpl=4",)}, "lora.ranks: 'mpl' matches no layer; presets: attention, "),
        ({"alphas": ("[=4",)}, r"lora.alphas: '\[' is not a regular expression"),
    ],
)
def test_what_chooses_no_layer_is_refused(changes, sentence):
    with pytest.raises(WrongRequest, match=sentence):
        layers(**changes)


@pytest.mark.parametrize("text", ["attention=16,mlp=8", '["attention=16", "mlp=8"]'])
def test_ranks_are_given_as_text_or_as_a_list(text):
    values: dict = {}
    set_values(values, (f"lora.ranks={text}", "lora.double_blocks=0-3, 5", "lora.single_blocks=all"))
    lora = config_from_dict(values, "here").lora
    assert lora.ranks == ("attention=16", "mlp=8") and (lora.double_blocks, lora.single_blocks) == ("0-3,5", None)


@pytest.mark.parametrize("key, value", [
    ("ranks", "mlp"), ("ranks", "mlp=1.5"), ("ranks", "=4"), ("ranks", "mlp=-1"), ("ranks", 4),
    ("alphas", "mlp=0"), ("alphas", "mlp=nan"), ("double_blocks", "3-1"),
    ("double_blocks", "0-9999999999"), ("double_blocks", "a"), ("single_blocks", -1),
])  # fmt: skip
def test_malformed_expressions_are_refused_by_key(key, value):
    with pytest.raises(WrongRequest, match=f"lora.{key} must be "):
        config_from_dict({"lora": {key: value}}, "here")


def test_modulation_that_rank_0_leaves_out_is_known_ahead():
    config, all_layers = tiny_config(), LoraConfig(targets=("attention", "modulation"))
    assert not is_known_ahead(config, all_layers.adapted())
    assert is_known_ahead(config, LoraConfig(targets=("attention", "modulation"), ranks=("modulation=0",)).adapted())


@pytest.mark.parametrize("dialect", WRITTEN_DIALECTS)
def test_files_of_every_format_make_the_change_that_was_trained(dialect, tmp_path):
    flux = randomize(Flux(tiny_config()))
    adapted = Adapted(6, 5.0, ranks=("mlp=3", r"single_blocks\.0\..*=4"), alphas=("mlp=2",), rank_stabilized=True)
    for layer in add_adapted(flux, adapted).values():
        torch.nn.init.normal_(layer.lora_up)
    path = tmp_path / "lora"
    save_lora(path, adapters_of(flux), flux.config, dialect, torch.float32)
    read = load_lora(path, flux.config).adapters
    assert read.keys() == adapted.layers(matrices(flux.config)).keys()
    for name, adapter in read.items():
        layer = flux.get_submodule(name)
        scale = (2 if "mlp" in name else 5) / len(layer.lora_down) ** 0.5
        torch.testing.assert_close(adapter.change(), scale * layer.lora_up @ layer.lora_down, rtol=1e-5, atol=1e-5)


def test_one_rank_for_all_is_as_before():
    one, other = (randomize(Flux(tiny_config())) for _ in range(2))
    add_lora(one, 5, 3.0, "all", torch.Generator().manual_seed(1))
    add_adapted(other, Adapted(5, 3.0, "all"), torch.Generator().manual_seed(1))
    for (_, a), (_, b) in zip(one.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(a, b)
    assert {
        layer.lora_scale for layer in one.modules() if hasattr(layer, "lora_scale") and layer.lora_down is not None
    } == {0.6}
