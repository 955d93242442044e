"""Schedules in closed form."""

from __future__ import annotations

import math

import pytest

from fluxq.config import TrainingConfig
from fluxq.config_files import config_from_dict
from fluxq.errors import WrongRequest
from fluxq.training.defaults import resolve_schedule
from fluxq.training.schedules import SCHEDULES, learning_rate_factor


def factors(name: str, *at: int, warmup: int = 10, **settings: float) -> list[float]:
    """The factors of steps `at` of 110."""
    training = TrainingConfig(schedule=name, steps=110, warmup=warmup, **settings)
    return [learning_rate_factor(training, step) for step in at]


@pytest.mark.parametrize("name", SCHEDULES)
def test_warmup_rises_linearly_to_the_full_learning_rate(name):
    assert factors(name, *range(5), warmup=4) == [0.25, 0.5, 0.75, 1, 1]
    assert factors(name, 0, warmup=0) == [1], "none"


@pytest.mark.parametrize(
    ("name", "settings", "expected"),  # a quarter, half, three quarters of the way, and behind the last step
    [
        ("constant", {}, [1, 1, 1, 1]),
        ("linear", {}, [0.75, 0.5, 0.25, 0]),
        ("linear", {"schedule_floor": 0.2}, [0.8, 0.6, 0.4, 0.2]),
        ("cosine", {}, [(1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2, 0]),
        ("cosine", {"schedule_cycles": 2}, [0.5, 1, 0.5, 0]),
        ("cosine", {"schedule_cycles": 2, "schedule_floor": 0.1}, [0.55, 1, 0.55, 0.1]),
        ("polynomial", {}, [9 / 16, 1 / 4, 1 / 16, 0]),
        ("polynomial", {"schedule_power": 3.0}, [27 / 64, 1 / 8, 1 / 64, 0]),
        ("wsd", {}, [1, 1, 1, 0]),
        ("wsd", {"schedule_decay": 0.5}, [1, 1, 0.5, 0]),
        ("wsd", {"schedule_decay": 1.0}, [0.75, 0.5, 0.25, 0]),
        ("inverse_sqrt", {}, [math.sqrt(10 / (10 + after)) for after in (25, 50, 75, 100)]),
        ("rex", {}, [0.75 / 0.875, 0.5 / 0.75, 0.25 / 0.625, 0]),
    ],
)
def test_schedules_have_their_closed_forms(name, settings, expected):
    assert factors(name, 10, 35, 60, 85, 110, **settings) == pytest.approx([1, *expected], abs=1e-12)


def test_wsd_falls_in_the_last_fifth_of_the_steps():
    assert factors("wsd", 90, 95, 100, 105) == pytest.approx([1, 0.75, 0.5, 0.25])


def test_inverse_sqrt_without_a_warmup_halves_the_square_after_ten_thousand_steps():
    training = TrainingConfig(schedule="inverse_sqrt", steps=20_000)
    assert learning_rate_factor(training, 10_000) ** 2 == pytest.approx(0.5)


def test_every_schedule_can_be_asked_for():
    for name in SCHEDULES:
        assert config_from_dict({"training": {"schedule": name}}, "a test").training.schedule == name
    with pytest.raises(WrongRequest, match=", ".join(SCHEDULES)):
        config_from_dict({"training": {"schedule": "step"}}, "a test")


def test_a_warmup_is_a_share_of_all_steps_or_a_number_of_them():
    for warmup, steps in ((0, 0), (0.1, 33), (0.998, 329), (7, 7)):
        assert resolve_schedule(TrainingConfig(steps=330, warmup=warmup)).warmup == steps


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            {"warmup": 2.5},
            "a warm-up of 2.5 steps is not a whole number; for a share of all steps, give a number below 1",
        ),
        ({"warmup": 9}, "a warm-up of 9 steps does not fit into 9; lower --warmup or raise --steps"),
        ({"warmup": 0.99}, "a warm-up of 9 steps does not fit into 9"),
        ({"warmup": 3, "schedule": "cosine", "schedule_cycles": 7}, "7 cycles of the schedule do not fit into 6 steps"),
        (
            {"schedule": "wsd", "schedule_decay": 0.1},
            "the last 0.9 steps are too few for a schedule to fall in; raise training.",
        ),
    ],
)
def test_a_schedule_that_does_not_fit_into_the_run_is_refused(settings, sentence):
    with pytest.raises(WrongRequest, match=sentence):
        resolve_schedule(TrainingConfig(steps=9, **settings))
