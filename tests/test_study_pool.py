"""Many runs: failing, killed and interrupted ones, jobs of a cluster, leftovers, one data set for all of them."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from joblib.externals.loky.process_executor import TerminatedWorkerError
from small_runs import ROWS, SMALL, assert_same_run, flip, make_table, visible

from selfdetr import study
from selfdetr.data import dataset, features
from selfdetr.resume import STATE
from selfdetr.study import cache, compute, pool
from selfdetr.study.compute import run_hash

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_failing_run_leaves_no_folder_and_the_others_stay(tiny_folder, tmp_path, monkeypatch):
    "Every study reads each of the five feature files once, and hashes once."
    compute_run, reads, hashes = cache.compute_run, [], []
    read, digest = features.READERS["npy"], dataset._digest
    monkeypatch.setitem(features.READERS, "npy", lambda path: (reads.append(path.name), read(path))[1])
    monkeypatch.setattr(dataset, "_digest", lambda data: (hashes.append(1), digest(data))[1])

    def fails_for_seed_1(spec, data, folder, *options):
        (folder / "metrics.json").write_text('{"average": ')
        if spec.seed == 1 and spec.loss.feedback_encoder:
            raise OSError("no space left on device")
        compute_run(spec, data, folder, *options)

    with monkeypatch.context() as patch:
        patch.setattr(cache, "compute_run", fails_for_seed_1)
        with pytest.raises(RuntimeError, match="1 of 4 runs failed") as caught:
            make_table(ROWS, 2, tiny_folder, tmp_path)
    assert len(reads) == len(set(reads)) == 5 and len(hashes) == 1
    assert '"seed": 1' in str(caught.value) and "no space left on device" in str(caught.value)
    kept = study.runs(tmp_path)
    assert len(kept) == 3 and "problem" not in kept and set(kept.run) == set(visible(tmp_path))
    computed = []
    counted = lambda spec, *rest: (computed.append(spec.seed), compute_run(spec, *rest))  # noqa: E731
    monkeypatch.setattr(cache, "compute_run", counted)
    table = make_table(ROWS, 2, tiny_folder, tmp_path)
    assert computed == [1] and table.content["seeds"] == [0, 1] and len(visible(tmp_path)) == 4
    assert table.content["data"] and len(reads) == 2 * len(set(reads)) == 10 and len(hashes) == 2
    again = make_table([{**ROWS[1], "name": "the same by another name"}, *ROWS], 2, tiny_folder, tmp_path)
    assert computed == [1] and again.content["rows"][0]["average"] == again.content["rows"][2]["average"]


def test_the_bar_counts_what_ends_last(tmp_path):
    works = [pool.work_folder(name, tmp_path) for name in ("finished", "stopped")]
    with pool._watch_epochs(works, [7, 9], show=True) as bar:
        (tmp_path / "finished").mkdir()
        works[1].mkdir()
        (works[1] / "epochs").write_text("4")
    assert bar.n == 11


def test_a_run_found_under_another_name_has_the_spec_that_was_asked_for(finished, tiny, tmp_path):
    shutil.copytree(finished.folder, tmp_path / finished.folder.name)
    spec = replace(finished.spec, dataset="elsewhere", fold="2")
    assert study.run(spec, tiny, runs_root=tmp_path).spec == spec
    assert pool.run_all([spec], {"2": tiny}, runs_root=tmp_path, workers=1, progress=False)[0].spec == spec
    assert len(visible(tmp_path)) == 1


def test_a_killed_worker_is_one_message_and_a_second_call_goes_on(finished, tiny, tmp_path, monkeypatch):
    "What loky raises when the system kills a worker; `make kill` really kills one."
    shutil.copytree(finished.folder, tmp_path / finished.folder.name)
    specs = [finished.spec, study.override(finished.spec, {"train.epochs": 3})]

    def killed(*_, **__):
        raise TerminatedWorkerError("A worker process managed by the executor was unexpectedly terminated.")

    with monkeypatch.context() as patch:
        patch.setattr(pool, "Parallel", killed)
        with pytest.raises(RuntimeError, match="1 of 2 runs failed; the others are kept") as caught:
            study.run_all(specs, tiny, "", tmp_path, "cpu", 2, False)
    lines = str(caught.value).splitlines()
    name = run_hash(specs[1], tiny.hash())
    assert lines[1].startswith(f"run {name} (seed 0): a worker process was killed") and "call again" in lines[1]
    assert finished.folder.name not in str(caught.value)
    assert len(study.run_all(specs, tiny, "", tmp_path, "cpu", 1, False)) == 2


def test_a_damaged_run_stops_a_study_before_any_training(copied, tiny, monkeypatch):
    flip(copied.folder / "history.csv", 0.5)
    monkeypatch.setattr(compute, "train", lambda *_, **__: pytest.fail("training was started"))
    specs = [study.override(copied.spec, {"train.epochs": 3}), copied.spec]
    with pytest.raises(ValueError, match="history.csv.*delete the folder"):
        study.run_all(specs, tiny, "", copied.folder.parent, "cpu", 1, False)


ENDS = """
import multiprocessing, os, signal, time
from selfdetr.study import pool

