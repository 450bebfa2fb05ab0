"""What several cores or GPUs do: for several runs at the same moment, and for ONE run that is split.

A run alone; N runs side by side, where one that is done goes on until all are, so that none has the machine to itself
while it is timed; one run with N threads; and one in N processes that torchrun starts, each with its part of the batch.
"""

import json
import os

import numpy as np
import pandas as pd
from common import apart, heading, machine, options_of, step_times, torch, training_of
from torch import multiprocessing

LIMIT = 1800  # seconds until all runs must be ready; compiling on a GPU takes long


def train(number, options, start, finished, results):
    "One of several runs: warm up, wait for the others, time the steps, and keep on until the last one has finished."
    torch.set_num_threads(1)
    setup = training_of(options)
    step_times(setup)
    start.wait(LIMIT)
    results[number] = torch.tensor(step_times(setup, options.steps))
    with finished.get_lock():
        finished.value += 1
    while finished.value < start.parties:
        setup.step()


def side_by_side(options):
    "Seconds of every step by the clock and of the processor, in each of several runs."
    kind, n = "fork" if options.smoke else "spawn", options.processes
    context, results = multiprocessing.get_context(kind), torch.zeros(n, 2, options.steps).share_memory_()
    shared = options, context.Barrier(n), context.Value("i", 0), results
    multiprocessing.start_processes(train, shared, n, start_method=kind)  # one that fails ends all
    return results.tolist()


def split(options, processes, threads):
    "The same of one run, in processes of its own."
    start = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}") * (processes > 1)
    given = [f"--{key}={vars(options)[key]}" for key in ("size", "device", "steps")]
    return [apart(__file__, "--json", f"--threads={threads}", *given, threads=threads, start=start)]


def main(argv=None):
    options = options_of(__doc__, argv, processes=dict(type=int, default=2, help="N, default: %(default)s"),
                         size="quick", device="cpu", threads=1, steps=50, json=None)  # fmt: skip
    if options.json:
        setup = training_of(options)
        step_times(setup)
        times = step_times(setup, options.steps)
        return print(json.dumps(times)) if os.environ.get("RANK", "0") == "0" else None
    os.environ["OMP_NUM_THREADS"] = "1"  # of the runs, which start with a copy of this
    n, found = options.processes, {}
    found[f"{n} runs"] = side_by_side(options)
    if not options.smoke:
        found = {"one run": split(options, 1, 1)} | found
        found |= {f"one run, {n} threads": split(options, 1, n)} if options.device == "cpu" else {}
        found[f"one run, {n} processes"] = split(options, n, 1)
    print(f"{machine(options.device, processors=os.cpu_count(), steps=options.steps)}\n{heading(options.size)}\n")
    table = pd.DataFrame({name: {
        "step, median ms": 1e3 * np.median([clock for clock, _ in runs]),
        "processor ms": 1e3 * np.mean([processor for _, processor in runs]),  # of one process
        "steps/s": sum(1 / np.mean(clock) for clock, _ in runs),
    } for name, runs in found.items()}).T  # fmt: skip
    table["throughput"] = table["steps/s"] / table["steps/s"].iloc[0]
    print(table.to_string(float_format="{:.2f}".format))
    print("a step on a CPU that takes much longer than its processor time had to wait for other programs")


if __name__ == "__main__":
    main()
