"""How memory and time grow with the length of a recording or window, with channels, queries and videos.

Every measurement runs in a process of its own, on one thread: processor time, the least of three readings, or of fewer
once they take ten seconds together; and the most memory that was resident during the first, beyond what the process
held when its model or its folder was ready. Recordings are sparse .npy files, mapped as real ones are.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from common import (GRID, Size, apart, forget_peak, make_batch, make_model, options_of, resident, torch, training,
                    verdict)  # fmt: skip
from scipy.optimize import nnls

from selfdetr.check.folder import check_folder
from selfdetr.data.dataset import Dataset, Video, load_dataset
from selfdetr.data.windows import WindowConfig, training_windows
from selfdetr.inference import InferenceConfig, detect, detect_dataset
from selfdetr.model import ModelConfig
from selfdetr.trainer import TrainConfig, epoch_batches

LIMIT = 3000  # MB of a training step of the paper's size


# ---- what is measured: each of these gets ready in a folder and returns what is then timed


def sparse(path, steps, channels):
    "A .npy file of zeros that takes no room on a disk."
    np.lib.format.open_memmap(path, "w+", np.float32, (steps, channels))
    return path


def detection(folder, hours=0.3, **changes):
    "Detect in one mapped recording; every score passes, so that suppression has the most to do."
    model = make_model(ModelConfig(**changes))
    path = sparse(f"{folder}/recording.npy", round(hours * 3600 * GRID.fps / GRID.stride), model.config.channels)
    detect(model, np.zeros((128, model.config.channels), np.float32), GRID)  # the first call loads what is needed
    return lambda: detect(model, path, GRID)


def window(steps, maps):
    "The model on one window, with its maps or without."
    model = make_model(ModelConfig())
    features = torch.randn(1, steps, model.config.channels)
    look = torch.no_grad()(lambda features=features: model(features, maps=maps))
    look(features[:, :64])
    return look


def train(steps, batch=4, feedback=True):
    "A training step."
    setup = training(Size(ModelConfig(), TrainConfig(batch=batch), steps), feedback=feedback)
    setup.step(make_batch(ModelConfig(), 1, 64)._replace(mask=None))  # makes the optimiser's state
    return setup.step


def write_videos(folder, videos, steps=300, channels=64):
    "A data set of short recordings, four instances each, half of it for training."
    folder = Path(folder, "data")
    (folder / "features").mkdir(parents=True)
    instances = [{"label": f"c{i}", "segment": [3.0 + 7 * i, 7.0 + 7 * i]} for i in range(4)]
    entry = {"duration": steps / 10, "annotations": instances}
    database = {f"video_{i:06d}": {"subset": ("training", "test")[i % 2]} | entry for i in range(videos)}
    for name in database:
        sparse(folder / "features" / f"{name}.npy", steps, channels)
    (folder / "annotations.json").write_text(json.dumps({"database": database}))
    (folder / "dataset.json").write_text(json.dumps({"fps": 10, "stride": 1, "snippet": 1, "in_memory": False}))
    return folder


def index(folder, videos):
    "What a run does before its first step: read and hash a mapped data set, cut windows, order them, make a batch."
    write_videos(folder, videos)

    def read():
        dataset = load_dataset(Path(folder, "data"))
        windows = training_windows(dataset, length=64)
        return dataset.hash(), windows.batch(epoch_batches(len(windows), 16, 0, 0)[0])

    return read


def check(folder, videos):
    "Check a folder before anything is trained."
    return partial(check_folder, write_videos(folder, videos))


def search(folder, videos):
    "Detect in the test half of a data set with a small model."
    dataset = load_dataset(write_videos(folder, videos))
    small = dict(dim=32, heads=4, hidden=64, queries=10, decoder_layers=2, norm_groups=8)
    model = make_model(ModelConfig(channels=64, classes=4, **small))
    return lambda: detect_dataset(model, dataset, InferenceConfig(most=20), WindowConfig(256))


def cutting(hours):
    "Training windows of one recording with an instance every seven seconds; no features are needed."
    start = np.arange(0, hours * 3600 - 7, 7.0)
    segments, steps = np.stack([start, start + 4], axis=1), round(hours * 3600 * GRID.fps / GRID.stride)
    video = Video("one", "train", hours * 3600, GRID, steps, 0, segments, np.zeros(len(start), dtype=np.int64))
    return partial(training_windows, Dataset(Path("none"), ("action",), (video,), 64, None))


class Series(NamedTuple):
    "One thing that grows."

    title: str
    unit: str
    sizes: tuple[float, ...]
    make: Callable  # (folder, size) -> what is timed
    memory: int  # exponent of the memory, where the size dominates
    seconds: int  # the same of the time
    beyond: float | None = None  # extrapolated to


VIDEOS = (100, 1000, 3000, 10_000)
WINDOWS, STEPS = (64, 256, 1024, 2048, 4096), (64, 128, 256, 512, 1024)  # of detection; of training
SERIES = {
    "recording": Series("detection in one recording", "hours", (0.1, 1, 3, 10), detection, 1, 1, 100),
    "channels": Series("detection", "channels", (36, 256, 1024, 2048), lambda f, n: detection(f, channels=n), 1, 1),
    "queries": Series("detection", "queries", (20, 40, 100, 300), lambda f, n: detection(f, queries=n), 1, 1),
    "window": Series("one window, no maps", "steps", WINDOWS, lambda f, n: window(n, False), 1, 2, 16_384),
    "window-maps": Series("one window, with maps", "steps", WINDOWS, lambda f, n: window(n, True), 2, 2, 16_384),
    "training": Series("training, feedback", "steps", STEPS, lambda f, n: train(n), 2, 2, 4096),
    "training-no-maps": Series("training, no maps", "steps", STEPS, lambda f, n: train(n, feedback=False), 2, 2, 4096),
    "paper": Series("training step of the paper's size", "steps", (128,), lambda f, n: train(n, batch=16), 2, 2),
    "cutting": Series("windows of one recording", "hours", (1, 10, 30, 100), lambda f, n: cutting(n), 1, 1, 1000),
    "index": Series("reading and hashing a data set", "videos", VIDEOS, index, 1, 1, 100_000),
    "check": Series("checking a data set", "videos", VIDEOS, check, 1, 1, 100_000),
    "search": Series("detection in a data set", "videos", VIDEOS, search, 1, 1, 100_000),
}  # fmt: skip
SMOKE = {"recording": (0.01,), "window": (64,), "training": (16,), "cutting": (0.1,), "index": (4,), "check": (4,)}


def measure(name, size, folder, readings=3):
    "Processor seconds and MB of one size. Runs alone in its process."
    work, seconds, peaks = SERIES[name].make(folder, size), [], []
    forget_peak()
    before = resident()
    while len(seconds) < readings and sum(seconds) < 10:
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)
        peaks.append(resident())
    return {"seconds": round(min(seconds), 3), "megabytes": round(peaks[0] - before, 3)}


def measure_all(names, smoke):
    "A row for every size of these series."
    rows = []
    for name, series in ((name, SERIES[name]) for name in names):
        for size in SMOKE.get(name, ()) if smoke else series.sizes:
            with tempfile.TemporaryDirectory() as folder:
                found = measure(name, size, folder, 1) if smoke else apart(__file__, "--one", name, size, folder)
            rows.append(dict(series=name, size=size, unit=series.unit, kind="measured") | found)
            print(f"{series.title:<36}{size:>8g} {series.unit:<9}", found, flush=True)
    return pd.DataFrame(rows)


def terms(sizes, power):
    "What the law adds up: 1 and n; or, where things grow with the square, n and n^2."
    return np.asarray(sizes, float)[..., None] ** (power - 1, power)


def law(rows, what, power):
    "The factors of the two terms, not negative, by least squares of the relative errors."
    values = np.maximum(rows[what].to_numpy(float), 1e-3)
    return nnls(terms(rows["size"], power) / values[:, None], np.ones_like(values))[0]


def fit(measured):
    """The laws of the largest three sizes, a row a series; and rows of what they say beyond the largest.

    With each law stands the largest size as those before it foretell it, over what was measured.
    """
    laws, beyond = {}, []
    for name, one in measured.groupby("series", sort=False):
        series, last = SERIES[name], one.iloc[-1]
        if len(one) < 3:
            continue
        laws[name] = {"n": series.unit}
        far = dict(series=name, size=series.beyond, unit=series.unit, kind="extrapolated")
        for what, power in {"seconds": series.seconds, "megabytes": series.memory}.items():
            a, b = law(one.tail(3), what, power)
            laws[name][what] = f"{a:.3g} + {b:.3g} n" if power == 1 else f"{a:.3g} n + {b:.3g} n^2"
            foretold = terms(last["size"], power) @ law(one.iloc[-4:-1], what, power)
            laws[name][f"{what}, foretold"] = f"{foretold / last[what]:.2f}"
            far[what] = float(f"{terms(series.beyond or 0, power) @ (a, b):.3g}")
        beyond += [far] if series.beyond else []
    return pd.DataFrame(laws).T, pd.DataFrame(beyond)


PANELS = {
    "length of the recording, hours": ("recording", "cutting"),
    "length of a window, steps": ("window", "window-maps", "training", "training-no-maps"),
    "videos": ("index", "check", "search"),
}
COLOURS = ("#0072B2", "#332288", "#009E73", "#CC79A7")  # Okabe and Ito's


def plot(table, path):
    "Seconds above and memory below, over what grows; open marks and dashes are extrapolated."
    figure, grid = plt.subplots(2, 3, figsize=(11, 7), sharex="col", layout="constrained")
    for column, (label, names) in zip(grid.T, PANELS.items()):
        for ax, what, unit in zip(column, ("seconds", "megabytes"), ("processor time, s", "memory, MB")):
            for name, colour, mark in zip(names, COLOURS, "osD^"):
                rows = table[table.series == name].set_index("size")
                far, values = rows.kind == "extrapolated", rows[what].where(rows[what] > 0)  # 0 has no logarithm
                ax.loglog(values[~far], color=colour, marker=mark, label=SERIES[name].title)
                ax.loglog(values[far], mark, color=colour, markerfacecolor="white")
                ax.loglog(values.tail(1 + far.sum()), "--", color=colour, zorder=1)
            ax.set_ylabel(unit)
            ax.grid(alpha=0.3)
        column[1].set_xlabel(label)
        column[1].legend(frameon=False, fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.2))
    figure.suptitle("Growth on one core: measured (filled) and extrapolated (open, dashed)", fontsize="medium")
    figure.savefig(path, dpi=90)


def main(argv=None):
    options = options_of(__doc__, argv, csv=None, plot=None,
                         again=dict(help="read the measured rows from this CSV; measure only those of --only"),
                         only=dict(nargs="+", choices=tuple(SERIES), default=[], help="measure these series"),
                         one=dict(nargs=3, help=argparse.SUPPRESS))  # fmt: skip
    if options.one:
        name, size, folder = options.one
        return print(json.dumps(measure(name, json.loads(size), folder, 1 if options.smoke else 3)))
    measured = measure_all(options.only if options.again else options.only or SERIES, options.smoke)
    if options.again:
        kept = pd.read_csv(options.again).query("kind == 'measured' and series not in @options.only")
        measured = pd.concat([kept, measured])
        measured = measured.sort_values("series", key=lambda names: names.map(list(SERIES).index), kind="stable")
    for step in measured[measured.series == "paper"].megabytes:
        print(f"\ntraining step of the paper's size: {step:.0f} MB beyond model and features; "
              f"aim: under {LIMIT}: {verdict(step, LIMIT)}")  # fmt: skip
    laws, beyond = fit(measured)
    if len(laws):
        print("\nfitted to the largest three sizes; foretold: what those before it say of the largest, over what it is")
        print(f"{laws.to_string()}\n\nEXTRAPOLATED, not measured\n{beyond.to_string(index=False)}")
    table = pd.concat([measured, beyond], ignore_index=True)
    if options.csv:
        table.to_csv(options.csv, index=False)
    if options.plot:
        plot(table, options.plot)


if __name__ == "__main__":
    main()
