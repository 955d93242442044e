"""A command that a signal ends while it writes leaves nothing behind, under any name."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from click.testing import CliRunner

from fluxq import nano
from fluxq.caching.store import KINDS, Store
from fluxq.cli.main import main
from fluxq.formats import atomic
from fluxq.formats.checkpoint.files import Checkpoint, write_safetensors
from fluxq.formats.lora.algebra import Adapter
from fluxq.formats.lora.write import save_lora
from fluxq.model import FluxConfig
from fluxq.nano import drawing

COMMANDS = {
    "quantize": "quantize {flux} {out}/x.safetensors",
    "convert": "lora convert {lora} {out}/x.safetensors --to diffusers",
    "convert to a folder": "lora convert {lora} {out}/x --to peft",
    "resize": "lora resize {lora} {out}/x.safetensors --rank 1",
    "merge": "lora merge {lora} {lora} --out {out}/x.safetensors",
    "merge into a model": "lora merge {lora} --base {flux} --out {out}/x.safetensors",
    "extract": "lora extract {flux} {tuned} {out}/x.safetensors --rank 1",
}
SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")


pytestmark = pytest.mark.skipif(os.name == "nt", reason="POSIX signals")


@contextmanager
def default_handler(name: str) -> Iterator[None]:
    """The signal is not ignored, as under nohup."""
    handler = signal.default_int_handler if name == "SIGINT" else signal.SIG_DFL
    before = signal.signal(getattr(signal, name), handler)
    try:
        yield
    finally:
        signal.signal(getattr(signal, name), before)


@pytest.mark.parametrize(("command", "name"), zip(COMMANDS, (SIGNALS * 3)[: len(COMMANDS)], strict=True))
def test_a_signal_leaves_no_temporary_file(tmp_path, monkeypatch, command, name):
    (out := tmp_path / "out").mkdir()
    save_lora(lora := tmp_path / "a.safetensors", {"txt_in": Adapter(torch.ones(2, 128), torch.ones(192, 2), 1.0)},
              FluxConfig.nano())  # fmt: skip
    tuned = tmp_path / "tuned.safetensors"
    if command == "extract":
        changed = {key: Checkpoint(nano.FLUX).get(key) for key in Checkpoint(nano.FLUX).keys()}
        changed["single_blocks.0.linear1.weight"] += 1
        write_safetensors(tuned, changed)
    seen = []

    def interrupted(path, flags):
        seen.append(os.listdir(out))
        signal.raise_signal(getattr(signal, name))

    monkeypatch.setattr(atomic, "_flush", interrupted)
    with default_handler(name):
        arguments = COMMANDS[command].format(flux=nano.FLUX, lora=lora, out=out, tuned=tuned)
        result = CliRunner().invoke(main, arguments.split())
    assert result.exit_code == 128 + getattr(signal, name), result.output
    assert len(seen) == 1 and ".tmp-" in seen[0][0] and not os.listdir(out)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "finished"), [("SIGTERM", 0), ("SIGHUP", 1), ("SIGINT", 3)])
def test_a_signal_while_caching_keeps_what_is_finished(tmp_path, monkeypatch, name, finished):
    (tmp_path / "photos").mkdir()
    for i, (image, caption) in enumerate(drawing.concept(seed=1, count=2)):
        image.save(tmp_path / "photos" / f"{i}.png")
        (tmp_path / "photos" / f"{i}.txt").write_text(caption)
    command = ["cache", str(tmp_path / "photos"), "--model", "nano", "--cache", str(tmp_path / "cache")]
    real, records = atomic._flush, []

    def interrupted(path, flags):
        records.extend([path] if path.suffix == ".safetensors" else [])
        if len(records) > finished:
            signal.raise_signal(getattr(signal, name))
        real(path, flags)

    monkeypatch.setattr(atomic, "_flush", interrupted)
    with default_handler(name):
        result = CliRunner().invoke(main, command)
    assert result.exit_code == 128 + getattr(signal, name), result.output
    assert not [path for path in tmp_path.rglob("*") if ".tmp-" in path.name]
    store = Store(tmp_path / "cache")
    assert not store.verify() and sum(len(store.records(kind)) for kind in KINDS) == finished
    monkeypatch.undo()
    assert CliRunner().invoke(main, command).exit_code == 0
