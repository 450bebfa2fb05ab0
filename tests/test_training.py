"""The training loop: a plain loop as oracle, the same numbers twice and after a crash, faults."""


from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from selfdetr import study, trainer
from selfdetr.data import DataError, training_windows
from selfdetr.feedback import FeedbackConfig, feedback_loss
from selfdetr.losses import LossConfig, SetCriterion
from selfdetr.model import PRESETS, ModelConfig, SelfDETR
from selfdetr.trainer import STATE, TrainConfig, epoch_batches, learning_rate, train

SIZES = dict(channels=8, classes=3, dim=16, heads=2, hidden=16, queries=5, norm_groups=2, decoder_layers=2)
CONFIG = TrainConfig(epochs=3, batch=4, lr=1e-3, milestones=(2,), window=32, overlap=0.25)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def windows(tiny):
    return training_windows(tiny, CONFIG.window, CONFIG.overlap)


def new_model(seed=0, **changes):
    torch.manual_seed(seed)
    return SelfDETR(ModelConfig(**{**SIZES, **changes}))


def fit(model, windows, config=CONFIG, criterion=None, **options):
    return train(model, windows, criterion or SetCriterion(), config=config, device="cpu", progress=False, **options)


def without_time(history):
    return history.drop(columns="seconds")


def same_weights(a, b):
    pairs = list(zip(a.state_dict().items(), b.state_dict().items()))
    return all(n == m and torch.equal(x, y) for (n, x), (m, y) in pairs)


class FailsAt(SetCriterion):
    "Gives a loss term that is not a number at one call."

    def __init__(self, call):
        super().__init__()
        self.left = call

    def __call__(self, output, targets):
        self.left -= 1
        terms = super().__call__(output, targets)
        return terms | {"iou": terms["iou"] * float("nan")} if self.left < 0 else terms


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
    config = TrainConfig(epochs=2, batch=4, lr=1e-3, milestones=(1,), warmup=1, clip=0.5, weight_decay=0.01, window=32)
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


# ---- stop and go on


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_lost_run_is_continued_to_the_same_bits(windows, tmp_path, precision):
    "In either precision, also when the fault comes between two saves."
    config = TrainConfig(epochs=4, batch=4, lr=1e-3, milestones=(2,), window=32, precision=precision)
    steps = len(windows) // 4
    whole = new_model()
    history = fit(whole, windows, config, seed=3)
    with pytest.raises(FloatingPointError):
        fit(new_model(), windows, config, FailsAt(2 * steps + 1), seed=3, folder=tmp_path, save_seconds=0)
    assert len(torch.load(tmp_path / STATE, weights_only=True)["history"]) == 2
    resumed = new_model(seed=99)
    torch.manual_seed(12345)
    continued = fit(resumed, windows, config, seed=3, folder=tmp_path)
    assert same_weights(whole, resumed)
    pd.testing.assert_frame_equal(without_time(history), without_time(continued), check_exact=True)
    finished = fit(new_model(seed=98), windows, config, seed=3, folder=tmp_path)  # nothing is left to do
    pd.testing.assert_frame_equal(finished, continued, check_exact=True)


def test_bf16_trains_on_padded_windows_and_keeps_its_weights_in_fp32(tiny):
    windows = training_windows(tiny, 300, 0.25, keep=0.1)  # longer than the recordings: all of them are padded
    assert (windows.valid < 300).any()
    model = new_model()
    history = fit(model, windows, TrainConfig(epochs=2, batch=2, window=300, precision="bf16-mixed"))
    assert np.isfinite(history.to_numpy()).all()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(p.isfinite().all() for p in model.parameters())


FIRST = dict(config=CONFIG, criterion=SetCriterion(), feedback=FeedbackConfig(), seed=0)


