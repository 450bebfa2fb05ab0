"""Looks through a data set before training, and imports segments from a table; each name is loaded when it is asked for."""

from types import ModuleType
from typing import Any

__all__ = ["Findings", "check_folder", "import_labels", "import_segments"]


def __getattr__(name: str) -> Any:
    home: ModuleType
    if name == "Findings":
        from . import findings as home
    elif name == "check_folder":
        from . import folder as home
    elif name in ("import_labels", "import_segments"):
        from . import tables as home
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(home, name)
