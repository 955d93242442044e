"""Notes and obstacles from the facts about a machine; testing them needs no GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner

from fluxq.cli.main import main
from fluxq.memory import machine
from fluxq.memory.machine import (
    GPUBytes,
    InstalledGPU,
    Machine,
    SpillWatch,
    free_gpu_bytes,
    has_nvidia_driver,
    may_spill,
    notes,
    obstacle,
    ram_bytes,
    read_machine,
    spilled,
)

ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_120", "compute_120")
ADA = InstalledGPU("RTX 4090", (8, 9), 24 << 30)
GOOD = Machine("2.13.0+cu130", "13.0", False, True, False, ADA, ARCHITECTURES)
NO_CUDA = replace(GOOD, torch="2.13.0+cpu", cuda=None, gpu=None, architectures=())


def test_a_good_gpu_gives_no_note():
    assert notes(GOOD) == [] and obstacle(GOOD) is None


def test_torch_without_cuda_despite_a_driver_is_noted_with_the_remedy():
    (note,) = notes(NO_CUDA)
    assert "this torch (2.13.0+cpu) was built without CUDA" in note and "pip install --force-reinstall torch" in note
    assert "pytorch.org" in note and "\n" not in note and "http" not in note


def test_a_gpu_without_triton_is_noted_in_one_line():
    (note,) = notes(replace(GOOD, triton=False))
    assert "Triton is not installed" in note and "triton-windows" in note and "\n" not in note
    assert notes(replace(NO_CUDA, driver=False, triton=False)) == []


@pytest.mark.parametrize("change", [{"driver": False}, {"hidden": True}, {"rocm": True}])
def test_no_driver_or_a_hidden_gpu_gives_no_note(change):
    assert notes(replace(NO_CUDA, **change)) == []


def test_a_driver_too_old_for_torch_is_noted():
    (note,) = notes(replace(GOOD, gpu=None, architectures=()))
    assert "built for CUDA 13.0 but finds no GPU" in note and "update the NVIDIA driver" in note


@pytest.mark.parametrize("capability", [(7, 5), (7, 0), (6, 1)])
def test_emulated_bf16_is_noted(capability):
    """torch multiplies bf16 on every GPU that it has code for; below sm_80 it uses fp32."""
    old = replace(
        GOOD, gpu=InstalledGPU("RTX 2080", capability, 8 << 30), architectures=("sm_50", "sm_60", "sm_70", "sm_75")
    )
    (note,) = notes(old)
    assert "has no bf16 arithmetic: torch emulates it" in note and f"sm_{capability[0]}{capability[1]}" in note
    assert obstacle(old) is None


@pytest.mark.parametrize(
    ("capability", "runs"),
    [((8, 6), True), ((8, 9), True), ((12, 0), True), ((13, 0), True), ((6, 1), False), ((10, 0), False)],
)
def test_a_gpu_that_torch_has_no_code_for_is_refused(capability, runs):
    """Code runs on its own generation, from its own version up; PTX runs on every later one."""
    sentence = obstacle(replace(GOOD, gpu=InstalledGPU("the GPU", capability, 8 << 30)))
    assert (sentence is None) is runs
    if sentence:
        assert "has no code for the the GPU (sm_" in sentence and "CUDA_VISIBLE_DEVICES=-1" in sentence


def test_a_gpu_that_cannot_hold_bf16_is_refused():
    assert "cannot compute in bf16 on the RTX 4090 (sm_89)" in (obstacle(replace(GOOD, bf16=False)) or "")


@pytest.mark.parametrize(
    ("system", "there", "programs", "found"),
    [
        ("Windows", {"nvcuda.dll"}, set(), True),
        ("Windows", set(), {"nvidia-smi"}, False),
        ("Linux", {"nvidiactl", "libcuda.so.1"}, set(), True),
        ("Linux", {"nvidiactl"}, {"nvidia-smi"}, True),
        ("Linux", {"dxg", "libcuda.so.1"}, set(), True),
        ("Linux", {"libcuda.so.1"}, {"nvidia-smi"}, False),
        ("Linux", {"dxg"}, set(), False),
        ("Darwin", set(), set(), False),
    ],
)
def test_the_driver_is_detected_from_files(system, there, programs, found):
    """On Linux a library alone, as in container images, is not a driver: there must be a device too."""

    def exists(path: str) -> bool:
        return path.replace("\\", "/").rsplit("/", 1)[-1] in there

    assert has_nvidia_driver(system, exists, lambda name: name if name in programs else None) is found


def test_this_machine_is_read():
    seen, has, free = read_machine(), ram_bytes(), free_gpu_bytes()
    assert (free is None) if seen.gpu is None else (free is None or 0 < free <= seen.gpu.nbytes)
    assert seen.torch and isinstance(notes(seen), list)
    if has is not None:
        assert 0 < has[1] <= has[0]


def test_memory_that_torch_reserved_but_does_not_use_is_free(monkeypatch):
    values = dict(is_available=True, mem_get_info=(6 << 30, 8 << 30), memory_reserved=2 << 30, memory_allocated=1 << 30)
    for name, value in values.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    assert free_gpu_bytes() == 7 << 30


def test_every_command_notes_it_once_on_stderr(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "read_machine", lambda: NO_CUDA)
    monkeypatch.chdir(tmp_path)
    for command in ("train", "cache", "sample", "check"):
        result = CliRunner().invoke(main, [command, "--model", "nano", "--json"])
        assert result.stderr.count("note: an NVIDIA driver is installed") == 1, command
        assert "note:" not in result.stdout


def test_a_gpu_that_cannot_be_used_stops_every_command_but_check(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "read_machine", lambda: replace(GOOD, bf16=False))
    monkeypatch.chdir(tmp_path)
    for command in ("train", "cache", "sample", "demo"):
        result = CliRunner().invoke(main, [command, "--json"])
        assert result.exit_code == 2 and "cannot compute in bf16" in result.stderr, command
    result = CliRunner().invoke(main, ["check", "--model", "nano", "--json"])
    assert result.exit_code == 0 or "cannot compute in bf16" in result.stdout


GIB = 1 << 30


@pytest.mark.parametrize(
    ("before", "now", "expected"),
    [
        ((12, 11, 0), (12, 1, 9.5), 0),  # all of it on the GPU
        ((12, 11, 0), (12, 0.1, 10.8), 0),  # full to the brim
        ((12, 11, 0), (12, 0.1, 13), 2.1),  # more than the GPU has
        ((12, 9, 0), (12, 0.2, 10), 1.2),  # others have 3 GiB, and keep them
        ((12, 9, 0), (12, 2, 9.9), 0.9),  # more than was free, whatever is free now
        ((12, 9, 0), (12, 4, 7), 0),  # others have given some back meanwhile: the GPU is not full
        ((12, 9, 1), (12, 0.1, 9.9), 0),
        ((12, 10, 0), (12, 0.1, 10.1), 0),  # too little to tell
    ],
)
def test_what_cannot_be_on_the_gpu_counts_as_spilled(before, now, expected):
    before, now = (GPUBytes(*(int(n * GIB) for n in numbers)) for numbers in (before, now))
    assert spilled(before, now) == pytest.approx(expected * GIB, abs=0.01 * GIB)


def test_a_spill_is_reported_once_with_the_remedy():
    states = iter([GPUBytes(12 * GIB, 11 * GIB, 0), GPUBytes(12 * GIB, 5 * GIB, 6 * GIB)])
    watch = SpillWatch(lambda: next(states, GPUBytes(12 * GIB, 0, 14 * GIB)))
    assert watch.note() is None
    note = watch.note()
    assert note and "about 3.0 GiB" in note and "--vram" in note and "Prefer No Sysmem Fallback" in note
    assert watch.note() is None
    assert SpillWatch(lambda: None).note() is None


def test_windows_and_wsl_may_spill():
    assert may_spill("Windows", "11") and may_spill("Linux", "5.15.153.1-microsoft-standard-WSL2")
    assert not may_spill("Linux", "6.8.0-45-generic")
