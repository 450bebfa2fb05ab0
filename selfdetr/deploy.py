"Moved to `selfdetr.detector` and `selfdetr.onnx`; these names are here until all importers have followed."

from .detector import *  # noqa: F403
from .onnx import *  # noqa: F403
