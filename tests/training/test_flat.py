"""Parameters as slices of one tensor: their values, their gradients, and their rounding."""

from __future__ import annotations

import torch
from torch import nn

from fluxq.kernels.rounding import rounded
from fluxq.training.flat import BLOCK, Flat

BF16 = torch.bfloat16


def parameters() -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape)) for shape in ((3, 100), (16, 16), (1, 7))]


def test_parameters_keep_their_values_and_become_slices():
    own = parameters()
    before = [p.detach().clone() for p in own]
    flat = Flat(own)
    assert all(map(torch.equal, own, before)) and all(start % BLOCK == 0 for start in flat.starts)
    with torch.no_grad():
        flat.values.fill_(2.0)
    assert all(p.eq(2).all() for p in own)


def test_gradients_are_moved_and_a_missing_one_is_zero():
    own = parameters()
    flat = Flat(own)
    (own[0].sum() + 3 * own[2].sum()).backward()
    flat.gather()
    found = flat.parts(flat.values.grad)
    assert [float(g.mean()) for g in found] == [1.0, 0.0, 3.0]
    assert flat.values.grad.sum() == 300 + 3 * 7, "what lies between the slices is zero"
    assert all(p.grad is None for p in own)


def test_parameters_that_nobody_writes_are_rounded_once():
    own = parameters()
    flat = Flat(own)
    with flat.unchanged():
        for p in own:
            first, again = rounded(p, BF16), rounded(p, BF16)
            assert torch.equal(first, p.to(BF16)) and first.data_ptr() == again.data_ptr()
        storages = {rounded(p, BF16).untyped_storage().data_ptr() for p in own}
        assert len(storages) == 1, "all of them in one tensor"
    assert flat.tensors[1].dtype == BF16 and len(flat.tensors) == 2


def test_rounding_follows_every_update():
    own = parameters()
    flat = Flat(own)
    for _ in range(3):
        with flat.unchanged():
            assert torch.equal(rounded(own[0], BF16), own[0].to(BF16))
        with torch.no_grad():
            own[0].add_(1.0)
        assert torch.equal(rounded(own[0], BF16), own[0].to(BF16)), "while parameters change, each use rounds anew"
