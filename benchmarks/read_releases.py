"""How long it takes to check and read a release: THUMOS14's layout at its real lengths, with features of noise.

All of THUMOS14 (412 recordings) takes 5.2 GB of disk as float32, and of memory; --half writes float16, half as large on
disk. The files are written into a temporary folder that is removed at the end. Needs THUMOS14's annotations, which
`selfdetr.data.find_data` has to find.
"""

import json
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
from common import options_of, traced_peak

from selfdetr.check.folder import check_folder
from selfdetr.data.dataset import load_dataset
from selfdetr.data.files import find_data, read_json
from selfdetr.data.windows import training_windows
from selfdetr.trainer import epoch_batches

WHERE = dict(annotations="annotations/thumos14.json", features="i3d_features", stride=4, snippet=16)


def write_release(folder, count, channels, dtype):
    "The layout of the widely used release, recordings spread over both subsets: how many steps there are in all."
    whole = read_json(find_data("thumos14") / "annotations.json")
    names = sorted(whole["database"])
    chosen = np.linspace(0, len(names) - 1, min(count, len(names))).round().astype(int)
    whole["database"] = {names[i]: whole["database"][names[i]] for i in chosen}
    for part in ("annotations", "i3d_features"):
        (folder / part).mkdir(parents=True)
    (folder / WHERE["annotations"]).write_text(json.dumps(whole))
    (folder / "dataset.json").write_text(json.dumps(WHERE))
    features, total = np.random.default_rng(0).standard_normal((4096, channels)).astype(dtype), 0
    for name, entry in whole["database"].items():
        steps = (round(entry["duration"] * entry["fps"]) - WHERE["snippet"]) // WHERE["stride"] + 1
        np.save(folder / "i3d_features" / f"{name}.npy", np.resize(features, (steps, channels)))
        total += steps
    return total


def timed(what, function, memory=False):
    "The result; its seconds by the clock and of the processor are printed, and the memory that a second call takes."
    clock, processor = time.perf_counter(), time.process_time()
    result = function()
    clock, processor = time.perf_counter() - clock, time.process_time() - processor
    held = f"{traced_peak(function):10.0f} MB at most" if memory else ""
    print(f"{what:<44}{clock:8.2f} s{processor:8.2f} s of the processor{held}", flush=True)
    return result


def measure(folder):
    "Check, load and cut into windows."
    findings = timed("check_folder", lambda: check_folder(folder), memory=True)
    for name, held in {"mapped": False, "in memory": True}.items():
        dataset = timed(f"load_dataset, {name}", partial(load_dataset, folder, in_memory=held), memory=not held)
        windows = timed(f"training_windows, {name}", partial(training_windows, dataset))
        order = epoch_batches(len(windows), 16, 0, 0)[:32]
        timed(f"{len(order)} batches of 16 of {len(windows)}, {name}", lambda: [*map(windows.batch, order)])  # noqa: B023
    return findings


def main(argv=None):
    options = options_of(__doc__, argv, videos=dict(type=int, default=412, help="how many of the recordings"),
                         half=dict(action="store_true", help="write float16"))  # fmt: skip
    videos, channels = (4, 4) if options.smoke else (options.videos, 2048)
    if find_data("thumos14") is None:
        raise SystemExit("THUMOS14's annotations are not here; put them where find_data looks, see 20_files")
    with tempfile.TemporaryDirectory() as folder:
        root, dtype = Path(folder) / "thumos14", np.float16 if options.half else np.float32
        steps = timed("writing", lambda: write_release(root, videos, channels, dtype))
        size = steps * channels * np.dtype(dtype).itemsize / 1e9
        print(f"{videos} recordings, {steps:,} steps of {channels} channels, {size:.2f} GB on disk\n\n{measure(root)}")


if __name__ == "__main__":
    main()
