"""Runs and tables: round trips, faults, killed and simultaneous processes, statistics against SciPy, whole files."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from scipy.stats import ttest_rel

from selfdetr import study
from selfdetr.data import DataError, load_dataset
from selfdetr.study import Run, RunSpec, make_spec, override, run_hash

SMALL = {
    "model.dim": 16,
    "model.heads": 2,
    "model.norm_groups": 2,
    "model.hidden": 16,
    "model.queries": 6,
    "train.epochs": 3,
    "train.batch": 3,
}
ROWS = [
    {"name": "baseline", "overrides": {**SMALL, "loss.feedback_encoder": 0, "loss.feedback_decoder": 0}, "paper": None},
    {"name": "both", "overrides": SMALL, "paper": {"0.5": 60.0, "average": 56.7}},
]
CLAIM = {"text": "feedback helps", "better": "both", "worse": "baseline"}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    plt.close("all")


@pytest.fixture
def spec(tiny):
    return make_spec("tiny", "smoke", tiny, overrides=SMALL)


@pytest.fixture(scope="module")
def finished(tiny_folder, tmp_path_factory):
    "One run, computed once for all tests; copy it before changing it."
    torch.set_num_threads(1)
    data = load_dataset(tiny_folder)
    spec = make_spec("tiny", "smoke", data, overrides=SMALL)
    return study.run(spec, data, runs_root=tmp_path_factory.mktemp("runs"), device="cpu", progress=False)


def make_table(rows, seeds, tiny_folder, runs_root, **options):
    options = dict(dataset=str(tiny_folder), profile="smoke", device="cpu", workers=1, progress=False) | options
    return study.table(rows, seeds, runs_root=runs_root, **options)


def shown(folder):
    "What a user sees in a runs folder: lock files and unfinished work are hidden."
    return sorted(p.name for p in Path(folder).glob("[!.]*"))


def measured(run):
    "The metrics without times."
    return {k: v for k, v in run.metrics.items() if not k.startswith("seconds")}


def strict_json(path):
    "The content of a file without NaN and Infinity, which are no JSON."
    return json.loads(path.read_text(), parse_constant=lambda text: pytest.fail(f"{path.name} holds {text}"))


def assert_same_run(a, b):
    assert measured(a) == measured(b)
    histories = (run.history.drop(columns="seconds") for run in (a, b))
    pd.testing.assert_frame_equal(*histories, check_exact=True)
    for name in ("checkpoint.safetensors", "detections.json", "detector.json", "config.json", "spec.json"):
        assert (a.folder / name).read_bytes() == (b.folder / name).read_bytes(), name


# ---- specs


@pytest.fixture
def frozen_source(monkeypatch):
    "The hash of the code does not change in a test; taking it costs more than the rest."
    training = study.training_hash()
    monkeypatch.setattr(study, "training_hash", lambda: training)


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


# The fixtures below hold for all examples of a test, which is what these tests want.
examples = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@settings(examples, max_examples=60)
@given(overrides=OVERRIDES, seed=st.integers(0, 10**6), dataset=st.text(max_size=8), profile=st.text(max_size=8))
def test_a_spec_survives_its_json(frozen_source, overrides, seed, dataset, profile):
    spec = override(RunSpec(dataset, profile, seed=seed), overrides)
    again = RunSpec.from_json(spec.to_json())
    assert again == spec and again.to_json() == spec.to_json() and run_hash(again, "") == run_hash(spec, "")
    for key, value in overrides.items():
        part, name = key.split(".")
        assert getattr(getattr(again, part), name) == (tuple(value) if name == "milestones" else value)


@settings(examples, max_examples=60)
@given(a=OVERRIDES, b=OVERRIDES)
def test_runs_share_a_name_only_when_they_are_the_same(frozen_source, a, b):
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
        with pytest.raises(ValueError, match="override 'train.milestones'.*has to be like"):
            override(spec, {"train.milestones": value})


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_a_seed_that_cannot_be_one_is_refused(tiny, seed):
    with pytest.raises(ValueError, match=f"seed {seed}: give a whole number"):
        make_spec("tiny", "smoke", tiny, seed)


@pytest.mark.parametrize("options, message", [
    ("--seed -1", "argument --seed: '-1'; give a whole number from 0"),
    ("--seed " + "1" * 23, "argument --seed: "),
    ("--seed 1.5", "argument --seed: '1.5'; give a whole number from 0"),
    ("--sed 1", "unrecognized arguments: --sed 1"),
    ("--profile quik", "argument --profile: invalid choice: 'quik'"),
    ("--preset tadter", "argument --preset: invalid choice: 'tadter'"),
    ("--set model.quieres=3", "override 'model.quieres': no such field; did you mean 'model.queries'?"),
    ("--set modle.queries=3", "override 'modle.queries': no such field; did you mean 'model.queries'?"),
    ("--set train.epochs=many", "override 'train.epochs': 'many' is not of type int"),
    ("--set train.epochs=0", "TrainConfig.epochs is 0; it must be positive"),
    ("--set model.heads=5", "ModelConfig.dim is 32; it must be divisible by heads"),
    ("--set train.epochs", "argument --set: 'train.epochs'; write part.field=value"),
    ("--device cuda:99", "device 'cuda:99'"),
    ("--device cudax", "device 'cudax'"),
    ("--runs FILE/runs", "a file is a file"),
    ("--data-root", "argument --data-root: expected one argument"),
])  # fmt: skip
def test_wrong_options_are_one_line_before_any_data_are_read(tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(study, "open_dataset", lambda *_: pytest.fail("the data were read"))
    (tmp_path / "a file").touch()
    arguments = [option.replace("FILE", str(tmp_path / "a file")) for option in options.split()]
    assert study.main(["simulated", "--profile", "smoke", *arguments]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("selfdetr-train: error: ") and shown.err.count("\n") == 1 and message in shown.err
    assert shown.out == "" and [path.name for path in tmp_path.iterdir()] == ["a file"]


def test_a_misspelt_data_set_is_one_line_with_the_near_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert study.main(["thumos41", "--profile", "smoke"]) == 2
    said = capsys.readouterr().err
    assert "data set 'thumos41': no such folder in data" in said and "did you mean 'thumos14'?" in said
    assert said.count("\n") == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("said, words", [
    ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT not set; .*torchrun"),
    ({"SLURM_NTASKS": "4", "SLURM_JOB_NAME": "train"}, "SLURM_NTASKS is 4, .*torchrun.*--ntasks=1"),
])  # fmt: skip
def test_processes_that_nobody_started_are_one_error_and_not_a_long_wait(tiny, tmp_path, monkeypatch, said, words):
    monkeypatch.setattr(study, "make_fabric", lambda _: pytest.fail("waits for the others"))
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    spec = study.make_spec("tiny", "smoke", tiny)
    with pytest.raises(ValueError, match=words):
        study.run(spec, tiny, runs_root=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()
    for name, value in (("SLURM_JOB_NAME", "bash"), ("WORLD_SIZE", "1"), ("TORCHELASTIC_RUN_ID", "x")):
        monkeypatch.setenv(name, value)
    study.check_start()


def test_unknown_names_stop_a_table_before_any_training(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "train", lambda *_, **__: pytest.fail("training was started"))
    wrong_row = {"name": "wrong", "overrides": {"loss.feedbak": 1}, "paper": None}
    cases = [
        (dict(profile="quik"), ROWS, 1, "profile 'quik'.*smoke, quick, full"),
        (dict(dataset="thumos15"), ROWS, 1, "data set 'thumos15'"),
        ({}, [*ROWS, wrong_row], 1, "'loss.feedbak'.*loss.feedback_encoder"),
        ({}, [ROWS[0], ROWS[0]], 1, "different names"),
        ({}, ROWS, 0, "at least one seed"),
    ]
    for options, rows, seeds, message in cases:
        options = {"data_root": tmp_path / "data"} | options
        with pytest.raises(ValueError, match=message) as caught:
            make_table(rows, seeds, tiny_folder, tmp_path / "runs", **options)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "runs").exists()
    with pytest.raises(DataError):
        study.open_dataset("thumos15", "quick", tmp_path)


def test_a_claim_about_an_unknown_row_stops_a_table_before_any_training(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "train", lambda *_, **__: pytest.fail("training was started"))
    with pytest.raises(ValueError, match="'bothh'"):
        make_table(ROWS, 1, tiny_folder, tmp_path, claims=[{"text": "t", "better": "bothh", "worse": "baseline"}])
    with pytest.raises(ValueError, match="seed"):
        make_table(ROWS, [0, 0], tiny_folder, tmp_path)  # the same numbers twice would pass for evidence


# ---- the source hash


def hashes():
    return study.training_hash(), study.source_hash()


@pytest.fixture
def package(tmp_path, monkeypatch):
    "A copy of the package that the source hash is taken of."
    for path in Path(study.__file__).parent.glob("*.py"):
        shutil.copy(path, tmp_path)
    monkeypatch.setattr(study.selfdetr, "__file__", str(tmp_path / "__init__.py"))
    return tmp_path


def test_prose_does_not_change_the_source_hash(package):
    before = hashes()
    for path in package.glob("[!_]*.py"):
        path.write_text(f'"""Another title"""\n# a comment\n{path.read_text()}\n\n"text at the end"\n# the end\n')
    matcher = package / "matcher.py"
    text = matcher.read_text()
    changed = text.replace('"Focal cost of', '"The focal cost of').replace(
        "    p = logits", "    # here\n    p  =  logits"
    )
    assert changed != text
    matcher.write_text(changed)
    (package / "plots.py").write_text("nothing to do with a run's numbers = ")
    assert hashes() == before


@pytest.mark.parametrize(
    "module, old, new",
    [
        ("matcher", "classes: float = 6.0", "classes: float = 6.5"),
        ("feedback", "EPS = 1e-7", "EPS = 1e-6"),
        ("losses", "1 - overlap", "1 + overlap"),
        ("feedback", 'first: str = "guidance"', 'first: str = "map"'),
        ("trainer", 'STATE = "state.pt"', "STATE = None"),
        ("segments", "def cw_to_se(", "def cw_to_se(\n    _,\n"),
        ("denoising", "class DINO(SelfDETR):", "class DINO(SelfDETR):\n    wrong = True"),
        ("inference", "sigma: float = 0.5", "sigma: float = 0.4"),  # a part of the spec
    ],
)
def test_code_changes_the_source_hash(package, module, old, new):
    before, path = hashes(), package / f"{module}.py"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    assert all(a != b for a, b in zip(hashes(), before))


@pytest.mark.parametrize(
    "module, old, new",
    [
        ("segments", "kept, _ = _suppress(", "kept, _ = 0, _suppress("),
        ("inference", "scores.topk(", "scores.bottomk("),
        ("evaluation", "def evaluate(", "def evaluate(\n    _,\n"),
        ("study", "detections = detect_dataset(", "detections = 0 * detect_dataset("),
    ],
)
def test_measuring_code_changes_the_source_but_not_the_name_of_a_run(package, module, old, new):
    (training, source), path = hashes(), package / f"{module}.py"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    assert study.training_hash() == training and study.source_hash() != source


def test_a_run_measured_by_other_code_is_measured_again_and_not_trained(tiny_folder, tmp_path, monkeypatch):
    before = make_table(ROWS, 1, tiny_folder, tmp_path)
    folder = before.runs["both"][0].folder
    (folder / "detections.json").write_text("{}")
    files = before.runs["both"][0].files | {"detections.json": study.file_sum(folder / "detections.json")}
    study.seal(folder, before.runs["both"][0].metrics | {"average": 99.0, "source": "older"}, files)
    old = (folder / "metrics.json").read_text()
    monkeypatch.setattr(study, "train", lambda *_, **__: pytest.fail("trained again"))
    assert list(study.runs(tmp_path)["current code"]) == [name != folder.name for name in shown(tmp_path)]
    with monkeypatch.context() as patch:  # interrupted: the old metrics stay, and stay recognised as old
        patch.setattr(study, "evaluate", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(RuntimeError, match="disk full"):
            make_table(ROWS, 1, tiny_folder, tmp_path)
    assert (folder / "metrics.json").read_text() == old
    measured_runs = []
    measure = study.measure
    monkeypatch.setattr(study, "measure", lambda *a: (measured_runs.append(a[2].seed), measure(*a))[1])
    again = make_table(ROWS, 1, tiny_folder, tmp_path)
    assert len(measured_runs) == 1 and again.content == before.content
    for a, b in zip(before.runs["both"], again.runs["both"]):
        assert measured(a) == measured(b) and not list(b.folder.glob(".*"))


# ---- one run


def test_a_run_says_what_it_measured(finished):
    metrics, spec = finished.metrics, finished.spec
    values = list(metrics["mAP"].values())
    assert list(metrics["mAP"]) == ["0.3", "0.4", "0.5", "0.6", "0.7"] and all(0 <= v <= 100 for v in values)
    assert metrics["average"] == pytest.approx(np.mean(values))
    per_class = pd.DataFrame(metrics["per_class"]).T
    assert per_class.mean().to_dict() == pytest.approx(metrics["mAP"])
    assert [(d["part"], d["layer"]) for d in metrics["diversity"]] == [
        ("encoder", 1), ("encoder", 2), ("decoder", 1), ("decoder", 2)]  # fmt: skip
    assert metrics["epochs"] == len(finished.history) == spec.train.epochs
    assert {"python", "torch", "numpy", "selfdetr", "device", "source", "data"} <= set(metrics)
    assert shown(finished.folder.parent) == [finished.folder.name] == [run_hash(spec, metrics["data"])]
    for path in finished.folder.glob("*.json"):
        strict_json(path)


def test_labels_that_are_left_out_count_in_no_judgement(tmp_path):
    "With video scores the annotation file is judged: of an instance `Ambiguous`, and of one that the folder ignores."
    rows = [("run", 1, 3), ("jump", 4, 6), ("Ambiguous", 6, 8), ("rest", 8, 9)]
    instances = [{"label": label, "segment": [start, end]} for label, start, end in rows]
    entry = {"duration": 10.0, "fps": 10, "annotations": instances}
    database = {name: entry | {"subset": name} for name in ("training", "test")}
    (tmp_path / "features").mkdir()
    for name in database:
        np.save(tmp_path / "features" / f"{name}.npy", np.ones((100, 4), np.float32))
    (tmp_path / "annotations.json").write_text(json.dumps({"database": database}))
    (tmp_path / "scores.json").write_text(json.dumps({"results": {}, "class": []}))
    settings = {"stride": 1, "snippet": 1, "video_scores": "scores.json"}
    found = pd.DataFrame(rows[:2], columns=["label", "start", "end"]).assign(video="test", score=1.0)
    for more, classes in ({}, ["jump", "rest", "run"]), ({"ignore_labels": ["Ambiguous", "rest"]}, ["jump", "run"]):
        (tmp_path / "dataset.json").write_text(json.dumps(settings | more))
        result = study.judge_detections(found, load_dataset(tmp_path))
        assert sorted(result.per_class.index) == classes
        assert result.average == pytest.approx(2 / len(classes))


FILES = ["spec.json", "metrics.json", "history.csv", "checkpoint.safetensors", "config.json"]


@pytest.mark.parametrize("damage", ["cut off", "empty", "missing"])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_run_names_the_file(finished, tmp_path, name, damage):
    folder = Path(shutil.copytree(finished.folder, tmp_path / "run"))
    if damage == "missing":
        (folder / name).unlink()
    else:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2] if damage == "cut off" else b"")
    with pytest.raises(ValueError) as caught:
        study.read_run(folder).model()
    assert str(folder) in str(caught.value) and name in str(caught.value)
    listed = study.runs(tmp_path)  # the list still works, and lists what it can read
    assert list(listed.run) == ["run"]


def test_runs_lists_damaged_folders_beside_good_ones(finished, tmp_path):
    shutil.copytree(finished.folder, tmp_path / "a")
    shutil.copytree(finished.folder, tmp_path / "b")
    (tmp_path / "a" / "metrics.json").write_text("{")
    (tmp_path / ".unfinished").mkdir()
    listed = study.runs(tmp_path).set_index("run")
    assert list(listed.index) == ["a", "b"] and "delete the folder" in listed.problem["a"]
    assert listed.average["b"] == finished.metrics["average"] and listed["current code"]["b"]
    assert study.runs(tmp_path / "nowhere").empty


def test_a_run_on_a_folder_is_found_by_its_spec_alone(tiny, tiny_folder, tmp_path, monkeypatch):
    "Wherever the folder is, the run has one name; another folder of the same last name has other runs."
    spec = make_spec(str(tiny_folder), "smoke", tiny, overrides=SMALL | {"train.epochs": 1})
    where = dict(runs_root=tmp_path / "runs", device="cpu", progress=False)
    first = study.run(spec, **where)
    again = study.run(study.read_run(first.folder).spec, **where)
    assert (again.folder, again.metrics) == (first.folder, first.metrics)
    moved = shutil.copytree(tiny_folder, tmp_path / "elsewhere" / "other name")
    monkeypatch.setattr(study, "train", lambda *_, **__: pytest.fail("trained again"))
    monkeypatch.chdir(moved)
    for dataset in (str(moved), ".", "../other name"):
        found = study.run(make_spec(dataset, "smoke", load_dataset(moved), overrides=SMALL | {"train.epochs": 1}),
                          **where)  # fmt: skip
        assert found.folder.samefile(first.folder)
    assert list(study.runs(tmp_path / "runs").dataset) == [tiny_folder.name]
    with pytest.raises(DataError, match="gone.*no such folder"):
        study.run(replace(spec, dataset=str(tmp_path / "gone")), **where)


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


def test_results_of_other_data_or_of_more_seeds_are_not_replaced(tiny_folder, tmp_path, monkeypatch):
    other = shutil.copytree(tiny_folder, tmp_path / "other" / tiny_folder.name)
    path = min((other / "features").iterdir())
    np.save(path, np.load(path) + 1)
    folder, options = table_options(tiny_folder, tmp_path)
    fake_table([[20.0, 21.0], [30.0, 33.0]], tiny_folder).save(folder)
    kept = {path: path.read_bytes() for path in folder.iterdir()}
    trained = []
    monkeypatch.setattr(study, "run_all", lambda specs, *_: (trained.append(len(specs)), fake_runs([[1], [2]], [0]))[1])
    again = dict(rows=ROWS, name="table9", **options)
    with pytest.raises(DataError, match=r"table9\.json: .*2 seeds.* 1 .*seeds=2.*another out_dir"):
        study.table(seeds=1, **again)
    results, options = table_options(other, tmp_path)
    assert results == folder
    with pytest.raises(DataError, match=rf"table9\.json: .* other data of the name '{tiny_folder.name}'.*out_dir"):
        study.table(seeds=2, **again | options)
    assert not trained and {path: path.read_bytes() for path in folder.iterdir()} == kept
    for more in (dict(seeds=[5, 6]), dict(seeds=1, name="table8"), dict(seeds=1, results=tmp_path / "look")):
        study.table(**again | more)
    (folder / "table9.json").write_text("{")  # cut off: nothing to protect
    study.table(seeds=1, **again)
    assert trained == [4, 2, 2, 2]


def test_simulated_data_may_be_made_by_newer_code(tmp_path, monkeypatch):
    "The embedded benchmark is what the code makes; there are no two of it."
    folder, options = table_options("simulated", tmp_path, 1)
    options |= {"data_root": str(tmp_path / "data")}
    monkeypatch.setattr(study, "run_all", lambda *_: fake_runs([[1.0], [2.0]], [0]))
    made = study.table(ROWS, 1, name="table9", **options)
    made.content["data"] = "of older code"
    made.save(folder)
    study.table(ROWS, 1, name="table9", **options)


KILLED = """
import functools, os, signal, sys
import torch
from selfdetr import study, trainer
from selfdetr.data import load_dataset

