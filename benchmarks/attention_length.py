"""Time and memory of one layer of every kind of attention against the length of the window, and where they cross.

python benchmarks/attention_length.py [--csv FILE] [--plot FILE] [--batch N] [--longest N] [--gigabytes N]
                                      [--device cpu|cuda] [--again FILE]
"""

import argparse
import ctypes
import time
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import torch
from torch import nn

from selfdetr.attention import RelativeSelfAttention, SelfAttention
from selfdetr.deformable import DeformableCrossAttention, DeformableSelfAttention
from selfdetr.plots import method_colours
from selfdetr.speed import fuse
from selfdetr.transformer import CrossAttention, MLPEncoder

DIM, HEADS, QUERIES, DROPOUT = 256, 8, 40, 0.1
KINDS = {
    "encoder": {
        "standard": lambda: SelfAttention(DIM, HEADS, DROPOUT),
        "relative": lambda: RelativeSelfAttention(DIM, HEADS, DROPOUT),
        "deformable": lambda: DeformableSelfAttention(DIM, HEADS),
        "mlp": lambda: MLPEncoder(3, DIM),
    },
    "cross": {
        "standard": lambda: CrossAttention(DIM, HEADS, DROPOUT, first=False),
        "deformable": lambda: DeformableCrossAttention(DIM, HEADS),
    },
}
DESIGNS = {"standard": "detr", "relative": "relative", "deformable": "tadtr", "mlp": "rtd"}  # that attend so
COLOURS = {kind: method_colours(DESIGNS.values())[design] for kind, design in DESIGNS.items()}
MODES = {"detect": "detection, without maps", "train": "training, with maps"}
AIM = 1.5  # deformable against standard cross-attention at 128 steps


def inputs_of(place, batch, length, device):
    "What a layer at a place is called with, besides `mask` and `maps`."
    torch.manual_seed(0)
    memory = torch.randn(batch, length, DIM, device=device)
    if place == "encoder":
        return memory, torch.randn(batch, length, DIM, device=device)
    content, anchor, sine = (torch.randn(batch, QUERIES, DIM, device=device) for _ in range(3))
    return content, anchor, sine, memory, torch.randn(1, length, DIM, device=device)


def make_call(place, kind, mode, batch, length, device):
    "A function that computes the layer once: forward, and in training backward from output and map."
    layer, inputs = KINDS[place][kind]().to(device), inputs_of(place, batch, length, device)
    more = {}
    if place == "cross":
        centre = torch.rand(batch, QUERIES, 1, device=device)
        more["segments"] = torch.cat([centre, 0.02 + 0.2 * torch.rand_like(centre)], -1)
    if mode == "detect":
        layer.eval()
        return torch.no_grad()(lambda: layer(*inputs, maps=False, **more))
    if device.type == "cpu":
        fuse(nn.ModuleList([layer]))  # as models are trained there
    for x in inputs:
        x.requires_grad_()

    def step():
        output, attention_map = layer(*inputs, **more)
        (output.sum() + attention_map.square().sum()).backward()

    return step


def clock(device):
    "Seconds: of the processor, so that other programs count less; on a GPU by the clock, when it is done."
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def shortest(call, device):
    "The shortest of at least five times, and of as many as fit into half a second."
    call()
    times, began = [], clock(device)
    while len(times) < 5 or (clock(device) - began < 0.5 and len(times) < 100):
        start = clock(device)
        call()
        times.append(clock(device) - start)
    return min(times)


def status(name):
    "A line of the process's status, in MB."
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1e3


def extra_memory(call, device):
    "MB that a call takes at its peak beside what there was before; None where the system does not tell."
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return (torch.cuda.max_memory_allocated(device) - before) / 1e6
    if not Path("/proc/self/clear_refs").exists():
        return None
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before = status("VmRSS")
    call()
    return status("VmHWM") - before


def gigabytes(place, kind, mode, batch, length):
    "About what standard and relative attention need: a few tensors with an entry for each head, row and column."
    rows = length if place == "encoder" else QUERIES
    dense = kind in ("standard", "relative")
    return 4 * batch * rows * length * (HEADS * dense + 2) * (6 if mode == "train" else 3) / 1e9


