"""Faults: killed processes, a full disk, leftovers."""

import json
import os
import re
import time
from pathlib import Path

import kill_runs
import pytest
from disks import longest_file

from selfdetr import simulate
from selfdetr.data import files, load_dataset

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
def test_killed_runs_and_studies_end_in_the_same_bits(capfd):
    "The short form of `make kill`."
    status, said = kill_runs.main(["--kills", "12", "--seed", "1"]), capfd.readouterr()
    assert status == 0, said.err[-3000:]
    kills = json.loads(said.out.splitlines()[0])
    assert kills["kills"] >= 12 and "all equal" in said.out  # both of two studies may be killed at once
    assert {"in training", "in writing", "in one of two studies", "in measuring again"} <= set(kills)


def test_a_full_disk_leaves_the_old_picture(tmp_path):
    import matplotlib.pyplot as plt

    from selfdetr import plots

    path = plots.save_picture(plt.figure(figsize=(1, 1)), tmp_path / "table.png")
    before = path.read_bytes()
    message = re.escape(f"{path}: cannot be written (File too large); make room there")
    with pytest.raises(OSError, match=message), longest_file(100):
        plots.save_picture(plt.figure(figsize=(1, 1)), path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    plt.close("all")


def test_the_parts_of_killed_writers_are_removed_and_those_of_others_are_not(tmp_path):
    path = files.write_whole(tmp_path / "table.json", "old")
    dead, living, other = (tmp_path / f".{name}.part" for name in ("table.json.0", "table.json.1", "table2.json.0"))
    for part in (dead, living, other):
        part.write_text("ha")
    for part in (dead, other):
        os.utime(part, (time.time() - 7200,) * 2)
    files.write_whole(path, "new")
    assert path.read_text() == "new" and not dead.exists() and living.exists() and other.exists()


def test_a_simulated_data_set_stays_where_another_cannot_take_its_place(tmp_path, monkeypatch):
    small = simulate.SimulatorConfig(train_videos=1, test_videos=1, video_seconds=20.0)
    folder, move = simulate.make_dataset(tmp_path / "made", 0, small), os.replace
    before = load_dataset(folder).hash()

    def full(source, target):  # moves everything but a new data set
        if Path(target) == folder and not str(source).endswith("-replaced"):
            raise OSError("no room")
        move(source, target)

    monkeypatch.setattr(simulate.os, "replace", full)
    with pytest.raises(OSError, match="no room"):
        simulate.make_dataset(folder, 1, small, renew=True)
    assert load_dataset(folder).hash() == before and list(tmp_path.iterdir()) == [folder]