@pytest.mark.parametrize("changes, message", [
    (dict(config=replace(CONFIG, lr=2e-3)), r"train\.lr was 0\.001 and is 0\.002 now"),
    (dict(config=replace(CONFIG, epochs=9)), r"train\.epochs was 3 and is 9 now"),
    (dict(config=replace(CONFIG, milestones=(1, 2))), r"train\.milestones was \(2,\) and is \(1, 2\) now"),
    (dict(criterion=SetCriterion(LossConfig(feedback_decoder=0))), r"loss\.feedback_decoder was 5\.0 and is 0 now"),
    (dict(feedback=FeedbackConfig(kl="map")), r"feedback\.kl was 'guidance' and is 'map' now"),
    (dict(feedback=None), r"feedback\.\w+ was .* and is None now"),
    (dict(seed=1), r"seed was 0 and is 1 now"),
    (dict(model=dict(dropout=0.3)), r"model\.dropout was 0\.1 and is 0\.3 now"),  # the same parameters
    (dict(model=dict(dim=8)), r"model\.dim was 16 and is 8 now"),
    (dict(windows=dict(overlap=0.5)), r"windows\.number was \d+ and is \d+ now"),
    (dict(windows=dict(length=40)), r"windows\.length was 32 and is 40 now"),
])  # fmt: skip
def test_a_state_of_other_settings_is_refused_with_both_values(tiny, windows, tmp_path, changes, message):
    fit(new_model(), windows, folder=tmp_path, **FIRST)
    before = (tmp_path / STATE).read_bytes()
    changes = dict(changes)
    model = new_model(**changes.pop("model", {}))
    other = training_windows(tiny, **{"length": CONFIG.window, "overlap": CONFIG.overlap, **changes.pop("windows", {})})
    with pytest.raises(DataError, match=f"{STATE}: .*{message}; .*delete {STATE} and") as caught:
        fit(model, other, folder=tmp_path, **FIRST | changes)
    assert "\n" not in str(caught.value) and (tmp_path / STATE).read_bytes() == before


def test_a_state_of_other_data_is_refused(tiny, windows, tmp_path):
    "Of as many windows of the same length: their features count."
    fit(new_model(), windows, folder=tmp_path, **FIRST)
    tiny.array[0] += 1
    with pytest.raises(DataError, match=r"windows\.data was '\w+' and is '\w+' now"):
        fit(new_model(), training_windows(tiny, CONFIG.window, CONFIG.overlap), folder=tmp_path, **FIRST)


def test_a_state_that_does_not_say_its_settings_is_refused(windows, tmp_path):
    "As older code wrote it."
    fit(new_model(), windows, folder=tmp_path)
    state = trainer.read_state(tmp_path / STATE, torch.device("cpu"))
    trainer.write_state(tmp_path / STATE, {name: value for name, value in state.items() if name != "recipe"})
    with pytest.raises(DataError, match=f"{STATE}: .*older version.*; delete {STATE} and"):
        fit(new_model(), windows, folder=tmp_path)


# ---- faults


def test_a_loss_that_is_not_finite_names_its_batch_and_keeps_the_state(windows, tmp_path):
    steps = len(windows) // 4
    assert steps >= 2
    model, seed = new_model(), 4
    with pytest.raises(FloatingPointError) as caught:
        fit(model, windows, criterion=FailsAt(steps + 1), seed=seed, folder=tmp_path, save_seconds=0)
    message = str(caught.value)
    assert "epoch 1, step 1" in message and "iou" in message
    for i in epoch_batches(len(windows), 4, seed, 1)[1]:
        assert f"{windows.dataset.videos[windows.video[i]].name} at step {windows.start[i]}" in message
    state = torch.load(tmp_path / STATE, weights_only=True)
    assert len(state["history"]) == 1 and all(v.isfinite().all() for v in state["model"].values())
    assert not list(tmp_path.glob("*.part"))
    assert all(p.isfinite().all() for p in model.parameters())  # the update was not made


def test_features_that_turn_out_not_finite_stop_the_run(windows):
    "Features are checked when they are loaded; should they change after that, the loop still says where."
    windows.dataset.array[windows.row[0] + 3] = np.nan
    name = windows.dataset.videos[windows.video[0]].name
    with pytest.raises(FloatingPointError, match=f"not finite.*{name}"):
        fit(new_model(), windows, TrainConfig(epochs=1, batch=len(windows), window=32))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_features_that_are_not_finite_are_one_error_before_training(tiny_folder, tmp_path, monkeypatch, value):
    folder = tmp_path / "bad"
    (folder / "features").mkdir(parents=True)
    for path in tiny_folder.rglob("*.*"):
        (folder / path.relative_to(tiny_folder)).write_bytes(path.read_bytes())
    path = sorted((folder / "features").iterdir())[1]
    features = np.load(path)
    features[17, 2] = value
    np.save(path, features)
    monkeypatch.setattr(study, "train", lambda *_, **__: pytest.fail("training was started"))
    rows = [{"name": "baseline", "overrides": {}, "paper": None}]
    with pytest.raises(DataError) as caught:
        study.table(rows, 1, dataset=str(folder), profile="smoke", runs_root=tmp_path / "runs", progress=False)
    message = str(caught.value)
    assert path.stem in message and "17" in message and "\n" not in message
    assert not (tmp_path / "runs").exists()


