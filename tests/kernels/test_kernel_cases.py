"""What `fluxq bench kernels` measures is right on the Triton backend too, and covers every op that has a choice."""

from __future__ import annotations

from fluxq.bench import kernel_cases
from fluxq.bench.kernel_cases import cases
from fluxq.bench.kernels import check

WITHIN_OTHERS = {"fill_padding", "fill_tail", "sum_shares"}  # parts of lora_linear


def test_every_case_is_right_and_every_op_with_a_choice_has_one(triton_ops, device, monkeypatch):
    from fluxq.kernels.triton.shipped import PATHS

    monkeypatch.setattr(kernel_cases, "LARGE", (8 * 96, 8 * 192, 4 * 256))
    monkeypatch.setattr(kernel_cases, "FEW", (1, 8 * 192, 4 * 256))
    seen = set()
    for case in cases(device):
        check(case)
        seen.add(case.op)
    assert seen | WITHIN_OTHERS == set(PATHS)
