"""Small models, one to train and one whose detections differ; a loss that fails; numbers; what tests compare."""

import numpy as np
import pytest
import torch

from selfdetr.data.files import DataError
from selfdetr.designs import Objective, make_model
from selfdetr.losses import SetCriterion
from selfdetr.model import ModelConfig, SelfDETR
from selfdetr.trainer import TrainConfig
from selfdetr.variants import DesignConfig

SIZE = dict(dim=32, heads=4, hidden=32, queries=8, norm_groups=4, encoder_layers=1, decoder_layers=2)
SIZES = dict(channels=8, classes=3, dim=16, heads=2, hidden=16, queries=5, norm_groups=2, decoder_layers=2)
CONFIG = TrainConfig(epochs=3, batch=4, lr=1e-3, milestones=(2,))


class FailsAt(Objective):
    "Gives a loss term that is not a number at one call."

    def __init__(self, call):
        super().__init__(SetCriterion())
        self.left = call

    def __call__(self, model, batch):
        self.left -= 1
        terms = super().__call__(model, batch)
        return terms | {"iou": terms["iou"] * float("nan")} if self.left < 0 else terms


def new_model(seed=0, **changes):
    "A model that trains in a second."
    torch.manual_seed(seed)
    return SelfDETR(ModelConfig(**{**SIZES, **changes}))


def some_model(**changes):
    "A model whose scores differ from window to window, which those of an untrained one hardly do."
    torch.manual_seed(3)
    model = make_model(DesignConfig(channels=8, classes=3, **SIZE, **changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model


def generator(seed):
    return torch.Generator().manual_seed(seed)


def random_maps(seed, *shape):
    "Maps whose rows sum to 1, in float64."
    return (2 * torch.randn(shape, generator=generator(seed), dtype=torch.float64)).softmax(-1)


def tail_mask(lengths, steps):
    return torch.arange(steps) >= torch.tensor(lengths)[:, None]


def same_weights(a, b):
    pairs = list(zip(a.state_dict().items(), b.state_dict().items()))
    return all(n == m and torch.equal(x, y) for (n, x), (m, y) in pairs)


def refused(action):
    "The one line with which a call is refused."
    with pytest.raises(DataError) as error:
        action()
    assert "\n" not in str(error.value)
    return str(error.value)


def close(one, other, columns=("start", "end", "score"), atol=1e-4):
    "Whether two tables of detections have the same labels, and nearly the same numbers."
    return one.label.tolist() == other.label.tolist() and np.allclose(one[[*columns]], other[[*columns]], atol=atol)
