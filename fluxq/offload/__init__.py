"""Streaming of frozen weights between host and card, for any module with buffers."""

from fluxq.offload.inputs import HostInputs, Pass
from fluxq.offload.ring import AllResident, Ring, StreamingRing
from fluxq.offload.schedule import Copy, Schedule, spread
from fluxq.offload.streams import CudaStreams, Immediate, Late, Piece, Staged, Stored, Streams

__all__ = [
    "AllResident",
    "Copy",
    "CudaStreams",
    "HostInputs",
    "Immediate",
    "Late",
    "Pass",
    "Piece",
    "Ring",
    "Schedule",
    "Staged",
    "Stored",
    "Streams",
    "StreamingRing",
    "spread",
]
