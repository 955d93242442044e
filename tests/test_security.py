"""What SECURITY.md promises: nothing in a file is run, no path in a file leads out of its folder, and text in a file
reaches the terminal as text only. Damaged files: tests/fuzz. No network and no other program: tests/short_demo.py.
"""

from __future__ import annotations

import ast
import io
import json
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from rich.table import Table
from test_imports import MODULES

from fluxq.cli.main import main
from fluxq.console import SafeConsole
from fluxq.data.dataset import Dataset
from fluxq.errors import WrongRequest
from fluxq.formats.checkpoint.files import PICKLE_SUFFIXES, Checkpoint, write_safetensors
from fluxq.formats.checkpoint.shards import Shards
from fluxq.formats.npz import NpzFile
from fluxq.models.hub import hub_id
from fluxq.sampling.requests import Request
from fluxq.sampling.sheets import labeled_grid, save_image
from fluxq.training.defaults import _file_name

pytestmark = pytest.mark.slow

# --- the source ---

UNPICKLERS = {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
NETWORK = {"urllib", "http", "requests", "httpx", "aiohttp", "ftplib", "smtplib", "webbrowser"}
RUNS_CODE = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.hub.load", "pty.spawn"}
MAY = {  # what is forbidden elsewhere -> the modules that need it
    "huggingface_hub": {"fluxq.models.hub", "fluxq.formats.tokenizers"},
    "socket": {"fluxq.training.stopping"},  # a pair within the process, which signals wake
    "subprocess": {"fluxq.memory.conditions"},  # nvidia-smi, for the GPU's clock and temperature
}


def faults(source: str, module: str = "") -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""][node.level :]
            for name in (name.split(".")[0] for name in names):
                if name in UNPICKLERS | NETWORK or module not in MAY.get(name, {module}):
                    yield f"line {node.lineno} imports {name}"
        if isinstance(node, ast.Call):
            called, options = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
            if called in RUNS_CODE or "trust_remote_code" in options or options.get("shell", "False") != "False":
                yield f"line {node.lineno} calls {called}"
            if called == "torch.load" and options.get("weights_only") != "True":
                yield f"line {node.lineno} unpickles"
            if called in ("np.load", "numpy.load", "np.lib.format.read_array"):
                yield f"line {node.lineno} may unpickle"


def test_no_module_unpickles_runs_text_or_uses_the_network():
    found = {module: list(faults(path.read_text(encoding="utf-8"), module)) for module, path in MODULES.items()}
    assert not {module: lines for module, lines in found.items() if lines}


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from pickle import load",
        "import subprocess",
        "import http.client",
        "from huggingface_hub import HfApi",
        "eval(text)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "os.system(text)",
        "f(trust_remote_code=True)",
        "run(text, shell=True)",
    ],
)
def test_what_is_forbidden_is_noticed(line):
    assert list(faults(line))


# --- files ---


class Planted:
    def __reduce__(self):
        return Path.touch, (Path("run"),)


@pytest.mark.parametrize("suffix", [*sorted(PICKLE_SUFFIXES), ".safetensors"])
def test_a_pickle_is_refused_whatever_its_name_and_not_run(suffix, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Planted()}, "weights" + suffix)
    with pytest.raises(WrongRequest, match="is a pickle checkpoint, which can run hidden code"):
        Checkpoint("weights" + suffix)
    assert not Path("run").exists()


def test_objects_in_an_npz_are_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("a.npz", latents=np.array([Planted()], object))
    with pytest.raises(WrongRequest, match="more than numbers"):
        NpzFile(Path("a.npz"))
    assert not Path("run").exists()


OUT_OF_THE_FOLDER = ("../x", "/etc/x", "a/../../x", "..\\x", "C:\\x", "sub/x")


