"""From a folder of features and annotations to the batches a model trains on.

The names that last: load_dataset, Dataset, TimeGrid, DataError, WindowConfig, Windows, Batch, training_windows,
test_windows, windows_of, read_annotations, find_data. They are loaded when they are asked for.
"""

from typing import TYPE_CHECKING, Any

MODULES = ("files", "config", "timegrid", "annotations", "releases", "features", "dataset", "windows")

if TYPE_CHECKING:
    from .annotations import *  # noqa: F403
    from .config import *  # noqa: F403
    from .dataset import *  # noqa: F403
    from .features import *  # noqa: F403
    from .files import *  # noqa: F403
    from .releases import *  # noqa: F403
    from .timegrid import *  # noqa: F403
    from .windows import *  # noqa: F403


def check_like(value: Any, usual: Any, where: str, name: str) -> None:  # until `study` calls value_as
    from .config import value_as

    value_as(tuple[type(usual[0]), ...] if isinstance(usual, tuple) else type(usual), value, where, name)  # type: ignore


def __getattr__(name: str) -> Any:
    if name.startswith("__") or name in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import annotations, config, files, releases, timegrid

    for module in (files, config, timegrid, annotations, releases):
        if hasattr(module, name):
            return getattr(module, name)
    from . import dataset, features, windows

    for module in (features, dataset, windows):
        if hasattr(module, name):
            return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
