"""How many bits at a time a compiled kernel reads and writes global memory, pointer by pointer.

Read from the LLVM code, in which each access is one line of assembler with its width, and its address can be traced
back to a kernel argument. The assembler keeps those widths.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

ACCESS = re.compile(r"(?:ld|st)\.global[\w.:]*?(?:\.v(?P<vector>\d))?\.b(?P<bits>\d+)")
COPY = re.compile(r"cp\.async\.c[ag]\.shared\.global [^;]*?(?P<bytes>0x[0-9a-f]+)")
POINTER = re.compile(r"ptr addrspace\(1\) (?:\w+ )*(%[\w.]+)")
ADDRESS = re.compile(r"^ +(%[\w.]+) = (?:getelementptr|select|phi ptr addrspace\(1\)) ?(.*)$", re.MULTILINE)


def widths(llir: str, arguments: Sequence[str]) -> dict[str, set[int]]:
    """Bits of each access through each of the kernel's `arguments` (those that are not constants, in order)."""
    body = llir[llir.index("\ndefine ") :]
    sources = {made: re.findall(r"(?:ptr addrspace\(1\)|\[) (%[\w.]+)", rest) for made, rest in ADDRESS.findall(body)}
    found: dict[str, set[int]] = {}
    for line in body.splitlines():
        access, copy = ACCESS.search(line), COPY.search(line)
        if access is None and copy is None:
            assert not re.search(r"(= load|store|atomicrmw) .*addrspace\(1\)", line), (
                f"an access of unknown width: {line}"
            )
            continue
        bits = 8 * int(copy["bytes"], 16) if copy else int(access["vector"] or 1) * int(access["bits"])
        for argument in _origins(POINTER.findall(line)[-1], sources, set()):
            found.setdefault(arguments[int(argument[1:])], set()).add(bits)
    return found


def _origins(address: str, sources: dict[str, list[str]], seen: set[str]) -> set[str]:
    """The arguments that `address` may derive from; in a loop it may derive from itself."""
    if address in seen:
        return set()
    seen.add(address)
    if address not in sources:
        return {address}
    return set().union(*(_origins(source, sources, seen) for source in sources[address]))