@pytest.mark.parametrize("name", OUT_OF_THE_FOLDER)
def test_an_index_names_only_files_of_its_folder(name, tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": f"{name}.safetensors"}}))
    with pytest.raises(WrongRequest, match="not a .safetensors file in the same folder"):
        Shards(index)


@pytest.mark.parametrize("name", OUT_OF_THE_FOLDER)
def test_a_dataset_names_only_records_of_its_cache(name, tmp_path):
    data = {"version": 1, "examples": [], "prompts": {"": name}, "t5_length": 4}
    (tmp_path / "d.json").write_text(json.dumps(data))
    with pytest.raises(WrongRequest, match="is not the key of text"):
        Dataset.load(tmp_path / "d.json")


@pytest.mark.parametrize("name", OUT_OF_THE_FOLDER)
def test_an_archive_is_read_where_it_is(name, tmp_path):
    np.save(tmp_path / "a.npy", np.ones(2))
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.write(tmp_path / "a.npy", f"{name}.npy")
    before = sorted(tmp_path.rglob("*"))
    assert [NpzFile(tmp_path / "a.npz").get(key).sum() for key in NpzFile(tmp_path / "a.npz").shapes] == [2]
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("text", [*OUT_OF_THE_FOLDER[:5], "a/..", "../a", "a/b/c", "a/b.safetensors", "-a/b", "a/\x1b"])
def test_what_is_not_a_hub_id_is_not_looked_up(text):
    assert hub_id(Path(text)) is None


@pytest.mark.parametrize("text", [*OUT_OF_THE_FOLDER, "a\nb", "\x1b[2Jx", "..x"])
def test_a_trigger_or_name_becomes_the_name_of_one_file(text, tmp_path):
    name = _file_name(text)
    assert name.isprintable() and (tmp_path / name).resolve().parent == tmp_path.resolve()
    assert not set(name) & set('/\\:<>"|?*')


# --- text ---

HOSTILE = {
    "escape": "\x1b]0;title\x07\x1b[2J",
    "line": "x\nerror: forged",
    "order": "\u202egnp.exe\u2066",
    "page": "<script>alert(1)</script>[bold]x[/bold]",
    "control": "\x9b31m\x7f\r\x08",
}


def clean(text: str) -> None:
    """Every line is printable, and none is a forged one."""
    assert all(line.isprintable() for line in text.split("\n")), ascii(text)
    assert not any(line.startswith("error: forged") for line in text.split("\n"))


@pytest.fixture(params=HOSTILE, ids=str)
def hostile(request) -> str:
    return HOSTILE[request.param]


def run(*arguments) -> str:
    done = CliRunner().invoke(main, [str(a) for a in arguments])
    assert done.exit_code in (0, 2), done.output
    return done.output


def test_metadata_of_a_lora_is_printed_as_text(hostile, tmp_path):
    down, up = torch.ones(2, 192), torch.ones(192, 2)
    tensors = {"lora_down.weight": down, "lora_up.weight": up}
    metadata = {"modelspec.title": hostile, "modelspec.trigger_phrase": hostile, "ss_sd_model_name": hostile}
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {f"lora_unet_double_blocks_0_img_attn_proj.{k}": v for k, v in tensors.items()}, metadata)
    for command in (("lora", "info"), ("check",)):
        output = run(*command, path)
        clean(output)
        assert len(output) > 200, "its title is shown"


def test_names_of_tensors_are_printed_as_text(hostile, tmp_path):
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {hostile: torch.ones(1), f"single_blocks.0.{hostile}": torch.ones(1)})
    clean(run("check", path))
    clean(run("quantize", path, tmp_path / "b.safetensors"))


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such names")
def test_names_of_files_and_captions_are_printed_as_text(hostile, tmp_path):
    hostile = hostile.replace("/", "")
    folder = tmp_path / hostile
    folder.mkdir()
    for i in range(2):
        Image.new("RGB", (96, 96)).save(folder / f"{i}{hostile}.png")
        (folder / f"{i}{hostile}.txt").write_text(hostile)
    (folder / f"bad{hostile}.png").write_bytes(b"x")
    for more in ((), ("--skip-bad",)):
        output = run("check", folder, "--model", "nano", "--trigger", hostile, *more)
        clean(output)
    clean(run("lora", "info", folder / hostile))
    clean(run("train", "--config", folder / hostile))


def test_tables_print_text(hostile):
    console = SafeConsole(width=200, markup=False, file=(file := io.StringIO()))
    table = Table(hostile.replace("\n", " "))
    table.add_row(hostile.replace("\n", " "))
    console.print(table)
    console.print(hostile)
    clean(file.getvalue())


def test_labels_and_settings_of_images_are_text(hostile, tmp_path):
    image = Image.new("RGB", (32, 32))
    for text in (hostile, "\udce9", "\0", "", " ", "x" * 500, "\u732b"):
        sheet = labeled_grid([[image]], [text], [text])
        save_image(sheet, tmp_path / "a.png", Request(text, 1, 32, 32), LoRA=text)
        assert "Steps: 20" in Image.open(tmp_path / "a.png").text["parameters"]
