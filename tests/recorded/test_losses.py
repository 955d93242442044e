"""A change of code that should change no numbers changes none.

Losses of 50 steps are compared with the record, where it applies: same CPU features, same libraries. Elsewhere they are
compared with those of the commit before, computed in the same run: HEAD if fluxq/ has changes that are not committed,
else its parent. A commit that means to change numbers makes the record anew (`make recorded`) and has a line
`losses change: WHY` in its message.
"""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
from pathlib import Path

import pytest
from recorded import record

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> dict[str, list[float]]:
    known = json.loads(record.RECORD.read_text())
    if applies(known):
        return known["losses"]
    before = earlier(ROOT)
    return record.losses_of(unpacked(ROOT, before, tmp_path_factory.mktemp("earlier")))


@pytest.fixture(scope="module")
def found(expected) -> dict[str, list[float]]:
    return record.losses_of(ROOT)


@pytest.mark.parametrize("case", record.CASES)
def test_losses_are_those_of_before(case, expected, found):
    assert len(found[case]) == record.STEPS
    assert found[case] == expected[case]  # floats, as JSON has them, are equal to the bit


def test_the_earlier_commit_is_head_for_changes_and_else_its_parent(tmp_path):
    def commit(message: str) -> None:
        who = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
        assert git(tmp_path, *who, "commit", "--quiet", "--all", "--message", message) is not None

    (tmp_path / "fluxq").mkdir()
    (file := tmp_path / "fluxq" / "a.py").write_text("1")
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", "fluxq")
    commit("first")
    with pytest.raises(pytest.skip.Exception, match="no earlier commit"):
        earlier(tmp_path)
    file.write_text("2")
    assert earlier(tmp_path) == "HEAD"
    commit("second")
    assert earlier(tmp_path) == "HEAD^"
    assert (unpacked(tmp_path, "HEAD^", tmp_path / "before") / "fluxq" / "a.py").read_text() == "1"
    file.write_text("3")
    commit("third\n\nlosses change: rounding in another order")
    with pytest.raises(pytest.skip.Exception, match="rounding in another order"):
        earlier(tmp_path)


def test_a_record_applies_to_its_own_libraries_and_cpu_only():
    known = record.place() | {"losses": {}}
    assert applies(known)
    assert not applies(known | {"capability": "another"}) and not applies(known | {"packages": {}})


def applies(known: dict) -> bool:
    return record.place().items() <= known.items()


def earlier(repository: Path) -> str:
    """The commit to compare with; skips if there is none, or if the losses are said to change since then."""
    if git(repository, "status", "--porcelain", "--", "fluxq"):
        return "HEAD"
    if not git(repository, "rev-parse", "--verify", "--quiet", "HEAD^"):
        pytest.skip("the record is of another CPU or other libraries, and there is no earlier commit to compare with")
    lines = (git(repository, "log", "--format=%B", "HEAD^..HEAD") or "").splitlines()
    if changed := [line for line in lines if line.startswith("losses change: ")]:
        pytest.skip("; ".join(changed))
    return "HEAD^"


def unpacked(repository: Path, commit: str, folder: Path) -> Path:
    """`folder` with fluxq as it was at `commit`."""
    packed = subprocess.run(["git", "archive", commit, "fluxq"], cwd=repository, capture_output=True, check=True)
    with tarfile.open(fileobj=io.BytesIO(packed.stdout)) as archive:
        archive.extractall(folder, filter="data")
    return folder


def git(repository: Path, *arguments: str) -> str | None:
    """What git says; None if it fails or is not there."""
    try:
        done = subprocess.run(["git", *arguments], cwd=repository, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
