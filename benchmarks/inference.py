"""How fast recordings are searched for actions, and what keeping the attention maps costs.

python benchmarks/inference.py [--size paper|quick] [--hours H] [--device cpu|cuda] [--threads N] [--repeats N]
                               [--passing SHARE] [--json]
"""

import argparse
import json
import math
import statistics
import time

import numpy as np
import torch
from train_step import NOTES, check_device, settings_of, waiter

from selfdetr.data import TimeGrid, windows_of
from selfdetr.inference import InferenceConfig, detect, detect_windows, merge, top_scores
from selfdetr.model import SelfDETR

GRID = TimeGrid(fps=24, stride=4, snippet=16)  # six steps a second


def make_case(size, hours):
    "A model of a size with random weights, the features of one recording, and how it is searched."
    torch.manual_seed(0)
    model_config, train = settings_of(size)
    steps = round(hours * 3600 * GRID.fps / GRID.stride)
    features = np.random.default_rng(0).standard_normal((steps, model_config.channels), dtype=np.float32)
    return SelfDETR(model_config).eval(), features, InferenceConfig(window=train.window)


@torch.no_grad()
def let_pass(model, windows, config, share):
    "Move the class bias so that this share of the scores kept of a window reaches `min_score`."
    batch = windows.batch(np.arange(min(len(windows), config.batch)))
    device = model.class_head.bias.device
    scores = top_scores(model(batch.features.to(device), batch.mask.to(device), maps=False), config.top)[0]
    limit = scores.flatten().sort(descending=True).values[math.ceil(share * scores.numel()) - 1]
    model.class_head.bias += math.log(config.min_score / (1 - config.min_score)) - limit.logit()


@torch.no_grad()
def look(model, windows, config, maps):
    "Run the model over all windows and fetch the best scores, as `detect_windows` does."
    device = model.class_head.bias.device
    for first in range(0, len(windows), config.batch):
        batch = windows.batch(np.arange(first, min(first + config.batch, len(windows))))
        output = model(batch.features.to(device), batch.mask.to(device), maps=maps)
        for found in top_scores(output, config.top):
            found.cpu()


def measure(size, options):
    "What is printed of a size, as a dictionary; times in seconds, one a repetition."
    torch.set_num_threads(options.threads)
    model, features, config = make_case(size, options.hours)
    model.to(options.device)
    windows = windows_of(features, config.window, config.overlap, GRID)
    let_pass(model, windows, config, options.passing)
    raw = detect_windows(model, windows, config)
    wait = waiter(torch.device(options.device))
    work = {
        "detect": lambda: detect(model, features, GRID, config=config),
        "merge": lambda: merge(raw, config),
        "without maps": lambda: look(model, windows, config, maps=False),
        "with maps": lambda: look(model, windows, config, maps=True),
    }
    times = {name: [] for name in work}
    for i in range(options.repeats + 1):
        for name, do in work.items():
            wait()
            start = time.perf_counter()
            do()
            wait()
            times[name] += [time.perf_counter() - start] if i else []  # the first repetition warms up
    return {
        "times": times,
        "windows": len(windows),
        "kept": len(windows) * min(config.top, model.config.queries * model.config.classes),
        "passed": len(raw),
        "window": config.window,
        "overlap": config.overlap,
        "batch": config.batch,
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
    }


def show(size, found, hours):
    "The result of one size as text."
    seconds = {name: statistics.median(values) for name, values in found["times"].items()}
    lines = [
        f"{size} ({NOTES[size]}): {hours:g} h of {GRID.fps / GRID.stride:g} steps a second, {found['windows']} windows "
        f"of {found['window']} steps, {found['batch']} at a time, overlap {found['overlap']}",
        f"detections before NMS: {found['passed']} of {found['kept']} pass min_score",
        f"{'part':<22}{'median s':>11}{'min - max s':>20}",
    ]
    for name, values in found["times"].items():
        lines.append(f"{name:<22}{seconds[name]:>11.3f}{f'{min(values):.3f} - {max(values):.3f}':>20}")
    whole = seconds["detect"]
    lines.append(f"detect: {found['windows'] / whole:.0f} windows/s, {hours / whole:.3f} hours of recordings a second")
    lines.append(f"share of NMS (merge / detect): {100 * seconds['merge'] / whole:.0f} %")
    lines.append(f"with maps / without maps: {seconds['with maps'] / seconds['without maps']:.2f}")
    return "\n".join(lines)


def parse():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=tuple(NOTES), help="one size only (default: both)")
    parser.add_argument("--hours", type=float, default=1.0, help="length of the recording (default: 1)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="default: cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--repeats", type=int, default=3, help="timed repetitions, after a first (default: 3)")
    parser.add_argument("--passing", type=float, default=0.25, help="share of scores above min_score (default: 0.25)")
    parser.add_argument("--json", action="store_true", help="print the raw times")
    options = parser.parse_args()
    if options.threads < 1 or options.repeats < 1:
        parser.error("--threads and --repeats must be at least 1")
    if not 0 < options.hours < math.inf or not 0 < options.passing <= 1:
        parser.error("--hours must be positive and --passing in (0, 1]")
    check_device(parser, options.device)
    return options


def main():
    options = parse()
    found = {size: measure(size, options) for size in ([options.size] if options.size else NOTES)}
    if options.json:
        print(json.dumps(found))
        return
    device = next(iter(found.values()))["device"]
    print(f"device {device}, threads {options.threads}, torch {torch.__version__}, repeats {options.repeats}\n")
    print("\n\n".join(show(size, one, options.hours) for size, one in found.items()))


if __name__ == "__main__":
    main()
