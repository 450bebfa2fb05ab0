"""How fast recordings are searched for actions, and what keeping the attention maps costs.

With random weights every score is near 0.01 and would pass. The class bias is moved so that a share of them does.
"""

import json
import math
import statistics

import numpy as np
from common import (GRID, SIZES, heading, in_turns, machine, make_model, noise, options_of, ratios, search,
                    settings_of, times_table, torch)  # fmt: skip

from selfdetr.data import windows_of
from selfdetr.inference import InferenceConfig, merge, top_scores


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
    "What is printed of a size; times in seconds, one a repetition."
    model_config, _, window = settings_of(size)
    model, config = make_model(model_config).to(options.device), InferenceConfig()
    features = noise(round(options.hours * 3600 * GRID.fps / GRID.stride), model_config.channels)
    windows = windows_of(features, window, 0.25, GRID)  # as they overlap in detection
    let_pass(model, windows, config, options.passing)
    raw = search(model, features, window, nms="none", most=10**9).assign(video=0)
    times = in_turns(options.repeats, options.device, {
        "detect": lambda: search(model, features, window),
        "merge": lambda: merge(raw, config),
        "without maps": lambda: look(model, windows, config, maps=False),
        "with maps": lambda: look(model, windows, config, maps=True)})  # fmt: skip
    kept = len(windows) * min(config.top, model_config.queries * model_config.classes)
    return {"times": times, "windows": len(windows), "kept": kept, "passed": len(raw)}


def show(size, found, options):
    times = found["times"]
    whole, merging = (statistics.median(times[name]) for name in ("detect", "merge"))
    looks = {name: times[name] for name in ("without maps", "with maps")}
    return "\n".join([
        f"\n{heading(size)}",
        f"{options.hours:g} h of {GRID.fps / GRID.stride:g} steps a second, {found['windows']} windows",
        f"detections before NMS: {found['passed']} of {found['kept']} pass min_score", times_table(times, unit=1.0),
        f"detect: {found['windows'] / whole:.0f} windows/s, {options.hours / whole:.3f} hours of recordings a second",
        f"share of NMS (merge / detect): {100 * merging / whole:.0f} %", ratios(looks, "without maps")])  # fmt: skip


def main(argv=None):
    options = options_of(__doc__, argv, size=None, device=dict(choices=("cpu", "cuda")), threads=1, json=None,
                         hours=dict(type=float, default=1.0, help="length of the recording"),
                         repeats=dict(type=int, default=3, help="timed repetitions, after a first"),
                         passing=dict(type=float, default=0.25, help="share of scores above min_score"))  # fmt: skip
    if options.smoke:
        options.hours = 0.01
    found = {size: measure(size, options) for size in ([options.size] if options.size else SIZES)}
    if options.json:
        return print(json.dumps(found))
    print(machine(options.device, threads=options.threads, repeats=options.repeats))
    for size, one in found.items():
        print(show(size, one, options))


if __name__ == "__main__":
    main()
