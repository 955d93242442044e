"""Token ids compared with transformers, with the real vocabularies; and where tokenizers are found."""

import os
import shutil
import struct
import tracemalloc
from pathlib import Path

import pytest
from helpers import Lazy
from sentencepiece import SentencePieceProcessor

from fluxq import nano
from fluxq.errors import WrongRequest
from fluxq.formats.tokenizers import find_tokenizers, load_clip_tokenizer, load_t5_tokenizer

transformers = Lazy("transformers")
AWKWARD = [
    "",
    " ",
    "a red circle at the top",
    "  two  spaces,\ttabs\nand\r\n\n lines\u2028 ",
    "Ünïcödé naïve CAFÉ İstanbul ß a\u0301",
    "日本語のテキスト مرحبا بالعالم",
    "emoji 🐱👩‍👩‍👧‍👦🏳️‍🌈!",
    "zero\u200bwidth\u00a0no-break\ufeff\x00\x7f\ufffd",
    "ﬁ ligature ① ½ ▁ _",
    "don't WON'T it's (word:1.2) [x], 'q' \"q\" 3.14159",
    "pneumono" * 300,
    "x" * 2000,
    "</s>",
    "a </s> b",
    "a</s>b<pad> <unk><extra_id_0> <extra_id_99>.",
    "<|endoftext|>",
    "a<|endoftext|>b <|startoftext|> c",
]


@pytest.mark.slow
@pytest.mark.parametrize("file", ["spiece.model", "tokenizer.json"])
def test_t5_ids_equal_transformers(vocabularies, file):
    theirs = transformers.T5Tokenizer.from_pretrained(str(vocabularies / "tokenizer_2"))
    ours = load_t5_tokenizer((vocabularies / "tokenizer_2" / file,))
    for text in AWKWARD:
        assert ours(text) == theirs(text, add_special_tokens=False, verbose=False)["input_ids"]


@pytest.mark.slow
@pytest.mark.parametrize("form", ["vocab.json", "tokenizer.json"])
def test_clip_ids_equal_transformers(vocabularies, tmp_path, form):
    theirs = transformers.CLIPTokenizer.from_pretrained(str(vocabularies / "tokenizer_1"))
    theirs.save_pretrained(tmp_path)
    lists = vocabularies / "tokenizer_1" / "vocab.json", vocabularies / "tokenizer_1" / "merges.txt"
    ours, ids = load_clip_tokenizer(lists if form == "vocab.json" else (tmp_path / form,))
    assert ids == (49406, 49407)
    for text in AWKWARD:
        assert ours(text) == theirs(text, add_special_tokens=False, verbose=False)["input_ids"]


