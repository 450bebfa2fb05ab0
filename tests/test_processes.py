"""Devices; several processes: a step on a batch in two parts is that on the whole, a run is that of one process."""

import json
import math
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from together import CASES, begin_run, one_step, study_run, whole_run

from selfdetr.data import DataError
from selfdetr.processes import choose_device, make_fabric

HERE = Path(__file__).resolve().parent


@pytest.mark.parametrize(
    "device, chosen",
    [("auto", ("cuda", None)), ("cuda", ("cuda", None)), ("cuda:1", ("cuda", [1])), ("cpu", ("cpu", None))],
)
def test_a_gpu_may_be_named(monkeypatch, device, chosen):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device(device) == chosen


@pytest.mark.parametrize("device", ["cuda:2", "cuda:", "cuda:x", "cuda:9", "cuda:-1", "cudax", "mps", "mps:0", "auto:0",
                                    "cpu:", "", "gpu"])  # fmt: skip
def test_a_device_that_is_not_there_is_refused(monkeypatch, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(DataError, match="choose one of"):
        choose_device(device)


@pytest.mark.parametrize("said, words", [
    ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT are not set; .*torchrun"),
    ({"SLURM_NTASKS": "4", "SLURM_JOB_NAME": "train"}, "SLURM_NTASKS is 4, but they were not started by .*--ntasks=1"),
])  # fmt: skip
def test_processes_that_were_not_started_are_one_error_and_not_a_long_wait(monkeypatch, said, words):
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=words):
        make_fabric("cpu")
    for name, value in (("SLURM_JOB_NAME", "bash"), ("WORLD_SIZE", "1")):
        monkeypatch.setenv(name, value)
    assert make_fabric("cpu").world_size == 1


# ---- two processes

pytestmark = pytest.mark.usefixtures("one_thread")


def port_can_be_opened() -> bool:
    try:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            s.listen()
        return True
    except OSError:
        return False


def port_is_missing() -> str:
    "Why two processes cannot talk here, if so."
    if not torch.distributed.is_available():
        return "this torch has no torch.distributed"
    return "" if port_can_be_opened() else "torchrun needs a local port, and none can be opened here"


def torchrun(*command: str, cwd: Path) -> subprocess.CompletedProcess:
    "Two processes of a command, with gloo."
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.run([*start, *command], capture_output=True, text=True, timeout=300, cwd=cwd)


@pytest.fixture(scope="module")
def two(tiny_folder, tmp_path_factory) -> Path:
    "The folder of what two processes computed."
    if reason := port_is_missing():
        pytest.skip(reason)
    out = tmp_path_factory.mktemp("together")
    begin_run(str(tiny_folder), str(out / "of one process"))
    done = torchrun(str(HERE / "together.py"), str(out), str(tiny_folder), cwd=out)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.mark.parametrize("name", CASES)
def test_the_gradient_of_a_batch_in_two_parts_is_that_of_the_whole(two, name):
    "Parts of three and two windows, padded differently, with eleven instances and one."
    whole = one_step(name)
    for rank in (0, 1):
        parts = load_file(two / f"{name} {rank}.safetensors")
        assert parts.keys() == whole.keys()
        for key, value in whole.items():
            torch.testing.assert_close(parts[key], value, rtol=1e-4, atol=1e-5 * max(1, value.abs().max().item()))
    largest = max(v.abs().max() for k, v in whole.items() if not k.startswith("term"))
    assert largest > 0.01 and whole["term total"] > 1


def test_a_run_of_two_processes_ends_near_that_of_one(two, tiny_folder):
    ranks = [json.loads((two / f"{rank}.json").read_text())["run"] for rank in (0, 1)]
    assert ranks[0] == ranks[1]  # the same weights, and the same log, in both
    one = whole_run(str(tiny_folder), None)
    assert ranks[0]["history"].keys() == one["history"].keys()
    for name, values in one["history"].items():
        assert ranks[0]["history"][name] == pytest.approx(values, rel=1e-3), name
    start, end, ours = (np.array(values) for values in (one["start"], one["weights"], ranks[0]["weights"]))
    moved = np.abs(end - start)
    assert np.abs(ours - end).max() < moved.max() / 20  # untrained weights are off by all of it


def test_a_resumed_run_of_two_processes_is_the_undisturbed_one(two):
    "With dropout: both processes draw their random numbers again from the epoch on."
    found = [json.loads((two / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert found[0]["resumed"] == found[0]["undisturbed"] == found[1]["undisturbed"]


def test_a_run_is_taken_over_by_another_number_of_processes(two, tiny_folder):
    "Two epochs in two processes and the third in one, and the other way round."
    found = [json.loads((two / f"{rank}.json").read_text()) for rank in (0, 1)]
    alone = whole_run(str(tiny_folder), str(two / "left"))
    assert alone["history"]["total"][:2] == found[0]["undisturbed"]["history"]["total"][:2]
    assert found[0]["taken over"] == found[1]["taken over"]
    for taken in (alone, found[0]["taken over"]):  # dropout is another one: near, not equal
        assert taken["history"]["total"][2] == pytest.approx(found[0]["undisturbed"]["history"]["total"][2], rel=0.1)


def test_denoising_queries_train_in_two_processes(two):
    found = [json.loads((two / f"{rank}.json").read_text())["dino"] for rank in (0, 1)]
    assert found[0] == found[1] and all(math.isfinite(v[0]) for v in found[0]["history"].values())


def test_a_study_run_of_two_processes_is_one_run_in_the_cache(two, tiny_folder, tmp_path):
    "Found by both when they ask again; near the run of one process."
    found = [json.loads((two / f"{rank}.json").read_text())["study"] for rank in (0, 1)]
    assert found[0] == found[1] and len(list((two / "runs").glob("[!.]*"))) == 1
    one = study_run(str(tiny_folder), tmp_path)
    assert (found[0]["metrics"]["processes"], one["metrics"]["processes"]) == (2, 1)
    for name in ("total", "class", "feedback_encoder"):
        assert found[0]["history"][name] == pytest.approx(one["history"][name], rel=1e-3)
    assert found[0]["metrics"]["average"] == pytest.approx(one["metrics"]["average"], abs=0.5)


def test_processes_that_do_not_share_a_folder_are_told_so(two):
    found = [json.loads((two / f"{rank}.json").read_text())["apart"] for rank in (0, 1)]
    assert all("not seen by all processes; put it on a file system that all share" in text for text in found), found


def test_more_processes_than_windows_are_refused_by_all(two):
    found = [json.loads((two / f"{rank}.json").read_text())["refused"] for rank in (0, 1)]
    assert found[0] == found[1] == "2 processes for batches of 1 windows; start 1 at most"
