"""Streaming of frozen weights between host and card, for any module with buffers."""

from fluxq.offload.ring import AllResident, Ring

__all__ = ["AllResident", "Ring"]