def measure(options, device):
    "A row for every layer, mode and length: ms and MB."
    lengths = [2**i for i in range(4, 14) if 2**i <= options.longest]
    rows = []
    for place in KINDS:
        for mode in MODES:
            for kind in KINDS[place]:
                for length in lengths:
                    if gigabytes(place, kind, mode, options.batch, length) <= options.gigabytes:
                        call = make_call(place, kind, mode, options.batch, length, device)
                        memory = extra_memory(call, device)
                        ms = 1e3 * shortest(call, device)
                        rows.append(dict(place=place, mode=mode, kind=kind, length=length, ms=ms, megabytes=memory))
    return pd.DataFrame(rows).astype({"megabytes": float}).round(4)  # NaN where the system does not tell


def curves(table):
    "(place, mode, kind) -> length -> (ms, MB), of the rows that were measured."
    found = {(place, mode, kind): {} for place in KINDS for mode in MODES for kind in KINDS[place]}
    for row in table.itertuples():
        found[row.place, row.mode, row.kind][row.length] = (row.ms, row.megabytes)
    return found


def crossing(ours, theirs):
    "The first length from which on one curve stays below the other, as far as both were measured."
    common = sorted(set(ours) & set(theirs))
    below = [ours[n][0] < theirs[n][0] for n in common]
    return next((n for i, n in enumerate(common) if all(below[i:])), None)


def report(found):
    for place in KINDS:
        for mode, what in MODES.items():
            lengths = sorted({n for kind in KINDS[place] for n in found[place, mode, kind]})
            print(f"\n{place}, {what}: ms (MB) by length")
            print(f"{'':<12}" + "".join(f"{n:>16,}" for n in lengths))
            for kind in KINDS[place]:
                curve = found[place, mode, kind]
                cells = (f"{curve[n][0]:.2f} ({curve[n][1]:.0f})" if n in curve else "-" for n in lengths)
                print(f"{kind:<12}" + "".join(f"{cell:>16}" for cell in cells))
            ours, theirs = found[place, mode, "deformable"], found[place, mode, "standard"]
            ratio, start = ours[128][0] / theirs[128][0], crossing(ours, theirs)
            judged = f" (aim {AIM}: {'met' if ratio <= AIM else 'MISSED'})" if place == "cross" else ""
            longest = max(set(ours) & set(theirs))
            print(f"deformable / standard at 128: {ratio:.2f}{judged}; at {longest:,}: ", end="")
            print(f"{ours[longest][0] / theirs[longest][0]:.3f}; faster from {start:,} on" if start else "never faster")


def draw(found, path):
    figure, axes = plt.subplots(2, 2, figsize=(8, 6), sharex=True, layout="constrained")
    for column, place in zip(axes.T, KINDS):
        for (there, mode, kind), curve in found.items():
            if there == place and curve:
                for ax, which in zip(column, (0, 1)):
                    values = [curve[n][which] or float("nan") for n in curve]  # 0 has no logarithm
                    style, label = "-" if mode == "detect" else "--", kind if mode == "detect" else None
                    ax.loglog(list(curve), values, style, marker="o", markersize=3, color=COLOURS[kind], label=label)
        name = "encoder self-attention" if place == "encoder" else f"cross-attention, {QUERIES} queries"
        column[0].set_title(name)
        column[0].legend(frameon=False, fontsize="small")
        column[1].set_xlabel("length of the window (steps)")
    axes[0, 0].set_ylabel("ms")
    axes[1, 0].set_ylabel("MB at the peak")
    axes[1, 1].plot([], [], "k-", label=MODES["detect"])
    axes[1, 1].plot([], [], "k--", label=MODES["train"])
    axes[1, 1].legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", help="write all rows there")
    parser.add_argument("--plot", help="write the curves there")
    parser.add_argument("--batch", type=int, default=1, help="windows")
    parser.add_argument("--longest", type=int, default=8192, help="steps")
    parser.add_argument("--gigabytes", type=float, default=9.0, help="leave out what needs about more than that")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--again", help="read the rows from this CSV instead of measuring")
    options = parser.parse_args()
    torch.set_num_threads(1)
    table = pd.read_csv(options.again) if options.again else measure(options, torch.device(options.device))
    if options.csv:
        table.to_csv(options.csv, index=False)
    results = curves(table)
    report(results)
    if options.plot:
        draw(results, options.plot)
