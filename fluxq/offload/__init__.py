"""Streams frozen weights between host and GPU, for any module with buffers."""

from .inputs import HostInputs, Pass
from .ring import AllResident, Ring, StreamingRing
from .schedule import Copy, Schedule, spread
from .streams import ByteRange, CudaStreams, Immediate, Late, Staged, Stored, Streams

__all__ = [
    "AllResident",
    "Copy",
    "CudaStreams",
    "HostInputs",
    "Immediate",
    "Late",
    "Pass",
    "ByteRange",
    "Ring",
    "Schedule",
    "Staged",
    "Stored",
    "Streams",
    "StreamingRing",
    "spread",
]