def test_a_weight_without_its_loss_term_stops_before_the_first_update(windows):
    model, before = new_model(encoder_layers=0), new_model(encoder_layers=0)
    with pytest.raises(KeyError, match="feedback_encoder"):
        fit(model, windows)
    assert same_weights(model, before)
    off = SetCriterion(LossConfig(feedback_encoder=0))
    history = fit(model, windows, TrainConfig(epochs=1, batch=4, window=32), off)
    assert "feedback_encoder" not in history and not same_weights(model, before)


def test_the_history_shows_terms_that_are_not_trained(windows):
    off = SetCriterion(LossConfig(feedback_encoder=0, feedback_decoder=0))
    history = fit(new_model(), windows, TrainConfig(epochs=1, batch=4, window=32), off)
    asked = [name for name in trainer.COLUMNS if name != "query_overlap"]  # a term only where it has a weight
    assert list(history.columns) == asked and (history.feedback_encoder > 0).all()
    other = fit(new_model(), windows, TrainConfig(epochs=1, batch=4, window=32), off, feedback=FeedbackConfig(kl="map"))
    assert other.total.to_list() == history.total.to_list()  # the direction changes what is watched, not what is learnt
    assert other.feedback_encoder.to_list() != history.feedback_encoder.to_list()


# ---- devices


@pytest.mark.parametrize(
    "device, chosen",
    [("auto", ("cuda", None)), ("cuda", ("cuda", None)), ("cuda:1", ("cuda", [1])), ("cpu", ("cpu", None))],
)
def test_a_gpu_may_be_named(monkeypatch, device, chosen):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert trainer.choose_device(device) == chosen


@pytest.mark.parametrize("device", ["cuda:2", "cuda:", "cuda:x", "cuda:9", "cuda:-1", "cudax", "mps", "mps:0", "auto:0",
                                    "cpu:", "", "gpu"])  # fmt: skip
def test_a_device_that_is_not_there_is_refused(monkeypatch, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(DataError, match="choose one of"):
        trainer.choose_device(device)


def test_the_history_shows_the_overlap_of_queries_where_it_has_a_weight(windows):
    criterion = SetCriterion(LossConfig(query_overlap=1.0))
    history = fit(new_model(), windows, TrainConfig(epochs=1, batch=4, window=32), criterion)
    assert list(history.columns) == trainer.COLUMNS and (history.query_overlap > 0).all()


@pytest.mark.parametrize("first, then", [(True, False), (False, True)])
def test_a_state_serves_parameters_in_one_vector_and_in_many(windows, tmp_path, first, then):
    "Two epochs one way and the third the other: what an undisturbed run learns, up to rounding."
    whole = new_model()
    history = fit(whole, windows)
    with pytest.raises(FloatingPointError):
        stops = FailsAt(2 * (len(windows) // 4) + 1)
        fit(new_model(), windows, criterion=stops, folder=tmp_path, save_seconds=0, fast=first)
    resumed = new_model(seed=5)
    continued = fit(resumed, windows, folder=tmp_path, fast=then)
    assert continued.total.to_list() == pytest.approx(history.total.to_list(), rel=1e-4)
    for a, b in zip(whole.parameters(), resumed.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("wrong", [{"overlap": 1.0}, {"keep": 0.0}, {"keep": 5.0}, {"warmup": -3}])
def test_settings_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ValueError, match="TrainConfig: .*are needed"):
        TrainConfig(**wrong)


@pytest.mark.parametrize("preset", ["tadtr", "react"])
def test_features_too_large_for_the_arithmetic_name_their_batch(windows, preset):
    "Finite, but their products are not: points of deformable attention then have no time."
    attention = {k.removeprefix("model."): v for k, v in PRESETS[preset].items() if k.startswith("model.")}
    windows.dataset.array[:-1] = 3.3e38
    with pytest.raises(FloatingPointError, match="The batch: "):
        fit(new_model(**attention), windows)