@pytest.mark.slow
def test_nanos_ids_equal_transformers():
    theirs = transformers.CLIPTokenizer.from_pretrained(str(nano.CLIP_TOKENIZER))
    ours, ids = load_clip_tokenizer((nano.CLIP_TOKENIZER / "vocab.json", nano.CLIP_TOKENIZER / "merges.txt"))
    assert ids == (theirs.bos_token_id, theirs.eos_token_id)
    for text in ("a red circle", "A  Blue square, at the TOP!"):
        assert ours(text) == theirs(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("name", ["spiece.model", "tokenizer.json"])
def test_file_of_another_kind_is_refused(tmp_path, name):
    (tmp_path / name).write_text('{"version": "1.0"}')
    with pytest.raises(WrongRequest, match=rf"{name} is not a usable T5 tokenizer \(.*\); use spiece.model"):
        load_t5_tokenizer((tmp_path / name,))


@pytest.mark.slow
def test_clips_json_is_refused_for_t5_and_vice_versa(vocabularies, tmp_path):
    transformers.CLIPTokenizer.from_pretrained(str(vocabularies / "tokenizer_1")).save_pretrained(tmp_path)
    with pytest.raises(WrongRequest, match="its ids 0 and 1 are not <pad> and </s>"):
        load_t5_tokenizer((tmp_path / "tokenizer.json",))
    with pytest.raises(
        WrongRequest, match=r"not a usable CLIP tokenizer \(it has no <\|startoftext\|>\); use vocab.json"
    ):
        load_clip_tokenizer((vocabularies / "tokenizer_2" / "tokenizer.json",))


def test_missing_or_damaged_vocabulary_is_one_sentence(tmp_path):
    (tmp_path / "vocab.json").write_text("{")
    with pytest.raises(
        WrongRequest, match=r"vocab\.json with .*merges\.txt is not a usable CLIP tokenizer \(.*\); use"
    ):
        load_clip_tokenizer((tmp_path / "vocab.json", tmp_path / "merges.txt"))


# --- within a GGUF T5 ---


def charsmap_of(spiece: Path) -> bytes:
    """normalizer_spec.precompiled_charsmap (field 2 in field 3 of the protocol buffer)."""
    return fields(fields(spiece.read_bytes())[3])[2]


def fields(message: bytes) -> dict[int, bytes]:
    """Field number -> last value, for the bytes fields of a protocol buffer."""
    found, at = {}, 0

    def varint() -> int:
        nonlocal at
        begin = at
        while message[at] > 127:
            at += 1
        at += 1
        return sum((byte & 127) << 7 * i for i, byte in enumerate(message[begin:at]))

    while at < len(message):
        key = varint()
        if key & 7 == 0:
            varint()
        else:
            size = {1: 8, 5: 4}.get(key & 7) or varint()
            found[key >> 3] = message[at : at + size]
            at += size
    return found


def write_gguf(path: Path, spiece: Path, charsmap: bool = True, padding: int = 0, architecture="t5encoder", **changes):
    """A GGUF T5 as llama.cpp's converter makes it from `spiece`, without tensors; None in `changes` removes a value."""
    gguf = pytest.importorskip("gguf")
    cpu = SentencePieceProcessor(model_file=str(spiece))
    ids = range(cpu.vocab_size())
    kinds = [2 if cpu.is_unknown(i) else 3 if cpu.is_control(i) else 1 for i in ids]
    values = {
        "tokenizer_model": "t5",
        "token_list": [cpu.id_to_piece(i) for i in ids] + [f"[PAD{len(ids) + n}]" for n in range(padding)],
        "token_scores": [cpu.get_score(i) for i in ids] + [-10000.0] * padding,
        "token_types": kinds + [5] * padding,
        "precompiled_charsmap": charsmap_of(spiece) if charsmap else None,
        "add_space_prefix": True,
        "remove_extra_whitespaces": True,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "unk_token_id": 2,
    }
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_string("general.name", "a T5")
    writer.add_array("general.tags", ["one", "two"])
    for name, value in (values | changes).items():
        if value is not None:
            getattr(writer, f"add_{name}")(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


MARKS = [
    "Y\u0345 Z\u0302\u036b7",
    "\u030b\u03544\u032f\u035d\\G\u03525",
    " \u2581 a\u2581",
    "W\u0323\u0334\u034d",
    "[PAD500]",
]


@pytest.mark.parametrize("padding", [0, 12])
def test_ids_of_a_gguf_equal_those_of_its_spiece_model(tmp_path, padding):
    theirs = load_t5_tokenizer((nano.T5_TOKENIZER,))
    ours = load_t5_tokenizer((write_gguf(tmp_path / "t5.gguf", nano.T5_TOKENIZER, padding=padding),))
    for text in AWKWARD + MARKS:
        assert ours(text) == theirs(text)


@pytest.mark.slow
@pytest.mark.parametrize("charsmap", [True, False])
def test_ids_of_a_real_gguf_equal_those_of_its_spiece_model(vocabularies, tmp_path, charsmap):
    spiece = vocabularies / "tokenizer_2" / "spiece.model"
    theirs = load_t5_tokenizer((spiece,))
    ours = load_t5_tokenizer((write_gguf(tmp_path / "t5.gguf", spiece, charsmap, padding=128),))
    for text in AWKWARD + MARKS:
        assert ours(text) == theirs(text)


def test_a_gguf_next_to_a_model_comes_after_other_files_and_before_the_hubs_cache(nowhere, monkeypatch):
    model = touch(nowhere / "clip" / "t5.st")
    for name in CLIP_LISTS:
        touch(model.parent / name)
    cached = str(touch(nowhere / "hub" / "spiece.model"))
    monkeypatch.setattr(
        "huggingface_hub.try_to_load_from_cache", lambda repository, name: cached if "spiece" in name else None
    )
    (model.parent / "a.gguf").write_bytes(b"GGUF\x03\0\0\0" + b"\xff" * 60)
    write_gguf(model.parent / "b.gguf", nano.T5_TOKENIZER, architecture="flux")
    write_gguf(model.parent / "c.gguf", nano.T5_TOKENIZER, tokenizer_model=None)
    assert find_tokenizers([model])[1] == (Path(cached),)
    gguf = write_gguf(model.parent / "d.gguf", nano.T5_TOKENIZER, architecture="t5")
    assert find_tokenizers([model])[1] == (gguf,)
    assert find_tokenizers([], model.parent, gguf)[1] == (gguf,)
    spiece = touch(nowhere / "tokenizer_2" / "spiece.model")
    assert find_tokenizers([model])[1] == (spiece,)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"architecture": "llama"}, "it is not a GGUF T5"),
        ({"tokenizer_model": "llama"}, "it has no T5 tokenizer"),
        ({"token_scores": None}, "its tokens, scores or token types are missing"),
        ({"token_scores": [0.5]}, "it has 500 tokens, 1 scores and 500 token types"),
        ({"token_scores": [float("nan")] * 500}, "a score is not a number"),
        ({"token_types": [7] * 500}, "a token has an unknown type"),
        ({"token_types": [5] * 500}, "its ids 0, 1 and 2 are not <pad>, </s>"),
        ({"eos_token_id": 2}, "its ids 0, 1 and 2 are not <pad>, </s>"),
        ({"token_types": [1] * 500}, "its ids 0, 1 and 2 are not <pad>, </s> and the unknown token"),
        (
            {"token_list": ["<pad>", "</s>"], "token_scores": [0.0] * 2, "token_types": [3] * 2},
            "its ids 0, 1 and 2 are not",
        ),
        ({"precompiled_charsmap": b"\xff\xff\xff\xff" * 4}, "."),
    ],
)
def test_a_gguf_without_a_tokenizer_of_t5s_is_refused(tmp_path, changes, sentence):
    path = write_gguf(tmp_path / "t5.gguf", nano.T5_TOKENIZER, **changes)
    with pytest.raises(
        WrongRequest, match=rf"t5.gguf is not a usable T5 tokenizer \(.*{sentence}.*\); use spiece.model"
    ):
        load_t5_tokenizer((path,))


