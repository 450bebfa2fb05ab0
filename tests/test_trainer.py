"""The training loop: a plain loop as oracle, the same numbers twice, the schedule, faults, the log."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import CONFIG, SIZES, FailsAt, new_model, same_weights

from selfdetr.data import training_windows
from selfdetr.data.windows import random_windows
from selfdetr.designs import Objective, make_model, make_objective, preset
from selfdetr.feedback import FeedbackConfig, feedback_loss
from selfdetr.losses import LossConfig, SetCriterion
from selfdetr.scores import DesignLoss
from selfdetr.trainer import HISTORY_COLUMNS, TrainConfig, _process_seed, epoch_batches, learning_rate, train

ONCE = TrainConfig(epochs=1, batch=4)


pytestmark = pytest.mark.usefixtures("one_thread")


def fit(model, windows, config=CONFIG, loss=LossConfig(), feedback=FeedbackConfig(), objective=None, **options):
    objective = objective or make_objective(model, loss, feedback)
    return train(model, windows, objective, config, device="cpu", progress=False, **options)


def without_time(history):
    return history.drop(columns="seconds")


# ---- the numbers


def test_same_seed_same_numbers_and_another_seed_others(windows):
    runs = []
    for seed in (1, 1, 2):
        model = new_model()
        torch.manual_seed(len(runs))  # order and dropout come from the run's seed alone
        runs.append((model, fit(model, windows, seed=seed)))
    (first, history), (again, repeated), (other, different) = runs
    pd.testing.assert_frame_equal(without_time(history), without_time(repeated), check_exact=True)
    assert same_weights(first, again) and not same_weights(first, other)
    assert (history.total != different.total).all()


def test_training_is_the_plain_loop(windows):
    "Plain PyTorch, without Fabric: the same batches, losses and learning rates give the same weights."
    config = TrainConfig(epochs=2, batch=4, lr=1e-3, milestones=(1,), warmup=1, clip=0.5, weight_decay=0.01)
    model, plain = (new_model(dropout=0.0) for _ in range(2))
    history = fit(model, windows, config, seed=7)
    criterion, totals = SetCriterion(), []
    optimizer = torch.optim.AdamW(plain.parameters(), lr=123.0, weight_decay=0.01)
    for epoch in range(2):
        order = np.random.default_rng([7, epoch]).permutation(len(windows))
        steps = len(windows) // 4
        for step in range(steps):
            lr = 1e-3 * step / steps if epoch == 0 else 1e-4  # warm-up, then behind the milestone
            optimizer.param_groups[0]["lr"] = lr
            batch = windows.batch(order[4 * step : 4 * step + 4])
            output = plain(batch.features, batch.mask)
            total = criterion.total(criterion(output, batch.targets) | feedback_loss(output))
            optimizer.zero_grad()
            total.backward()
            torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
            optimizer.step()
            totals.append(total.item())
    assert history.total.to_list() == pytest.approx(np.array(totals).reshape(2, -1).mean(1), rel=1e-5)
    # Where a gradient is next to nothing, Adam blows rounding up: the key biases, which move no softmax, are left out,
    # and the rest is compared as a whole, the distance between the two against the way they went.
    left_out = ("in_proj.bias", "k_content.bias", "k_position.bias")
    names = [name for name in model.state_dict() if not name.endswith(left_out)]
    states = (m.state_dict() for m in (model, plain, new_model(dropout=0.0)))
    ours, theirs, start = (torch.cat([state[name].flatten() for name in names]) for state in states)
    assert (ours - theirs).norm() < 3e-3 * (theirs - start).norm()


class Looks(Objective):
    "Keeps the features of the windows that it is shown, by call."

    def __init__(self):
        super().__init__(SetCriterion())
        self.seen = []

    def __call__(self, model, batch):
        self.seen.append({window.numpy().tobytes() for window in batch.features})
        return super().__call__(model, batch)


def test_random_windows_follow_seed_and_epoch(tiny):
    "Every epoch shows the windows that `of_epoch` draws for it, and no others."
    windows = random_windows(tiny, 32, 0.25)
    one_batch, runs, shown = TrainConfig(epochs=3, batch=len(windows)), [], []
    for seed in (1, 1, 2):
        model, looks = new_model(), Looks()
        runs.append((model, fit(model, windows, one_batch, objective=looks, seed=seed)))
        drawn = [windows.of_epoch(seed, epoch).batch(range(len(windows))) for epoch in range(3)]
        assert looks.seen == [{window.numpy().tobytes() for window in batch.features} for batch in drawn]
        assert len({frozenset(seen) for seen in looks.seen}) == 3
        shown.append(looks.seen)
    (first, history), (again, repeated), (other, different) = runs
    assert shown[0] == shown[1] and all(a != b for a, b in zip(shown[0], shown[2]))
    pd.testing.assert_frame_equal(without_time(history), without_time(repeated), check_exact=True)
    assert same_weights(first, again) and not same_weights(first, other)
    assert (history.total != different.total).all()


@pytest.mark.parametrize("quality", [False, True])
def test_batches_without_an_instance_train(tiny, quality):
    "Windows that are drawn may miss all instances."
    tiny.videos = tuple(replace(v, segments=v.segments[:0], labels=v.labels[:0]) for v in tiny.videos)
    windows = random_windows(tiny, 32, 0.25)
    assert len(windows) >= 4 and not any(len(target["labels"]) for target in windows.targets)
    history = fit(new_model(), windows, ONCE, DesignLoss(quality=quality))
    assert np.isfinite(history.to_numpy()).all() and (history["class"] > 0).all() and (history.iou == 0).all()


@given(st.integers(1, 70), st.integers(1, 20), st.integers(0, 5), st.integers(0, 5))
def test_an_epoch_shows_every_window_at_most_once(windows, batch, seed, epoch):
    batches = epoch_batches(windows, batch, seed, epoch)
    shown = np.concatenate(batches)
    assert len(np.unique(shown)) == len(shown) and set(shown) <= set(range(windows))
    assert len(shown) == (windows // batch * batch or windows)
    assert {len(b) for b in batches} == {min(batch, windows)}


@given(st.integers(0, 5), st.integers(6, 20), st.sampled_from(["step", "cosine"]))
def test_the_learning_rate_is_positive_never_above_its_peak_and_falls_after_warm_up(warmup, epochs, schedule):
    config = TrainConfig(epochs=epochs, schedule=schedule, warmup=warmup, milestones=(6, 9), lr=0.5)
    rates = [learning_rate(config, e) for e in np.arange(0.25, epochs, 0.25)]
    after = rates[4 * warmup :]
    assert 0 < min(rates) and max(rates) <= 0.5 and after == sorted(after, reverse=True)


def test_bf16_trains_on_padded_windows_and_keeps_its_weights_in_fp32(tiny):
    windows = training_windows(tiny, 300, 0.25, keep=0.1)  # longer than the recordings: all of them are padded
    assert (windows.valid < 300).any()
    model = new_model()
    history = fit(model, windows, TrainConfig(epochs=2, batch=2, precision="bf16-mixed"))
    assert np.isfinite(history.to_numpy()).all()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(p.isfinite().all() for p in model.parameters())


# ---- faults


def test_a_loss_that_is_not_finite_names_its_batch_and_updates_nothing(windows):
    steps = len(windows) // 4
    assert steps >= 2
    model, seed = new_model(), 4
    with pytest.raises(FloatingPointError) as caught:
        fit(model, windows, objective=FailsAt(steps + 1), seed=seed)
    message = str(caught.value)
    assert "epoch 1, step 1" in message and "iou" in message
    for i in epoch_batches(len(windows), 4, seed, 1)[1]:
        assert f"{windows.dataset.videos[windows.video[i]].name} at step {windows.start[i]}" in message
    assert all(p.isfinite().all() for p in model.parameters())


def test_features_that_turn_out_not_finite_stop_the_run(windows):
    "Features are checked when they are loaded; should they change after that, the loop still says where."
    windows.dataset.array[windows.row[0] + 3] = np.nan
    name = windows.dataset.videos[windows.video[0]].name
    with pytest.raises(FloatingPointError, match=f"not finite.*{name}"):
        fit(new_model(), windows, TrainConfig(epochs=1, batch=len(windows)))


def test_a_weight_without_its_loss_term_stops_before_the_first_update(windows):
    model, before = new_model(encoder_layers=0), new_model(encoder_layers=0)
    with pytest.raises(KeyError, match="feedback_encoder"):
        fit(model, windows, objective=Objective(SetCriterion()))
    assert same_weights(model, before)
    history = fit(model, windows, ONCE, LossConfig(feedback_encoder=0))
    assert "feedback_encoder" not in history and not same_weights(model, before)


def test_the_history_shows_terms_that_are_not_trained(windows):
    off = LossConfig(feedback_encoder=0, feedback_decoder=0)
    history = fit(new_model(), windows, ONCE, off)
    asked = [name for name in HISTORY_COLUMNS if name != "query_overlap"]  # a term only where it has a weight
    assert list(history.columns) == asked and (history.feedback_encoder > 0).all()
    other = fit(new_model(), windows, ONCE, off, FeedbackConfig(kl="map"))
    assert other.total.to_list() == history.total.to_list()  # the direction changes what is watched, not what is learnt
    assert other.feedback_encoder.to_list() != history.feedback_encoder.to_list()


def test_the_history_shows_the_overlap_of_queries_where_it_has_a_weight(windows):
    history = fit(new_model(), windows, ONCE, DesignLoss(query_overlap=1.0))
    assert list(history.columns) == HISTORY_COLUMNS and (history.query_overlap > 0).all()


@pytest.mark.parametrize("wrong", [{"warmup": -3}, {"lr": 0.0}, {"clip": float("nan")}, {"precision": "16"}], ids=str)
def test_settings_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ValueError, match=f"TrainConfig.{next(iter(wrong))} is .*(must be|choose one of)"):
        TrainConfig(**wrong)


def test_every_process_and_epoch_draws_other_numbers():
    assert len({_process_seed(s, e, r) for s in (0, 1) for e in range(9) for r in range(9)}) == 2 * 9 * 9


@pytest.mark.parametrize("name", ["tadtr", "react"])
def test_features_too_large_for_the_arithmetic_name_their_batch(windows, name):
    "Finite, but their products are not: points of deformable attention then have no time."
    windows.dataset.array[:-1] = 3.3e38
    with pytest.raises(FloatingPointError, match="The batch: "):
        fit(make_model(preset(name, **SIZES)), windows, loss=LossConfig(feedback_encoder=0, feedback_decoder=0))


def test_feedback_that_starts_late_leaves_the_first_part_of_training_as_without(windows):
    "The first two of three epochs have no weight of the feedback; the last one has."
    def weights_by_epoch(loss, feedback):
        model, kept = new_model(dropout=0.0), {}

        def keep(epoch):
            kept[epoch] = torch.cat([p.detach().flatten() for p in model.parameters()])

        fit(model, windows, replace(CONFIG, epochs=3), loss, feedback, on_epoch=keep)
        return kept

    late = weights_by_epoch(LossConfig(), FeedbackConfig(start=0.6))
    without = weights_by_epoch(LossConfig(feedback_encoder=0, feedback_decoder=0), FeedbackConfig())
    assert torch.equal(late[2], without[2]) and not torch.equal(late[3], without[3])
