"""What is said about a run that goes wrong: each kind once, and nothing about one that does not."""

from __future__ import annotations

import math

import pytest

from fluxq.errors import WrongRequest
from fluxq.training.health import BAD_IN_A_ROW, BAD_OF_LAST, Health, high_learning_rate


def record(step: int, **changes) -> dict:
    return {"step": step, "loss": 1.0, "grad": 0.5, "seconds": 2.0, "peak_bytes": 8 << 30} | changes


def said(count: int, change, watch=None) -> list[str]:
    """The lines about `count` steps; change(step) -> what differs in its record."""
    records: list[dict] = []
    health, lines = Health(records, watch), []
    for step in range(1, count + 1):
        records.append(record(step, **change(step)))
        lines += [f"{step}: {line}" for line in health.check()]
    return lines


def test_nothing_is_said_about_an_ordinary_run():
    assert said(300, lambda step: {"loss": 1 + math.sin(step) / 2, "seconds": 2 + math.cos(step)}) == []


@pytest.mark.parametrize(
    ("change", "first", "words"),
    [
        (lambda step: {"loss": 1.0 if step <= 100 else 3.1}, 200, "the loss has been above 3, three times its start"),
        (lambda step: {"grad": 0.0 if step > 50 else 0.5}, 70, "the gradient has been zero for 20 steps"),
        (lambda step: {"seconds": 11.0 if step == 42 else 2.0}, 42, "step 42 took 11.0 s, the 20 before it 2.0 s each"),
        (lambda step: {"peak_bytes": (9 if step > 30 else 8) << 30}, 31, "grew from 8.0 GiB at step 20 to 9.0 GiB"),
    ],
)
def test_what_went_wrong_is_said_once(change, first, words):
    (line,) = said(300, change)
    assert line.startswith(f"{first}: warning: ") and words in line


def test_five_bad_gradients_in_a_row_end_the_run():
    with pytest.raises(WrongRequest, match="5 of the last 15 steps, .* no finite gradient; .* lower --lr"):
        said(20, lambda step: {"grad": math.nan} if step > 10 else {})
    assert said(60, lambda step: {"grad": math.inf} if 0 < step % 20 < BAD_IN_A_ROW else {}) == []


def test_twenty_bad_gradients_of_a_thousand_end_the_run():
    each = 1000 // BAD_OF_LAST
    with pytest.raises(WrongRequest, match="20 of the last"):
        said(1000, lambda step: {"grad": math.nan} if step % each == 0 else {})
    assert said(2000, lambda step: {"grad": math.nan} if step % (each + 5) == 0 else {}) == []


def test_only_a_very_high_learning_rate_is_warned_of():
    assert high_learning_rate(1e-2) == [] and "0.02 is very high" in str(high_learning_rate(0.02))


class Watched:
    """What a watch answers; asked: when it was asked what changed."""

    def __init__(self, changes=()) -> None:
        self.answer, self.asked, self.settled = list(changes), [], 0

    def settle(self) -> None:
        self.settled += 1

    def changes(self, step: int) -> list[str]:
        self.asked.append(step)
        return self.answer

    def regression(self, records) -> str:
        return f"compared after {len(records)} steps"


def test_what_changed_is_read_only_where_a_line_about_it_is_due():
    watch = Watched(["a save came just before it", "the GPU's clock fell"])
    change = lambda step: {"seconds": 11.0 if step in (42, 44, 160) else 2.0}  # noqa: E731
    lines = said(300, change, watch)
    assert [line.split(":")[0] for line in lines] == ["42", "50", "160"], "within 100 steps it is not said again"
    assert lines[0].endswith("2.0 s each; what changed: a save came just before it, the GPU's clock fell")
    assert lines[1] == "50: warning: compared after 50 steps"
    assert watch.asked == [42, 160] and watch.settled == 1


def test_a_run_that_became_slower_after_it_was_compared_says_so_at_its_end():
    watch = Watched()
    watch.regression = lambda own: "slower" if len(own) > 50 else None
    watch.remember = lambda own: watch.asked.append(len(own))
    health = Health(records := [], watch)
    for step in range(1, 61):
        records.append(record(step))
        assert list(health.check()) == []
    assert health.ended() == "warning: slower" and watch.asked == [60]


def test_a_resumed_run_is_not_slow_because_it_begins():
    """Its first step loads kernels, and its memory is that of another process."""
    records = [record(step) for step in range(1, 101)]
    health = Health(records)
    for step in range(101, 200):
        records.append(record(step, seconds=60.0 if step == 101 else 2.0, peak_bytes=10 << 30))
        assert list(health.check()) == []
