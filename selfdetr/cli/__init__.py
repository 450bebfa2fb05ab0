"""The command `selfdetr`: see `selfdetr --help`."""

from .commands import main

__all__ = ["main"]