HUGE = 1 << 40


def key_value(kind: int, data: bytes, key: bytes = b"tokenizer.ggml.tokens") -> bytes:
    return struct.pack("<Q", len(key)) + key + struct.pack("<I", kind) + data


@pytest.mark.parametrize(
    ("version", "count", "data", "sentence"),
    [
        (1, 1, b"", "is GGUF version 1, but fluxq reads only 2 and 3"),
        (3, HUGE, b"", "1,099,511,627,776 key-value pairs"),
        (3, 9, b"", "8 more bytes, but only 0 are left"),
        (3, 1, struct.pack("<Q", HUGE), "a string of 1,099,511,627,776 bytes"),
        (3, 1, struct.pack("<Q", 1) + b"\xff", "not UTF-8"),
        (3, 1, key_value(8, struct.pack("<Q", HUGE)), "a string of 1,099,511,627,776 bytes"),
        (3, 1, key_value(8, struct.pack("<Q", 1 << 25)), "33,554,432 more bytes, but only 0 are left"),
        (3, 1, key_value(13, b""), "tokenizer.ggml.tokens has the unknown type 13"),
        (3, 1, key_value(9, struct.pack("<IQ", 9, 1)), "has the unknown type 9"),
        (
            3,
            1,
            key_value(9, struct.pack("<IQ", 8, HUGE)),
            "tokens claims 1,099,511,627,776 values, but only 0 bytes are left",
        ),
        (
            3,
            1,
            key_value(9, struct.pack("<IQ", 6, HUGE)),
            "tokens claims 1,099,511,627,776 values, but only 0 bytes are left",
        ),
        (3, 1, key_value(9, struct.pack("<IQ", 8, 1 << 21) + bytes(1 << 24)), "the limit is 1,048,576"),
        (3, 1, key_value(9, struct.pack("<IQ", 8, HUGE), b"other"), "other claims 1,099,511,627,776 values"),
        (3, 1, key_value(8, struct.pack("<Q", HUGE), b"other"), "1,099,511,627,776 more bytes, but only 0 are left"),
    ],
)
def test_a_false_gguf_header_is_refused_without_using_memory(tmp_path, version, count, data, sentence):
    path = tmp_path / "t5.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", version, 0, count) + data)
    tracemalloc.start()
    try:
        with pytest.raises(WrongRequest, match=sentence):
            load_t5_tokenizer((path,))
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("content", [b"", b"GGU", b"GGML" + bytes(20)])
def test_a_file_that_is_only_named_gguf_is_refused(tmp_path, content):
    (tmp_path / "t5.gguf").write_bytes(content)
    with pytest.raises(WrongRequest, match=r"t5.gguf is not a GGUF file; use a GGUF file"):
        load_t5_tokenizer((tmp_path / "t5.gguf",))


