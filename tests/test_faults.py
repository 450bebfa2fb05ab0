"""Faults: killed processes, damaged files, a full disk, folders that cannot be written to, leftovers."""

import contextlib
import errno
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from joblib.externals.loky.process_executor import TerminatedWorkerError

from selfdetr import data, study, trainer
from selfdetr.checkpoint import load_model
from selfdetr.data import load_dataset
from selfdetr.resume import BEFORE, STATE

resource = pytest.importorskip("resource")  # not on Windows

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = {"model.dim": 16, "model.heads": 2, "model.norm_groups": 2, "model.hidden": 16, "model.queries": 6,
         "train.epochs": 4, "train.batch": 3}  # fmt: skip
HERE = Path(__file__).parent


@pytest.fixture(scope="module", autouse=True)
def fixed_code():
    "The hashes of the code do not change in a test; taking them costs more than training."
    hashes = study.training_hash(), study.source_hash()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "training_hash", lambda: hashes[0])
        patch.setattr(study, "source_hash", lambda: hashes[1])
        yield


@pytest.fixture(scope="module")
def often():
    "The state is written after every epoch."
    train = study.train
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "train", lambda *a, **k: train(*a, **{"save_seconds": 0, **k}))
        yield


@pytest.fixture(scope="module")
def finished(tiny_folder, tmp_path_factory):
    "One run, computed once for all tests; copy it before changing it."
    torch.set_num_threads(1)
    dataset = load_dataset(tiny_folder)
    spec = study.make_spec("tiny", "smoke", dataset, overrides=SMALL)
    return study.run(spec, dataset, runs_root=tmp_path_factory.mktemp("runs"), device="cpu", progress=False)


@pytest.fixture
def copy(finished, tmp_path):
    "A cache that holds that run."
    return study.read_run(shutil.copytree(finished.folder, tmp_path / "runs" / finished.folder.name))


def compute(finished, dataset, runs_root):
    return study.run(finished.spec, dataset, runs_root=runs_root, device="cpu", progress=False)


def assert_same(run, other):
    timeless = [{k: v for k, v in r.metrics.items() if not k.startswith("seconds")} for r in (run, other)]
    assert timeless[0] == timeless[1]
    histories = (r.history.drop(columns="seconds") for r in (run, other))
    pd.testing.assert_frame_equal(*histories, check_exact=True)
    assert run.file("checkpoint.safetensors").read_bytes() == other.file("checkpoint.safetensors").read_bytes()


def flip(path, place):
    "Flip one bit of a file, at a part of its length."
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 1
    path.write_bytes(content)


def cut(path, part):
    path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])


