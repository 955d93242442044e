"""Token ids against transformers with the real vocabularies, and where tokenizers are found."""

import os
import shutil
from pathlib import Path

import pytest
from transformers import CLIPTokenizer, T5Tokenizer

from fluxq import nano
from fluxq.errors import WrongRequest
from fluxq.formats.tokenizers import find_tokenizers, load_clip_tokenizer, load_t5_tokenizer

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


@pytest.mark.parametrize("file", ["spiece.model", "tokenizer.json"])
def test_t5_ids_equal_transformers(vocabularies, file):
    theirs = T5Tokenizer.from_pretrained(str(vocabularies / "tokenizer_2"))
    ours = load_t5_tokenizer((vocabularies / "tokenizer_2" / file,))
    for text in AWKWARD:
        assert ours(text) == theirs(text, add_special_tokens=False, verbose=False)["input_ids"]


@pytest.mark.parametrize("form", ["vocab.json", "tokenizer.json"])
def test_clip_ids_equal_transformers(vocabularies, tmp_path, form):
    theirs = CLIPTokenizer.from_pretrained(str(vocabularies / "tokenizer_1"))
    theirs.save_pretrained(tmp_path)
    lists = vocabularies / "tokenizer_1" / "vocab.json", vocabularies / "tokenizer_1" / "merges.txt"
    ours, ids = load_clip_tokenizer(lists if form == "vocab.json" else (tmp_path / form,))
    assert ids == (49406, 49407)
    for text in AWKWARD:
        assert ours(text) == theirs(text, add_special_tokens=False, verbose=False)["input_ids"]


def test_nanos_ids_equal_transformers():
    theirs = CLIPTokenizer.from_pretrained(str(nano.CLIP_TOKENIZER))
    ours, ids = load_clip_tokenizer((nano.CLIP_TOKENIZER / "vocab.json", nano.CLIP_TOKENIZER / "merges.txt"))
    assert ids == (theirs.bos_token_id, theirs.eos_token_id)
    for text in ("a red circle", "A  Blue square, at the TOP!"):
        assert ours(text) == theirs(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("name", ["spiece.model", "tokenizer.json"])
def test_file_of_another_kind_is_no_t5_tokenizer(tmp_path, name):
    (tmp_path / name).write_text('{"version": "1.0"}')
    with pytest.raises(WrongRequest, match=rf"{name} is no usable T5 tokenizer \(.*\); give spiece.model"):
        load_t5_tokenizer((tmp_path / name,))


def test_clips_json_is_no_t5_tokenizer_nor_the_other_way_round(vocabularies, tmp_path):
    CLIPTokenizer.from_pretrained(str(vocabularies / "tokenizer_1")).save_pretrained(tmp_path)
    with pytest.raises(WrongRequest, match="its ids 0 and 1 are not <pad> and </s>"):
        load_t5_tokenizer((tmp_path / "tokenizer.json",))
    with pytest.raises(
        WrongRequest, match=r"no usable CLIP tokenizer \(it has no <\|startoftext\|>\); give vocab.json"
    ):
        load_clip_tokenizer((vocabularies / "tokenizer_2" / "tokenizer.json",))


def test_missing_or_damaged_vocabulary_is_one_sentence(tmp_path):
    (tmp_path / "vocab.json").write_text("{")
    with pytest.raises(WrongRequest, match=r"vocab\.json with .*merges\.txt is no usable CLIP tokenizer \(.*\); give"):
        load_clip_tokenizer((tmp_path / "vocab.json", tmp_path / "merges.txt"))


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
    """A folder to put things into, and a hub whose cache is empty and that cannot be reached."""
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
def test_tokenizers_are_found_where_each_program_has_them(nowhere, place):
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


def test_the_nearest_and_what_is_there_come_first(nowhere):
    model = touch(nowhere / "a" / "b" / "t5.st")
    far, near = touch(nowhere / "tokenizer_2" / "spiece.model"), nowhere / "a" / "tokenizer_2" / "spiece.model"
    for name in CLIP_LISTS:
        touch(model.parent / name)
    assert find_tokenizers([model], known=lambda path: path == near)[1] == (far,)
    far.unlink()
    assert find_tokenizers([model], known=lambda path: path == near)[1] == (near,)
    assert find_tokenizers([model], t5=touch(near))[1] == (near,)


def test_a_bare_tokenizer_json_beside_a_model_is_nobodys(nowhere):
    model = touch(nowhere / "t5.st")
    touch(nowhere / "tokenizer.json")
    with pytest.raises(WrongRequest, match="CLIP's tokenizer .* and T5's tokenizer"):
        find_tokenizers([model])


def test_a_given_folder_or_file_is_taken_also_when_it_is_gone_but_known(nowhere):
    clip = tuple(touch(nowhere / "c" / name) for name in CLIP_LISTS)
    t5 = touch(nowhere / "t" / "tokenizer.json")
    for given in (t5, t5.parent):
        assert find_tokenizers([], nowhere / "c", given) == (clip, (t5,))
    known = {*clip, t5}.__contains__
    shutil.rmtree(nowhere / "c")
    t5.unlink()
    for given in (t5, t5.parent):
        assert find_tokenizers([], nowhere / "c", given, known) == (clip, (t5,))
    with pytest.raises(WrongRequest, match=r"/c is no CLIP tokenizer; --set model.clip_tokenizer=FOLDER wants vocab"):
        find_tokenizers([], nowhere / "c", t5)


def test_the_hubs_cache_is_looked_into_before_the_hub_is_asked(nowhere, monkeypatch):
    cached = {("black-forest-labs/FLUX.1-dev", f"tokenizer/{name}"): str(nowhere / name) for name in CLIP_LISTS}
    cached["google/t5-v1_1-xxl", "spiece.model"] = str(nowhere / "s")
    monkeypatch.setattr(
        "huggingface_hub.try_to_load_from_cache", lambda repository, name: cached.get((repository, name))
    )
    assert find_tokenizers([]) == (tuple(nowhere / name for name in CLIP_LISTS), (nowhere / "s",))


def test_fetching_is_said_and_takes_the_ungated_ones(nowhere, monkeypatch):
    said = []
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda repository, name: str(nowhere / repository / name))
    clip, t5 = find_tokenizers([], say=said.append)
    assert clip == tuple(nowhere / "openai/clip-vit-large-patch14" / name for name in CLIP_LISTS)
    assert t5 == (nowhere / "google/t5-v1_1-xxl" / "spiece.model",)
    assert said == [
        "fetching CLIP's tokenizer (vocab.json, merges.txt) from openai/clip-vit-large-patch14, once",
        "fetching T5's tokenizer (spiece.model) from google/t5-v1_1-xxl, once",
    ]


def test_offline_one_sentence_names_the_files_and_their_usual_places(nowhere):
    with pytest.raises(WrongRequest) as caught:
        find_tokenizers([touch(nowhere / "models" / "t5.st")], say=pytest.fail)
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