# --- where they are found ---

CLIP_LISTS, CLIP_JSON = ("vocab.json", "merges.txt"), ("tokenizer.json",)
FORGE = "backend/huggingface/black-forest-labs/FLUX.1-dev"
PLACES = {  # CLIP's model, T5's model, CLIP's tokenizer, its files, T5's tokenizer
    "flat": ("clip_l.safetensors", "t5.safetensors", "", CLIP_LISTS, "spiece.model"),
    "diffusers": ("text_encoder/a", "text_encoder_2/b", "tokenizer", CLIP_LISTS, "tokenizer_2/spiece.model"),
    "diffusers_json": ("text_encoder/a", "text_encoder_2/b", "tokenizer", CLIP_JSON, "tokenizer_2/tokenizer.json"),
    "comfyui": (
        "models/clip/clip_l.st",
        "models/text_encoders/t5/t5.st",
        "comfy/sd1_tokenizer",
        CLIP_LISTS,
        "comfy/text_encoders/t5_tokenizer/tokenizer.json",
    ),
    "forge": (
        "models/text_encoder/clip_l.st",
        "models/text_encoder/t5.st",
        f"{FORGE}/tokenizer",
        CLIP_LISTS,
        f"{FORGE}/tokenizer_2/spiece.model",
    ),
}


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """A folder for files; the hub's cache is empty and the hub cannot be reached."""
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *a, **k: None)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", unreachable)
    return tmp_path


def unreachable(*_, **__):
    raise ConnectionError("no network")


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


@pytest.mark.parametrize("place", PLACES)
def test_tokenizers_are_found_where_each_program_keeps_them(nowhere, place):
    clip, t5, folder, names, spiece = PLACES[place]
    models = [touch(nowhere / clip), touch(nowhere / t5)]
    expected = tuple(touch(nowhere / folder / name) for name in names), (touch(nowhere / spiece),)
    assert find_tokenizers(models) == expected


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege on Windows")
def test_models_that_are_links_have_their_tokenizers_at_either_end(nowhere):
    real = touch(nowhere / "disk" / "text_encoder" / "clip.st")
    link = nowhere / "models" / "clip.st"
    link.parent.mkdir()
    link.symlink_to(real)
    t5 = touch(link.parent / "spiece.model")
    clip = [touch(nowhere / "disk" / "tokenizer" / name) for name in CLIP_LISTS]
    assert find_tokenizers([link]) == (tuple(clip), (t5,))


