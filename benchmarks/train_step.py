"""Time and peak memory of one training step at the paper's size and at the quick size, part by part, and how much
longer it takes without the package's acceleration and in a common eager implementation.
"""

import json
import statistics
import time

import numpy as np
from common import (apart, heading, machine, options_of, ratios, resident, step_times, times_table, torch, training_of,
                    verdict, waiter)  # fmt: skip

from selfdetr.matcher import match

PARTS = ("forward", "matching", "losses", "backward", "update", "whole step")
AIM_SHARE = 25  # per cent of a step for matching and losses together
AIM_MS = 50  # a step of the quick size on one core
HOWS = {"fast": "as the package trains", "half": "the same in bf16-mixed",
        "plain": "without its acceleration", "eager": "as is common, eager.py"}  # fmt: skip


def measure_parts(setup, steps):
    "Seconds of every part in every step; a wait between the parts keeps a GPU's work in the part it belongs to."
    seen, times, wait, run = {}, [], waiter(setup.device), setup.fabric.backward

    def note(name, **more):
        wait()
        seen.update({name: time.perf_counter()}, **more)

    def backward(*args):
        note("losses")
        run(*args)
        note("backward")

    setup.fabric.backward = backward
    setup.model.register_forward_pre_hook(lambda *_: note("begin"))
    setup.model.register_forward_hook(lambda model, args, output: note("forward", output=output))
    for _ in range(1 + steps):
        seen.clear()  # the last step's output would take memory
        note("start")
        setup.step()
        note("end")
        # The losses match too; matching the same output again tells how much of their time that was.
        match(seen.pop("output"), setup.batch.targets)
        note("again")
        names = ("start", "begin", "forward", "losses", "backward", "end", "again")
        before, forward, losses, back, after, matching = np.diff([seen[name] for name in names])
        losses, whole = max(losses - matching, 0.0), seen["end"] - seen["start"]
        times.append((forward, matching, losses, back, before + after, whole))
    return dict(zip(PARTS, map(list, zip(*times[1:]))))


def measure(options):
    "Seconds of every step and of its parts, and the peak memory before and after. Runs alone in its process."
    peak = resident if options.device == "cpu" else lambda: torch.cuda.max_memory_allocated() / 1e6
    setup = training_of(options, options.how)
    before = peak()
    step_times(setup)
    clock, processor = step_times(setup, options.steps)
    memory = [before, peak()]
    parts = measure_parts(setup, options.steps) if setup.fabric else {}
    return {"step": clock, "processor": processor, "parts": parts, "memory": memory}


def show(found, size, how, options):
    "What was measured of one size and one way to train."
    cpu, step = options.device == "cpu", 1e3 * statistics.median(found["step"])
    print(f"\n{how}: {HOWS[how]}\n{times_table({'step': found['step']})}")
    if parts := found["parts"]:
        shares = [100 * (a + b) / s for a, b, s in zip(parts["matching"], parts["losses"], parts["whole step"])]
        share = statistics.median(shares)
        print(times_table(parts, "whole step"))
        print(f"matching + losses: {share:.1f} % of a step; aim: under {AIM_SHARE} %: {verdict(share, AIM_SHARE)}")
    if cpu:
        print(f"processor time of a step, all threads: {1e3 * statistics.median(found['processor']):.1f} ms")
    if cpu and (size, how, options.threads) == ("quick", "fast", 1):
        print(f"step: {step:.1f} ms; aim: at most {AIM_MS} ms: {verdict(step, AIM_MS)}")
    before, peak = found["memory"]
    of = "process" if cpu else "device"
    print(f"peak memory: {peak:.0f} MB ({of}), of it {before:.0f} MB before the first step", flush=True)


def main(argv=None):
    options = options_of(__doc__, argv, size=None, device="cpu", threads=1, steps=20, json=None,
                         how=dict(choices=tuple(HOWS), help="one way to train only"))  # fmt: skip
    if options.json:
        return print(json.dumps(measure(options)))
    print(machine(options.device, threads=options.threads, steps=options.steps))
    sizes, hows = [options.size] if options.size else ("paper", "quick"), [options.how] if options.how else HOWS
    for size in sizes:
        print(f"\n{heading(size)}, feedback on")
        found = {}
        for how in hows:
            options.size, options.how = size, how
            given = [f"--{name}={vars(options)[name]}" for name in ("size", "how", "device", "threads", "steps")]
            one = measure(options) if options.smoke else apart(__file__, "--json", *given, threads=options.threads)
            found[how] = one["step"]
            show(one, size, how, options)
        if "fast" in found:
            print(f"\n{ratios(found, 'fast')}")


if __name__ == "__main__":
    main()
