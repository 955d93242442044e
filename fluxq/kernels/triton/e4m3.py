"""fp32 into e4m3 (4 exponent bits, 3 of mantissa) with integer arithmetic, for cards that know no fp8.

Before sm_89 Triton refuses even to load that type. So kernels write its bytes, and the host calls them fp8.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def to_e4m3(x):
    """The byte (uint8) that torch's cast of fp32 `x` within -448..448 to float8_e4m3fn gives, bit for bit."""
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    # Below 2^-6 the steps are 2^-9 wide, as are fp32's at 2^14: there an addition rounds.
    small = (size.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    # Above, the exponent's bias goes from 127 to 7, and 20 bits of mantissa are rounded off, half to even.
    large = (size - 0x3C000000 + 0x7FFFF + ((size >> 20) & 1)) >> 20
    return (tl.where(size < 0x3C800000, small, large) | ((bits >> 24) & 0x80)).to(tl.uint8)