# ---- kills


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
def test_killed_runs_and_studies_end_in_the_same_bits():
    "The short form of `make kill`."
    script = [sys.executable, str(HERE / "kill_runs.py"), "--kills", "12", "--seed", "1"]
    done = subprocess.run(script, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    kills = json.loads(done.stdout.splitlines()[0])
    assert kills["kills"] >= 12 and "all equal" in done.stdout  # both of two studies may be killed at once
    assert {"in training", "in writing", "in one of two studies", "in measuring again"} <= set(kills)


def test_a_run_that_was_complete_when_it_was_killed_is_only_published(finished, tiny, tmp_path, monkeypatch):
    work = shutil.copytree(finished.folder, study.work_folder(finished.folder.name, tmp_path))
    (work / STATE).write_bytes(b"of the last epoch")
    (work / ".metrics.json.0123.part").write_text("{")
    monkeypatch.setattr(study, "compute", lambda *_: pytest.fail("computed again"))
    assert_same(compute(finished, tiny, tmp_path), finished)
    assert {p.name for p in (tmp_path / finished.folder.name).iterdir()} == {*study.FILES, "metrics.json"}


def test_a_killed_worker_is_one_message_and_a_second_call_goes_on(finished, tiny, tiny_folder, tmp_path, monkeypatch):
    "What loky raises when the system kills a worker; `make kill` really kills one."
    shutil.copytree(finished.folder, tmp_path / finished.folder.name)
    specs = [finished.spec, study.override(finished.spec, {"train.epochs": 3})]
    where = (str(tiny_folder), "smoke", "")

    def killed(*_, **__):
        raise TerminatedWorkerError("A worker process managed by the executor was unexpectedly terminated.")

    with monkeypatch.context() as patch:
        patch.setattr(study, "Parallel", killed)
        with pytest.raises(RuntimeError, match="1 of 2 runs failed; the others are kept") as caught:
            study.run_all(specs, tiny, where, tmp_path, "cpu", 2, False)
    lines = str(caught.value).splitlines()
    name = study.run_hash(specs[1], tiny.hash())
    assert lines[1].startswith(f"run {name} (seed 0): a worker process was killed") and "call again" in lines[1]
    assert finished.folder.name not in str(caught.value)
    assert len(study.run_all(specs, tiny, where, tmp_path, "cpu", 1, False)) == 2


# ---- damaged states


@pytest.fixture
def interrupted(finished, tiny, tmp_path, often):
    "The work folder of a run that was stopped before it was measured, with two states."
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "measure", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            compute(finished, tiny, tmp_path)
    work = study.work_folder(finished.folder.name, tmp_path)
    assert {STATE, BEFORE} <= {p.name for p in work.iterdir()}
    return work


# ---- damaged runs


@pytest.mark.parametrize("name", ["spec.json", "metrics.json", "history.csv"])
def test_a_flipped_bit_in_what_is_read_is_found_wherever_it_is(copy, name):
    path = copy.folder / name
    whole = path.read_bytes()
    for place in np.linspace(0, 1, 25):
        flip(path, place)
        if path.read_bytes() == whole:
            continue
        with pytest.raises(ValueError, match=re.escape(f"{path}: not of a complete run") + ".*delete the folder"):
            study.read_run(copy.folder)
        path.write_bytes(whole)
    study.read_run(copy.folder)


@pytest.mark.parametrize("name", ["checkpoint.safetensors", "config.json", "detections.json", "detector.json"])
def test_a_flipped_bit_is_found_where_the_file_is_used_and_a_cut_one_at_once(copy, name):
    path = copy.folder / name
    whole = path.read_bytes()
    flip(path, 0.9)
    run = study.read_run(copy.folder)
    message = re.escape(str(path)) + ".*not what was written.*delete the folder"
    with pytest.raises(ValueError, match=message):
        run.file(name)
    if name in ("checkpoint.safetensors", "config.json"):
        with pytest.raises(ValueError, match=message):
            run.model()
    for content in (whole[:-1], whole + b"\n", b""):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=re.escape(str(path)) + ".* bytes instead of "):
            study.read_run(copy.folder)


def test_a_damaged_model_is_not_measured_again(copy, tiny):
    study.seal(copy.folder, copy.metrics | {"source": "older"}, copy.files)
    flip(copy.folder / "checkpoint.safetensors", 0.9)
    before = (copy.folder / "metrics.json").read_bytes()
    with pytest.raises(ValueError, match="checkpoint.safetensors.*not what was written"):
        compute(copy, tiny, copy.folder.parent)
    assert (copy.folder / "metrics.json").read_bytes() == before


def test_a_damaged_run_stops_a_study_before_any_training(copy, tiny, tiny_folder, monkeypatch):
    flip(copy.folder / "history.csv", 0.5)
    monkeypatch.setattr(study, "train", lambda *_, **__: pytest.fail("training was started"))
    specs, where = [study.override(copy.spec, {"train.epochs": 3}), copy.spec], (str(tiny_folder), "smoke", "")
    with pytest.raises(ValueError, match="history.csv.*delete the folder"):
        study.run_all(specs, tiny, where, copy.folder.parent, "cpu", 1, False)


def test_weights_are_checked_in_any_model_folder(copy):
    "Also where there is no run around them."
    for name in ("spec.json", "metrics.json", "history.csv"):
        (copy.folder / name).unlink()
    load_model(copy.folder)
    flip(copy.folder / "checkpoint.safetensors", 0.9)
    with pytest.raises(ValueError, match="checkpoint.safetensors.*not those that were saved"):
        load_model(copy.folder)


