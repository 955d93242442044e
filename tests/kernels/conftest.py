"""Where kernels are tested: on the card if there is one, else in Triton's interpreter, made right for bf16."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fluxq.kernels import backend


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def triton_ops(device):
    """The Triton backend's module, in use inside the test."""
    pytest.importorskip("triton")
    if device.type == "cpu":
        mend_interpreted_dot()
    with backend("triton"):
        from fluxq.kernels import triton

        yield triton


@pytest.fixture(params=["reference", "triton"])
def either_backend(request):
    """A test that asks for this runs twice, on the reference and on Triton."""
    if request.param == "triton":
        request.getfixturevalue("triton_ops")
        yield request.param
    else:
        with backend("reference"):
            yield request.param


def mend_interpreted_dot() -> None:
    """Triton's interpreter multiplies the bits of bf16 as if they were integers; here they become fp32 first."""
    import triton.language as tl
    from triton.runtime import interpreter

    if getattr(interpreter.InterpreterBuilder.create_dot, "mended", False):
        return
    original = interpreter.InterpreterBuilder.create_dot

    def widened(handle):
        bits = handle.data
        return (bits.astype(np.uint32) << 16).view(np.float32) if handle.dtype.scalar == tl.bfloat16 else bits

    def create_dot(self, a, b, d, *rest):
        if tl.bfloat16 not in (a.dtype.scalar, b.dtype.scalar):
            return original(self, a, b, d, *rest)
        product = np.matmul(widened(a), widened(b), dtype=np.float32)
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    create_dot.mended = True
    interpreter.InterpreterBuilder.create_dot = create_dot