data, spec, runs_root, last = *sys.argv[1:4], int(sys.argv[4])
torch.set_num_threads(1)
step, calls = trainer.train_step, []

def train_step(*args, **options):
    calls.append(1)
    if len(calls) > last:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(*args, **options)

trainer.train_step = train_step
study.train = functools.partial(study.train, save_seconds=0)
study.run(study.RunSpec.from_json(spec), load_dataset(data), runs_root=runs_root, device="cpu", progress=False)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
def test_a_killed_run_is_continued_to_the_same_bits(finished, tiny, tiny_folder, tmp_path):
    spec, steps = finished.spec, finished.metrics["steps"] // finished.metrics["epochs"]
    assert steps >= 2
    arguments = [str(tiny_folder), spec.to_json(), str(tmp_path), str(2 * steps + 1)]  # one step into the third epoch
    done = subprocess.run([sys.executable, "-c", KILLED, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    work = study.work_folder(finished.folder.name, tmp_path)
    assert shown(tmp_path) == [] and (work / "state.pt").exists() and (work / "epochs").read_text() == "2"
    trained = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "train", lambda *a, train=study.train, **k: train(*a, **{**k, "on_epoch": trained.append}))
        resumed = study.run(spec, tiny, runs_root=tmp_path, device="cpu", progress=False)
    assert trained == [3]  # the finished epochs were not trained again
    assert_same_run(finished, resumed)
    assert shown(tmp_path) == [finished.folder.name] and not work.exists()


def test_a_run_lost_after_training_is_only_measured_again(finished, tiny, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(study, "write_results", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            study.run(finished.spec, tiny, runs_root=tmp_path, device="cpu", progress=False)
    assert shown(tmp_path) == []
    assert_same_run(finished, study.run(finished.spec, tiny, runs_root=tmp_path, device="cpu", progress=False))


SIMULTANEOUS = """
import sys, time
from pathlib import Path
import torch
from selfdetr import study
from selfdetr.data import load_dataset

data, spec, runs_root, log = *sys.argv[1:4], Path(sys.argv[4])
torch.set_num_threads(1)
compute = study.compute

def slowly(*args, **options):
    log.write_text("first")
    time.sleep(1)
    return compute(*args, **options)

study.compute = slowly
study.run(study.RunSpec.from_json(spec), load_dataset(data), runs_root=runs_root, device="cpu", progress=False)
"""


def test_two_processes_that_want_the_same_run_compute_it_once(finished, tiny, tiny_folder, tmp_path, monkeypatch):
    log, runs_root = tmp_path / "log", tmp_path / "runs"
    arguments = [str(tiny_folder), finished.spec.to_json(), str(runs_root), str(log)]
    first = subprocess.Popen([sys.executable, "-c", SIMULTANEOUS, *arguments], stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 90
        while not log.exists() and first.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        assert log.exists(), first.stderr.read() if first.poll() is not None else "the first process did not start"
        monkeypatch.setattr(study, "compute", lambda *_: pytest.fail("computed a second time"))
        second = study.run(finished.spec, tiny, runs_root=runs_root, device="cpu", progress=False)
        assert first.wait(60) == 0, first.stderr.read()
    finally:
        first.kill()
        first.communicate()
    assert_same_run(finished, second)


def test_a_finished_run_needs_no_device_unless_processes_belong_together(finished, tiny, monkeypatch):
    def refuses(device):
        raise ValueError(f"device {device!r} is not here")

    monkeypatch.setattr(study, "make_fabric", refuses)
    where = dict(runs_root=finished.folder.parent, device="cuda", progress=False)
    assert study.run(finished.spec, tiny, **where).metrics == finished.metrics
    for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"):  # torchrun: the first process asks the cache for all
        with monkeypatch.context() as patch, pytest.raises(ValueError, match="'cuda' is not here"):
            patch.setenv(name, "2")
            patch.setenv("TORCHELASTIC_RUN_ID", "x")
            study.run(finished.spec, tiny, **where)


# ---- many runs


def test_a_failing_run_leaves_no_folder_and_the_others_stay(tiny_folder, tmp_path, monkeypatch):
    compute = study.compute

    def fails_for_seed_1(spec, data, folder, *options):
        (folder / "metrics.json").write_text('{"average": ')
        if spec.seed == 1 and spec.loss.feedback_encoder:
            raise OSError("no space left on device")
        compute(spec, data, folder, *options)

    with monkeypatch.context() as patch:
        patch.setattr(study, "compute", fails_for_seed_1)
        with pytest.raises(RuntimeError, match="1 of 4 runs failed") as caught:
            make_table(ROWS, 2, tiny_folder, tmp_path)
    assert '"seed": 1' in str(caught.value) and "no space left on device" in str(caught.value)
    kept = study.runs(tmp_path)
    assert len(kept) == 3 and "problem" not in kept and set(kept.run) == set(shown(tmp_path))
    computed = []
    monkeypatch.setattr(study, "compute", lambda spec, *rest: (computed.append(spec.seed), compute(spec, *rest)))
    table = make_table(ROWS, 2, tiny_folder, tmp_path)
    assert computed == [1] and table.content["seeds"] == [0, 1] and len(shown(tmp_path)) == 4
    again = make_table([{**ROWS[1], "name": "the same by another name"}, *ROWS], 2, tiny_folder, tmp_path)
    assert computed == [1] and again.content["rows"][0]["average"] == again.content["rows"][2]["average"]


def fake_runs(averages, seeds):
    "Runs as the cache would return them, in the order of `run_all`: all rows of a seed, then the next seed."
    metrics = [
        {"average": row[i], "mAP": {"0.5": row[i] + 1, "0.7": row[i] - 1}, "test_instances": 9, "diversity": [],
         "protocol": "all"}
        for i in range(len(seeds))
        for row in averages
    ]
    return [Run(Path("unused"), RunSpec(), m, pd.DataFrame()) for m in metrics]


def fake_table(averages, tiny_folder, seeds=None, rows=None, **more):
    seeds = seeds or list(range(len(averages[0])))
    rows = rows or [{"name": f"row {i}", "overrides": {}, "paper": None} for i in range(len(averages))]
    claims = [{"text": "better", "better": rows[1]["name"], "worse": rows[0]["name"]}]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "run_all", lambda *_: fake_runs(averages, seeds))
        return make_table(rows, seeds, tiny_folder, "unused", claims=claims, name="table9", title="A test.", **more)


scores = st.lists(st.tuples(*[st.floats(0, 100)] * 2), min_size=2, max_size=6)


@settings(examples, max_examples=30)
@given(pairs=scores)
def test_differences_and_verdicts_are_the_paired_t_test(frozen_source, tiny_folder, pairs):
    base, ours = (list(x) for x in zip(*pairs))
    assume(np.std(np.subtract(ours, base)) > 1e-3)
    content = fake_table([base, ours], tiny_folder).content
    expected, delta = ttest_rel(ours, base), content["rows"][1]["delta"]
    low, high = expected.confidence_interval(0.95)
    assert delta["mean"] == pytest.approx(np.mean(ours) - np.mean(base), abs=1e-9)
    assert (delta["low"], delta["high"]) == (pytest.approx(low, abs=1e-6), pytest.approx(high, abs=1e-6))
    assume(abs(expected.pvalue - 0.05) > 1e-6)
    clear = "reproduced" if expected.statistic > 0 else "not reproduced"
    assert content["claims"][0]["verdict"] == (clear if expected.pvalue < 0.05 else "inconclusive")
    assert content["rows"][0]["delta"] is None and content["rows"][1]["average"] == ours


def test_table_files_hold_to_their_contract(tiny_folder, tmp_path):
    rows = [
        {"name": "baseline", "overrides": {"loss.feedback_encoder": 0}, "paper": {"0.5": 50.0, "average": 50.3}},
        {"name": "both", "overrides": {}, "paper": None},
    ]
    table = fake_table([[20.0, 30.0, 25.0], [24.0, 33.5, 30.0]], tiny_folder, [4, 7, 9], rows)
    assert table.save(tmp_path / "results") == tmp_path / "results"
    names = [f"table9.{kind}" for kind in ("csv", "json", "md", "png")]
    assert sorted(p.name for p in (tmp_path / "results").iterdir()) == names  # and no part of a file
    content = strict_json(tmp_path / "results" / "table9.json")
    assert {"table", "dataset", "profile", "seeds", "metric", "rows", "claims"} <= set(content)
    names = [content[k] for k in ("table", "dataset", "profile", "seeds")]
    assert names == ["table9", "tiny", "smoke", [4, 7, 9]]
    for row, asked in zip(content["rows"], rows):
        assert set(row) == {"name", "overrides", "paper", "mAP", "average", "delta"}
        assert {k: row[k] for k in asked} == asked and len(row["average"]) == 3
        assert row["mAP"] == {"0.5": [v + 1 for v in row["average"]], "0.7": [v - 1 for v in row["average"]]}
    assert content["rows"][0]["delta"] is None and set(content["rows"][1]["delta"]) == {"mean", "low", "high"}
    assert [set(c) for c in content["claims"]] == [{"text", "verdict", "evidence"}]
    assert content["claims"][0]["verdict"] == "reproduced"  # +4, +3.5, +5
    csv = pd.read_csv(tmp_path / "results" / "table9.csv", index_col=0)
    markdown = (tmp_path / "results" / "table9.md").read_text()
    assert list(csv.index) == ["baseline", "both"] and all(r["name"] in markdown for r in rows)
    assert "reproduced" in markdown and "4, 7, 9" in markdown and "+4.2" in markdown
    assert (tmp_path / "results" / "table9.png").read_bytes().startswith(b"\x89PNG")


def test_one_seed_gives_a_table_without_interval_and_verdict(tiny_folder, tmp_path):
    table = fake_table([[20.0], [30.0]], tiny_folder)
    table.save(tmp_path)
    content = json.loads((tmp_path / "table9.json").read_text())
    assert content["rows"][1]["delta"] == {"mean": 10.0, "low": None, "high": None}
    assert content["claims"][0]["verdict"] == "inconclusive"
    assert "nan" not in (tmp_path / "table9.md").read_text().lower()


def test_a_simulated_table_says_so(tiny_folder):
    table = fake_table([[20.0, 21.0], [30.0, 33.0]], tiny_folder)
    assert "simulated" not in study.markdown(table)
    table.content["dataset"] = "simulated"
    assert "**simulated**" in study.markdown(table)


def test_a_table_says_what_the_papers_numbers_come_from(tiny_folder):
    rows = [{"name": name, "overrides": {}, "paper": None} for name in ("baseline", "both")]
    rows[1]["paper"] = {"average": 56.7}
    table = fake_table([[20.0, 21.0], [30.0, 33.0]], tiny_folder, rows=rows)
    assert "95 % interval. `paper avg`: THUMOS14, I3D features; not comparable" in study.markdown(table)
    table = fake_table([[20.0, 21.0], [30.0, 33.0]], tiny_folder, rows=rows, published="TSN features")
    table.content["dataset"] = "thumos14"
    assert "95 % interval. `paper avg`: TSN features.\n\n|" in study.markdown(table)
    table.content["rows"][1]["paper"] = None
    assert "95 % interval.\n\n|" in study.markdown(table)


def test_a_crash_while_saving_leaves_the_old_table_whole(tiny_folder, tmp_path, monkeypatch):
    old, new = (fake_table([[20.0, 21.0], [b, 33.0]], tiny_folder) for b in (30.0, 31.0))
    old.save(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def half(handle):
        os.ftruncate(handle, os.fstat(handle).st_size // 2)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", half)
    with pytest.raises(OSError, match=r"table9\.json: cannot be written .*No space left.* make room there"):
        new.save(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.name in before} == before
    assert {p.name for p in tmp_path.iterdir()} == set(before)


ENDS = """
import multiprocessing, os, signal, time
from selfdetr import study

study.attempt = os.getpid
pids = study.in_workers([()] * 6, 6)
assert os.getpid() not in pids
left = multiprocessing.active_children()
signal.signal(signal.SIGINT, signal.SIG_IGN)
os.killpg(0, signal.SIGINT)
time.sleep(1)
assert not left, left
"""


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="no groups of processes on this system")
def test_a_notebook_of_workers_ends_without_a_traceback():
    "At its end a kernel, and all processes that it has started, are interrupted, those that are still starting too."
    done = subprocess.run([sys.executable, "-c", ENDS], capture_output=True, text=True, timeout=200,
                          start_new_session=True)  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


INTERRUPTED = """
import os, signal, sys, time
from pathlib import Path
from selfdetr import study

def busy(path):
    Path(path).touch()
    time.sleep(100)

study.attempt = busy
print("begins", flush=True)
study.in_workers([(path,) for path in sys.argv[1:]], 2)
"""


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="no groups of processes on this system")
def test_an_interrupt_stops_a_study_and_its_workers(tmp_path):
    "Ctrl-C, which the terminal sends to all of its processes."
    (tmp_path / "script.py").write_text(INTERRUPTED)
    begun = [tmp_path / "a", tmp_path / "b"]
    process = subprocess.Popen([sys.executable, str(tmp_path / "script.py"), *map(str, begun)], text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)  # fmt: skip
    try:
        deadline = time.monotonic() + 90
        while not all(path.exists() for path in begun) and time.monotonic() < deadline:
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        said = process.communicate(timeout=40)[1]  # which waits until no process holds the pipe
    finally:
        process.kill()
    assert process.returncode == -signal.SIGINT and said.rstrip().endswith("KeyboardInterrupt")


# ---- claims


def test_claims_about_layers_margins_and_one_row():
    "Diversities of two rows and two layers, three seeds, written down by hand."
    def run(average, first, last):
        layers = [{"part": "decoder", "layer": i, "diversity": d} for i, d in ((1, first), (2, last))]
        return Run(Path("unused"), RunSpec(), {"average": average, "diversity": layers}, pd.DataFrame())

    runs = {
        "a": [run(50.0, 3.0, 1.0), run(51.0, 3.2, 1.1), run(52.0, 2.9, 1.0)],
        "b": [run(50.5, 3.0, 2.0), run(51.4, 3.2, 2.2), run(52.6, 2.9, 2.1)],
    }
    falls = {"text": "falls", "better": "a", "worse": "a", "of": "decoder 1", "than": "decoder"}
    assert study.judge(falls, runs)["verdict"] == "reproduced"  # +2.0, +2.1, +1.9
    raises = {"text": "raises", "better": "b", "worse": "a", "of": "decoder 2"}
    assert "+1.07 d(A)" in study.judge(raises, runs)["evidence"]
    same = {"text": "no gain", "better": "b", "worse": "a"}  # +0.5, +0.4, +0.6: clearly higher, by less than 1
    assert study.judge(same, runs)["verdict"] == "reproduced"
    assert study.judge(same | {"margin": 1.0}, runs)["verdict"] == "reproduced"
    assert study.judge(same | {"margin": 0.1}, runs)["verdict"] == "not reproduced"
    assert study.judge(same | {"margin": 0.5}, runs)["verdict"] == "inconclusive"


def test_all_claims_of_all_data_sets_are_on_the_page(tiny_folder, tmp_path):
    better, worse = (fake_table(a, tiny_folder) for a in ([[1, 2], [3, 4.1]], [[3, 4.1], [1, 2]]))
    worse.content |= {"dataset": "other", "source": "of another version"}
    for table in (better, worse):
        table.save(tmp_path / f"{table.content['dataset']}-smoke")
    page = study.write_claims(tmp_path).read_text()
    assert "1 reproduced" in page and "1 not reproduced" in page
    page = re.sub(" +", " ", page)
    assert "| better | tiny, smoke |" in page and "| better | other, smoke |" in page
    assert "changed since other-smoke was computed" in page
    (tmp_path / "tiny-smoke" / "table9.json").write_text('{"table": ')
    before = (tmp_path / "claims.md").read_bytes()
    with pytest.raises(ValueError, match=r"table9\.json: not a table .* run its notebook again"):
        study.write_claims(tmp_path)
    assert (tmp_path / "claims.md").read_bytes() == before


# ---- a cluster


def test_jobs_of_a_cluster_give_the_table_of_the_workers(tiny_folder, tmp_path):
    "With submitit's local executor, which starts one process a job as Slurm would."
    pytest.importorskip("submitit")
    rows = [ROWS[0], {**ROWS[1], "overrides": SMALL | {"train.lr": 1e12}}]
    with pytest.raises(RuntimeError, match="1 of 2 runs failed") as caught:
        make_table(rows, 1, tiny_folder, tmp_path / "jobs", cluster="local")
    assert "training stopped in epoch" in str(caught.value)
    sent = make_table(ROWS[:1], 1, tiny_folder, tmp_path / "jobs", cluster="local")
    here = make_table(ROWS[:1], 1, tiny_folder, tmp_path / "workers")
    assert sent.content == here.content
    with pytest.raises(ValueError, match="choose 'slurm', 'local'"):
        make_table(ROWS[:1], 1, tiny_folder, tmp_path / "none", cluster="cloud")


@pytest.mark.parametrize(
    "device, cluster, gpus, turns",
    [("auto", "", 2, ["cuda:0", "cuda:1"]), ("cuda", "", 1, ["cuda:0"]), ("cuda:1", "", 2, ["cuda:1"]),
     ("cpu", "", 2, ["cpu"]), ("auto", "", 0, ["auto"]), ("cuda", "slurm", 2, ["cuda"])],
)  # fmt: skip
def test_runs_take_the_gpus_in_turn(monkeypatch, device, cluster, gpus, turns):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert study.take_turns(device, cluster) == turns
