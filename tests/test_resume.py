"""The state of a run: the same bits after a stop; damaged states, states of other settings and of other storage."""

import os
import shutil
from dataclasses import replace

import pandas as pd
import pytest
import torch
from models import CONFIG, FailsAt, new_model

from selfdetr.data import DataError, training_windows
from selfdetr.data.windows import random_windows
from selfdetr.designs import Objective
from selfdetr.feedback import FeedbackConfig
from selfdetr.losses import LossConfig, SetCriterion
from selfdetr.resume import BEFORE, STATE, State, read_state, write_state
from selfdetr.trainer import make_optimizer, train

CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("one_thread")


def fit(model, windows, config=CONFIG, objective=None, **options):
    objective = objective or Objective(SetCriterion())
    return train(model, windows, objective, config, device="cpu", progress=False, **options)


def stop_after(epochs):
    "For `on_epoch`: a kill, when the state of that epoch has been written."

    def stop(finished):
        if finished == epochs:
            raise KeyboardInterrupt

    return stop


def assert_same(model, history, other, continued):
    for (name, a), (again, b) in zip(model.state_dict().items(), other.state_dict().items(), strict=True):
        assert name == again and torch.equal(a, b), name
    histories = (h.drop(columns="seconds") for h in (history, continued))
    pd.testing.assert_frame_equal(*histories, check_exact=True)


# ---- stop and go on


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_lost_run_is_continued_to_the_same_bits(windows, tmp_path, precision):
    "In either precision, also when the fault comes between two saves."
    config = replace(CONFIG, epochs=4, precision=precision)
    whole = new_model()
    history = fit(whole, windows, config, seed=3)
    fails = FailsAt(2 * (len(windows) // 4) + 1)
    with pytest.raises(FloatingPointError):
        fit(new_model(), windows, config, fails, seed=3, state=State(tmp_path, save_seconds=0))
    state = read_state(tmp_path / STATE, CPU)
    assert len(state["history"]) == 2 and all(v.isfinite().all() for v in state["model"].values())
    assert not list(tmp_path.glob("*.part"))
    resumed = new_model(seed=99)
    torch.manual_seed(12345)
    continued = fit(resumed, windows, config, seed=3, state=State(tmp_path))
    assert_same(whole, history, resumed, continued)
    finished = fit(new_model(seed=98), windows, config, seed=3, state=State(tmp_path))  # nothing is left to do
    pd.testing.assert_frame_equal(finished, continued, check_exact=True)


def test_a_lost_run_on_random_windows_is_continued_to_the_same_bits(tiny, tmp_path):
    "Each epoch draws its own windows, so one that began again with the first would be seen."
    config = replace(CONFIG, epochs=4)
    whole, resumed = new_model(), new_model(seed=99)
    history = fit(whole, random_windows(tiny, 32, 0.25), config, seed=3)
    with pytest.raises(KeyboardInterrupt):
        fit(new_model(), random_windows(tiny, 32, 0.25), config, seed=3, state=State(tmp_path, 0),
            on_epoch=stop_after(2))  # fmt: skip
    continued = fit(resumed, random_windows(tiny, 32, 0.25), config, seed=3, state=State(tmp_path))
    assert_same(whole, history, resumed, continued)


@pytest.mark.parametrize("first, then", [(True, False), (False, True)])
def test_a_state_serves_parameters_in_one_vector_and_in_many(windows, tmp_path, first, then):
    "Two epochs one way and the third the other: what an undisturbed run learns, up to rounding."
    whole, resumed = new_model(), new_model(seed=5)
    history = fit(whole, windows)
    with pytest.raises(KeyboardInterrupt):
        fit(new_model(), windows, state=State(tmp_path, 0), on_epoch=stop_after(2), fast=first)
    continued = fit(resumed, windows, state=State(tmp_path), fast=then)
    assert continued.total.to_list() == pytest.approx(history.total.to_list(), rel=1e-4)
    for a, b in zip(whole.parameters(), resumed.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-4)


def test_a_state_is_written_when_it_is_due_and_at_the_end(windows, tmp_path, monkeypatch):
    now, written = [0.0], []
    monkeypatch.setattr("selfdetr.resume.time.monotonic", lambda: now[0])
    monkeypatch.setattr("selfdetr.resume.write_state", lambda _, state: written.append(len(state["history"])))

    def ten_seconds_later(_):
        now[0] += 10

    fit(new_model(), windows, replace(CONFIG, epochs=6), state=State(tmp_path, 25), on_epoch=ten_seconds_later)
    assert written == [4, 6]


# ---- damage


@pytest.fixture(scope="module")
def finished(tiny_folder, tmp_path_factory):
    "A finished run with its folder, computed once; copy it before changing it."
    from selfdetr.data import load_dataset

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder, model = tmp_path_factory.mktemp("state"), new_model()
    windows = training_windows(load_dataset(tiny_folder), 32, 0.25)
    history = fit(model, windows, state=State(folder, save_seconds=0))
    torch.set_num_threads(threads)
    return folder, model, history


@pytest.fixture
def folder(finished, tmp_path):
    return shutil.copytree(finished[0], tmp_path / "run")


def flip(path, place):
    "Flip one bit of a file, at a part of its length."
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 1
    path.write_bytes(content)


def cut(path, part):
    path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])


