"""Time and peak memory of one training step at the paper's size and at the quick size, part by part, and how much
longer it takes without the package's acceleration and in a common eager implementation.
"""

import json
import statistics
import time

from common import (HOWS, SIZES, apart, heading, machine, match_again, options_of, peak_memory, ratios, times_table,
                    training_of, verdict, waiter, watch)  # fmt: skip

LIMIT_SHARE = 25.0  # per cent of a step for matching and losses together
LIMIT_MS = {"quick": 50.0}  # a step on one core


def measure_parts(setup, steps, now):
    "Seconds of every part in every step; a wait between the parts keeps a GPU's work in the part it belongs to."
    seen = watch(setup, now)

    def step():
        seen.clear()  # the last step's output would take memory
        start = now()
        setup.step()
        end = now()
        # The losses match too; matching the same output again tells how much of their time that was.
        match_again(seen["output"], setup.batch)
        matching = now() - end
        return {
            "forward": seen["forward"] - seen["begin"],
            "matching": matching,
            "losses": max(seen["losses"] - seen["forward"] - matching, 0.0),
            "backward": seen["backward"] - seen["losses"],
            "update": seen["begin"] - start + end - seen["backward"],
            "whole step": end - start,
        }

    step()
    times = [step() for _ in range(steps)]
    return {name: [t[name] for t in times] for name in times[0]}


def measure(size, how, options):
    "Seconds of every step and of its parts, and the peak memory before and after. Runs alone in its process."
    setup = training_of(size, how, options.device)
    wait = waiter(setup.device)

    def now():
        wait()
        return time.perf_counter()

    def step():
        start, processor = now(), time.process_time()
        setup.step()
        return now() - start, time.process_time() - processor

    before = peak_memory(setup.device)
    for _ in range(3):  # the first steps pay for memory, for the optimiser's state and, on a GPU, for compiling
        step()
    wall, processor = zip(*(step() for _ in range(options.steps)))
    memory = [before, peak_memory(setup.device)]
    parts = measure_parts(setup, options.steps, now) if setup.fabric else {}
    return {"step": wall, "processor": processor, "parts": parts, "memory": memory}


def show(size, how, found, options):
    "What was measured of one size and one way to train, as text."
    cpu, step = options.device == "cpu", 1e3 * statistics.median(found["step"])
    lines = [f"\n{how}: {HOWS[how]}", times_table({"step": found["step"]})]
    if parts := found["parts"]:
        shares = [100 * (a + b) / s for a, b, s in zip(parts["matching"], parts["losses"], parts["whole step"])]
        share = statistics.median(shares)
        lines += [times_table(parts, "whole step"),
                  f"matching + losses: {share:.1f} % of a step ({min(shares):.1f} - {max(shares):.1f} %); "
                  f"aim: under {LIMIT_SHARE:.0f} %: {verdict(share, LIMIT_SHARE)}"]  # fmt: skip
    if cpu:
        lines.append(f"processor time of a step, all threads: {1e3 * statistics.median(found['processor']):.1f} ms")
    if cpu and options.threads == 1 and how == "fast" and size in LIMIT_MS:
        lines.append(f"step: {step:.1f} ms; aim: at most {LIMIT_MS[size]:.0f} ms: {verdict(step, LIMIT_MS[size])}")
    before, peak = found["memory"]
    of = "process" if cpu else "device"
    known = f"{peak:.0f} MB ({of}), of it {before:.0f} MB before the first step" if peak else "not known on this device"
    return "\n".join([*lines, f"peak memory: {known}"])


def main(argv=None):
    options = options_of(__doc__, argv, size=None, how=None, device="cpu", threads=1, steps=20, json=None)
    if options.json:
        return print(json.dumps(measure(options.size, options.how, options)))
    print(machine(options.device, threads=options.threads, steps=options.steps))
    for size in [options.size] if options.size else SIZES:
        print(f"\n{heading(size)}, feedback on")
        steps = {}
        for how in [options.how] if options.how else HOWS:
            arguments = [f"--{name}={vars(options)[name]}" for name in ("device", "threads", "steps")]
            found = measure(size, how, options) if options.smoke else apart(
                __file__, "--json", f"--size={size}", f"--how={how}", *arguments, threads=options.threads)  # fmt: skip
            steps[how] = found["step"]
            print(show(size, how, found, options), flush=True)
        if "fast" in steps and len(steps) > 1:
            print(f"\n{ratios(steps, 'fast')}")


if __name__ == "__main__":
    main()
