"""The kernels' cases (fluxq/bench) are right on the Triton backend, cover every op with a choice, and launch every
kernel with several programs, none of which uses memory of another.
"""

from __future__ import annotations

from collections import Counter

import pytest

from benchmarks.aot import kernels
from fluxq.bench.kernel_cases import cases, step_case
from fluxq.bench.kernels import check
from fluxq.bench.memory_bound import RARE_STEPS, RARE_STORAGE, STEPS, STORAGE, Sizes

WITHIN_OTHERS = {"fill_padding", "sum_shares", "drop"}  # parts of lora_linear


SHAPE = 65, 1088  # two programs of 64 rows and of 1,024 columns, and only 64 divides the columns
ROTATED = 40, 320  # two programs of 32 rows and of 256 columns


@pytest.fixture(scope="module")
def grids() -> Counter[str]:
    """Kernel -> the most programs of a launch, over the tests of this file."""
    return Counter()


@pytest.fixture(autouse=True)
def _recorded(recorded, grids):
    yield
    if recorded is not None:
        grids |= recorded.grids


def tiny(device) -> Sizes:
    """Two programs of 16 rows or of 4,096 numbers, the last one ragged, masked heads and columns, a rank of 5."""
    return Sizes(device, tokens=22, width=192, heads=3, text=7, rank=5)


def test_every_case_is_right_and_every_op_with_a_choice_has_one(triton_ops, device):
    from fluxq.kernels.triton.shipped import PATHS, STREAMING

    seen = set()
    for case in cases(device, tiny(device), ROTATED):
        if case.op not in STREAMING or case.op == "row_quantize":  # the others' are below
            check(case)
        seen.add(case.op)
    assert seen | WITHIN_OTHERS == set(PATHS)


@pytest.mark.parametrize("name", [*STEPS, *RARE_STEPS])
def test_every_step_is_right(name, triton_ops, device):
    check(step_case({**STEPS, **RARE_STEPS}[name](tiny(device))))


@pytest.mark.parametrize("name", [*STORAGE, *RARE_STORAGE])
def test_every_change_of_form_is_right(name, triton_ops, device):
    check(step_case({**STORAGE, **RARE_STORAGE}[name](tiny(device), *(ROTATED if "rotated" in name else SHAPE))))


def test_every_kernel_was_launched_with_several_programs(grids, recorded, request):
    tests = 2 + sum(map(len, (STEPS, RARE_STEPS, STORAGE, RARE_STORAGE)))
    if recorded is None or sum(item.path == request.path for item in request.session.items) < tests:
        pytest.skip("needs all tests of this file, in the interpreter")
    assert {name for name, programs in grids.items() if programs > 1} == kernels()