def test_the_nearest_and_existing_files_come_first(nowhere):
    model = touch(nowhere / "a" / "b" / "t5.st")
    far, near = touch(nowhere / "tokenizer_2" / "spiece.model"), nowhere / "a" / "tokenizer_2" / "spiece.model"
    for name in CLIP_LISTS:
        touch(model.parent / name)
    assert find_tokenizers([model], known=lambda path: path == near)[1] == (far,)
    far.unlink()
    assert find_tokenizers([model], known=lambda path: path == near)[1] == (near,)
    assert find_tokenizers([model], t5=touch(near))[1] == (near,)


def test_a_bare_tokenizer_json_next_to_a_model_is_ignored(nowhere):
    model = touch(nowhere / "t5.st")
    touch(nowhere / "tokenizer.json")
    with pytest.raises(WrongRequest, match="CLIP's tokenizer .* and T5's tokenizer"):
        find_tokenizers([model])


def test_a_given_folder_or_file_is_used_even_if_only_known(nowhere):
    clip = tuple(touch(nowhere / "c" / name) for name in CLIP_LISTS)
    t5 = touch(nowhere / "t" / "tokenizer.json")
    for given in (t5, t5.parent):
        assert find_tokenizers([], nowhere / "c", given) == (clip, (t5,))
    known = {*clip, t5}.__contains__
    shutil.rmtree(nowhere / "c")
    t5.unlink()
    for given in (t5, t5.parent):
        assert find_tokenizers([], nowhere / "c", given, known) == (clip, (t5,))
    with pytest.raises(WrongRequest, match=r"/c is not a CLIP tokenizer; use vocab"):
        find_tokenizers([], nowhere / "c", t5)


def test_the_hubs_cache_is_searched_before_the_hub(nowhere, monkeypatch):
    cached = {("black-forest-labs/FLUX.1-dev", f"tokenizer/{name}"): str(nowhere / name) for name in CLIP_LISTS}
    cached["google/t5-v1_1-xxl", "spiece.model"] = str(nowhere / "s")
    monkeypatch.setattr(
        "huggingface_hub.try_to_load_from_cache", lambda repository, name: cached.get((repository, name))
    )
    assert find_tokenizers([]) == (tuple(nowhere / name for name in CLIP_LISTS), (nowhere / "s",))


def test_downloads_are_announced_and_use_the_ungated_repositories(nowhere, monkeypatch):
    said = []
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda repository, name: str(nowhere / repository / name))
    clip, t5 = find_tokenizers([], notify=said.append)
    assert clip == tuple(nowhere / "openai/clip-vit-large-patch14" / name for name in CLIP_LISTS)
    assert t5 == (nowhere / "google/t5-v1_1-xxl" / "spiece.model",)
    assert said == [
        "downloading CLIP's tokenizer (vocab.json, merges.txt) from openai/clip-vit-large-patch14 (only this once)",
        "downloading T5's tokenizer (spiece.model) from google/t5-v1_1-xxl (only this once)",
    ]


def test_offline_one_sentence_names_the_files_and_their_usual_places(nowhere):
    with pytest.raises(WrongRequest) as caught:
        find_tokenizers([touch(nowhere / "models" / "t5.st")], notify=pytest.fail)
    sentence = str(caught.value)
    for part in (
        "vocab.json and merges.txt",
        "spiece.model",
        "comfy/sd1_tokenizer",
        "comfy/text_encoders/t5_tokenizer",
    ):
        assert part in sentence
    for part in (f"Forge's {FORGE}/tokenizer_2", "tokenizer_2 of a diffusers folder", "google/t5-v1_1-xxl on"):
        assert part in sentence
    assert "--set model.clip_tokenizer=FOLDER --set model.t5_tokenizer=FILE" in sentence and "\n" not in sentence
    with pytest.raises(WrongRequest, match="nor in the hub's cache, and --offline forbids downloading them; copy"):
        find_tokenizers([nowhere / "models" / "t5.st"], fetch=pytest.fail, offline=True)
