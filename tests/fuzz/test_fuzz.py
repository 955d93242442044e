"""Readers of files against damaged and invented ones: only a WrongRequest of one printable line comes out, memory stays
a small multiple of the file, and nothing hangs.

    make fuzz SECONDS=600

searches for that long and keeps the smallest file of each fault in corpus/<reader>/; these are tried every time.
Without FUZZ_SECONDS each reader gets EXAMPLES files, drawn by commit.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import time
import traceback
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from hashlib import blake2b
from itertools import count
from pathlib import Path
from unicodedata import bidirectional, category

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from fluxq.errors import WrongRequest
from fluxq.formats.checkpoint.files import DTYPES

from .mutations import damaged
from .readers import READERS, Reader

pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name == "nt", reason="limits of memory and time are POSIX's")]

CORPUS = Path(__file__).parent / "corpus"
SECONDS = float(os.environ.get("FUZZ_SECONDS", 0))
EXAMPLES = 120
CPU_SECONDS, MOST_BYTES, TIMES = 5.0, 16 << 20, 64
"""What reading one file may take: CPU time, and MOST_BYTES of Python's memory or TIMES the file's size."""
LINE = 4096  # characters of an error
REORDERS = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")


def head() -> int:
    command = ["git", "rev-parse", "HEAD"]
    done = subprocess.run(command, cwd=CORPUS, capture_output=True, text=True, check=False)
    return int(done.stdout.strip() or "0", 16)


class Hangs(BaseException):
    """Not an Exception, which readers catch."""


@contextmanager
def limited(nbytes: int) -> Iterator[None]:
    """Raises Hangs after CPU_SECONDS; what Python allocates is counted, and libraries may take another GiB."""

    def stop(number: int, frame: object) -> None:
        raise Hangs(f"over {CPU_SECONDS} s of CPU time for {nbytes:,} bytes")

    before, (soft, hard) = signal.signal(signal.SIGPROF, stop), resource.getrlimit(resource.RLIMIT_AS)
    if Path("/proc/self/statm").exists():
        now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + (1 << 30), hard))
    tracemalloc.start()
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
        assert peak <= max(MOST_BYTES, TIMES * nbytes), f"{peak:,} bytes of memory for {nbytes:,} of the file"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        tracemalloc.stop()
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGPROF, before)


def attempt(reader: Reader, path: Path, content: bytes) -> None:
    """Raises AssertionError, or what came out of the reader, unless that is a proper WrongRequest."""
    path.write_bytes(content)
    with limited(len(content)):
        try:
            reader.read(path)
        except WrongRequest as error:
            text = str(error)
            moves = [c for c in text if category(c) in ("Cc", "Zl", "Zp") or bidirectional(c) in REORDERS]
            assert not moves and len(text) < LINE, f"not a line that can be printed: {text[:LINE]!r}"


@pytest.fixture
def place(request, tmp_path) -> tuple[str, Reader, Path, list[bytes]]:
    """A reader's name, the reader, the path of its file, and valid contents."""
    reader = READERS[request.param]
    path = tmp_path / "run" / reader.file
    path.parent.mkdir(parents=True)
    return request.param, reader, path, list(reader.valid(path.parent))


every_reader = pytest.mark.parametrize("place", READERS, indirect=True)


@every_reader
def test_valid_files_are_read(place):
    _, reader, path, valid = place
    for content in valid:
        path.write_bytes(content)
        with suppress(WrongRequest) if reader.may_refuse else nullcontext():
            reader.read(path)


@every_reader
def test_faults_that_were_found_stay_fixed(place):
    name, reader, path, _ = place
    for file in sorted((CORPUS / name).glob("*")):
        attempt(reader, path, file.read_bytes())


NUMBERS = st.integers(-2, 9) | st.sampled_from([1 << 31, 1 << 63, 1 << 64, 10**400]) | st.floats()
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
)
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*DTYPES, "F4"]) | JSON,
        "shape": st.lists(NUMBERS, max_size=4) | JSON,
        "data_offsets": st.lists(NUMBERS, min_size=2, max_size=2) | JSON,
    }
)
HEADERS = st.dictionaries(st.sampled_from(["__metadata__", "a.weight", "lora_unet_x.alpha"]) | st.text(), ENTRY | JSON)


@st.composite
def invented(draw: st.DrawFn, valid: list[bytes]) -> bytes:
    """A file from nothing, perhaps with the first bytes of a valid one."""
    kind = draw(st.integers(0, 2))
    if kind == 0:
        return json.dumps(draw(JSON)).encode(errors="replace")
    if kind == 1:
        header = json.dumps(draw(HEADERS)).encode(errors="replace")
        return len(header).to_bytes(8, "little") + header + draw(st.binary(max_size=64))
    return draw(st.sampled_from(valid))[: draw(st.integers(0, 64))] + draw(st.binary(max_size=200))


def search(name: str, reader: Reader, path: Path, valid: list[bytes], number: int) -> None:
    @seed(number)
    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink] if SECONDS else [Phase.generate],
        print_blob=False,
    )
    @given(st.data())
    def only_wrong_requests_come_out(data: st.DataObject) -> None:
        if data.draw(st.integers(0, 5)):
            content = damaged(
                data.draw(st.sampled_from(valid)), data.draw(st.randoms(use_true_random=False)), reader.structured
            )
        else:
            content = data.draw(invented(valid))
        try:
            attempt(reader, path, content)
        except BaseException as error:
            if isinstance(error, Exception | Hangs) or "Panic" in type(error).__name__:
                keep(name, content, error)
                raise AssertionError(f"{type(error).__name__} from {len(content)} bytes: {str(error)[:300]}") from error
            raise

    only_wrong_requests_come_out()


def keep(name: str, content: bytes, error: BaseException) -> None:
    """With FUZZ_SECONDS: the content in the corpus, by the line that raised; the last one of a line is the smallest."""
    if SECONDS:
        frame = [f for f in traceback.extract_tb(error.__traceback__) if "/fluxq/" in f.filename][-1:]
        where = f"{frame[0].name}-{type(error).__name__}" if frame else type(error).__name__
        (CORPUS / name).mkdir(exist_ok=True)
        found = CORPUS / name / f"{where}-{blake2b(str(frame).encode(), digest_size=3).hexdigest()}"
        if not found.exists() or found.stat().st_size > len(content):
            found.write_bytes(content)


@every_reader
def test_only_wrong_requests_come_out(place):
    end, faults = time.monotonic() + SECONDS / len(READERS), []
    for number in count(head()):
        try:
            search(*place, number)
        except AssertionError as fault:
            faults.append(fault)
        if time.monotonic() >= end:
            break
    if faults:
        raise faults[0]
