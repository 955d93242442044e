"""The sdist, and the wheel that is built from it, have every file of the package: its tables, the toy model and its
vocabularies. CI also installs that wheel and runs the demo from it (.ci/run), and says what its disk has no room for.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"


def tracked() -> list[str]:
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a clone")
    return done.stdout.split("\n")[:-1]


def built(kind: str, folder: Path, out: Path) -> Path:
    pytest.importorskip("setuptools", "77")
    command = [sys.executable, "-c", BUILD, kind, str(out)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return out / done.stdout.split("\n")[-2]


def test_the_wheel_of_the_sdist_has_every_file_of_the_package_and_no_other(tmp_path):
    files = [name for name in tracked() if (ROOT / name).is_file()]
    for name in files:
        (tmp_path / "clone" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "clone" / name).write_bytes((ROOT / name).read_bytes())
    with tarfile.open(built("build_sdist", tmp_path / "clone", tmp_path)) as sdist:
        sdist.extractall(tmp_path / "sdist", filter="data")
    (unpacked,) = (tmp_path / "sdist").iterdir()
    with zipfile.ZipFile(built("build_wheel", unpacked, tmp_path)) as wheel:
        package = {name for name in wheel.namelist() if ".dist-info/" not in name}
        assert package == {name for name in files if name.startswith("fluxq/")}
        for name in package:
            assert wheel.read(name) == (ROOT / name).read_bytes()


@pytest.mark.skipif(sys.platform != "linux" or shutil.which("g++") is None, reason="where CI has an emulated GPU")
@pytest.mark.parametrize(
    ("gib", "said"),
    [
        (6, ["6 GiB are free here and 6 GiB for temporary files", "the disk is too full", "failed with 6 GiB free"]),
        (16, ["LEFT OUT: the emulated GPU does not fit", "activate: No such file", "failed with 16 GiB free"]),
    ],
)
def test_ci_says_what_it_needs_what_is_free_and_what_failed(gib, said, tmp_path):
    """Nothing is installed: `make` does nothing here, so that the environment is missing."""
    for name in (".ci/run", "README.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    disk = f"echo Filesystem; echo /dev/disk 0 0 {gib << 20} 0% /"
    for name, does in (("df", disk), ("make", "exit 0")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / name).chmod(0o755)
    path = {name: value for name, value in os.environ.items() if name != "EMULATED_GPU_PYTHON"}
    path["PATH"] = f"{tmp_path}:{path['PATH']}"
    done = subprocess.run([tmp_path / ".ci" / "run"], env=path, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert not [line for line in said if line not in done.stdout + done.stderr]
