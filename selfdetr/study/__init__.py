"""Runs and tables of a study; each name is loaded when it is asked for, so `import selfdetr.study` costs nothing."""

from types import ModuleType
from typing import Any

__all__ = [
    "Run", "RunSpec", "Table", "check_parameters", "interval", "make_spec", "open_dataset", "open_folds", "override",
    "read_run", "read_table", "run", "run_all", "runs", "source_hash", "table", "verdict", "write_claims",
]


def __getattr__(name: str) -> Any:
    home: ModuleType
    if name in ("Run", "read_run", "run", "runs"):
        from . import cache as home
    elif name == "source_hash":
        from . import compute as home
    elif name == "run_all":
        from . import pool as home
    elif name in ("RunSpec", "check_parameters", "make_spec", "open_dataset", "open_folds", "override"):
        from . import spec as home
    elif name == "interval":
        from .. import report as home
    elif name == "verdict":
        from . import statistics as home
    elif name in ("Table", "read_table", "table"):
        from . import tables as home
    elif name == "write_claims":
        from . import evidence as home
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(home, name)
