"""Addressed randomness: equal addresses give equal numbers, different ones give independent numbers."""

import numpy as np
import pytest
import torch

from fluxq.data.randomness import generator, normal


def test_numbers_of_an_address_are_frozen():
    """Every resumed run relies on these numbers: if this test fails, a resumed run would see other noise."""
    assert generator(7, "noise", 3, "photos/07.jpg").integers(0, 1 << 32, 3).tolist() == FROZEN_INTEGERS
    assert normal((3,), 7, "noise", 3, "photos/07.jpg").tolist() == FROZEN_NORMALS


def test_draws_do_not_depend_on_earlier_draws():
    first = normal((2, 3), 1, "noise", 5)
    torch.manual_seed(0)
    np.random.seed(0)
    normal((100,), 1, "noise", 4)
    generator(1, "noise", 5).random(10)
    assert torch.equal(normal((2, 3), 1, "noise", 5), first)


def test_global_generators_are_left_alone():
    torch.manual_seed(0)
    np.random.seed(0)
    expected = torch.rand(3), np.random.rand(3)
    torch.manual_seed(0)
    np.random.seed(0)
    normal((10,), 1, "noise")
    assert torch.equal(torch.rand(3), expected[0]) and np.array_equal(np.random.rand(3), expected[1])


def test_every_part_of_the_address_matters():
    addresses = [
        (0, "noise"),
        (1, "noise"),
        (0, "order"),
        (0, "noise", 1),
        (0, "noise", "1"),
        (0, "noise", 11),
        (0, "noise", 1, 1),
        (0, "noise", "a", "bc"),
        (0, "noise", "ab", "c"),
        (0, "noise", "abc"),
        (0, "noise", "größe"),
        (-1, "noise"),
        (1 << 80, "noise"),
    ]
    draws = {tuple(normal((4,), *address).tolist()) for address in addresses}
    assert len(draws) == len(addresses)


def test_whole_numbers_of_every_kind_are_equal_addresses():
    assert torch.equal(normal((4,), np.int64(3), "noise", np.int32(2)), normal((4,), 3, "noise", 2))


@pytest.mark.parametrize("part", [1.5, None, True, b"a", (1, 2)])
def test_an_address_of_another_type_is_refused(part):
    with pytest.raises(TypeError):
        generator(0, "noise", part)


def test_normal_is_standard_normal_and_uncorrelated_between_addresses():
    draws = torch.stack([normal((4000,), 3, "noise", n) for n in range(16)])
    assert draws.dtype == torch.float32
    assert abs(draws.mean()) < 5 / 64_000**0.5
    assert abs(draws.var() - 1) < 5 * (2 / 64_000) ** 0.5
    correlation = torch.corrcoef(draws) - torch.eye(16)
    assert correlation.abs().max() < 5 / 4000**0.5


FROZEN_INTEGERS = [3306027921, 2571731129, 3003570501]
FROZEN_NORMALS = [-1.3059803247451782, -0.5972549319267273, 0.7956271767616272]
