"""Mistakes with devices, found without a GPU: all runs on a pretended device that refuses tensors of the CPU"""

import contextlib
from types import SimpleNamespace
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
from pandas.testing import assert_frame_equal
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from selfdetr.data.timegrid import TimeGrid
from selfdetr.data.windows import Batch, WindowConfig
from selfdetr.designs import PRESETS, make_model, make_objective
from selfdetr.feedback import FeedbackConfig
from selfdetr.inference import detect
from selfdetr.intervention import Replaced
from selfdetr.study.spec import RunSpec, override
from selfdetr.trainer import TrainConfig, make_optimizer, train_step
from selfdetr.variants import DesignConfig

aten = torch.ops.aten
_MOVES = {aten._to_copy.default, aten.copy_.default}
_TAKES_INDICES = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}
THERE = torch.device("meta")  # the name the pretended device goes by


class Elsewhere(torch.Tensor):
    "A tensor on the pretended device; its values are on the CPU."

    @staticmethod
    def __new__(cls, values):
        more = {"strides": values.stride(), "storage_offset": values.storage_offset(), "dtype": values.dtype}
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, device=THERE, **more)

    def __init__(self, values):
        self.values = values

    def __repr__(self):
        return f"elsewhere {tuple(self.shape)}"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _compute(function, args, kwargs or {})


def _values(x):
    return x.values if isinstance(x, Elsewhere) else x


def _wrapped(x):
    return Elsewhere(x) if isinstance(x, torch.Tensor) and not isinstance(x, Elsewhere) else x


def _compute(function, args, kwargs):
    "What a GPU does: all tensors are there but single numbers and indices, or it is an error."
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    there = [x for x in tensors if isinstance(x, Elsewhere)]
    judged = tensors[:1] if function in _TAKES_INDICES else tensors
    here = [x for x in judged if not isinstance(x, Elsewhere) and x.dim()]
    if there and here and function not in _MOVES:
        raise RuntimeError(f"{function}: tensors of two devices, {tuple(here[0].shape)} is on the CPU")
    device = kwargs.get("device")
    stays = device.type == THERE.type if device is not None else bool(there)
    if device is not None:
        kwargs = kwargs | {"device": torch.device("cpu")}
    result = function(*tree_map(_values, args), **tree_map(_values, kwargs))
    if function._schema.is_mutable:
        return args[0] if isinstance(result, torch.Tensor) else tree_map(_wrapped, result)
    return tree_map(_wrapped, result) if stays else result


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return _compute(function, args, kwargs or {})


class _Lists(TorchFunctionMode):
    "Two functions that are no operations: `torch.tensor` and `tolist`."

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.tensor and kwargs.get("device") == THERE:
            return Elsewhere(function(*args, **kwargs | {"device": "cpu"}))
        if function is torch.Tensor.tolist:
            return _values(args[0]).tolist()
        return function(*args, **kwargs)


@contextlib.contextmanager
def second_device():
    "Lets functions make tensors on the pretended device."
    with _Lists(), _Operations():
        yield


def move(model):
    "A model on the pretended device."
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            setattr(module, name, torch.nn.Parameter(Elsewhere(p.detach()), p.requires_grad))
        for name, b in module.named_buffers(recurse=False):
            setattr(module, name, Elsewhere(b))
    return model


SMALL = dict(channels=8, classes=3, dim=16, heads=4, hidden=32, queries=6, norm_groups=4, decoder_layers=2, dropout=0.0)
FEW = {"dino": {"denoising": 4}, "recommended": {"members": 2}}  # of what a design has many


DESIGNS = PRESETS | {"relative": {"model.encoder_attention": "relative"}}


def model_of(name, **changes):
    torch.manual_seed(0)
    design = {key[len("model.") :]: value for key, value in DESIGNS[name].items() if key.startswith("model.")}
    return make_model(DesignConfig(**design | SMALL | FEW.get(name, {}) | changes))


def loss_of(name):
    return override(RunSpec(), {k: v for k, v in DESIGNS[name].items() if k.startswith("loss.")}).loss


def batch_of(there):
    rng = torch.Generator().manual_seed(0)
    features = torch.randn(3, 16, 8, generator=rng)
    mask = torch.arange(16).expand(3, -1) >= torch.tensor([16, 12, 9])[:, None]
    targets = [
        {"segments": torch.tensor([[0.3, 0.2], [0.6, 0.1]]), "labels": torch.tensor([0, 2])},
        {"segments": torch.tensor([[0.4, 0.4]]), "labels": torch.tensor([1])},
        {"segments": torch.zeros(0, 2), "labels": torch.zeros(0, dtype=torch.int64)},
    ]
    return Batch(Elsewhere(features), Elsewhere(mask), targets) if there else Batch(features, mask, targets)


def one_step(name, there, feedback=None, **changes):
    "The numbers of a training step: its terms and the norm of the gradient."
    model, loss = model_of(name, **changes), loss_of(name)
    if there:
        move(model)
    objective = make_objective(model, loss, feedback or FeedbackConfig())
    optimizer = make_optimizer(model, TrainConfig(lr=1e-3))
    fabric = SimpleNamespace(device=THERE if there else torch.device("cpu"), backward=lambda loss: loss.backward())
    return train_step(fabric, model.train(), optimizer, objective, batch_of(there), 0.1).read()


def test_a_tensor_of_the_cpu_is_an_error():
    with second_device(), pytest.raises(RuntimeError, match="two devices"):
        Elsewhere(torch.ones(3)) + torch.ones(3)
    with second_device():
        assert isinstance(torch.zeros(3, device=THERE) + Elsewhere(torch.ones(3)), Elsewhere)
        assert type(Elsewhere(torch.ones(3)).cpu()) is torch.Tensor


@pytest.mark.parametrize("name", DESIGNS)
def test_a_step_of_every_design_makes_its_tensors_on_the_device(name):
    expected = one_step(name, there=False)
    with second_device():
        assert one_step(name, there=True) == pytest.approx(expected, rel=1e-4)
        assert one_step(name, there=True, dropout=0.1)["gradient"] > 0


@pytest.mark.parametrize("guidance", get_args(get_type_hints(FeedbackConfig)["guidance"]))
def test_every_guidance_is_made_on_the_device(guidance):
    feedback = FeedbackConfig(guidance=guidance)
    expected = one_step("self-detr", False, feedback)
    with second_device():
        found = one_step("self-detr", True, feedback)
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", DESIGNS)
def test_detection_makes_its_tensors_on_the_device(name):
    features = np.random.default_rng(0).standard_normal((50, 8)).astype(np.float32)

    def found(model):
        return detect(model, features, TimeGrid(30, 8, 16), windows=WindowConfig(length=16, test_overlap=0.5))

    expected = found(model_of(name))
    with second_device():
        assert_frame_equal(found(move(model_of(name))), expected, rtol=1e-4)


@pytest.mark.parametrize("part", ["encoder", "decoder"])
@pytest.mark.parametrize("how", ["mean row", "identity", "guidance"])
def test_replaced_maps_are_made_on_the_device(how, part):
    features, mask, _ = batch_of(there=False)
    with torch.no_grad():
        expected = Replaced(model_of("self-detr").eval(), how, part)(features, mask)
        with second_device():
            found = Replaced(move(model_of("self-detr")).eval(), how, part)(Elsewhere(features), Elsewhere(mask))
    assert torch.allclose(found.segments.values, expected.segments, atol=1e-5)
