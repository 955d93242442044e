"""`make aot` sees how many bits a kernel moves at a time through each pointer, and names those that move too few."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from benchmarks.accesses import widths
from benchmarks.aot import Report, broken_promises
from benchmarks.promises import Promise

LLIR = """
define ptx_kernel void @_kernel(ptr addrspace(1) %0, ptr addrspace(1) readnone %1, i32 %2, ptr addrspace(1) %3) {
  %4 = getelementptr bfloat, ptr addrspace(1) %0, i64 %9
  %5 = tail call { i32, i32 } asm sideeffect "@$3 ld.global.v4.b32 { $0, $1 }, [ $2 + 0 ];", "=r"(ptr addrspace(1) %4)
  br label %6
6:
  %7 = phi ptr addrspace(1) [ %8, %6 ], [ %1, %0 ]
  %8 = getelementptr i8, ptr addrspace(1) %7, i64 32
  tail call void asm sideeffect "cp.async.ca.shared.global [ $0 + 0 ], [ $1 + 0 ], 0x8;", "r"(ptr addrspace(1) %7)
  %9 = tail call i16 asm sideeffect "@$2 ld.global.b16 { $0 }, [ $1 + 0 ];", "=c,l,b"(ptr addrspace(1) %8)
  tail call void asm sideeffect "@$5 st.global.L1::evict_last.v2.b64 [ $4 + 0 ];", "r"(ptr addrspace(1) %3, i1 %10)
  ret void
}
"""


def test_each_access_is_followed_back_to_its_argument():
    assert widths(LLIR, ("a", "b", "n", "c")) == {"a": {128}, "b": {64, 16}, "c": {128}}


def test_an_unknown_access_is_an_error():
    with pytest.raises(AssertionError, match="unknown width"):
        widths(LLIR.replace("  ret", "  store i32 %2, ptr addrspace(1) %3\n  ret"), ("a", "b", "n", "c"))


@pytest.mark.parametrize(("narrow", "broken"), [(None, []), (("b",), []), ((), ["16- and 64-bit accesses through b"])])
def test_only_named_pointers_may_be_narrow(narrow, broken):
    report = Report("kernel", "kernel", 89, 4, 3, 32, 0, 0, {}, {"a": [128], "b": [16, 64]}, 1.0)
    assert broken_promises(Promise(narrow=narrow), report) == broken
