"""How fast recordings are searched for actions, and what keeping the attention maps costs.

With random weights every score is near 0.01 and would pass. The class bias is moved so that a quarter of them does.
"""

import math
import statistics
from dataclasses import replace

import numpy as np
from common import GRID, SIZES, heading, in_turns, machine, make_model, options_of, ratios, times_table, torch

from selfdetr.data.windows import WindowConfig, windows_of
from selfdetr.inference import InferenceConfig, detect, merge, top_scores

CONFIG = InferenceConfig()
PASSING = 0.25  # share of the scores kept of a window that reach `min_score`
ROUNDS = 3
DENSE = 0.75  # overlap of test windows that detects better: three times as many windows


@torch.no_grad()
def look(model, windows, maps, most=None):
    "Run the model over the windows and fetch the best scores, as detection does."
    found, device = [], model.class_head.bias.device
    for indices in np.split(np.arange(len(windows)), range(CONFIG.batch, len(windows), CONFIG.batch))[:most]:
        batch = windows.batch(indices)
        best = top_scores(model(batch.features.to(device), batch.mask.to(device), maps=maps), CONFIG.top)
        found.append([x.cpu() for x in best])
    return found


def let_pass(model, windows):
    "Move the class bias, by the scores of the first batch."
    scores = look(model, windows, maps=False, most=1)[0][0].flatten().sort(descending=True).values
    limit = scores[math.ceil(PASSING * len(scores)) - 1]
    model.class_head.bias.data += math.log(CONFIG.min_score / (1 - CONFIG.min_score)) - limit.logit().item()


def show(name, options):
    "Measure one size and print what was found."
    c, _, steps = SIZES[name]
    model, cut = make_model(c).to(options.device), WindowConfig(steps)
    features = torch.randn(round(options.hours * 3600 * GRID.fps / GRID.stride), c.channels)
    windows = windows_of(features, cut.length, cut.test_overlap, GRID)
    let_pass(model, windows)
    raw = detect(model, features, GRID, config=replace(CONFIG, nms="none", most=10**9), windows=cut).assign(video=0)
    dense = replace(cut, test_overlap=DENSE)
    times = in_turns(ROUNDS, options.device, {
        "detect": lambda: detect(model, features, GRID, config=CONFIG, windows=cut),
        "detect, dense": lambda: detect(model, features, GRID, config=CONFIG, windows=dense),
        "merge": lambda: merge(raw, CONFIG),
        "without maps": lambda: look(model, windows, maps=False),
        "with maps": lambda: look(model, windows, maps=True)})  # fmt: skip
    whole, merging = (statistics.median(times[name]) for name in ("detect", "merge"))
    kept = len(windows) * min(CONFIG.top, c.queries * c.classes)
    print(f"\n{heading(name)}\n{options.hours:g} hours, {len(windows)} windows")
    print(f"detections before NMS: {len(raw)} of {kept} pass min_score\n{times_table(times, unit=1.0)}")
    print(f"detect: {len(windows) / whole:.0f} windows/s, {options.hours / whole:.3f} hours of recordings a second")
    denser = statistics.median(times["detect, dense"])
    print(f"test overlap {DENSE} instead of {cut.test_overlap}: {options.hours / denser:.3f} hours a second, "
          f"{denser / whole:.2f} times the time")
    looks = {name: times[name] for name in ("without maps", "with maps")}
    print(f"share of NMS (merge / detect): {100 * merging / whole:.0f} %\n{ratios(looks, 'without maps')}")


def main(argv=None):
    options = options_of(__doc__, argv, size=None, device="cpu",
                         hours=dict(type=float, default=1.0, help="length of the recording"))  # fmt: skip
    options.hours = 0.01 if options.smoke else options.hours
    print(machine(options.device, rounds=ROUNDS))
    for name in [options.size] if options.size else ("paper", "quick"):
        show(name, options)


if __name__ == "__main__":
    main()
