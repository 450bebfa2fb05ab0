"""What is faster computes what the definition computes, in twenty steps, compiled, and read late; what steps cost."""

from functools import partial

import numpy as np
import pytest
import torch

from selfdetr import speed, trainer
from selfdetr.checkpoint import save_model
from selfdetr.data import test_windows as windows_for_testing
from selfdetr.designs import Objective, make_model, make_objective
from selfdetr.feedback import FeedbackConfig, feedback_loss
from selfdetr.losses import LossConfig, SetCriterion
from selfdetr.speed import accelerate, batches, kept_bytes, least_seconds, operations, release
from selfdetr.trainer import StepValues, TrainConfig, prepare, train, train_step
from selfdetr.variants import DesignConfig

SIZES = dict(channels=8, classes=3, dim=32, heads=4, hidden=64, queries=6, norm_groups=4, decoder_layers=3)
CONFIG = TrainConfig(epochs=1, batch=4, lr=1e-3)


pytestmark = pytest.mark.usefixtures("one_thread")


def new_model(**changes):
    torch.manual_seed(0)
    return make_model(DesignConfig(**{**SIZES, **changes})).train()


def gradients(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize(
    "changes",
    [{}, {"maps": "before", "look_forward_twice": False}, {"encoder_layers": 0}, {"decoder_self_attention": "none"}],
    ids=["whole", "other gradient", "no encoder", "no queries"],
)
def test_fast_and_plain_agree_for_twenty_steps(tiny, changes):
    "Losses and gradients, with dropout drawn from the same numbers; rounding grows by the update, so it is bounded."
    models = [new_model(**changes) for _ in range(2)]
    sides = [(m, *prepare(m, CONFIG, "cpu", fast)) for m, fast in zip(models, (True, False))]
    weights, padded = {}, 0
    if not changes.keys() <= {"maps", "look_forward_twice"}:  # a part that is not there gives no feedback
        weights = {"feedback_encoder": 0.0} if "encoder_layers" in changes else {"feedback_decoder": 0.0}
    objective = make_objective(models[0], LossConfig(**weights))
    windows = windows_for_testing(tiny, 32, 0.5)  # unlike those for training, some of them are padded
    order = [np.arange(4 * i, 4 * i + 4) % len(windows) for i in range(20)]
    for step, batch in enumerate(batches(windows, order, torch.device("cpu"))):
        padded += batch.mask is not None
        values = []
        for _, fabric, wrapped, optimizer in sides:
            torch.manual_seed(step)
            values.append(train_step(fabric, wrapped, optimizer, objective, batch, 0.1).read())
        fast, plain = values
        assert fast == pytest.approx(plain, rel=1e-3 if step else 1e-5)
        a, b = (gradients(m) for m in models)
        assert (a - b).norm() < (1e-2 if step else 1e-5) * b.norm()
    assert 0 < padded < 20


def test_where_the_operations_are_the_same_so_are_the_bits():
    model, features = new_model(), torch.randn(2, 16, 8)
    outputs = []
    for fast in (False, True):
        if fast:
            accelerate(model, torch.device("cpu"))
        torch.manual_seed(1)
        outputs.append(model(features))
    for name in ("logits", "segments", "encoder_maps", "decoder_maps", "cross_maps"):
        assert torch.equal(*(getattr(output, name) for output in outputs)), name
    release(model)


def test_a_trained_model_is_an_ordinary_model_again(windows, tmp_path):
    model = new_model()
    train(model, windows, Objective(SetCriterion()), CONFIG, device="cpu", progress=False)
    storages = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert len(storages) == len(list(model.parameters())) and all(p.grad is None for p in model.parameters())
    assert not any({"forward", "attend"} & set(vars(m)) for m in model.modules())
    save_model(model, tmp_path)


def test_the_compiled_model_gives_the_same_gradients():
    "The capture and the joint graph of forward and backward that CUDA trains with; nothing may fall back to Python."
    model = new_model(dropout=0.0, dim=16, encoder_layers=1, decoder_layers=1, norm_groups=2)
    features, found = torch.randn(2, 8, 8), []
    for compiled in (False, True):
        if compiled:
            model.compile(backend="aot_eager", fullgraph=True)
        model.zero_grad()
        output = model(features)
        loss = output.logits.square().sum() + output.segments.sum() + sum(feedback_loss(output).values())
        loss.backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    release(model)
    torch._dynamo.reset()
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_a_step_read_late_is_still_named(windows, monkeypatch):
    "On a GPU the numbers of a step are read after the next one; the step that went wrong is named, not the one after."
    calls = []

    def late(*_):
        calls.append(1)
        if len(calls) == 3:  # weights that are not finite make the next matching fail
            raise FloatingPointError("matching cost is not finite")
        return StepValues(["total"], torch.tensor([float("nan") if len(calls) == 2 else 1.0]))

    monkeypatch.setattr(trainer, "train_step", late)
    with pytest.raises(FloatingPointError, match="epoch 0, step 1: not finite: total. The batch: "):
        train(new_model(), windows, Objective(SetCriterion()), CONFIG, device="cpu", progress=False)


def training_step(windows, fast=True, feedback=True, **changes):
    "A model and one training step of it."
    model = new_model(**changes)
    [batch] = batches(windows, [np.arange(4)], torch.device("cpu"))
    fabric, wrapped, optimizer = prepare(model, CONFIG, "cpu", fast)
    weights = {} if feedback else dict(feedback_encoder=0.0, feedback_decoder=0.0)
    objective = make_objective(model, LossConfig(**weights), FeedbackConfig() if feedback else None)
    return model, partial(train_step, fabric, wrapped, optimizer, objective, batch, CONFIG.clip)


@pytest.mark.parametrize("changes", [{}, dict(encoder_attention="deformable", cross_attention="deformable")])
def test_feedback_is_not_free(windows, changes):
    "It is counted in the operations and in what is kept, for maps of every kind."
    costs = []
    for feedback in (False, True):
        model, step = training_step(windows, feedback=feedback, **changes)
        costs.append((operations(step), kept_bytes(model, step)))
        assert costs[-1] == (operations(step), kept_bytes(model, step))  # nothing is left of the count before
    assert costs[0][0] < costs[1][0] and costs[0][1] < costs[1][1]


def test_fused_blocks_compute_as_much_and_keep_less(windows):
    (plain, slow), (fused, fast) = (training_step(windows, fast) for fast in (False, True))
    assert operations(slow) == operations(fast)
    assert kept_bytes(fused, fast) < 0.9 * kept_bytes(plain, slow)


def test_parameters_in_one_vector_are_not_counted_as_kept(windows):
    model, step = training_step(windows)
    assert len({p.untyped_storage().data_ptr() for p in model.parameters()}) == 1
    own = next(model.parameters()).untyped_storage().nbytes()
    assert kept_bytes(torch.nn.Module(), step) == kept_bytes(model, step) + own


def test_the_least_of_a_calls_own_times_is_taken(monkeypatch):
    "By the clock of the processor: 3, 2 and 4 seconds for one call, 10, 30 and 20 for the other."
    spent = iter([3, 10, 2, 30, 4, 20])
    now = [100.0]
    monkeypatch.setattr(speed.time, "process_time", lambda: now[0])

    def call():
        now[0] += next(spent)

    assert least_seconds({"one": call, "other": call}, rounds=3) == {"one": 2, "other": 10}
