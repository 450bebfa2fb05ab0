"""How long it takes to check and read a release: THUMOS14's layout at its real lengths, with features of noise.

All of THUMOS14 (412 recordings) takes 5.2 GB of disk as float32, and of memory; --half writes float16, half as large on
disk. The files are written into a temporary folder that is removed at the end. Needs THUMOS14's annotations, which
`selfdetr.data.find_data` has to find.
"""

import functools
import json
import tempfile
import time
from pathlib import Path

import numpy as np
from common import noise, options_of, traced_peak

from selfdetr.check.folder import check_folder
from selfdetr.data.dataset import load_dataset
from selfdetr.data.files import find_data, read_json
from selfdetr.data.windows import training_windows

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
    features, total = noise(4096, channels).astype(dtype), 0
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
    mapped = timed("load_dataset, mapped", lambda: load_dataset(folder, in_memory=False), memory=True)
    held = timed("load_dataset, in memory (float32)", lambda: load_dataset(folder))
    for name, dataset in (("mapped", mapped), ("in memory", held)):
        windows = timed(f"training_windows, {name}", functools.partial(training_windows, dataset))
        order = np.random.default_rng(0).permutation(len(windows))[: min(len(windows) // 16, 32) * 16].reshape(-1, 16)
        what = f"{len(order)} batches of 16 of {len(windows)}, {name}"
        timed(what, lambda windows=windows, order=order: [windows.batch(indices) for indices in order])
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
