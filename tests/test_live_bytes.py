"""The counter of live bytes: sequences whose peak can be worked out by hand."""

from __future__ import annotations

import gc

import pytest
import torch
from live_bytes import LiveBytes
from torch.utils.checkpoint import checkpoint

MIB = 1 << 20


def mib(n: float, **options) -> torch.Tensor:
    return torch.empty(int(n * MIB // 4), **options)


def test_a_known_sequence_gives_a_known_peak():
    with LiveBytes() as bytes:
        a = mib(3)
        assert (bytes.live, bytes.peak) == (3 * MIB, 3 * MIB)
        b = mib(2)
        del a
        assert (bytes.live, bytes.peak) == (2 * MIB, 5 * MIB)
        c = mib(1)
        assert (bytes.live, bytes.peak) == (3 * MIB, 5 * MIB)
        d = mib(4)
        del b, c, d
    assert (bytes.live, bytes.peak) == (0, 7 * MIB)


def test_views_and_changes_in_place_are_no_new_bytes():
    with LiveBytes() as bytes:
        a = mib(1)
        views = [a[5:], a.view(-1, 2).mT, a.unflatten(0, (4, -1)).chunk(2, 1), a.detach(), a.view(torch.uint8)]
        a.add_(1).mul_(2).zero_()
        torch.add(a, 1, out=a)
        assert bytes.peak == MIB
        del a
        assert bytes.live == MIB
        del views
        assert bytes.live == 0


def test_a_temporary_counts_while_it_lives():
    with LiveBytes() as bytes:
        x = mib(1)
        y = (x + 1) * 2  # x, x + 1, and the product
        assert (bytes.live, bytes.peak) == (2 * MIB, 3 * MIB)
        bytes.reset_peak()
        y.mul_(2)
        assert bytes.peak == 2 * MIB


def test_what_was_there_before_counts_only_where_it_is_named():
    weight, other = torch.ones(256, 1024), torch.ones(256, 1024)
    with LiveBytes() as bytes:
        views = weight.mT, other[1:]
        weight.mul_(1)
        assert bytes.peak == 0
    with LiveBytes(before=[weight, weight[3:]]) as bytes:
        views = weight.mT, other[1:]
        assert bytes.live == MIB
        del weight, views
        assert bytes.live == 0


def test_tensors_from_numbers_and_grown_outputs_count():
    with LiveBytes() as bytes:
        few = torch.tensor([1.0, 2.0, 3.0])
        assert bytes.live == 12
        grown = torch.empty(0)
        torch.cat([few, few], out=grown)
        assert bytes.live == 36
        del few, grown
    assert bytes.live == 0


def test_storages_on_another_device_are_left_out():
    with LiveBytes(device="meta") as bytes:
        here = mib(5)
        there = here.to("meta")
        assert (bytes.live, bytes.peak) == (5 * MIB, 5 * MIB)
        more = mib(1 << 20, device="meta")  # a TiB of nothing
        assert bytes.live == 5 * MIB + (1 << 40)
        del here, there, more
    assert bytes.live == 0


def test_what_backward_needs_lives_until_then():
    x = mib(1).zero_().requires_grad_()
    with LiveBytes() as bytes:
        y = x.exp().sin().sum()
        assert bytes.live == MIB + 4  # exp's result, which exp and sin both ask for, and the sum
        y.backward()
        del y
        assert bytes.live == MIB  # the gradient
    with LiveBytes() as again:
        y = checkpoint(lambda x: x.exp().sin(), x, use_reentrant=False).sum()
        kept = again.live
    assert kept == 4 and y.grad_fn is not None


def test_nothing_is_kept_alive_or_left_behind():
    bytes = LiveBytes()
    with bytes:
        for _ in range(100):
            mib(0.01) + 1
        a = mib(1)
    assert bytes.live == a.nbytes
    del a  # outside too
    gc.collect()
    assert bytes.live == 0 and not bytes._known and not bytes._numbers


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_meta_counts_like_the_cpu(device):
    """Layers as models have them, but for attention, which meta takes apart."""
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.GroupNorm(2, 8), torch.nn.SiLU())
    model = model.to(device).requires_grad_(False)
    with LiveBytes() as bytes:
        y = model(torch.zeros(1, 3, 64, 64, device=device))
        z = torch.nn.functional.linear(y, torch.zeros(128, 64, device=device)).to(torch.bfloat16).float()
    features = 8 * 64 * 64 * 4
    assert (bytes.live, bytes.peak) == (3 * features, 4 * features)  # y and z; and z in bf16
    del y, z
    assert bytes.live == 0


def test_the_peak_is_known_by_owner_even_if_that_is_said_later():
    weight = mib(1)
    with LiveBytes(before=[weight]) as bytes:
        bytes.belongs("weights", [weight[5:]])
        early = mib(7)
        del early
        bytes.reset_peak()
        kept = mib(2)
        passing = mib(3)
        del passing
        bytes.belongs("activations")  # what is there and nobody's: kept alone
        last = mib(2)
        del kept, last
    assert bytes.peak == 6 * MIB
    assert bytes.peak_by_owner() == {"weights": MIB, "activations": 2 * MIB, "": 3 * MIB}
