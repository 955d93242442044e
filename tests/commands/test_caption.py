"""`fluxq caption`: photographs get captions, edits are shown and trained on, contradictions are refused in pairs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from captioning import tiny
from click.testing import CliRunner
from PIL import Image

from fluxq.cli.main import main
from fluxq.commands.caption import caption_command


def run(*arguments: object):
    return CliRunner().invoke(main, ["caption", *map(str, arguments)])


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    (folder := tmp_path / "photos").mkdir()
    for i, text in enumerate(("a woman with red hair on a beach", "a woman with red hair, glasses", "")):
        Image.effect_mandelbrot((96, 96), (-2, -1, 1, 1), 20 + i).convert("RGB").save(folder / f"{i}.png")
        if text:
            (folder / f"{i}.txt").write_text(text)
    return folder


ASK = {"--model": "x", "--prompt": "x", "--max-words": 3, "--batch": 2, "--overwrite": None, "--offline": None}
EDIT = {"--remove": ["x"], "--replace": ["x", "y"], "--table": []}


@pytest.mark.parametrize("ask", ASK)
def test_options_for_a_model_and_for_edits_are_refused_in_pairs(ask, photos):
    for edit, values in EDIT.items():
        result = run(photos, ask, *([ASK[ask]] if ASK[ask] else []), edit, *values)
        sentence = f"error: {ask} is for captions that a model writes, {edit} for those that are there; run one after"
        assert result.exit_code == 2 and sentence in result.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--table", "--trigger", "zqx"], "--trigger changes nothing in a --table"),
        (["--remove", "hat, zqx", "--trigger", "a Zqx"], "--remove zqx would take out the trigger a Zqx"),
        (["--remove", "hat,,glasses"], "--remove has an empty phrase"),
        (["--replace", "hat", " "], "--replace 'hat' ' ' needs two texts; to take something out use --remove"),
        (["--replace", "hat", "hat"], "changes nothing"),
        (["--prompt", " "], "--prompt is empty"),
        (["--model", "gone/nor/an/id"], "--model gone/nor/an/id does not exist"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_changes(arguments, sentence, photos):
    before = {path.name: path.read_bytes() for path in photos.iterdir()}
    result = run(photos, *arguments)
    assert result.exit_code == 2 and sentence in result.stderr
    assert {path.name: path.read_bytes() for path in photos.iterdir()} == before


def test_edits_are_shown_kept_and_said(photos):
    result = run(
        photos, "--remove", "red hair, glasses, hat", "--replace", "woman", "person", "--trigger", "zqx", "--json"
    )
    assert result.exit_code == 0, result.output
    assert f"{photos / '0.txt'}\n  - a woman with red hair on a beach\n  + zqx, a person on a beach\n" in result.stderr
    assert "'hat' is in no caption\n" in result.stderr and "2 captions changed, of 3 images\n" in result.stderr
    assert f"the captions as they were: {photos / 'captions-backup-1'}\n" in result.stderr
    answer = json.loads(result.stdout)
    assert answer["changed"][str(photos / "1.txt")]["after"] == ["zqx, a person"] and answer["unmatched"] == ["hat"]
    assert (photos / "1.txt").read_text() == "zqx, a person\n" and not (photos / "2.txt").exists()
    assert (photos / "captions-backup-1" / "1.txt").read_text() == "a woman with red hair, glasses"


def test_the_table_has_what_every_caption_says_first(photos):
    result = run(photos, "--table", "--json")
    assert result.stderr.splitlines()[-1] == "     2 of 2  woman with red hair"
    assert json.loads(result.stdout) == {"table": [{"phrase": "woman with red hair", "captions": 2, "of": 2}]}
    answer = caption_command([photos], remove=["red hair"], table=True)
    assert [row["phrase"] for row in answer["table"]] == ["woman"]


@pytest.mark.slow
def test_an_edited_caption_is_encoded_again(photos, tmp_path):
    cache = [str(photos), "--model", "nano", "--cache", str(tmp_path / "cache")]

    def texts() -> dict[str, list[str]]:
        assert CliRunner().invoke(main, ["cache", *cache]).exit_code == 0
        (dataset,) = (tmp_path / "cache" / "datasets").glob("*.json")
        found = json.loads(dataset.read_text())
        return {example["name"]: example["text"] for example in found["examples"]}

    before = texts()
    run(photos, "--remove", "glasses")
    after = texts()
    assert [name for name in before if before[name] != after[name]] == ["photos/1.png"]


@pytest.mark.slow
def test_photographs_are_captioned_once(photos, tmp_path):
    torch.manual_seed(7)
    model = tiny.florence2(tmp_path / "florence2")
    (photos / "3.png").write_bytes((photos / "0.png").read_bytes()[:2000])
    common = [photos, "--model", model, "--max-words", 9, "--trigger", "zqx"]
    result = run(*common, "--json")
    assert result.exit_code == 2, "an image could not be decoded"
    assert "2 of 4 images have a caption, which --overwrite replaces\n" in result.stderr
    assert f"2 images to caption with {model}\non the CPU, 1 image at a time\n" in result.stderr
    answer, text = json.loads(result.stdout), (photos / "2.txt").read_text()
    assert answer["captions"] == {str(photos / "2.txt"): text.strip()} and text.startswith("zqx, ")
    assert len(answer["unread"]) == 1 and "3.png cannot be read (" in answer["unread"][0]
    assert "--skip-bad" not in result.output and not (photos / "3.txt").exists()
    (photos / "3.png").unlink()
    again = run(*common)
    assert again.exit_code == 0 and again.stderr == "" and again.stdout.startswith("3 of 3 images have a caption")
    replaced = run(*common, "--overwrite", "--batch", 2)
    assert replaced.exit_code == 0, replaced.output
    assert (photos / "captions-backup-1" / "0.txt").read_text() == "a woman with red hair on a beach"
    assert (photos / "2.txt").read_text() == text and (photos / "0.txt").read_text().startswith("zqx, ")
