"""How long it takes from a command to the first training step: imports, opening and hashing the data, worker processes.

What a run itself takes is subtracted from the time at which it is written down. The data are there before.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import machine, options_of, verdict

from selfdetr.study import open_dataset

TABLE = """
from selfdetr.study import table
short = {{"train.epochs": 1, "train.milestones": []}}
rows = [{{"name": name, "overrides": short | {{"train.lr": lr}}}} for name, lr in (("a", 1e-3), ("b", 1e-4))]
table(rows, 1, profile={profile!r}, workers=2, data_root={data!r}, runs_root={runs!r}, device="cpu")
"""
AIM = 5.0  # seconds


def first_step(command, runs):
    "Seconds from the start of a command to the first training step of the run that is done first."
    started = time.time()
    subprocess.run(command, check=True, capture_output=True)
    written = []
    for path in runs.glob("[!.]*/metrics.json"):
        metrics = json.loads(path.read_text())
        written.append(path.stat().st_mtime - metrics["seconds_train"] - metrics["seconds_test"] - started)
    return min(written)


def main(argv=None):
    options = options_of(__doc__, argv, rounds=dict(type=int, default=3, help="default: %(default)s"))
    profile, rounds = "smoke" if options.smoke else "quick", 1 if options.smoke else options.rounds
    print(f"{machine('cpu', rounds=rounds)}\nprofile {profile}\n")
    with tempfile.TemporaryDirectory() as folder:
        data = str(Path(folder) / "data")
        open_dataset("simulated", profile, data)
        short = ["--set", "train.epochs=1", "--set", "train.milestones=[]"]
        for name in ("selfdetr train", "a table of two runs, two workers")[: 1 if options.smoke else 2]:
            times = []
            for i in range(rounds):
                runs = Path(folder) / f"{name[:1]}{i}"
                where = ["--data-root", data, "--runs", str(runs), "--device", "cpu", "--profile", profile, *short]
                train = [sys.executable, "-m", "selfdetr", "train", "simulated", "--preset", "detr", *where]
                code = TABLE.format(profile=profile, data=data, runs=str(runs))
                times.append(first_step(train if name == "selfdetr train" else [sys.executable, "-c", code], runs))
            middle = statistics.median(times)
            print(f"{name}: first step after {middle:.1f} s (aim: {AIM:g} s: {verdict(middle, AIM)})")


if __name__ == "__main__":
    main()
