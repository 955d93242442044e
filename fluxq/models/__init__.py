"""Which file serves which part of FLUX.1, the hub, and what one file is."""

from .parts import Models, Served

__all__ = ["Models", "Served"]
