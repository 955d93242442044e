"""The sdist, and the wheel that is built from it, have every file of the package: its tables, the toy model and its
vocabularies. CI also installs that wheel and runs the demo from it (.ci/run).
"""

from __future__ import annotations

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
