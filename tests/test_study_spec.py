"""Specs survive their JSON, and what cannot be a spec, a data set or a parameter is refused in one line."""

import json
import shutil
import unicodedata
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfdetr import study
from selfdetr.data import DataError
from selfdetr.data.files import checksum
from selfdetr.settings import choose_settings
from selfdetr.simulate import SimulatorConfig, make_dataset
from selfdetr.study import RunSpec, make_spec, override
from selfdetr.study.compute import run_hash, training_hash

numbers = st.floats(0, 100)
OVERRIDES = st.fixed_dictionaries(
    {},
    optional={
        "model.dim": st.sampled_from([64, 128, 256]),
        "model.encoder_layers": st.integers(0, 6),
        "model.decoder_self_attention": st.sampled_from(["standard", "relational", "none"]),
        "model.dropout": st.floats(0, 0.9),
        "feedback.encoder": st.sampled_from(["matmul", "average", "last"]),
        "feedback.kl": st.sampled_from(["guidance", "map"]),
        "train.milestones": st.lists(st.integers(1, 100), max_size=3),
        "train.lr": st.floats(1e-7, 10),
        "train.precision": st.sampled_from(["32-true", "bf16-mixed"]),
        "loss.feedback_encoder": numbers,
        "loss.alpha": numbers,
        "inference.nms": st.sampled_from(["soft", "hard", "none"]),
        "inference.sigma": st.floats(0.01, 10),
    },
)


@settings(max_examples=40)
@given(overrides=OVERRIDES, seed=st.integers(0, 10**6), dataset=st.text(max_size=8), profile=st.text(max_size=8))
def test_a_spec_survives_its_json(overrides, seed, dataset, profile):
    spec = override(RunSpec(dataset, profile, seed=seed), overrides)
    again = RunSpec.from_json(spec.to_json())
    assert again == spec and again.to_json() == spec.to_json() and run_hash(again, "") == run_hash(spec, "")
    for key, value in overrides.items():
        part, name = key.split(".")
        assert getattr(getattr(again, part), name) == (tuple(value) if name == "milestones" else value)


@settings(max_examples=40)
@given(a=OVERRIDES, b=OVERRIDES)
def test_runs_share_a_name_only_when_they_are_the_same(a, b):
    a, b = override(RunSpec(), a), override(RunSpec(), b)
    assert (run_hash(a, "data") == run_hash(b, "data")) == (a == b)
    assert len({run_hash(a, "data"), run_hash(a, "other data"), run_hash(replace(a, seed=1), "data")}) == 3


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", '{"seeds": 1}', '{"model": {"width": 3}}', '{"train": {"lr": 0}}']
)
def test_text_that_is_no_spec_is_a_value_error(text):
    with pytest.raises(ValueError):
        RunSpec.from_json(text)


@pytest.mark.parametrize("key", ["lr", "seed", "model.depth", "models.dim", "train.", ".lr", "loss.alpha.x", ""])
def test_an_unknown_override_is_named(key):
    with pytest.raises(ValueError, match="no such field") as caught:
        override(RunSpec(), {key: 1})
    assert repr(key) in str(caught.value)


@pytest.mark.parametrize("value", [["a"], [[1]], [None], [1.5], [10**30]])
def test_what_an_override_puts_into_a_list_is_checked(value):
    for spec in (RunSpec(), override(RunSpec(), {"train.milestones": []})):
        with pytest.raises(ValueError, match="override 'train.milestones': milestones is "):
            override(spec, {"train.milestones": value})


@pytest.mark.parametrize("seed", [-1, 10**13])
def test_a_seed_that_cannot_be_one_is_refused(tiny, seed):
    with pytest.raises(ValueError, match=f"seed {seed}: give a whole number"):
        make_spec("tiny", "smoke", tiny, seed)


def table_options(dataset, out_dir, seeds=2):
    names = dict(dataset=str(dataset), profile="smoke", data_root="", seeds=seeds, device="cpu", workers=1,
                 out_dir=str(out_dir), cluster="")  # fmt: skip
    return study.check_parameters(names)


