"""Time and memory of one layer of every kind of attention against the length of the window, and where they cross.

Time is the processor's (on a GPU the clock's), the shortest of half a second of calls; memory is what a call adds to
the process at its peak. What would need more than about 9 GB is left out.
"""

import ctypes
import math
import time
from copy import deepcopy
from itertools import product

import matplotlib.pyplot as plt
import pandas as pd
from common import forget_peak, options_of, resident, torch, verdict
from torch import nn
from torch.utils.benchmark import Timer

from selfdetr.attention import Anchors, CrossAttention, Memory, SelfAttention
from selfdetr.deformable import DeformableCrossAttention, DeformableSelfAttention
from selfdetr.plots import method_colours
from selfdetr.speed import fuse
from selfdetr.variants import MLPEncoder, RelativeSelfAttention

DIM, HEADS, QUERIES, DROPOUT = 256, 8, 40, 0.1
LAYERS = {
    "encoder": {
        "standard": SelfAttention(DIM, HEADS, DROPOUT),
        "relative": RelativeSelfAttention(DIM, HEADS, DROPOUT),
        "deformable": DeformableSelfAttention(DIM, HEADS),
        "mlp": MLPEncoder(3, DIM),
    },
    "cross": {
        "standard": CrossAttention(DIM, HEADS, DROPOUT, first=False),
        "deformable": DeformableCrossAttention(DIM, HEADS),
    },
}
DESIGNS = {"standard": "detr", "relative": "relative", "deformable": "tadtr", "mlp": "rtd"}  # that attend so
COLOURS = {kind: method_colours(DESIGNS.values())[design] for kind, design in DESIGNS.items()}
MODES = {"detect": "detection, without maps", "train": "training, with maps"}
LIMIT = 9  # gigabytes; what would need about more than that is left out
AIM = 1.5  # deformable against standard cross-attention at 128 steps


def inputs_of(place, batch, length, **more):
    "What a layer at a place is called with, besides `mask` and `maps`."
    torch.manual_seed(0)
    content, position = torch.randn(batch, length, DIM, **more), torch.randn(1, length, DIM, **more)
    if place == "encoder":
        return content, position
    segments = torch.rand(batch, QUERIES, 2, device=more["device"]) * torch.tensor([1, 0.2], device=more["device"])
    x, embedded, sine = (torch.randn(batch, QUERIES, DIM, **more) for _ in range(3))
    return x, Anchors(segments, embedded, sine), Memory(content, position)


def make_call(place, kind, mode, batch, length, device):
    "A function that computes the layer once: forward, and in training backward from output and map."
    layer, training = deepcopy(LAYERS[place][kind]).to(device), mode == "train"
    inputs = inputs_of(place, batch, length, device=device, requires_grad=training)
    if not training:
        layer.eval()
        return torch.no_grad()(lambda: layer(*inputs, maps=False))
    if device.type == "cpu":
        fuse(nn.ModuleList([layer]))  # as models are trained there

    def step():
        output, attention_map = layer(*inputs)
        (output.sum() + attention_map.square().sum()).backward()

    return step


def extra_memory(call, device):
    "MB that a call takes at its peak beyond what there was before; NaN where the system does not tell."
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return (torch.cuda.max_memory_allocated(device) - before) / 1e6
    ctypes.CDLL(None).malloc_trim(0)
    if not forget_peak():
        return math.nan
    before = resident("VmRSS")
    call()
    return resident() - before


def gigabytes(place, kind, mode, batch, length):
    "About what standard and relative attention need: a few tensors with an entry for each head, row and column."
    rows = length if place == "encoder" else QUERIES
    dense = kind in ("standard", "relative")
    return 4 * batch * rows * length * (HEADS * dense + 2) * (6 if mode == "train" else 3) / 1e9


def measure(options):
    "A row for every layer, mode and length: ms and MB."
    device, rows = torch.device(options.device), []
    clock = {"timer": time.process_time} if options.device == "cpu" else {}  # by the clock it waits for a GPU
    seconds = 0.001 if options.smoke else 0.5
    lengths = [2**i for i in range(4, 14) if 2**i <= options.longest]
    for place, mode, kind, length in (row for p in LAYERS for row in product([p], MODES, LAYERS[p], lengths)):
        if gigabytes(place, kind, mode, options.batch, length) <= LIMIT:
            call = make_call(place, kind, mode, options.batch, length, device)
            memory = extra_memory(call, device)
            timer = Timer("call()", globals={"call": call}, **clock)  # of as many calls as fit into the seconds
            rows.append(dict(place=place, mode=mode, kind=kind, length=length, megabytes=memory,
                             ms=1e3 * min(timer.blocked_autorange(min_run_time=seconds).times)))  # fmt: skip
    return pd.DataFrame(rows).round(4)


def report(table):
    "Times and memory by length, and deformable attention against standard attention."
    for (place, mode), rows in table.groupby(["place", "mode"], sort=False):
        cells = rows.ms.map("{:.2f}".format) + rows.megabytes.map(" ({:.0f})".format)
        shown = rows.assign(cells=cells).pivot(index="kind", columns="length", values="cells").reindex(LAYERS[place])
        print(f"\n{place}, {MODES[mode]}: ms (MB) by length\n{shown.fillna('-').to_string()}")
        ms = rows.pivot(index="length", columns="kind", values="ms")
        ratio = (ms.deformable / ms.standard).dropna()
        print("deformable / standard:", ", ".join(f"{value:.3f} at {length:,}" for length, value in ratio.items()))
        if place == "cross" and 128 in ratio:
            print(f"aim at 128: at most {AIM}: {verdict(ratio[128], AIM)}")


def draw(table, path):
    figure, axes = plt.subplots(2, 2, figsize=(8, 6), sharex=True, layout="constrained")
    for column, place in zip(axes.T, LAYERS):
        for (mode, kind), rows in table[table.place == place].groupby(["mode", "kind"], sort=False):
            style, label = ("-", kind) if mode == "detect" else ("--", None)
            for ax, what in zip(column, ("ms", "megabytes")):
                values = rows[what].where(rows[what] > 0)  # 0 has no logarithm
                ax.loglog(rows.length, values, style, marker="o", markersize=3, color=COLOURS[kind], label=label)
        column[0].set_title("encoder self-attention" if place == "encoder" else f"cross-attention, {QUERIES} queries")
        column[0].legend(frameon=False, fontsize="small")
        column[1].set_xlabel("steps (dashed: training, with maps)")
    axes[0, 0].set_ylabel("ms")
    axes[1, 0].set_ylabel("MB at the peak")
    figure.savefig(path, dpi=100)


def main(argv=None):
    options = options_of(__doc__, argv, csv=None, plot=None, device="cpu",
                         batch=dict(type=int, default=1, help="windows"), longest=dict(type=int, default=8192),
                         again=dict(help="read the rows from this CSV instead of measuring"))  # fmt: skip
    if options.smoke:
        options.longest = 32
    table = pd.read_csv(options.again) if options.again else measure(options)
    if options.csv:
        table.to_csv(options.csv, index=False)
    report(table)
    if options.plot:
        draw(table, options.plot)


if __name__ == "__main__":
    main()
