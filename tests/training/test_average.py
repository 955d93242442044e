"""The moving average of the LoRA: the formula, and weights that come back as they were."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from fluxq.kernels.rounding import rounded
from fluxq.training.average import Average
from fluxq.training.optim import build_optimizer, optimizer_step


def optimizer(decay: float = 0.45):
    parameters = [nn.Parameter(torch.randn(5, 7)), nn.Parameter(torch.randn(3, 300))]
    made = build_optimizer("adamw", parameters, 0.1, 0.0)
    made.average = Average(made.flats, decay)
    return parameters, made


class Loss:
    def __init__(self, loss) -> None:
        self.loss = loss

    def share(self, index: int) -> float:
        return 1.0

    def prepare(self, index: int) -> None: ...


def test_it_is_the_formula_in_fp64_and_a_skipped_step_does_not_count():
    parameters, made = optimizer()
    exact = [p.detach().double() for p in parameters]
    count = 0
    for step in range(12):
        factor = torch.nan if step == 4 else 1.0
        loss = Loss(lambda index: factor * sum((p - 1).square().sum() for p in parameters))  # noqa: B023
        optimizer_step(made, loss, step, 1, 1.0, 0.0)
        count += step != 4
        decay = min(0.45, (1 + count) / (10 + count))
        if step != 4:
            exact = [decay * a + (1 - decay) * p.detach().double() for a, p in zip(exact, parameters, strict=True)]
    assert made.average.count == count == 11
    assert (1 + 2) / (10 + 2) < 0.45 < (1 + 11) / (10 + 11), "both branches of the decay were taken"
    own = made.average.of_parameters()
    for p, average in zip(parameters, exact, strict=True):
        torch.testing.assert_close(own[p].double(), average, rtol=1e-6, atol=1e-6)
        assert own[p].dtype == torch.float32 and not torch.equal(own[p], p)


def test_inside_the_parameters_are_the_average_also_rounded_and_come_back_to_the_bit():
    parameters, made = optimizer()
    optimizer_step(made, Loss(lambda index: sum(p.sum() for p in parameters)), 0, 1, 1.0, 0.0)
    before, own = [p.detach().clone() for p in parameters], made.average.of_parameters()

    def are(expected: list[torch.Tensor]) -> bool:
        with made.rounding():
            pairs = [*zip(parameters, expected, strict=True)]
            exact = all(torch.equal(p, e) for p, e in pairs)
            return exact and all(torch.equal(rounded(p, torch.bfloat16), e.bfloat16()) for p, e in pairs)

    assert are(before)
    with pytest.raises(KeyError), made.averaged():
        assert are([own[p] for p in parameters])
        raise KeyError
    assert are(before)
    optimizer_step(made, Loss(lambda index: sum(p.sum() for p in parameters)), 1, 1, 1.0, 0.0)
    assert not any(torch.equal(p, b) for p, b in zip(parameters, before, strict=True)), "updates reach them again"


def test_nothing_saves_the_weights_while_they_are_the_average():
    """Another thread saves after a signal."""
    _, made = optimizer()
    with made.averaged():
        got: list[bool] = []
        thread = threading.Thread(target=lambda: got.append(made.changing.acquire(blocking=False)))
        thread.start()
        thread.join()
    assert got == [False]