@pytest.mark.parametrize("dataset, name", [
    ("simulated", "simulated"), ("a/tiny", "tiny"), ("a/tiny/", "tiny"), ("a/b/../tiny", "tiny"), (".", "here"),
    ("..", "above"), ("../there", "there"),
])  # fmt: skip
def test_the_folder_of_results_has_the_data_sets_name(tmp_path, monkeypatch, dataset, name):
    (tmp_path / "above" / "here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "above" / "here")
    results, options = table_options(dataset, "out")
    assert results == options["results"] == Path("out", f"{name}-smoke") and options["dataset"] == dataset


def test_results_that_cannot_be_written_stop_a_notebook_in_its_first_cell(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    parameters = dict(dataset="simulated", profile="smoke", data_root="", seeds=1, device="cpu", workers=1, cluster="")
    study.check_parameters(parameters | {"out_dir": str(tmp_path / "new" / "results")})
    assert not (tmp_path / "new").exists()
    with pytest.raises(OSError, match=r"file/results: cannot be written \(.*file is a file\); choose a folder"):
        study.check_parameters(parameters | {"out_dir": str(tmp_path / "file" / "results")})


# ---- folds


def test_runs_have_the_names_they_had_before_there_were_folds():
    spec = override(RunSpec("a", "smoke", 3), {"train.lr": 0.5})
    old = {name: value for name, value in asdict(replace(spec, dataset="")).items() if name not in ("fold", "inner")}
    text = json.dumps([old, "data", training_hash()], sort_keys=True)
    assert run_hash(spec, "data") == run_hash(replace(spec, fold="2"), "data") == checksum(text.encode())[:16]
    written = json.loads(spec.to_json())
    del written["fold"], written["inner"], written["loss"]["quality"], written["windows"]["random"]
    del written["inference"]["cut"], written["inference"]["voting"]
    assert RunSpec.from_json(json.dumps(written)) == spec


def test_a_fold_is_opened_by_its_name(folds_folder, tiny_folder, tmp_path, monkeypatch):
    folds = study.open_folds(str(folds_folder), "smoke")
    tested = {fold: [video.name for video in data.split("test")] for fold, data in folds.items()}
    assert {fold: len(names) for fold, names in tested.items()} == {"1": 2, "2": 2, "3": 1}
    assert len(set(sum(tested.values(), []))) == 5
    assert list(study.open_folds(str(folds_folder), "smoke", folds=["3", "1"])) == ["3", "1"]
    assert list(study.open_folds(str(folds_folder), "smoke", folds="2")) == ["2"]
    assert study.open_dataset(str(folds_folder), "smoke", fold="3").hash() == folds["3"].hash()
    assert study.open_dataset(str(folds_folder), "smoke", fold=None).hash() == folds["1"].hash()
    plain = study.open_folds(str(tiny_folder), "smoke")
    assert list(plain) == [""] and plain[""].hash() == study.open_dataset(str(tiny_folder), "smoke", fold=None).hash()
    monkeypatch.chdir(tmp_path)
    assert list(study.open_folds(folds_folder.name, "smoke", folds_folder.parent)) == ["1", "2", "3"]


@pytest.mark.parametrize("name, fold, message", [
    ("folded", "", "folded: has 3 folds, and a run is on one; name a fold: 1, 2, 3"),
    ("folded", "4", "folded: has no fold '4'; it is one of 1, 2, 3"),
    ("tiny", "1", "tiny: has no fold '1'; it has no folders fold1, fold2, ..."),
])  # fmt: skip
def test_a_fold_that_is_not_there_is_one_line(folds_folder, tiny_folder, name, fold, message):
    folder = {"folded": folds_folder, "tiny": tiny_folder}[name]
    with pytest.raises(DataError) as caught:
        study.open_dataset(str(folder), "smoke", fold=fold)
    assert str(caught.value) == f"{folder.parent}/{message}"
    if fold:
        with pytest.raises(DataError, match=f"has no fold '{fold}'"):
            study.open_folds(str(folder), "smoke", folds=fold)


def set_file(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def lose_a_class(place):
    kept = json.loads((place / "dataset.json").read_text())["classes"][1:]
    set_file(place / "dataset.json", classes=kept, ignore_labels=["action 0"])


def turn_the_classes_round(place):
    set_file(place / "dataset.json", classes=json.loads((place / "dataset.json").read_text())["classes"][::-1])


def halve_the_channels(place):
    for path in (place / "features").iterdir():
        np.save(path, np.load(path)[:, ::2])


def judge_otherwise(place):
    set_file(place / "dataset.json", protocol="thumos14-212")


def share_a_test_video(place):
    database = json.loads((place / "annotations.json").read_text())["database"]
    database["video_0003"]["subset"] = "test"
    set_file(place / "annotations.json", database=database)


@pytest.mark.parametrize("change, message", [
    (lose_a_class, "folds 1 and 2 differ in their classes: 'action 0' is only in 1; write one list of classes"),
    (turn_the_classes_round, "folds 1 and 2 differ in their classes: their order is not the same; write one list"),
    (halve_the_channels, "folds 1 and 2 have features of 8 and 4 channels; extract those of all folds in the same way"),
    (judge_otherwise, "folds 1 and 2 are judged by the protocols None and 'thumos14-212'; write the same one"),
    (share_a_test_video, "video 'video_0003' is in the test split of folds 1 and 2; let one of them train on it"),
])  # fmt: skip
def test_folds_that_do_not_belong_together_are_one_line(folds_folder, tmp_path, change, message):
    folder = shutil.copytree(folds_folder, tmp_path / "folded")
    change(folder / "fold2")
    with pytest.raises(DataError) as caught:
        study.open_folds(str(folder), "smoke")
    assert str(caught.value).startswith(f"{folder}: {message}") and "\n" not in str(caught.value)
    study.open_dataset(str(folder), "smoke", fold="2")  # by itself it can be used


def test_a_video_that_two_folds_test_on_is_found_in_any_unicode_form(folds_folder, tmp_path):
    folder = shutil.copytree(folds_folder, tmp_path / "folded")
    for fold, form in (("1", "NFC"), ("2", "NFD")):
        place, name = folder / f"fold{fold}", unicodedata.normalize(form, "knäuel")
        database = json.loads((place / "annotations.json").read_text())["database"]
        database[name] = database.pop("video_0003") | {"subset": "test"}
        set_file(place / "annotations.json", database=database)
        (place / "features" / "video_0003.npy").rename(place / "features" / f"{name}.npy")
    with pytest.raises(DataError, match="is in the test split of folds 1 and 2"):
        study.open_folds(str(folder), "smoke")


def test_data_of_an_older_simulator_are_made_again(tmp_path):
    folder = make_dataset(tmp_path / "simulated-smoke", config=SimulatorConfig(train_videos=2, test_videos=1))
    assert len(study.open_dataset("simulated", "smoke", tmp_path).videos) == 10
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]
    (folder / "simulated.json").write_text("{}")
    (folder / "features" / "mine.txt").write_text("")
    with pytest.raises(DataError, match="not this simulated data set"):
        study.open_dataset("simulated", "smoke", tmp_path)
    assert (folder / "features" / "mine.txt").exists()


# ---- an inner split, and the standard profile


def change_recordings(folder, split):
    "Other features, and other instances of the same classes, for the recordings of a split."
    database = json.loads((folder / "annotations.json").read_text())["database"]
    for name, entry in database.items():
        if entry["subset"] == split:
            path = folder / "features" / f"{name}.npy"
            np.save(path, 2 - np.load(path))
            entry["annotations"] = [item | {"label": "action 0"} for item in entry["annotations"][1:]]
    set_file(folder / "annotations.json", database=database)


def subsets(folder):
    database = json.loads((folder / "annotations.json").read_text())["database"]
    return {video.split: database[video.name]["subset"] for video in study.open_dataset(str(folder), "smoke").videos}


@pytest.mark.parametrize("profile", ["smoke", "standard"])
def test_an_inner_run_depends_on_no_test_recording(tiny_folder, tmp_path, profile):
    folder = shutil.copytree(tiny_folder, tmp_path / "tiny")

    def names():
        every = [(inner, study.open_dataset(str(folder), profile, inner=inner)) for inner in (True, False)]
        return [run_hash(make_spec(str(folder), profile, data, inner=inner), data.hash()) for inner, data in every]

    first = names()
    change_recordings(folder, subsets(folder)["test"])
    second = names()
    assert second[0] == first[0] and len({*first, *second}) == 3
    change_recordings(folder, subsets(folder)["train"])
    assert not {*names()} & {*first, *second}


def test_inner_splits_of_folds_may_judge_the_same_recordings(folds_folder):
    opened = study.open_folds(str(folds_folder), "smoke", inner=True)
    judged = [[video.name for video in data.split("test")] for data in opened.values()]
    assert list(opened) == ["1", "2", "3"] and len({*sum(judged, [])}) < len(sum(judged, []))
    assert study.open_dataset(str(folds_folder), "smoke", fold="2", inner=True).hash() == opened["2"].hash()


@pytest.mark.parametrize("inner", [False, True])
def test_mapped_features_are_warned_of_and_not_standardised(tiny_folder, folds_folder, tmp_path, inner):
    for source, fold in (tiny_folder, ""), (folds_folder, "2"):
        folder = shutil.copytree(source, tmp_path / source.name, symlinks=True)
        place = folder / f"fold{fold}" if fold else folder
        settings = json.loads((place / "dataset.json").read_text())
        whole = study.open_dataset(str(folder), "standard", fold=fold, inner=inner)
        assert whole.scale is not None and whole.array is not None
        (place / "dataset.json").unlink()
        (place / "dataset.json").write_text(json.dumps(settings | {"in_memory": False}))
        with pytest.warns(UserWarning, match=f"{place}: features are mapped, so they are not standardised"):
            mapped = study.open_dataset(str(folder), "standard", fold=fold, inner=inner)
        name = mapped.videos[0].name
        assert mapped.array is None and mapped.scale is None
        assert np.array_equal(mapped.features(name), np.load(place / "features" / f"{name}.npy"))
        assert make_spec(str(folder), "standard", mapped, fold=fold, inner=inner).model.channels == mapped.channels


def test_a_folder_has_the_settings_of_the_data_set_that_it_is_named_after():
    named, placed = make_spec("gtea", "standard", None), make_spec("some/where/gtea", "standard", None)
    assert replace(placed, dataset="gtea") == named != replace(make_spec("mine", "standard", None), dataset="gtea")


@pytest.fixture(scope="module")
def long_actions(tmp_path_factory):
    "A folder of no known name, whose actions last up to some 150 steps."
    config = SimulatorConfig(train_videos=4, test_videos=2, video_seconds=400, stride=2.0)
    return make_dataset(tmp_path_factory.mktemp("place") / "mine", 0, config)


def test_a_study_chooses_the_settings_of_a_folder_that_no_profile_knows(long_actions):
    data = study.open_dataset(str(long_actions), "standard")
    base = make_spec("mine", "standard", None)
    chosen = {choice.name: choice.value for choice in choose_settings(data, base.windows, base.train)}
    spec = make_spec(str(long_actions), "standard", data)
    assert chosen["windows.length"] == 512 and set(chosen) == {"windows.length", "model.queries", "train.epochs"}
    assert spec == override(replace(base, dataset=spec.dataset, model=spec.model), chosen)
    rows = [make_spec(str(long_actions), "standard", data, 1, row) for row in ({}, {"windows.random": True})]
    assert rows[0].train == rows[1].train and rows[0].windows.length == rows[1].windows.length == 512
    assert make_spec(str(long_actions), "standard", data, 0, {"windows.length": 64}).windows.length == 64


def test_windows_that_lose_many_instances_are_warned_of(long_actions):
    with pytest.warns(UserWarning, match="windows of 64 steps are too short for 50 of 286 training instances"):
        study.open_folds(str(long_actions), "quick")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        study.open_folds(str(long_actions), "standard")
