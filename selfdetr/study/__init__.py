"""Runs and tables: what a run is, what computes it, the cache, many runs side by side, statistics, tables.

The names that last are those below. They are loaded when they are asked for, so `import selfdetr.study` costs nothing.
"""

from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cache import *  # noqa: F403
    from .compute import *  # noqa: F403
    from .pool import *  # noqa: F403
    from .spec import *  # noqa: F403
    from .statistics import *  # noqa: F403
    from .tables import *  # noqa: F403


def __getattr__(name: str) -> Any:
    home: ModuleType
    if name in ("RunSpec", "check_parameters", "make_spec", "open_dataset", "override"):
        from . import spec as home
    elif name == "source_hash":
        from . import compute as home
    elif name in ("Run", "read_run", "run", "runs"):
        from . import cache as home
    elif name == "run_all":
        from . import pool as home
    elif name in ("interval", "verdict"):
        from . import statistics as home
    elif name in ("Table", "read_table", "table", "write_claims"):
        from . import tables as home
    else:
        return _for_now(name)
    return getattr(home, name)


def _for_now(name: str) -> Any:  # until all names are imported from the modules that define them
    if not name.startswith("__") and name not in ("cache", "compute", "pool", "spec", "statistics", "tables"):
        from . import cache, compute, pool, spec, statistics, tables

        for each in (spec, compute, cache, pool, statistics, tables):
            if hasattr(each, name):
                return getattr(each, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
