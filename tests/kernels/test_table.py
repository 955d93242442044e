"""The table of paths and tiles: complete, nearest for unknown GPUs, and extended by a user's measurements."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.promises import L2_TB_S, l2_bytes
from fluxq.kernels.triton import table
from fluxq.offload.gpus import GPUS

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _nothing_laid_over():
    yield
    table.use_measured({})
    table.nearest.cache_clear()


@pytest.fixture
def on_ada(monkeypatch):
    monkeypatch.setattr(table, "generation", lambda device: 89)


def shapes(op):
    """The shape classes that an op must have rows for."""
    return table.shape_classes(op) if op == "row_quantize" else ("large",)


EVERY = [(op, shape) for op in table.PATHS for shape in table.shape_classes(op)]


@pytest.mark.parametrize("op", table.PATHS)
def test_every_op_has_a_row_for_every_gpu_and_a_reason(op):
    gpus = (*table.GENERATIONS, table.INTERPRETED)
    for choice in (table.SHIPPED[op, gpu, shape] for gpu in gpus for shape in shapes(op)):
        assert choice.path in table.PATHS[op]
        assert choice.word in ("predicted", "measured") and choice.why


def test_every_row_is_for_a_known_op_and_shape():
    for op, gpu, shape in table.SHIPPED:
        assert op in table.PATHS and shape in table.shape_classes(op)
        assert gpu in (*table.GENERATIONS, table.INTERPRETED)


def test_few_rows_are_up_to_64(on_ada):
    assert [table.choose("lora_linear_nf4", CPU, rows).path for rows in (1, 64, 65)] == ["fused", "fused", "extended"]


def test_large_rows_are_used_if_few_have_none(on_ada):
    assert table.choose("matmul_int8", CPU, 1) is table.SHIPPED["matmul_int8", 89, "large"]


@pytest.mark.parametrize(
    ("gpu", "nearest"), [(80, 80), (87, 86), (88, 89), (100, 90), (103, 90), (110, 120), (121, 120)]
)
def test_an_unknown_gpu_uses_the_nearest_and_warns_once(gpu, nearest, caplog):
    assert [table.nearest(gpu), table.nearest(gpu)] == [nearest, nearest]
    lines = [record.message for record in caplog.records]
    assert len(lines) == (gpu != nearest)
    assert all(f"{gpu / 10}" in line and f"{nearest / 10}" in line for line in lines)


def test_rows_are_quantized_in_the_narrowest_tile_that_holds_one(on_ada):
    tiles = [table.choose("row_quantize", CPU, width).block_n for width in (64, 1024, 3072, 15360, 32768, 40000)]
    assert tiles == [1024, 1024, 4096, 16384, 32768, 8192]


@pytest.mark.parametrize(("op", "shape"), EVERY)
def test_candidates_fit_the_gpu_and_start_with_the_row_in_use(op, shape):
    for gpu in table.GENERATIONS:
        found = table.candidates(op, gpu, shape)
        shipped = table.SHIPPED.get((op, gpu, shape)) or table.SHIPPED[op, gpu, "large"]
        assert replace(found[0], word=shipped.word, why=shipped.why) == shipped
        assert {c.path for c in found} == set(table.paths(op, gpu))
        tiled = {path: {c.block_m for c in found[1:] if c.path == path} for path in ("triton", "scaled")}
        assert "scaled" not in table.paths(op, gpu) or tiled["triton"] == tiled["scaled"], "each path in all tiles"
        assert len(set(found)) == len(found) > 1
        assert op not in table.STREAMING or len(found) <= 9, "each is compiled and checked"


@pytest.mark.parametrize(("op", "shape"), EVERY)
def test_every_candidate_survives_saving_and_reading(op, shape, tmp_path):
    found = {gpu: table.candidates(op, gpu, shape)[:: 1 if op in table.STREAMING else 7] for gpu in table.GENERATIONS}
    for choices in itertools.zip_longest(*found.values()):  # a file holds one for each GPU
        rows = {(op, gpu, shape): choice for gpu, choice in zip(found, choices, strict=True) if choice}
        table.write(tmp_path / "kernels.json", rows, "a GPU")
        assert table.read(tmp_path / "kernels.json") == rows


def test_measured_rows_take_precedence(on_ada, tmp_path):
    file = tmp_path / "new folder" / "kernels.json"
    mine = replace(table.SHIPPED["matmul_int8", 89, "large"], block_n=256, word="measured", why="1.2 ms, before 1.3 ms")
    table.write(file, {("matmul_int8", 89, "large"): mine}, "RTX 4090")
    assert json.loads(file.read_text())["measured_on"] == "RTX 4090"
    table.use_measured(table.read(file))
    assert table.choose("matmul_int8", CPU, 4608) == mine
    assert table.choose("matmul_fp8", CPU, 4608).word == "predicted"
    table.use_measured({})
    assert table.choose("matmul_int8", CPU, 4608).word == "predicted"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(op="softmax"), "softmax has no path"),
        (dict(gpu=75), "sm_75"),
        (dict(shape="middling"), "middling"),
        (dict(path="cuda"), "cuda"),
        (dict(op="matmul_fp8", path="scaled"), "matmul_fp8 has no path scaled"),
        (dict(block_m=48), "tiles"),
        (dict(block_m="64"), "sizes"),
        (dict(warps=3), "3 warps"),
        (dict(stages=8, block_k=128), "shared memory"),
        (dict(chunk=100), "chunks of 100"),
        (dict(stages=None), "sizes"),
    ],
)
def test_a_file_with_a_wrong_row_is_refused_by_name(tmp_path, change, said):
    refuse(tmp_path / "kernels.json", ("matmul_int8", 89, "large"), change, said)


@pytest.mark.parametrize(
    ("op", "change"),
    [
        ("modulate", dict(block_m=3)),
        ("modulate", dict(step=2)),
        ("modulate", dict(block_n=1024)),
        ("modulate_8bit_down", dict(block_m=8)),
        ("gelu_tanh", dict(block_n=0)),
        ("dequantize", dict(block_n=32)),
        ("qk_norm_rope", dict(warps=6)),
    ],
)
def test_a_tile_that_a_streaming_kernel_cannot_use_is_refused(tmp_path, op, change):
    refuse(tmp_path / "kernels.json", (op, 89, "large"), change, "tiles")


def refuse(file, key, change, said):
    table.write(file, {key: table.SHIPPED[key]}, "RTX 4090")
    content = json.loads(file.read_text())
    content["rows"][0] |= change
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"kernels.json is not a table of kernel choices .*{said}.*tune again"):
        table.read(file)


def test_a_file_from_before_the_gpus_new_key_is_read(tmp_path):
    file, key = tmp_path / "kernels.json", ("matmul_int8", 89, "large")
    table.write(file, {key: table.SHIPPED[key]}, "RTX 4090")
    content = json.loads(file.read_text())
    content["rows"] = [{"card" if name == "gpu" else name: value for name, value in content["rows"][0].items()}]
    file.write_text(json.dumps(content))
    assert table.read(file) == {key: table.SHIPPED[key]}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "Expecting"),
        ("[]", "indices"),
        ('{"version": 9, "rows": []}', "version 9, not 2"),
        ('{"version": 2, "rows": [{}]}', "no 'op'"),
    ],
)
def test_another_file_is_refused(tmp_path, text, said):
    (tmp_path / "kernels.json").write_text(text)
    with pytest.raises(ValueError, match=f"kernels.json is not a table of kernel choices .*{said}"):
        table.read(tmp_path / "kernels.json")


TALL = table.SHIPPED["matmul_int8", 89, "large"]


@pytest.mark.parametrize(
    ("rows", "columns", "sms", "block_m"),
    [
        (1536, 3072, 128, 128),  # 144 tall tiles: two waves, the second nearly empty
        (1536, 9216, 128, 128),
        (1536, 21504, 128, 256),
        (4608, 9216, 128, 256),
        (4608, 12288, 128, 256),
        (1536, 9216, 28, 256),
        (100, 3072, 28, 128),  # half of the tile would be empty
        (1536, 3072, 0, 256),
    ],
)
def test_tall_tiles_are_used_where_they_fill_the_gpu(rows, columns, sms, block_m):
    assert TALL.block_m == 256
    fitted = table.fitted(TALL, rows, columns, sms)
    assert fitted == replace(TALL, block_m=block_m)


def test_a_forced_or_low_tile_is_used_as_it_is(on_ada, monkeypatch):
    monkeypatch.setattr(table, "multiprocessors", lambda device: 128)
    assert table.choose_tile("matmul_int8", CPU, 1536, 3072).block_m == 128
    assert table.choose_tile("matmul_int8", CPU, 4608, 9216) is TALL
    assert table.choose_tile("matmul_fp8", CPU, 1536, 3072) is table.SHIPPED["matmul_fp8", 89, "large"]
    with table.using("matmul_int8", TALL):
        assert table.choose_tile("matmul_int8", CPU, 1536, 3072) is TALL


def test_tall_tiles_of_8_bit_products_are_worth_measuring():
    for op, gpu in (("matmul_int8", 86), ("matmul_int8", 89), ("matmul_fp8", 89)):
        assert (256, 128, 64, 8, 3) in {
            (c.block_m, c.block_n, c.block_k, c.warps, c.stages) for c in table.candidates(op, gpu)
        }


@pytest.mark.parametrize("gpu", table.GENERATIONS)
@pytest.mark.parametrize("op", ["matmul_int8", "matmul_fp8"])
def test_l2_feeds_8_bit_products(op, gpu):
    """At 60 % of its peak no product needs more than 80 % of what L2 gives, by assumption. On Hopper L2 limits every
    product that does not share reads between multiprocessors.
    """
    (name, gives), tile = L2_TB_S[gpu], table.SHIPPED[op, gpu, "large"]
    peak = getattr(GPUS[name], op.removeprefix("matmul_"))  # TFLOP/s; 0: not supported
    needs = peak * l2_bytes(tile.block_m, tile.block_n)
    assert (0.3 if gpu == 90 else 0.6) * needs <= 0.8 * gives


@pytest.mark.parametrize(
    ("rows", "sms", "fills"),
    [
        (512, 28, False),  # text on an RTX 3060
        (1024, 28, True),  # an image of 512 px
        (1536, 28, True),
        (1536, 128, False),  # all tokens at 512 px on an RTX 4090
        (4096, 128, True),  # an image of 1024 px: just two programs a multiprocessor
        (4608, 132, True),  # on an H100
        (4096, 170, False),  # on an RTX 5090
        (16, 0, True),  # unknown: Triton's interpreter
    ],
)
def test_down_is_multiplied_by_the_row_kernel_where_its_programs_fill_the_gpu(rows, sms, fills):
    tile = table.SHIPPED["modulate_8bit_down", 89, "large"]
    assert tile.block_m == table.SHIPPED["gelu_tanh_8bit_down", 89, "large"].block_m
    assert table.fills(-(-rows // tile.block_m), sms) == fills


def test_using_is_undone_even_if_nested():
    first, second = table.Choice("triton", 16), table.Choice("triton", 32)
    before = table.choose("matmul_int8", CPU, 100)
    with table.using("matmul_int8", first):
        with table.using("matmul_int8", second):
            assert table.choose("matmul_int8", CPU, 100) is second
        assert table.choose("matmul_int8", CPU, 100) is first
    assert table.choose("matmul_int8", CPU, 100) == before
