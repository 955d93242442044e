"""A command that a signal ends while it writes leaves nothing behind, under any name."""

import os
import signal

import pytest
import torch
from click.testing import CliRunner

from fluxq import nano
from fluxq.cli.main import main
from fluxq.formats import atomic
from fluxq.formats.lora.algebra import Adapter
from fluxq.formats.lora.write import save_lora
from fluxq.model import FluxConfig

COMMANDS = {
    "quantize": "quantize {flux} {out}/x.safetensors",
    "convert": "lora convert {lora} {out}/x.safetensors --to diffusers",
    "convert to a folder": "lora convert {lora} {out}/x --to peft",
    "resize": "lora resize {lora} {out}/x.safetensors --rank 1",
    "merge": "lora merge {lora} {lora} --out {out}/x.safetensors",
    "merge into a model": "lora merge {lora} --base {flux} --out {out}/x.safetensors",
}


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize(("command", "name"), zip(COMMANDS, ("SIGINT", "SIGTERM", "SIGHUP") * 2, strict=True))
def test_a_signal_leaves_no_temporary_file(tmp_path, monkeypatch, command, name):
    (out := tmp_path / "out").mkdir()
    save_lora(lora := tmp_path / "a.safetensors", {"txt_in": Adapter(torch.ones(2, 128), torch.ones(192, 2), 1.0)},
              FluxConfig.nano())  # fmt: skip
    seen = []

    def interrupted(path, flags):
        seen.append(os.listdir(out))
        signal.raise_signal(getattr(signal, name))

    monkeypatch.setattr(atomic, "_flush", interrupted)
    handler = signal.default_int_handler if name == "SIGINT" else signal.SIG_DFL  # not ignored, as under nohup
    before = signal.signal(getattr(signal, name), handler)
    try:
        result = CliRunner().invoke(main, COMMANDS[command].format(flux=nano.FLUX, lora=lora, out=out).split())
    finally:
        signal.signal(getattr(signal, name), before)
    assert result.exit_code == 128 + getattr(signal, name), result.output
    assert len(seen) == 1 and ".tmp-" in seen[0][0] and not os.listdir(out)