def test_a_run_without_sums_is_read_as_before(copy, tiny):
    "Runs of earlier versions have none, and old names in their files."
    content = json.loads((copy.folder / "metrics.json").read_text())
    del content["files"], content["sha256"]
    (copy.folder / "metrics.json").write_text(json.dumps(content))
    spec = json.loads((copy.folder / "spec.json").read_text())
    spec["model"] |= {"encoder_attention": "absolute", "decoder_self_attention": True}
    for name, values in {"spec.json": spec, "config.json": spec["model"]}.items():
        (copy.folder / name).write_text(json.dumps(values))
    old = study.read_run(copy.folder)
    assert old.files == {} and old.metrics == copy.metrics and old.spec == copy.spec
    assert old.model().config == copy.spec.model
    study.seal(copy.folder, old.metrics | {"source": "older"}, {})
    again = compute(copy, tiny, copy.folder.parent)
    assert set(again.files) == set(study.MEASURED) and again.metrics["average"] == copy.metrics["average"]


def test_a_reader_beside_a_new_measurement_sees_one_or_the_other(copy, monkeypatch):
    "The files change between the reading of the metrics and the look at the others."
    check_file, calls = study.check_file, []

    def changes_before(path, *options, **more):
        calls.append(path)
        if len(calls) == 1:
            (copy.folder / "detections.json").write_text("{}")
            files = copy.files | {"detections.json": study.file_sum(copy.folder / "detections.json")}
            study.seal(copy.folder, copy.metrics | {"average": 1.0}, files)
        return check_file(path, *options, **more)

    monkeypatch.setattr(study, "check_file", changes_before)
    assert study.read_run(copy.folder).metrics["average"] == 1.0


def test_a_run_in_hand_gives_its_files_after_a_new_measurement(copy):
    path = copy.folder / "detections.json"
    path.write_text("{}")
    with pytest.raises(ValueError, match="detections.json"):
        copy.file(path.name)
    study.seal(copy.folder, copy.metrics, copy.files | {path.name: study.file_sum(path)})
    assert copy.file(path.name) == path
    path.write_text("[]")
    with pytest.raises(ValueError, match="detections.json.*not what was written|detections.json.* bytes instead of"):
        copy.file(path.name)


# ---- no room


