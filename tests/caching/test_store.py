"""The cache on disk: keys, whole records or none, remembered hashes, verifying and pruning."""

import json
import os
import shutil
import threading
from dataclasses import replace
from hashlib import file_digest

import pytest
import torch

from fluxq.caching import store as module
from fluxq.caching.hashes import Hashes
from fluxq.caching.store import Store, Text, imported_latents_key, imported_text_key, latents_key, text_key
from fluxq.data.dataset import Dataset, Entry
from fluxq.errors import WrongRequest
from fluxq.formats.checkpoint import files


def some_text(caption: str = "a dog", length: int = 5) -> Text:
    return Text(torch.randn(length, 8).bfloat16(), torch.randn(6), caption, tokens=3, truncated=False)


def dataset(latents: str, text: str, prompt: str) -> Dataset:
    entry = Entry("photos/a.png", "/photos/a.png", 10, 11, 2, (64, 48), (latents,), (text,))
    return Dataset((entry,), {"": prompt}, t5_length=5, skipped=("one",), notes=("two", "three"))


def test_records_come_back_exactly(tmp_path):
    store, text = Store(tmp_path), some_text('größe, "dog"\n')
    mean, spread = torch.randn(16, 4, 6), torch.rand(16, 4, 6)
    store.put_latents("ab", mean, spread, "photos/a.png")
    store.put_text("cd", text)
    assert all(torch.equal(a, b) for a, b in zip(Store(tmp_path).latents("ab"), (mean, spread), strict=True))
    found = Store(tmp_path).text("cd")
    assert torch.equal(found.t5, text.t5) and torch.equal(found.clip, text.clip)
    assert found.t5.dtype == torch.bfloat16 and found.clip.dtype == torch.float32
    assert (found.caption, found.tokens, found.truncated) == (text.caption, 3, False)


@pytest.mark.parametrize("cuts", [(False, False), (False, True), (True, True)])
def test_truncation_is_remembered(cuts, tmp_path):
    store = Store(tmp_path)
    store.put_text("ab", replace(some_text(), truncated=cuts[0], clip_truncated=cuts[1]))
    assert store.truncated("ab") == cuts
    text = store.text("ab")
    assert (text.truncated, text.clip_truncated) == cuts


def test_keys_depend_on_every_part():
    keys = {
        latents_key("p", (64, 48), (64, 48), "a"),
        latents_key("q", (64, 48), (64, 48), "a"),
        latents_key("p", (65, 48), (64, 48), "a"),
        latents_key("p", (64, 48), (48, 64), "a"),
        latents_key("p", (64, 48), (64, 48), "b"),
        latents_key("p", (64, 48), (64, 48), "a", recolored=True),
        text_key("p", "t", "c", "k", 5),
        text_key("q", "t", "c", "k", 5),
        text_key("p", "u", "c", "k", 5),
        text_key("p", "t", "d", "k", 5),
        text_key("p", "t", "c", "l", 5),
        text_key("p", "t", "c", "k", 6),
        text_key("p", "t", "c", "k", 5, masked=True),
    }
    assert len(keys) == 13 and latents_key("p", (64, 48), (64, 48), "a") in keys


def test_keys_stay_what_they_are():
    """Another key for the same input would leave every record in users' caches unused, and encode them again."""
    assert latents_key("p", (64, 48), (64, 32), "a") == "6da09da8986a9a927ba9bfe5e37824ae"
    assert text_key("p", "t", "c", "k", 5) == "084a9e2ae233cda384818a05ec44d5e7"
    assert imported_latents_key("p", (64, 48), (64, 32), 1) == "imported-8fb05cdc819ca33e7ebe80d0d0aeea56"
    assert imported_text_key("p", 5) == "imported-4ea687df274ec3a336c2634a4b95135e"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_never_stored(tmp_path, bad):
    store = Store(tmp_path)
    with pytest.raises(ValueError, match=r"non-finite numbers for photos/a.png \(mean\)"):
        store.put_latents("ab", torch.full((16, 2, 2), bad), torch.ones(16, 2, 2), "photos/a.png")
    with pytest.raises(ValueError, match=r"non-finite numbers for 'a dog' \(clip\)"):
        store.put_text("cd", Text(torch.ones(5, 8), torch.full((6,), bad), "a dog", 3, False))
    assert not store.has("latents", "ab") and not store.has("text", "cd")


def test_wrong_shapes_are_refused(tmp_path):
    with pytest.raises(ValueError, match="mean and spread"):
        Store(tmp_path).put_latents("ab", torch.ones(16, 2, 2), torch.ones(16, 2, 3), "a")
    with pytest.raises(ValueError, match="t5"):
        Store(tmp_path).put_text("ab", Text(torch.ones(1, 5, 8), torch.ones(6), "a", 3, False))
    with pytest.raises(ValueError, match="mean and spread"):
        Store(tmp_path).put_latents("ab", torch.ones(2, 2), torch.ones(2, 2), "a")
    with pytest.raises(ValueError, match="clip"):
        Store(tmp_path).put_text("ab", Text(torch.ones(5, 8), torch.ones(1, 6), "a", 3, False))


