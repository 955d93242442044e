"""Streaming of frozen weights between host and card, for any module with buffers."""

from fluxq.offload.inputs import HostInputs, Pass
from fluxq.offload.ring import AllResident, Ring, StreamingRing
from fluxq.offload.schedule import Copy, Schedule, spread
from fluxq.offload.streams import CudaStreams, Immediate, Late, Staged, Streams

__all__ = [
    "AllResident",
    "Copy",
    "CudaStreams",
    "HostInputs",
    "Immediate",
    "Late",
    "Pass",
    "Ring",
    "Schedule",
    "Staged",
    "Streams",
    "StreamingRing",
    "spread",
]