@contextlib.contextmanager
def longest_file(size):
    "No file can be longer than so many bytes: the system refuses to write on, as it does on a full disk."
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_write_that_the_system_refuses_names_the_file_and_loses_nothing(finished, tiny, interrupted):
    runs_root, refused = interrupted.parent, []
    sizes = {path.stat().st_size for path in finished.folder.iterdir()}
    for limit in [0, *sorted(sizes)[:-1]]:  # at each, another file may be the first that does not fit
        with pytest.raises(OSError, match=r"\(File too large\); make room there") as caught, longest_file(limit):
            compute(finished, tiny, runs_root)
        refused.append(Path(str(caught.value).split("] ")[1].split(": ")[0]).name)
        assert not list(runs_root.glob("[!.]*")) and not list(interrupted.glob(".*.part"))
    assert {"detections.json", "checkpoint.safetensors"} <= set(refused), refused
    assert_same(compute(finished, tiny, runs_root), finished)
    with pytest.raises(OSError, match=f"{STATE}: cannot be written .*File too large"), longest_file(1000):
        compute(finished, tiny, runs_root / "new")


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
    other = study.replace(finished, spec=spec)

    def refused(free):
        fill(small_disk, free)
        with pytest.raises(OSError, match=r"\(No space left on device\); make room there, then run again") as caught:
            compute(other, tiny, runs_root)
        assert caught.value.errno == errno.ENOSPC and not list(runs_root.glob(".*/.*.part"))
        assert_same(study.read_run(runs_root / finished.folder.name), finished)
        assert len(study.runs(runs_root)) == 1
        named.append(Path(str(caught.value).split("] ")[1].split(": ")[0]).name)

    refused(free=16384)
    assert named == [STATE]
    (small_disk / "filler").unlink()
    with monkeypatch.context() as patch:  # with room for the states, but not for what comes then
        patch.setattr(study, "measure", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            compute(other, tiny, runs_root)
    monkeypatch.setattr(trainer, "train_epoch", lambda *_: pytest.fail("trained again"))
    for free in (0, 16384, 32768):
        refused(free)
    assert {"detections.json", "checkpoint.safetensors"} <= set(named), named
    (small_disk / "filler").unlink()
    done = compute(other, tiny, runs_root)
    monkeypatch.undo()
    assert_same(done, compute(other, tiny, runs_root.parent / "undisturbed"))


def test_a_full_disk_leaves_the_old_picture(tmp_path):
    import matplotlib.pyplot as plt

    from selfdetr import plots

    path = plots.save(plt.figure(figsize=(1, 1)), tmp_path / "table.png")
    before = path.read_bytes()
    message = re.escape(f"{path}: cannot be written (File too large); make room there")
    with pytest.raises(OSError, match=message), longest_file(100):
        plots.save(plt.figure(figsize=(1, 1)), path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    plt.close("all")


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
    monkeypatch.setattr(study, "train", lambda *_, **__: pytest.fail("training was started"))
    where = (str(tiny_folder), "smoke", "")
    assert_same(compute(finished, tiny, read_only), finished)
    assert_same(study.run_all([finished.spec], tiny, where, read_only, "cpu", 1, False)[0], finished)
    other = study.override(finished.spec, {"train.epochs": 5})
    for runs_root in (read_only, read_only / "new" / "runs"):
        message = re.escape(f"{runs_root}: cannot be written ({read_only} is read-only); choose a folder that you may")
        with pytest.raises(PermissionError, match=message):
            study.run_all([finished.spec, other], tiny, where, runs_root, "cpu", 1, False)
    with pytest.raises(OSError, match="cannot be written .*; choose a folder that you may write to"):
        compute(study.replace(finished, spec=other), tiny, read_only)


def test_results_that_cannot_be_written_stop_a_notebook_in_its_first_cell(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    parameters = dict(dataset="simulated", profile="smoke", data_root="", seeds=1, device="cpu", workers=1, cluster="")
    study.check_parameters(parameters | {"out_dir": str(tmp_path / "new" / "results")})
    assert not (tmp_path / "new").exists()
    with pytest.raises(OSError, match=r"file/results: cannot be written \(.*file is a file\); choose a folder"):
        study.check_parameters(parameters | {"out_dir": str(tmp_path / "file" / "results")})


# ---- leftovers


def test_leftovers_do_not_pile_up(copy, tmp_path):
    root = copy.folder.parent
    old = time.time() - 31 * 86400

    def unfinished(name, touched):
        work = study.work_folder(name, root)
        work.mkdir()
        (work / STATE).write_bytes(b"state")
        work.with_suffix(".lock").touch()
        for path in (work / STATE, work, work.with_suffix(".lock")):
            os.utime(path, (touched, touched))
        return work

    finished, fresh = unfinished(copy.folder.name, time.time()), unfinished("fresh", time.time())
    dead, busy = unfinished("dead", old), unfinished("busy", old)
    waiting = dead.with_suffix(".lock").open()  # by a process that opened it before the sweep and waits to have it
    with study.FileLock(busy.with_suffix(".lock")):
        study.sweep(root)
    assert not finished.exists() and not dead.exists()
    with waiting:  # a process that comes later waits for the same file
        assert os.path.samestat(os.fstat(waiting.fileno()), dead.with_suffix(".lock").stat())
    assert (fresh / STATE).exists() and (busy / STATE).exists() and copy.folder.exists()


def test_a_study_goes_on_from_its_own_states_however_old_they_are(finished, tiny, tiny_folder, tmp_path, monkeypatch):
    work = shutil.copytree(finished.folder, study.work_folder(finished.folder.name, tmp_path))
    work.with_suffix(".lock").touch()
    for path in (*work.iterdir(), work.with_suffix(".lock")):
        os.utime(path, (0, 0))
    monkeypatch.setattr(study, "compute", lambda *_: pytest.fail("begun anew"))
    where = (str(tiny_folder), "smoke", "")
    assert_same(study.run_all([finished.spec], tiny, where, tmp_path, "cpu", 1, False)[0], finished)


def test_the_parts_of_killed_writers_are_removed_and_those_of_others_are_not(tmp_path):
    path = data.write_whole(tmp_path / "table.json", "old")
    dead, living, other = (tmp_path / f".{name}.part" for name in ("table.json.0", "table.json.1", "table2.json.0"))
    for part in (dead, living, other):
        part.write_text("ha")
    for part in (dead, other):
        os.utime(part, (time.time() - 7200,) * 2)
    data.write_whole(path, "new")
    assert path.read_text() == "new" and not dead.exists() and living.exists() and other.exists()