def test_missing_record_is_named_with_the_remedy(tmp_path):
    with pytest.raises(WrongRequest, match=r"has no text/cd.safetensors; run `fluxq cache` again"):
        Store(tmp_path).text("cd")


@pytest.mark.parametrize("data", [b"", b"12345678", b"\x02\0\0\0\0\0\0\0{}"])
def test_damaged_record_is_named_with_the_remedy(tmp_path, data):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "cd.safetensors").write_bytes(data)
    for read in (Store(tmp_path).text, Store(tmp_path).truncated):
        with pytest.raises(
            WrongRequest, match=r"cache record .*cd.safetensors is damaged \(.+\); run `fluxq cache --verify`"
        ):
            read("cd")


def test_interrupted_write_leaves_no_record(tmp_path, monkeypatch):
    store = Store(tmp_path)

    def interrupted(tensors):
        yield b"1234"
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "safetensors_data", interrupted)
    with pytest.raises(KeyboardInterrupt):
        store.put_text("cd", some_text())
    assert not store.has("text", "cd") and list(tmp_path.rglob("*")) == []


def test_writers_of_the_same_record_do_not_disturb_each_other(tmp_path):
    text, errors = some_text(), []

    def work():
        try:
            for _ in range(10):
                Store(tmp_path).put_text("cd", text)
                assert torch.equal(Store(tmp_path).text("cd").t5, text.t5)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == [] and [path.name for path in (tmp_path / "text").iterdir()] == ["cd.safetensors"]


def test_verify_finds_every_kind_of_damage_and_nothing_else(tmp_path):
    store = Store(tmp_path)
    for key in ("good", "flipped", "short", "empty", "renamed"):
        store.put_text(key, some_text())
        store.put_latents(key, torch.randn(16, 2, 2), torch.rand(16, 2, 2), "a.png")
    for kind in ("text", "latents"):
        folder = tmp_path / kind
        data = bytearray((folder / "flipped.safetensors").read_bytes())
        data[-3] ^= 1
        (folder / "flipped.safetensors").write_bytes(data)
        (folder / "short.safetensors").write_bytes((folder / "short.safetensors").read_bytes()[:-7])
        (folder / "empty.safetensors").write_bytes(b"")
        (folder / "renamed.safetensors").rename(folder / "other.safetensors")
    shutil.copy(tmp_path / "text" / "good.safetensors", tmp_path / "latents" / "kind.safetensors")
    record = files.Checkpoint(tmp_path / "text" / "good.safetensors")
    tensors, facts = {name: record.get(name) for name in record.keys()}, {**record.metadata, "key": "shape"}
    turned = {name: tensor.reshape(*reversed(tensor.shape)) for name, tensor in tensors.items()}
    files.write_safetensors(tmp_path / "text" / "shape.safetensors", turned, facts)
    facts = {name: facts[name] for name in ("checksum", "caption")} | {"key": "facts"}
    files.write_safetensors(tmp_path / "text" / "facts.safetensors", tensors, facts)
    only_text = {"shape": "has changed since it was written", "facts": ""}
    expected = {
        "flipped": "has changed since it was written",
        "short": "truncated",
        "empty": "empty",
        "other": "written under another name",
    }
    bad = store.verify()
    assert {path.stem for path in bad if path.parent.name == "text"} == {*expected, *only_text}
    assert {path.stem for path in bad if path.parent.name == "latents"} == {*expected, "kind"}
    for path, reason in bad.items():
        assert (expected | only_text).get(
            path.stem, "holds clip, t5 instead of mean, spread"
        ) in reason and ";" not in reason
        assert path.exists()
    assert store.verify(remove=True) == bad
    assert store.verify() == {} and store.has("text", "good") and not any(path.exists() for path in bad)


def test_a_checksum_is_computed_once_a_run(tmp_path, monkeypatch):
    Store(tmp_path).put_text("ab", some_text())
    store, real, count = Store(tmp_path), module.checksum, []
    monkeypatch.setattr(module, "checksum", lambda tensors: count.append(1) or real(tensors))
    assert torch.equal(store.text("ab").t5, store.text("ab").t5) and len(count) == 1


def test_prune_deletes_what_no_dataset_uses_and_killed_writes(tmp_path):
    store = Store(tmp_path)
    for key in "abcd":
        store.put_text(key, some_text())
        store.put_latents(key, torch.randn(16, 2, 2), torch.rand(16, 2, 2), "a.png")
    (tmp_path / "text" / ".e.tmp-0123abcd.safetensors").write_bytes(b"123")
    (tmp_path / "text" / "notes.txt").write_text("not ours")
    before = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    count, nbytes = store.prune([dataset("a", "b", "c"), dataset("a", "a", "c")])
    after = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert [path.stem for path in store.records("latents")] == ["a"]
    assert [path.stem for path in store.records("text")] == ["a", "b", "c"]
    assert count == 5 and nbytes == before - after
    assert {path.name for path in (tmp_path / "text").iterdir() if path.suffix != ".safetensors"} == {"notes.txt"}


