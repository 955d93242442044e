"""Image-to-text models: Florence-2 by its tasks, others by a chat template or a prompt, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from captioning import tiny
from huggingface_hub import constants
from PIL import Image
from skimage import data

from fluxq.captioning.model import DEFAULT_PROMPT, Captioner
from fluxq.errors import WrongRequest

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    torch.manual_seed(7)
    folder = tmp_path_factory.mktemp("models")
    return {"florence2": tiny.florence2(folder / "florence2"), "llava": tiny.llava(folder / "llava")}


@pytest.fixture(scope="module")
def photos() -> list[Image.Image]:
    return [Image.fromarray(array) for array in (data.astronaut(), data.coffee(), data.chelsea())]


@pytest.mark.parametrize("kind", ["florence2", "llava"])
def test_each_image_gets_its_own_caption_in_a_batch_as_alone(kind, models, photos):
    captioner = Captioner(str(models[kind]), max_words=12)
    captions = captioner(photos)
    assert captions == [captioner([photo])[0] for photo in photos]
    assert len(set(captions)) == 3 and all(0 < len(caption.split()) <= 12 for caption in captions)
    assert {word for caption in captions for word in caption.split()} <= {*tiny.WORDS.split()}


def test_florence_answers_a_task_as_its_own_processor_reads_it(models, photos):
    captioner = Captioner(str(models["florence2"]))
    assert captioner.prompt == "<MORE_DETAILED_CAPTION>"
    processor, task = captioner.processor, "<CAPTION>"
    inputs = processor(images=photos, text=[task] * 3, return_tensors="pt")
    rows = captioner.model.generate(**inputs, do_sample=False, max_new_tokens=captioner.max_tokens)
    texts = processor.batch_decode(rows, skip_special_tokens=False)
    expected = [processor.post_process_generation(text, task=task, image_size=(9, 9))[task] for text in texts]
    captions = Captioner(str(models["florence2"]), prompt=task)(photos)
    assert captions == [text.replace("<pad>", "").strip() for text in expected]
    with pytest.raises(
        WrongRequest, match="--prompt <OD> is not answered with a text by Florence-2; use <OCR> or <CAP"
    ):
        Captioner(str(models["florence2"]), prompt="<OD>")


def test_a_chat_is_asked_the_prompt_and_its_answer_is_the_caption(models, photos, tmp_path):
    captioner = Captioner(str(models["llava"]), max_words=5)
    assert captioner.prompt == f"{DEFAULT_PROMPT} Use at most 5 words."
    captioner = Captioner(str(models["llava"]), prompt="a red dog under the tree")
    asked = captioner.processor.tokenizer.decode(captioner._inputs(photos[:1])["input_ids"][0])
    assert asked.endswith("a red dog under the tree <unk> <unk>") and asked.count("<image>") == 16
    chatty = captioner(photos)
    assert not any("a red dog under the tree" in caption for caption in chatty)
    plain = tiny.save(captioner.model, captioner.processor, shutil.copytree(models["llava"], tmp_path / "plain"))
    (plain / "chat_template.jinja").unlink()
    with pytest.raises(WrongRequest, match=r"plain cannot be asked for a caption with no prompt \(.*; give another"):
        Captioner(str(plain))(photos)
    assert all(Captioner(str(plain), prompt="<image> a red dog")(photos))


def changed(model: Path, folder: Path, **config) -> Path:
    copy = shutil.copytree(model, folder)
    values = json.loads((copy / "config.json").read_text()) | config
    (copy / "config.json").write_text(json.dumps(values))
    return copy


def refusal(model: Path | str, **options) -> str:
    with pytest.raises(WrongRequest) as error:
        Captioner(str(model), **options)
    return str(error.value)


def test_code_of_a_repository_is_never_run(models, tmp_path, monkeypatch):
    """Nor is it asked whether to: there may be nobody at the keyboard."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    code = {name: f"evil.{name}" for name in ("AutoConfig", "AutoProcessor", "AutoModelForImageTextToText")}
    evil = "from pathlib import Path\nPath('ran').touch()\n"
    foreign = changed(models["florence2"], tmp_path / "foreign", model_type="evil", auto_map=code)
    (foreign / "evil.py").write_text(evil)
    assert "foreign is a evil, which is not an image-to-text model of transformers" in refusal(foreign)
    native = changed(models["florence2"], tmp_path / "native", auto_map=code)
    (native / "evil.py").write_text(evil)
    for name in ("processor_config.json", "tokenizer_config.json"):
        values = json.loads((native / name).read_text()) | {"auto_map": code | {"AutoTokenizer": ["evil.T", None]}}
        (native / name).write_text(json.dumps(values))
    Captioner(str(native))
    values = json.loads((native / "processor_config.json").read_text()) | {"processor_class": "Evil"}
    (native / "processor_config.json").write_text(json.dumps(values))
    assert "cannot be loaded by transformers" in refusal(native)
    assert not (tmp_path / "ran").exists()


