"""Looks through a data set before training, and imports segments from a spreadsheet."""

from typing import Any

__all__ = ["Findings", "check_folder", "import_segments"]


def __getattr__(name: str) -> Any:  # each where it is asked for: the command should not wait for all of them
    if name == "Findings":
        from .findings import Findings

        return Findings
    if name == "check_folder":
        from .folder import check_folder

        return check_folder
    if name in ("import_segments", "VIDEOS"):
        from . import tables

        return getattr(tables, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
