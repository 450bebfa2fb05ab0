"""Several processes: a step on a batch in two parts is the step on the whole, a run is the run of one process."""

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
from together import CASES, begin_run, one_step, whole_run

from selfdetr.study import main, read_run
from selfdetr.trainer import process_seed

HERE = Path(__file__).resolve().parent
COMMAND = str(Path(sys.executable).with_name("selfdetr-train"))


def port_can_be_opened() -> bool:
    try:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            s.listen()
        return True
    except OSError:
        return False


pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed"),
    pytest.mark.skipif(not port_can_be_opened(), reason="torchrun needs a local port, and none can be opened here"),
]


def torchrun(*command: str, cwd: Path) -> subprocess.CompletedProcess:
    "Two processes of a command, with gloo."
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.run([*start, *command], capture_output=True, text=True, timeout=300, cwd=cwd)


@pytest.fixture(scope="module")
def two(tiny_folder, tmp_path_factory) -> Path:
    "The folder of what two processes computed."
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
    assert len({process_seed(s, e, r) for s in (0, 1) for e in range(9) for r in range(9)}) == 2 * 9 * 9


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


def test_a_study_run_of_two_processes_is_one_run_in_the_cache(tmp_path):
    "`selfdetr-train` under torchrun, and again; then the same spec in one process, in another cache."
    same = ["simulated", "--profile", "smoke", "--data-root", str(tmp_path / "data"), "--set", "model.dropout=0"]
    for _ in range(2):
        done = torchrun("--no-python", COMMAND, *same, "--runs", str(tmp_path / "two"), cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("average mAP") == 1
    assert main([*same, "--runs", str(tmp_path / "one")]) == 0
    (two,), (one,) = (list((tmp_path / name).glob("[!.]*")) for name in ("two", "one"))
    assert two.name == one.name and not list((tmp_path / "two").glob(".*[!k]"))
    two, one = read_run(two), read_run(one)
    assert (two.metrics["processes"], one.metrics["processes"]) == (2, 1)
    for name in ("total", "class", "feedback_encoder"):
        assert two.history[name].to_list() == pytest.approx(one.history[name].to_list(), rel=1e-3)
    assert two.metrics["average"] == pytest.approx(one.metrics["average"], abs=0.5)


def test_processes_that_do_not_share_the_runs_are_told_so_before_training(two):
    found = [json.loads((two / f"{rank}.json").read_text())["apart"] for rank in (0, 1)]
    assert all("not seen by all processes; put it on a file system that all share" in text for text in found), found
    assert not list(two.glob("node */.*/state.pt"))


def test_more_processes_than_windows_are_refused_by_all(two):
    found = [json.loads((two / f"{rank}.json").read_text())["refused"] for rank in (0, 1)]
    assert found[0] == found[1] == "2 processes for batches of 1 windows; start 1 at most"
