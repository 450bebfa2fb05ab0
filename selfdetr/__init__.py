"""Self-DETR for temporal action detection: the names that most people need, each imported when it is first used."""

from types import ModuleType
from typing import Any

__version__ = "0.1.0"
__all__ = ["Detector", "ModelConfig", "SelfDETR", "evaluate", "load_dataset"]


def __getattr__(name: str) -> Any:
    place: ModuleType
    if name == "Detector":
        from . import detector as place
    elif name in ("ModelConfig", "SelfDETR"):
        from . import model as place
    elif name == "evaluate":
        from . import evaluation as place
    elif name == "load_dataset":
        from .data import dataset as place
    else:
        raise AttributeError(f"selfdetr has no {name!r}; its names are {', '.join(__all__)}, and its modules")
    return getattr(place, name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
