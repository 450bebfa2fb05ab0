"""How long it takes to check and read a release: THUMOS14's layout at its real lengths, with features of noise.

python benchmarks/read_releases.py [--videos 40] [--half] [--folder /a/large/disk]

All of THUMOS14 (412 recordings) takes 5.2 GB of disk as float32, and of memory; --half writes float16, half as large on
disk. The files are written into a temporary folder that is removed at the end. Needs THUMOS14's annotations, which
`selfdetr.data.find_data` has to find.
"""

import argparse
import json
import shutil
import tempfile
import time
import tracemalloc
from pathlib import Path

import numpy as np

from selfdetr.check import check_folder
from selfdetr.data import find_data, load_dataset, read_json, training_windows

WHERE = dict(annotations="annotations/thumos14.json", features="i3d_features", stride=4, snippet=16)


def choose_videos(database, count):
    "The names of `count` videos, spread over both subsets."
    names = sorted(database)
    return [names[i] for i in np.linspace(0, len(names) - 1, min(count, len(names))).round().astype(int)]


def write_release(folder, count, channels, dtype):
    "The layout of the widely used release: how many steps there are in all."
    whole = read_json(find_data("thumos14") / "annotations.json")
    whole["database"] = {name: whole["database"][name] for name in choose_videos(whole["database"], count)}
    for part in ("annotations", "i3d_features"):
        (folder / part).mkdir(parents=True)
    (folder / WHERE["annotations"]).write_text(json.dumps(whole))
    (folder / "dataset.json").write_text(json.dumps(WHERE))
    noise = np.random.default_rng(0).standard_normal((4096, channels), dtype=np.float32).astype(dtype)
    total = 0
    for name, entry in whole["database"].items():
        steps = (round(entry["duration"] * entry["fps"]) - WHERE["snippet"]) // WHERE["stride"] + 1
        np.save(folder / "i3d_features" / f"{name}.npy", np.resize(noise, (steps, channels)))
        total += steps
    return total


def timed(function, *args, **options):
    "The result, seconds of the clock, seconds of the processor."
    clock, processor = time.perf_counter(), time.process_time()
    result = function(*args, **options)
    return result, time.perf_counter() - clock, time.process_time() - processor


def peak(function, *args, **options):
    "The most memory that Python and numpy held at once, in MB; pages of mapped files are not among it."
    tracemalloc.start()
    function(*args, **options)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return most / 1e6


def report(what, clock, processor, memory=None):
    held = "" if memory is None else f"{memory:10.0f} MB at most"
    print(f"{what:<44}{clock:8.2f} s{processor:8.2f} s of the processor{held}", flush=True)


def measure(folder):
    "Check, load and cut into windows, each timed and then once more for its memory."
    findings, *times = timed(check_folder, folder)
    report("check_folder", *times, peak(check_folder, folder))
    mapped, *times = timed(load_dataset, folder, in_memory=False)
    report("load_dataset, mapped", *times, peak(load_dataset, folder, in_memory=False))
    held, *times = timed(load_dataset, folder)
    report("load_dataset, in memory (float32)", *times)
    for name, dataset in (("mapped", mapped), ("in memory", held)):
        windows, *times = timed(training_windows, dataset)
        report(f"training_windows, {name}: {len(windows)}", *times)
        order = np.random.default_rng(0).permutation(len(windows))[: 16 * 32].reshape(-1, 16)
        _, *times = timed(lambda windows, order: [windows.batch(indices) for indices in order], windows, order)
        report(f"{len(order)} batches of 16, {name}", *times)
    return findings


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=int, default=412, help="how many of the recordings")
    parser.add_argument("--channels", type=int, default=2048)
    parser.add_argument("--half", action="store_true", help="write float16")
    parser.add_argument("--folder", help="where the temporary folder is made")
    options = parser.parse_args()
    if find_data("thumos14") is None:
        parser.error("THUMOS14's annotations are not here; put them where find_data looks, see 20_data")
    root = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        dtype = np.float16 if options.half else np.float32
        steps, *times = timed(write_release, root / "thumos14", options.videos, options.channels, dtype)
        size = steps * options.channels * np.dtype(dtype).itemsize / 1e9
        print(f"{options.videos} recordings, {steps:,} steps of {options.channels} channels, {size:.2f} GB on disk")
        report("writing", *times)
        findings = measure(root / "thumos14")
    finally:
        shutil.rmtree(root, ignore_errors=True)
    print(f"\n{findings}")


if __name__ == "__main__":
    main()
