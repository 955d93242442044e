"""A run's four models: finding their files (in folders or on the hub), loading them, and describing one file."""

from .parts import Models, Served

__all__ = ["Models", "Served"]