def test_what_is_no_captioning_model_is_refused(models, tmp_path):
    assert "gone does not exist; name the folder of an image-to-text model" in refusal(tmp_path / "gone")
    (tmp_path / "empty").mkdir()
    assert "has no config.json" in refusal(tmp_path / "empty")
    pickled = changed(models["florence2"], tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    assert "has no weights in model.safetensors; other files can run hidden code" in refusal(pickled)
    assert "is a bert, which is not an image-to-text" in refusal(
        changed(models["florence2"], tmp_path / "bert", model_type="bert")
    )
    deeper = json.loads((models["llava"] / "config.json").read_text())["text_config"] | {"num_hidden_layers": 2}
    sentence = refusal(changed(models["llava"], tmp_path / "deeper", text_config=deeper))
    assert "lacks 9 of the weights that transformers' llava has" in sentence
    legacy = changed(models["florence2"], tmp_path / "legacy", text_config={"model_type": "florence2_language"})
    assert "legacy cannot be loaded by transformers" in refusal(legacy)
    cut = changed(models["llava"], tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:-10])
    assert "cut cannot be loaded by transformers" in refusal(cut)


def test_a_hub_id_is_said_fetched_once_and_forbidden_offline(models, tmp_path, monkeypatch):
    """Only what is needed is fetched: no code, no other forms of the weights, no half of a download is used."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    snapshot = tmp_path / "hub" / "models--some--one" / "snapshots" / ("0" * 40)
    named = [*(path.name for path in models["florence2"].iterdir()), "modeling.py", "pytorch_model.bin", "onnx/m.json"]
    fetched, lines, cached = [], [], huggingface_hub.snapshot_download

    def model_info(repository: str, files_metadata: bool):
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name, size=1000) for name in named])

    def snapshot_download(repository: str, local_files_only: bool = False, allow_patterns=None):
        if local_files_only:
            return cached(repository, cache_dir=tmp_path / "hub", local_files_only=True)
        fetched.extend(allow_patterns)
        snapshot.mkdir(parents=True, exist_ok=True)
        for name in allow_patterns:
            shutil.copy(models["florence2"] / name, snapshot)
        (refs := snapshot.parents[1] / "refs").mkdir(exist_ok=True)
        (refs / "main").write_text("0" * 40)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: SimpleNamespace(model_info=model_info))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert "some/one is not in the hub's cache" in refusal("some/one", offline=True) and not fetched
    Captioner("some/one", notify=lines.append)
    assert sorted(fetched) == sorted(path.name for path in models["florence2"].iterdir())
    assert [line[:40] for line in lines] == [
        "some/one is not in the hub's cache: look",
        "fetching 6 files of some/one, 0.0 GB, on",
    ]
    Captioner("some/one", offline=True, notify=lines.append)
    assert len(fetched) == 6 and len(lines) == 2
    (snapshot / "tokenizer.json").unlink()
    assert "--offline forbids downloading it" in refusal("some/one", offline=True)
