"""Runs on disk: killed, interrupted, damaged, measured again, and without room or permission to write."""

import contextlib
import errno
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from disks import longest_file
from kill_runs import ended, fork, kill
from small_runs import ROWS, SMALL, assert_same_run, flip, make_table, run_again, strict_json, timeless, visible

from selfdetr import study, trainer
from selfdetr.data import DataError, load_dataset
from selfdetr.resume import BEFORE, STATE, State
from selfdetr.study import cache, compute, make_spec
from selfdetr.study.compute import run_hash

pytestmark = pytest.mark.usefixtures("one_thread")


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
    assert visible(finished.folder.parent) == [finished.folder.name] == [run_hash(spec, metrics["data"])]
    for path in finished.folder.glob("*.json"):
        strict_json(path)


def test_a_run_measured_by_other_code_is_measured_again_and_not_trained(tiny_folder, tmp_path, monkeypatch):
    before = make_table(ROWS, 1, tiny_folder, tmp_path)
    folder = before.runs["both"][0].folder
    (folder / "detections.json").write_text("{}")
    files = before.runs["both"][0].files | {"detections.json": cache.file_sum(folder / "detections.json")}
    cache.seal(folder, before.runs["both"][0].metrics | {"average": 99.0, "source": "older"}, files)
    old = (folder / "metrics.json").read_text()
    monkeypatch.setattr(compute, "train", lambda *_, **__: pytest.fail("trained again"))
    assert list(study.runs(tmp_path)["current code"]) == [name != folder.name for name in visible(tmp_path)]
    with monkeypatch.context() as patch:  # interrupted: the old metrics stay, and stay recognised as old
        patch.setattr(compute, "evaluate", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(RuntimeError, match="disk full"):
            make_table(ROWS, 1, tiny_folder, tmp_path)
    assert (folder / "metrics.json").read_text() == old
    measured_runs = []
    measure = cache.measure
    monkeypatch.setattr(cache, "measure", lambda *a: (measured_runs.append(a[2].seed), measure(*a))[1])
    again = make_table(ROWS, 1, tiny_folder, tmp_path)
    assert len(measured_runs) == 1 and again.content == before.content
    for a, b in zip(before.runs["both"], again.runs["both"]):
        assert timeless(a) == timeless(b) and not list(b.folder.glob(".*"))


DETECTION = {"inference.voting": 0.5, "inference.sigma": 0.2, "windows.test_overlap": 0.5}


def test_settings_of_detection_train_nothing_again(finished, tiny, tmp_path, monkeypatch):
    spec = study.override(finished.spec, DETECTION)
    fresh = study.run(spec, tiny, runs_root=tmp_path / "fresh", device="cpu", progress=False)
    shutil.copytree(finished.folder, tmp_path / "runs" / finished.folder.name)
    where = dict(runs_root=tmp_path / "runs", device="cpu", progress=False)
    others = [{"train.epochs": 3}, {"windows.overlap": 0.3}, {"model.dropout": 0.2}]
    specs = [study.override(finished.spec, DETECTION | other) for other in others]
    with monkeypatch.context() as patch:
        patch.setattr(compute, "train", lambda *_, **__: pytest.fail("trained again"))
        taken = study.run(spec, tiny, **where)
        for each in [*specs, replace(spec, seed=5)]:
            with pytest.raises(pytest.fail.Exception, match="trained again"):
                study.run(each, tiny, **where)
    assert taken.folder.name == fresh.folder.name != finished.folder.name and taken.spec == spec
    assert taken.metrics["average"] != finished.metrics["average"]
    assert_same_run(taken, fresh)



READ_FILES = ["spec.json", "metrics.json", "history.csv", "checkpoint.safetensors", "config.json"]


@pytest.mark.parametrize("damage", ["cut off", "empty", "missing"])
@pytest.mark.parametrize("name", READ_FILES)
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
    monkeypatch.setattr(compute, "train", lambda *_, **__: pytest.fail("trained again"))
    monkeypatch.chdir(moved)
    for dataset in (str(moved), ".", "../other name"):
        found = study.run(make_spec(dataset, "smoke", load_dataset(moved), overrides=SMALL | {"train.epochs": 1}),
                          **where)  # fmt: skip
        assert found.folder.samefile(first.folder)
    assert list(study.runs(tmp_path / "runs").dataset) == [tiny_folder.name]
    with pytest.raises(DataError, match="gone.*no such folder"):
        study.run(replace(spec, dataset=str(tmp_path / "gone")), **where)


def test_a_finished_run_needs_no_device_unless_processes_belong_together(finished, tiny, monkeypatch):
    def refuses(device):
        raise ValueError(f"device {device!r} is not here")

    monkeypatch.setattr(cache, "make_fabric", refuses)
    where = dict(runs_root=finished.folder.parent, device="cuda", progress=False)
    assert study.run(finished.spec, tiny, **where).metrics == finished.metrics
    for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"):  # torchrun: the first process asks the cache for all
        with monkeypatch.context() as patch, pytest.raises(ValueError, match="'cuda' is not here"):
            patch.setenv(name, "2")
            study.run(finished.spec, tiny, **where)


# ---- kills


forked = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")


def status_of(process, seconds=120):
    "How a forked process has ended; one that takes longer is killed, and has no status."
    status = ended(process, seconds)
    if status is None:
        kill(process)
    return status


def killed_in_training(spec, data, runs_root, steps):
    "What a process does that is killed after so many steps, with the state kept after every epoch."
    step, calls = trainer.train_step, []

    def train_step(*args, **options):
        calls.append(1)
        if len(calls) > steps:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(*args, **options)

    trainer.train_step = train_step
    cache.State = functools.partial(cache.State, save_seconds=0)
    study.run(spec, data, runs_root=runs_root, device="cpu", progress=False)


@forked
def test_a_killed_run_is_continued_to_the_same_bits(finished, tiny, tmp_path):
    spec, steps = finished.spec, finished.metrics["steps"] // finished.metrics["epochs"]
    assert steps >= 2
    process = fork(killed_in_training, spec, tiny, tmp_path, 2 * steps + 1)  # one step into the third epoch
    assert status_of(process) == -signal.SIGKILL
    work = cache.work_folder(finished.folder.name, tmp_path)
    assert visible(tmp_path) == [] and (work / "state.pt").exists() and (work / "epochs").read_text() == "2"
    trained = []
    with pytest.MonkeyPatch.context() as patch:
        fit = cache.fit
        patch.setattr(cache, "fit", lambda *options: fit(*options[:-1], trained.append))
        resumed = study.run(spec, tiny, runs_root=tmp_path, device="cpu", progress=False)
    assert trained == [3, 4]  # the finished epochs were not trained again
    assert_same_run(finished, resumed)
    assert visible(tmp_path) == [finished.folder.name] and not work.exists()


def test_a_run_lost_after_training_is_only_measured_again(finished, tiny, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(cache, "write_results", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            study.run(finished.spec, tiny, runs_root=tmp_path, device="cpu", progress=False)
    assert visible(tmp_path) == []
    monkeypatch.setattr(trainer, "train_epoch", lambda *_: pytest.fail("trained again"))
    assert_same_run(finished, study.run(finished.spec, tiny, runs_root=tmp_path, device="cpu", progress=False))


def compute_slowly(spec, data, runs_root, log):
    "What the first of two processes does."
    compute_run = cache.compute_run

    def slowly(*args):
        log.write_text("first")
        time.sleep(1)
        return compute_run(*args)

    cache.compute_run = slowly
    study.run(spec, data, runs_root=runs_root, device="cpu", progress=False)


@forked
def test_two_processes_that_want_the_same_run_compute_it_once(finished, tiny, tmp_path, monkeypatch):
    log, runs_root, deadline = tmp_path / "log", tmp_path / "runs", time.monotonic() + 90
    first = fork(compute_slowly, finished.spec, tiny, runs_root, log)
    try:
        while not log.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert log.exists(), "the first process did not start"
        monkeypatch.setattr(cache, "compute_run", lambda *_: pytest.fail("computed a second time"))
        second = study.run(finished.spec, tiny, runs_root=runs_root, device="cpu", progress=False)
    finally:
        status = status_of(first, 60)
    assert status == 0
    assert_same_run(finished, second)


def test_a_run_that_was_complete_when_it_was_killed_is_only_published(finished, tiny, tmp_path, monkeypatch):
    work = shutil.copytree(finished.folder, cache.work_folder(finished.folder.name, tmp_path))
    (work / STATE).write_bytes(b"of the last epoch")
    (work / ".metrics.json.0123.part").write_text("{")
    monkeypatch.setattr(cache, "compute_run", lambda *_: pytest.fail("computed again"))
    assert_same_run(run_again(finished, tiny, tmp_path), finished)
    assert {p.name for p in (tmp_path / finished.folder.name).iterdir()} == {*cache.FILES, "metrics.json"}


@pytest.fixture
def often(monkeypatch):
    "The state is written after every epoch."
    monkeypatch.setattr(cache, "State", functools.partial(State, save_seconds=0))


def stop(*_):
    raise KeyboardInterrupt


@pytest.fixture(scope="module")
def stopped(finished, tiny_folder, tmp_path_factory):
    "The work folder of a run that was stopped before it was measured, with two states."
    root = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(cache, "State", functools.partial(State, save_seconds=0))
        patch.setattr(cache, "measure", stop)
        run_again(finished, load_dataset(tiny_folder), root)
    work = cache.work_folder(finished.folder.name, root)
    assert {STATE, BEFORE} <= {path.name for path in work.iterdir()}
    return work


@pytest.fixture
def interrupted(stopped, tmp_path):
    "A copy of it."
    return shutil.copytree(stopped, tmp_path / stopped.name)


# ---- damaged runs


@pytest.mark.parametrize("name", ["spec.json", "metrics.json", "history.csv"])
def test_a_flipped_bit_in_what_is_read_is_found_wherever_it_is(copied, name):
    path = copied.folder / name
    whole = path.read_bytes()
    for place in np.linspace(0, 1, 25):
        flip(path, place)
        if path.read_bytes() == whole:
            continue
        with pytest.raises(ValueError, match=re.escape(f"{path}: not of a complete run") + ".*delete the folder"):
            study.read_run(copied.folder)
        path.write_bytes(whole)
    study.read_run(copied.folder)


@pytest.mark.parametrize("old, new", [("3.1e-05", "3.1E-05"), ("0.30000000000000004", "0.30000000000000005")])
def test_a_flipped_bit_is_found_where_the_number_stays_the_same(copied, old, new):
    values = json.loads((copied.folder / "metrics.json").read_text())
    del values["sha256"]
    cache.seal(copied.folder, values | {"seconds_test": float(old)}, values.pop("files"))
    study.read_run(copied.folder)
    text = (copied.folder / "metrics.json").read_text()
    assert text.count(old) == 1 and float(old) == float(new)
    (copied.folder / "metrics.json").write_text(text.replace(old, new))
    with pytest.raises(ValueError, match="metrics.json: not of a complete run"):
        study.read_run(copied.folder)


@pytest.mark.parametrize("name", ["checkpoint.safetensors", "config.json", "detections.json", "detector.json"])
def test_a_flipped_bit_is_found_where_the_file_is_used_and_a_cut_one_at_once(copied, name):
    path = copied.folder / name
    whole = path.read_bytes()
    flip(path, 0.9)
    run = study.read_run(copied.folder)
    message = re.escape(str(path)) + ".*not what was written.*delete the folder"
    with pytest.raises(ValueError, match=message):
        run.file(name)
    if name in ("checkpoint.safetensors", "config.json"):
        with pytest.raises(ValueError, match=message):
            run.model()
    for content in (whole[:-1], whole + b"\n", b""):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=re.escape(str(path)) + ".* bytes instead of "):
            study.read_run(copied.folder)


def test_a_damaged_model_is_not_measured_again(copied, tiny):
    cache.seal(copied.folder, copied.metrics | {"source": "older"}, copied.files)
    flip(copied.folder / "checkpoint.safetensors", 0.9)
    before = (copied.folder / "metrics.json").read_bytes()
    with pytest.raises(ValueError, match="checkpoint.safetensors.*not what was written"):
        run_again(copied, tiny, copied.folder.parent)
    assert (copied.folder / "metrics.json").read_bytes() == before


def test_a_reader_beside_a_new_measurement_sees_one_or_the_other(copied, monkeypatch):
    "The files change between the reading of the metrics and the look at the others."
    check_file, calls = cache.check_file, []

    def changes_before(path, *options, **more):
        calls.append(path)
        if len(calls) == 1:
            (copied.folder / "detections.json").write_text("{}")
            files = copied.files | {"detections.json": cache.file_sum(copied.folder / "detections.json")}
            cache.seal(copied.folder, copied.metrics | {"average": 1.0}, files)
        return check_file(path, *options, **more)

    monkeypatch.setattr(cache, "check_file", changes_before)
    assert study.read_run(copied.folder).metrics["average"] == 1.0


def test_a_run_in_hand_gives_its_files_after_a_new_measurement(copied):
    path = copied.folder / "detections.json"
    path.write_text("{}")
    with pytest.raises(ValueError, match="detections.json"):
        copied.file(path.name)
    cache.seal(copied.folder, copied.metrics, copied.files | {path.name: cache.file_sum(path)})
    assert copied.file(path.name) == path
    path.write_text("[]")
    with pytest.raises(ValueError, match="detections.json.*not what was written|detections.json.* bytes instead of"):
        copied.file(path.name)


# ---- no room


def test_a_write_that_the_system_refuses_names_the_file_and_loses_nothing(finished, tiny, interrupted):
    runs_root, refused = interrupted.parent, []
    sizes = {path.stat().st_size for path in finished.folder.iterdir()}
    for limit in [0, *sorted(sizes)[:-1]]:  # at each, another file may be the first that does not fit
        with pytest.raises(OSError, match=r"\(File too large\); make room there") as caught, longest_file(limit):
            run_again(finished, tiny, runs_root)
        refused.append(Path(str(caught.value).split("] ")[1].split(": ")[0]).name)
        assert not list(runs_root.glob("[!.]*")) and not list(interrupted.glob(".*.part"))
    assert {"detections.json", "checkpoint.safetensors"} <= set(refused), refused
    assert_same_run(run_again(finished, tiny, runs_root), finished)
    with pytest.raises(OSError, match=f"{STATE}: cannot be written .*File too large"), longest_file(1000):
        run_again(finished, tiny, runs_root / "new")


@pytest.fixture
def small_disk(tmp_path):
    "A file system of 1 MiB."
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    if os.geteuid() or not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a file system can only be mounted by root, where that is allowed")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def fill(disk, free):
    "Fill a file system but for so many bytes."
    filler = disk / "filler"
    filler.unlink(missing_ok=True)
    with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    os.truncate(filler, max(0, filler.stat().st_size - free))


def test_a_full_disk_keeps_finished_runs_and_the_state_and_more_room_ends_the_run(
    finished, tiny, small_disk, often, monkeypatch
):
    runs_root, named = small_disk / "runs", []
    shutil.copytree(finished.folder, runs_root / finished.folder.name)
    spec = study.override(finished.spec, {"train.epochs": 5})
    other = replace(finished, spec=spec)

    def refused(free):
        fill(small_disk, free)
        with pytest.raises(OSError, match=r"\(No space left on device\); make room there, then run again") as caught:
            run_again(other, tiny, runs_root)
        assert caught.value.errno == errno.ENOSPC and not list(runs_root.glob(".*/.*.part"))
        assert_same_run(study.read_run(runs_root / finished.folder.name), finished)
        assert len(study.runs(runs_root)) == 1
        named.append(Path(str(caught.value).split("] ")[1].split(": ")[0]).name)

    refused(free=16384)
    assert named == [STATE]
    (small_disk / "filler").unlink()
    with monkeypatch.context() as patch:  # with room for the states, but not for what comes then
        patch.setattr(cache, "measure", stop)
        with pytest.raises(KeyboardInterrupt):
            run_again(other, tiny, runs_root)
    monkeypatch.setattr(trainer, "train_epoch", lambda *_: pytest.fail("trained again"))
    for free in (0, 16384, 32768):
        refused(free)
    assert {"detections.json", "checkpoint.safetensors"} <= set(named), named
    (small_disk / "filler").unlink()
    done = run_again(other, tiny, runs_root)
    monkeypatch.undo()
    assert_same_run(done, run_again(other, tiny, runs_root.parent / "undisturbed"))


# ---- no permission


@pytest.fixture
def read_only(finished, tmp_path):
    "A cache with one run, on a read-only file system for root, in a read-only folder for others."
    place = tmp_path / "closed"
    shutil.copytree(finished.folder, place / finished.folder.name)
    if os.geteuid():
        place.chmod(0o555)
    else:
        mount = ["mount", "--bind", str(place), str(place)]
        if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("root may write anywhere, and a read-only file system cannot be mounted here")
        subprocess.run(["mount", "-o", "remount,bind,ro", place], check=True)
    yield place
    if os.geteuid():
        place.chmod(0o755)
    else:
        subprocess.run(["umount", "-l", place], check=True)


def test_a_read_only_cache_can_be_read_and_new_runs_are_one_error_before_training(
    finished, tiny, tiny_folder, read_only, monkeypatch
):
    monkeypatch.setattr(compute, "train", lambda *_, **__: pytest.fail("training was started"))
    assert_same_run(run_again(finished, tiny, read_only), finished)
    assert_same_run(study.run_all([finished.spec], tiny, "", read_only, "cpu", 1, False)[0], finished)
    other = study.override(finished.spec, {"train.epochs": 5})
    for runs_root in (read_only, read_only / "new" / "runs"):
        message = re.escape(f"{runs_root}: cannot be written ({read_only} is read-only); choose a folder that you may")
        with pytest.raises(PermissionError, match=message):
            study.run_all([finished.spec, other], tiny, "", runs_root, "cpu", 1, False)
    with pytest.raises(OSError, match="cannot be written .*; choose a folder that you may write to"):
        run_again(replace(finished, spec=other), tiny, read_only)
