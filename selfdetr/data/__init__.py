"""From a folder of features and annotations to the batches a model trains on; each name is loaded when it is asked for."""

from types import ModuleType
from typing import Any

__all__ = [
    "Batch", "DataError", "Dataset", "TimeGrid", "WindowConfig", "Windows", "find_data", "folds_of", "load_dataset",
    "load_fold", "read_annotations", "test_windows", "training_windows", "windows_of",
]


def __getattr__(name: str) -> Any:
    home: ModuleType
    if name == "read_annotations":
        from . import annotations as home
    elif name in ("Dataset", "folds_of", "load_dataset", "load_fold"):
        from . import dataset as home
    elif name in ("DataError", "find_data"):
        from . import files as home
    elif name == "TimeGrid":
        from . import timegrid as home
    elif name in ("Batch", "WindowConfig", "Windows", "test_windows", "training_windows", "windows_of"):
        from . import windows as home
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(home, name)
