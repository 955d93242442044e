"""The command line: argv -> config -> one function."""

from .main import main

__all__ = ["main"]
