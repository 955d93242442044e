"""Stacking, splitting and truncating low-rank changes, against the whole matrices in fp64."""

from __future__ import annotations

import pytest
import torch

from fluxq.formats.lora.algebra import Adapter, Part, combined, padded, resized, singular, split, stacked


def adapter(out, inputs, rank, alpha=1.3) -> Adapter:
    return Adapter(torch.randn(rank, inputs), torch.randn(out, rank), alpha)


def change(a: Adapter) -> torch.Tensor:
    return a.alpha / a.rank * a.up.double() @ a.down.double()


@pytest.mark.parametrize("alphas", [(1.5, 1.5, 1.5), (1.5, 3.0, 0.7)])
def test_stacked_parts_change_their_rows_and_no_others(alphas):
    rows = [((2, 5), (9, 10)), ((5, 9),), ((11, 14),)]
    parts = [Part(r, adapter(sum(b - a for a, b in r), 6, 3, alpha)) for r, alpha in zip(rows, alphas, strict=True)]
    wanted = torch.zeros(16, 6, dtype=torch.float64)
    for ranges, part in parts:
        pieces = change(part).split([b - a for a, b in ranges])
        for (a, b), piece in zip(ranges, pieces, strict=True):
            wanted[a:b] += piece
    whole = stacked(parts, 16)
    assert whole.rank == 9
    torch.testing.assert_close(change(whole), wanted, rtol=1e-6, atol=1e-6)
    back = split(whole, {str(i): r for i, r in enumerate(rows)})
    for i, part in enumerate(parts):
        assert back[str(i)].rank == 3
        torch.testing.assert_close(change(back[str(i)]), change(part.adapter), rtol=1e-6, atol=1e-6)


def test_equal_downs_keep_the_rank_only_if_rows_are_disjoint():
    down = torch.randn(3, 6)
    halves = [Part(((i * 4, i * 4 + 4),), Adapter(down.clone(), torch.randn(4, 3), 2.0)) for i in range(2)]
    assert stacked(halves, 8).rank == 3
    both = [Part(((0, 4),), h.adapter) for h in halves]
    assert stacked(both, 4).rank == 6
    torch.testing.assert_close(change(stacked(both, 4)), sum(change(h.adapter) for h in halves))


def test_split_copies_down_if_components_are_shared():
    whole = adapter(10, 6, 3)
    parts = split(whole, {"a": ((4, 10),), "b": ((0, 4),)})
    assert all(torch.equal(part.down, whole.down) for part in parts.values())
    torch.testing.assert_close(torch.cat([change(parts["b"]), change(parts["a"])]), change(whole))


def test_a_fresh_lora_is_split_whole():
    fresh = Adapter(torch.randn(3, 6), torch.zeros(10, 3), 3.0)
    assert {part.rank for part in split(fresh, {"a": ((0, 4),), "b": ((4, 10),)}).values()} == {3}


def test_norm_and_padding_and_folding_keep_the_change():
    whole = adapter(10, 6, 3)
    assert whole.norm() == pytest.approx(change(whole).norm().item(), rel=1e-5)
    for other in (padded(whole, 8), whole.folded(), padded(whole, 5).folded()):
        torch.testing.assert_close(change(other), change(whole), rtol=1e-6, atol=1e-6)


def test_loras_combine_at_their_strengths():
    one, two = {"a": adapter(8, 6, 2), "b": adapter(4, 6, 2)}, {"a": adapter(8, 6, 5, 0.4)}
    both = combined([(one, 0.5), (two, -2.0)])
    torch.testing.assert_close(change(both["a"]), 0.5 * change(one["a"]) - 2 * change(two["a"]), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(change(both["b"]), 0.5 * change(one["b"]))
    assert both["a"].rank == 7 and both["b"].rank == 2


@pytest.mark.parametrize("rank", [1, 4, 7])
def test_truncation_is_the_best_of_its_rank_and_returns_the_loss(rank):
    whole = adapter(20, 15, 8)
    left, values, right = torch.linalg.svd(change(whole))
    best = left[:, :rank] * values[:rank] @ right[:rank]
    shorter = resized(whole, rank)
    assert shorter.adapter.rank == rank
    torch.testing.assert_close(change(shorter.adapter), best, rtol=1e-4, atol=1e-4)
    assert shorter.lost == pytest.approx(float(values[rank:].square().sum()), rel=1e-4)
    assert shorter.whole == pytest.approx(float(values.square().sum()), rel=1e-4)


def test_energy_chooses_the_smallest_sufficient_rank():
    values = torch.tensor([4.0, 2.0, 1.0, 0.5])
    q1, q2 = torch.linalg.qr(torch.randn(12, 4))[0], torch.linalg.qr(torch.randn(9, 4))[0]
    whole = Adapter(q2.T.contiguous(), q1 * values, 4.0)
    shares = (values.square().cumsum(0) / values.square().sum()).tolist()
    for i, share in enumerate(shares):
        assert singular(whole).rank_for(share * (1 - 1e-6)) == i + 1
    assert resized(whole, energy=0.9).adapter.rank == 2
    assert resized(whole, energy=1.0).lost <= 1e-9


def test_a_rank_above_the_matrix_is_reduced_exactly():
    whole = adapter(4, 6, 9)
    shorter = resized(whole, 5)
    assert shorter.adapter.rank == 4 and shorter.lost == 0
    torch.testing.assert_close(change(shorter.adapter), change(whole), rtol=1e-5, atol=1e-5)


def test_resizing_to_the_same_or_a_higher_rank_changes_nothing():
    whole = adapter(10, 6, 3)
    assert resized(whole, 3).adapter is whole and resized(whole, 9).adapter is whole