pool._attempt = os.getpid
pids = pool._in_workers([()] * 3, 3)
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
from selfdetr.study import pool

def busy(path):
    Path(path).touch()
    time.sleep(100)

signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores it
pool._attempt = busy
print("begins", flush=True)
pool._in_workers([(path,) for path in sys.argv[1:]], 2)
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
    assert process.returncode in (-signal.SIGINT, 1), said  # 1 where an installed package has its own excepthook
    assert said.rstrip().endswith("KeyboardInterrupt"), said


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
    assert pool._take_turns(device, cluster) == turns


# ---- leftovers


def test_leftovers_do_not_pile_up(copied, tmp_path):
    root = copied.folder.parent
    old = time.time() - 31 * 86400

    def unfinished(name, touched):
        work = cache.work_folder(name, root)
        work.mkdir()
        (work / STATE).write_bytes(b"state")
        work.with_suffix(".lock").touch()
        for path in (work / STATE, work, work.with_suffix(".lock")):
            os.utime(path, (touched, touched))
        return work

    finished, fresh = unfinished(copied.folder.name, time.time()), unfinished("fresh", time.time())
    dead, busy = unfinished("dead", old), unfinished("busy", old)
    waiting = dead.with_suffix(".lock").open()  # by a process that opened it before the sweep and waits to have it
    with pool.FileLock(busy.with_suffix(".lock")):
        pool.sweep(root)
    assert not finished.exists() and not dead.exists()
    with waiting:  # a process that comes later waits for the same file
        assert os.path.samestat(os.fstat(waiting.fileno()), dead.with_suffix(".lock").stat())
    assert (fresh / STATE).exists() and (busy / STATE).exists() and copied.folder.exists()


def test_a_study_goes_on_from_its_own_states_however_old_they_are(finished, tiny, tmp_path, monkeypatch):
    work = shutil.copytree(finished.folder, cache.work_folder(finished.folder.name, tmp_path))
    work.with_suffix(".lock").touch()
    for path in (*work.iterdir(), work.with_suffix(".lock")):
        os.utime(path, (0, 0))
    monkeypatch.setattr(cache, "compute_run", lambda *_: pytest.fail("begun anew"))
    assert_same_run(study.run_all([finished.spec], tiny, "", tmp_path, "cpu", 1, False)[0], finished)


# ---- folds


def test_each_fold_trains_on_its_own_recordings_and_is_kept(folds_folder, tmp_path, monkeypatch):
    "One fold, then all, then all again, then what `run` finds by the spec alone."
    one = make_table(ROWS[:1], 1, folds_folder, tmp_path, folds="2")
    assert one.content["folds"] == ["2"] and len(visible(tmp_path)) == 1
    compute_run, computed = cache.compute_run, []
    monkeypatch.setattr(cache, "compute_run", lambda spec, *rest: (computed.append(spec), compute_run(spec, *rest))[1])
    table = make_table(ROWS[:1], 1, folds_folder, tmp_path)
    assert [spec.fold for spec in computed] == ["1", "3"]
    runs = table.runs["baseline"]
    assert [run.spec.fold for run in runs] == ["1", "2", "3"]
    assert runs[1].metrics == one.runs["baseline"][0].metrics
    folds = study.open_folds(str(folds_folder), "smoke")
    for run in runs:
        assert run.metrics["data"] == folds[run.spec.fold].hash()
        detected = json.loads(run.file("detections.json").read_text())["results"]
        assert set(detected) <= {video.name for video in folds[run.spec.fold].split("test")}
    assert table.content["test_instances"] == sum(run.metrics["test_instances"] for run in runs)
    again = make_table(ROWS[:1], 1, folds_folder, tmp_path)
    assert again.content == table.content and len(computed) == 2
    assert study.run(runs[-1].spec, runs_root=tmp_path, device="cpu", progress=False).metrics == runs[-1].metrics
    assert sorted(study.runs(tmp_path).fold) == ["1", "2", "3"]


def test_workers_share_the_folds_and_a_failing_run_names_its_fold(folds_folder, tmp_path, monkeypatch):
    reads, compute_run = [], cache.compute_run
    read = features.READERS["npy"]
    monkeypatch.setitem(features.READERS, "npy", lambda path: (reads.append(path), read(path))[1])

    def fails_on_fold_2(spec, *rest):
        if spec.fold == "2":
            raise OSError("no space left on device")
        compute_run(spec, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(cache, "compute_run", fails_on_fold_2)
        with pytest.raises(RuntimeError, match=r"1 of 3 runs failed.*\n.*\(fold 2, seed 0\): OSError: no space left"):
            make_table(ROWS[:1], 1, folds_folder, tmp_path / "alone")
    assert len(visible(tmp_path / "alone")) == 2
    assert len(reads) == len(set(reads)) == 15  # five recordings of three folds, once each
    alone = make_table(ROWS[:1], 1, folds_folder, tmp_path / "alone")
    assert len(reads) == 2 * len(set(reads)) == 30
    two = make_table(ROWS[:1], 1, folds_folder, tmp_path / "two", workers=2)
    assert two.content == alone.content
