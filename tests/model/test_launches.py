"""The table of launches: a row for everything that can be planned, and counts in the order of the work."""

from __future__ import annotations

import itertools

from fluxq.kernels import COMPUTES, FORMATS, POLICIES
from fluxq.kernels.chunks import CHUNKS
from fluxq.model.launches import launches, outside


def test_every_plan_has_a_row_and_less_work_is_fewer_launches():
    for format, compute, chunk, single in itertools.product(FORMATS, COMPUTES, {0, *CHUNKS.values()}, (False, True)):
        counts = launches(single, format, compute, chunk)
        assert counts.keys() == {"forward", *POLICIES} and 0 < counts["forward"] < counts["keep_all"]
        # what is kept in 8 bits has to be read back, which may take a launch more than keep_qkv has
        exact = [policy for policy in POLICIES if policy != "keep_all8"]
        assert all(counts[more] >= counts[less] for more, less in itertools.pairwise(exact)), (format, compute)
        assert counts["recompute"] > counts["keep_all8"] > counts["keep_all"], (format, compute)
        assert outside(format, compute, chunk) > 0


def test_weights_that_are_cut_take_more_launches():
    for single in (False, True):
        cut, whole = (launches(single, "nf4", "bf16", CHUNKS[gpu])["keep_all"] for gpu in (89, 86))
        assert cut > whole