def test_dataset_comes_back_equal(tmp_path):
    written = dataset("a", "b", "c")
    written.save(tmp_path / "d.json")
    assert Dataset.load(tmp_path / "d.json") == written
    assert written.records() == {("latents", "a"), ("text", "b"), ("text", "c")}


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": 0}', '{"version": 1, "examples": [{"name": "a"}]}'])
def test_damaged_dataset_is_refused(tmp_path, text):
    (tmp_path / "d.json").write_text(text)
    with pytest.raises(WrongRequest, match=r"d.json is not a dataset file \(.+\); delete it"):
        Dataset.load(tmp_path / "d.json")
    with pytest.raises(WrongRequest, match="none.json cannot be read"):
        Dataset.load(tmp_path / "none.json")


def count_reads(monkeypatch) -> list[str]:
    reads = []

    def counted(file, kind):
        reads.append(os.path.basename(file.name))
        return file_digest(file, kind)

    monkeypatch.setattr("fluxq.caching.hashes.file_digest", counted)
    return reads


def test_hash_is_read_once_and_again_when_the_file_changes(tmp_path, monkeypatch):
    reads = count_reads(monkeypatch)
    (tmp_path / "a").write_bytes(b"one")
    hashes = Hashes(tmp_path / "hashes.json")
    first = hashes.of(tmp_path / "a")
    assert hashes.of(tmp_path / "a") == first and reads == ["a"]
    hashes.save()
    hashes = Hashes(tmp_path / "hashes.json")
    assert hashes.of(os.path.relpath(tmp_path / "a")) == first and reads == ["a"]
    (tmp_path / "a").write_bytes(b"two!")
    assert hashes.of(tmp_path / "a") != first and reads == ["a", "a"]
    os.utime(tmp_path / "a", ns=(5, 5))
    hashes.of(tmp_path / "a")
    assert reads == ["a", "a", "a"]


def test_hash_of_a_deleted_file_is_remembered(tmp_path):
    (tmp_path / "a").write_bytes(b"one")
    hashes = Hashes(tmp_path / "hashes.json")
    first = hashes.of(tmp_path / "a")
    hashes.save()
    (tmp_path / "a").unlink()
    hashes = Hashes(tmp_path / "hashes.json")
    assert hashes.of(tmp_path / "a") == first
    assert hashes.knows(tmp_path / "a") and not hashes.knows(tmp_path / "b")
    with pytest.raises(WrongRequest, match="b does not exist"):
        hashes.of(tmp_path / "b")
    with pytest.raises(WrongRequest, match="cannot be read"):
        hashes.of(tmp_path)


def test_hashes_of_two_processes_are_both_kept(tmp_path):
    for name in "ab":
        (tmp_path / name).write_text(name)
    one, two = Hashes(tmp_path / "hashes.json"), Hashes(tmp_path / "hashes.json")
    one.of(tmp_path / "a")
    two.of(tmp_path / "b")
    one.save()
    two.save()
    assert set(json.loads((tmp_path / "hashes.json").read_text())) == {str(tmp_path / "a"), str(tmp_path / "b")}


@pytest.mark.parametrize("text", ["", "{", "3", "[1]"])
def test_damaged_hashes_are_refused(tmp_path, text):
    (tmp_path / "hashes.json").write_text(text)
    with pytest.raises(WrongRequest, match=r"hashes.json is damaged \(.+\); delete it"):
        Hashes(tmp_path / "hashes.json")


@pytest.mark.parametrize("at", [0, 500_000, 999_999])
def test_a_file_of_the_same_size_and_time_is_noticed(at, tmp_path):
    path = tmp_path / "a"
    path.write_bytes(bytes(1_000_000))
    hashes = Hashes(tmp_path / "hashes.json")
    first, status = hashes.of(path), path.stat()
    changed = bytearray(1_000_000)
    changed[at] = 1
    path.write_bytes(changed)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert hashes.of(path) != first


def test_a_record_whose_numbers_changed_is_refused_by_name_and_set_aside(tmp_path):
    """At its first read, so a run never trains on it; the next one encodes it again."""
    store = Store(tmp_path)
    store.put_latents("ab", torch.zeros(16, 2, 2), torch.ones(16, 2, 2), "photos/a.png")
    path = tmp_path / "latents" / "ab.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(WrongRequest, match="of photos/a.png has changed since it was written; it was set aside"):
        Store(tmp_path).latents("ab")
    assert not Store(tmp_path).has("latents", "ab") and path.with_suffix(".damaged").read_bytes() == content
    assert Store(tmp_path).prune([])[0] == 1 and not list(path.parent.iterdir())
