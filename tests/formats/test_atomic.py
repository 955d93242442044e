"""Files are written completely or not at all."""

import errno
import os
import re
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest

from fluxq.errors import WrongRequest
from fluxq.formats import atomic
from fluxq.formats.atomic import atomic_folder, atomic_path, remove_leftover


def test_atomic_path_keeps_the_suffix_and_makes_folders(tmp_path):
    with atomic_path(tmp_path / "new" / "folder" / "loss.png") as temporary:
        assert temporary.suffix == ".png" and temporary.parent == tmp_path / "new" / "folder"
        temporary.write_text("new")
    assert [path.name for path in (tmp_path / "new" / "folder").iterdir()] == ["loss.png"]


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, RuntimeError])
def test_interrupted_write_keeps_the_old_file(tmp_path, interruption):
    path = tmp_path / "x.json"
    path.write_text("old")

    def write_half():
        with atomic_path(path) as temporary:
            temporary.write_text("ne")
            raise interruption

    with pytest.raises(interruption):
        write_half()
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["x.json"]


def test_folders_made_for_a_file_that_never_came_are_removed_and_others_stay(tmp_path):
    (tmp_path / "old").mkdir()
    for folder in ("old", "old/new", "new/newer"):
        with pytest.raises(KeyboardInterrupt), atomic_path(tmp_path / folder / "x.json") as temporary:
            temporary.write_text("ne")
            raise KeyboardInterrupt
    (tmp_path / "file").write_text("")
    with pytest.raises(WrongRequest), atomic_path(tmp_path / "file" / "new" / "x.json"):
        pass
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "old"]


@pytest.mark.skipif(os.name == "nt", reason="needs flock")
def test_what_a_killed_process_left_is_used_again(tmp_path):
    (tmp_path / ".x.tmp-0.json").write_text("a long half")
    with atomic_path(tmp_path / "x.json") as temporary:
        assert temporary.name == ".x.tmp-0.json"
        temporary.write_text("new")
    (tmp_path / ".y.tmp-0").mkdir()
    (tmp_path / ".y.tmp-0" / "half").write_text("1")
    with atomic_folder(tmp_path / "y") as temporary:
        (temporary / "whole").write_text("2")
    assert os.listdir(tmp_path / "y") == ["whole"]
    (tmp_path / ".z.tmp-0").symlink_to(tmp_path / "x.json")
    with atomic_path(tmp_path / "z") as temporary:
        temporary.write_text("not through a link")
    (tmp_path / "z").unlink(), (tmp_path / ".z.tmp-0").unlink()
    (tmp_path / ".x.tmp-0.json").write_text("a long half")
    remove_leftover(tmp_path / "x.json")
    assert sorted(os.listdir(tmp_path)) == ["x.json", "y"] and (tmp_path / "x.json").read_text() == "new"


def test_two_writers_of_one_path_do_not_meet(tmp_path):
    with atomic_path(tmp_path / "x") as first:
        first.write_text("first")
        with atomic_path(tmp_path / "x") as second:
            second.write_text("second")
        remove_leftover(tmp_path / "x")
        assert first.read_text() == "first" and (tmp_path / "x").read_text() == "second"
    with pytest.raises(WrongRequest, match="y cannot be written"), atomic_folder(tmp_path / "y") as first:
        (first / "own").write_text("1")
        with atomic_folder(tmp_path / "y") as second:
            (second / "own").write_text("2")
        assert os.listdir(first) == os.listdir(tmp_path / "y") == ["own"]
    assert sorted(os.listdir(tmp_path)) == ["x", "y"] and (tmp_path / "x").read_text() == "first"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), OSError(30, "Read-only file system")])
def test_an_error_names_the_users_path(tmp_path, error):
    """Not the temporary one."""
    named = pytest.raises(WrongRequest, match=f"^{re.escape(str(tmp_path))}/[xy](/z)? cannot be written")
    with named, atomic_path(tmp_path / "x"):
        raise error
    with named, atomic_folder(tmp_path / "y"):
        raise error
    with named, atomic_folder(tmp_path / "y") as temporary, atomic_path(temporary / "z"):
        raise error
    with named, patch.object(Path, "mkdir", side_effect=OSError(*error.args, str(tmp_path / ".y.tmp-0"))):
        atomic_folder(tmp_path / "y").__enter__()
    assert not os.listdir(tmp_path)


def test_error_about_another_file_is_unchanged(tmp_path):
    with pytest.raises(FileNotFoundError, match="elsewhere"), atomic_path(tmp_path / "x"):
        Path("/nowhere/elsewhere").read_bytes()
    with pytest.raises(TimeoutError), atomic_path(tmp_path / "x"):
        raise TimeoutError("a server")


def test_a_full_disk_is_named_by_its_file_and_the_part_that_was_written_counts_as_free(tmp_path, monkeypatch):
    monkeypatch.setattr(
        atomic.shutil, "disk_usage", lambda folder: SimpleNamespace(total=9, free=len(os.listdir(folder)))
    )
    with pytest.raises(WrongRequest) as refused, atomic_path(tmp_path / "x.json", 7) as temporary:
        temporary.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert str(refused.value).startswith(
        f"{tmp_path / 'x.json'} cannot be written because the disk is full (7 bytes are"
    )
    assert "needed, 0 are free" in str(refused.value)


@pytest.mark.parametrize("held_for", [3, 1000])
def test_a_file_that_another_program_holds_open_is_waited_for(tmp_path, monkeypatch, held_for):
    """On Windows a file cannot be replaced while a virus scanner has it open, which takes less than a second."""
    (path := tmp_path / "x.json").write_text("old")
    tries, pauses, replace = [], [], os.replace

    def held(source, target):
        tries.append(source)
        if len(tries) <= held_for:
            raise PermissionError(13, "Access is denied", str(target))
        replace(source, target)

    monkeypatch.setattr(atomic, "IS_WINDOWS", True)
    monkeypatch.setattr(atomic.time, "sleep", pauses.append)
    monkeypatch.setattr(atomic.os, "replace", held)
    refused = pytest.raises(WrongRequest, match=r"x\.json cannot be written \(Access is denied\); choose")
    with refused if held_for > 3 else nullcontext(), atomic_path(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == ("old" if held_for > 3 else "new") and os.listdir(tmp_path) == ["x.json"]
    assert len(pauses) == 3 if held_for == 3 else 4 < sum(pauses) < 6


@pytest.mark.skipif(os.name == "nt", reason="needs flock")
def test_nothing_is_left_where_files_cannot_be_locked(tmp_path):
    with patch("fcntl.flock", side_effect=OSError(errno.ENOLCK, "No locks available")):
        with atomic_path(tmp_path / "x.json") as temporary:
            temporary.write_text("new")
        with atomic_folder(tmp_path / "y") as temporary:
            (temporary / "z").write_text("new")
    assert sorted(os.listdir(tmp_path)) == ["x.json", "y"] and (tmp_path / "y" / "z").exists()