DAMAGES = {f"a bit flipped at {place}": (lambda path, place=place: flip(path, place)) for place in (0, 0.3, 0.7, 1)}
DAMAGES |= {f"cut to {part}": (lambda path, part=part: cut(path, part)) for part in (0, 0.5, 0.999)}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_state_falls_back_to_the_one_before_and_says_so(finished, folder, windows, damage):
    damage(folder / STATE)
    again = new_model(seed=9)
    with pytest.warns(UserWarning, match="checksum is wrong") as caught:
        history = fit(again, windows, state=State(folder))
    message = str(caught[0].message)
    assert message.startswith(f"{folder / STATE}: ") and message.endswith(f"{folder / BEFORE}, epoch 2")
    assert_same(*finished[1:], again, history)


def test_without_a_whole_state_nothing_is_guessed(folder, windows):
    for name in (STATE, BEFORE):
        flip(folder / name, 0.5)
    with pytest.raises(DataError, match=f"; delete {STATE} and {BEFORE} there to start this run again") as caught:
        fit(new_model(), windows, state=State(folder))
    assert all(str(folder / name) in str(caught.value) for name in (STATE, BEFORE))


def test_a_kill_between_the_two_renames_costs_an_epoch_and_a_damaged_state_is_not_kept(tmp_path):
    path = tmp_path / STATE
    for epoch in range(3):
        write_state(path, {"history": [{}] * epoch})
    assert [len(read_state(tmp_path / name, CPU)["history"]) for name in (STATE, BEFORE)] == [2, 1]
    os.replace(path, tmp_path / "lost")
    assert len(read_state(path, CPU)["history"]) == 1
    path.write_bytes(b"damaged")
    write_state(path, {"history": [{}] * 9})  # what is damaged does not take the place of what is whole
    path.write_bytes(b"damaged again")
    with pytest.warns(UserWarning, match="epoch 1"):
        assert len(read_state(path, CPU)["history"]) == 1


# ---- other settings


FIRST = dict(config=CONFIG, objective=Objective(SetCriterion()), seed=0)


def other_objective(feedback=FeedbackConfig(), **weights):
    return dict(objective=Objective(SetCriterion(LossConfig(**weights)), feedback))


@pytest.mark.parametrize("changes, message", [
    (dict(config=replace(CONFIG, lr=2e-3)), r"train\.lr was 0\.001 and is 0\.002 now"),
    (dict(config=replace(CONFIG, epochs=9)), r"train\.epochs was 3 and is 9 now"),
    (dict(config=replace(CONFIG, milestones=(1, 2))), r"train\.milestones was \(2,\) and is \(1, 2\) now"),
    (other_objective(feedback_decoder=0), r"loss\.feedback_decoder was 5\.0 and is 0 now"),
    (other_objective(FeedbackConfig(kl="map")), r"feedback\.kl was 'guidance' and is 'map' now"),
    (other_objective(None), r"feedback\.\w+ was .* and is None now"),
    (dict(seed=1), r"seed was 0 and is 1 now"),
    (dict(model=dict(dropout=0.3)), r"model\.dropout was 0\.1 and is 0\.3 now"),  # the same parameters
    (dict(model=dict(dim=8)), r"model\.dim was 16 and is 8 now"),
    (dict(windows=dict(overlap=0.5)), r"windows\.number was \d+ and is \d+ now"),
    (dict(windows=dict(length=40)), r"windows\.length was 32 and is 40 now"),
])  # fmt: skip
def test_a_state_of_other_settings_is_refused_with_both_values(tiny, folder, changes, message):
    before = (folder / STATE).read_bytes()
    changes = dict(changes)
    model = new_model(**changes.pop("model", {}))
    other = training_windows(tiny, **{"length": 32, "overlap": 0.25, **changes.pop("windows", {})})
    with pytest.raises(DataError, match=f"{STATE}: .*{message}; .*delete {STATE} and") as caught:
        fit(model, other, state=State(folder), **FIRST | changes)
    assert "\n" not in str(caught.value) and (folder / STATE).read_bytes() == before


@pytest.mark.parametrize("drawn", [False, True])
def test_a_state_of_fixed_windows_is_refused_for_random_ones_and_the_other_way_round(tiny, tmp_path, drawn):
    "Of as many windows: they differ in nothing but that."
    random = random_windows(tiny, 32, 0.25)
    kinds = {True: random, False: replace(random, redraw=None)}
    fit(new_model(), kinds[drawn], state=State(tmp_path))
    with pytest.raises(DataError, match=rf"windows\.random was {drawn} and is {not drawn} now"):
        fit(new_model(), kinds[not drawn], state=State(tmp_path))


def test_a_state_of_other_data_is_refused(tiny, folder):
    "Of as many windows of the same length: their features count."
    tiny.array[0] += 1
    with pytest.raises(DataError, match=r"windows\.data was '\w+' and is '\w+' now"):
        fit(new_model(), training_windows(tiny, 32, 0.25), state=State(folder))


def test_a_state_of_another_model_is_an_error_and_not_a_damage(tmp_path):
    "Where the settings do not tell."
    layers = torch.nn.Linear(2, 2), torch.nn.Linear(3, 2)
    state, other = State(tmp_path), State(tmp_path)
    state.save(layers[0], make_optimizer(layers[0], CONFIG), [], last=True)
    with pytest.raises(DataError, match="(?s)of another model or optimiser .*delete state.pt and"):
        other.load(layers[1], make_optimizer(layers[1], CONFIG), {})
