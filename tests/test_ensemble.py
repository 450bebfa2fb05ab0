"""An ensemble: members are trained as they would be alone, keep their feedback, and detect together."""

from dataclasses import replace

import pandas as pd
import pytest
import torch
from models import CONFIG, SIZES
from pandas.testing import assert_frame_equal
from torch.testing import assert_close

from selfdetr.data.windows import WindowConfig
from selfdetr.designs import PRESETS, make_model, make_objective, preset
from selfdetr.ensemble import Ensemble, split_members
from selfdetr.inference import InferenceConfig, best_first, detect_dataset, merge
from selfdetr.resume import State
from selfdetr.scores import DesignLoss
from selfdetr.trainer import train

pytestmark = pytest.mark.usefixtures("one_thread")
OFF = dict(feedback_encoder=0, feedback_decoder=0)


def new_ensemble(name="recommended", **changes):
    torch.manual_seed(0)
    return make_model(preset(name, **{**SIZES, "members": 3, **changes}))


def vector_of(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("fast", [True, False])
def test_members_are_trained_as_alone(windows, fast):
    ensemble = new_ensemble(dropout=0.0)
    single = make_model(replace(ensemble.config, members=1))
    single.load_state_dict(ensemble.members[1].state_dict())
    start = vector_of(single)
    config = replace(CONFIG, clip=1e9)
    for model in (ensemble, single):
        objective = make_objective(model, DesignLoss(**OFF, quality=True), None)
        train(model, windows, objective, config, progress=False, fast=fast)
    alone, together = (vector_of(model) - start for model in (single, ensemble.members[1]))
    assert (alone - together).norm() < 0.02 * alone.norm()  # AdamW's eps is not divided by three


@pytest.mark.parametrize("name", ["self-detr", "tadtr", "rtd"])
def test_terms_are_means_over_members_also_those_of_feedback(windows, name):
    ensemble = new_ensemble(name, dropout=0.0)
    weights = {key.removeprefix("loss."): value for key, value in PRESETS[name].items() if key.startswith("loss.")}
    objective = make_objective(ensemble, DesignLoss(**weights))
    batch = windows.batch([0, 1, 2])
    terms = objective(ensemble, batch)
    each = [objective(member, batch) for member in ensemble.members]
    assert [*terms] == [*each[0]] and len({terms["class"].item() for terms in each}) == 3
    for term, value in terms.items():
        assert_close(value, sum(own[term] for own in each) / 3)


def test_an_ensemble_detects_what_its_members_detect(tiny):
    ensemble = new_ensemble().eval()
    every = InferenceConfig(nms="none", most=10**6, min_score=0.0)
    windows = WindowConfig(length=32, test_overlap=0.5)
    raw = [detect_dataset(member, tiny, every, windows) for member in ensemble.members]
    columns = ["video", "start", "end", "label", "score"]
    found, expected = (frame.sort_values(columns, ignore_index=True) for frame in
                       (detect_dataset(ensemble, tiny, every, windows), pd.concat(raw)))
    assert_frame_equal(found, expected, atol=1e-5)
    merged = best_first([merge(pd.concat(raw))])
    assert len(detect_dataset(ensemble, tiny, InferenceConfig(top=10**6), windows)) == len(merged)


def test_a_resumed_ensemble_ends_in_the_same_bits(windows, tmp_path):
    whole, halves = new_ensemble(), new_ensemble()
    objective = make_objective(whole, DesignLoss(**OFF), None)
    train(whole, windows, objective, CONFIG, progress=False)

    def stop(epoch):
        if epoch == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(halves, windows, objective, CONFIG, state=State(tmp_path / "s", save_seconds=0),
              progress=False, on_epoch=stop)
    halves = new_ensemble()
    train(halves, windows, objective, CONFIG, state=State(tmp_path / "s"), progress=False)
    for name, value in whole.state_dict().items():
        assert torch.equal(halves.state_dict()[name], value), name


def test_one_member_is_the_model_itself():
    assert type(make_model(preset("detr", **SIZES))).__name__ == "SelfDETR"
    model = make_model(preset("detr", **SIZES, members=2))
    assert isinstance(model, Ensemble) and {type(member).__name__ for member in model.members} == {"SelfDETR"}
    output = model(torch.randn(1, 12, 8))
    assert split_members(output, 1)[0] is output
