"""What several training runs at the same moment cost each other: a step of one run alone, then of K runs together.

A run that is done goes on until all are, so that none has the machine to itself while it is timed.
"""

import os

import numpy as np
import pandas as pd
from common import heading, machine, options_of, step_times, torch, training_of
from torch import multiprocessing

RUNS = {"cpu": (1, 2), "cuda": (1, 2, 4, 8)}  # at once
LIMIT = 1800  # seconds until all runs must be ready; compiling on a GPU takes long


def train(number, options, start, finished, results):
    "One run: warm up, wait for the others, time the steps, and keep on until the last one has finished."
    torch.set_num_threads(1)
    setup = training_of(options)
    step_times(setup)
    start.wait(LIMIT)
    results[number] = torch.tensor(step_times(setup, options.steps))
    with finished.get_lock():
        finished.value += 1
    while finished.value < start.parties:
        setup.step()


def together(count, options):
    "What is printed of this many runs at once."
    kind = "fork" if options.smoke else "spawn"
    context, results = multiprocessing.get_context(kind), torch.zeros(count, 2, options.steps).share_memory_()
    shared = options, context.Barrier(count), context.Value("i", 0), results
    multiprocessing.start_processes(train, shared, count, start_method=kind)  # one that fails ends all
    clock, processor = 1e3 * results.numpy().swapaxes(0, 1)
    rate = (1e3 / clock.mean(1)).sum()
    return {"step, median ms": np.median(clock), "processor ms": processor.mean(), "steps/s": rate}


def main(argv=None):
    options = options_of(__doc__, argv, size="quick", device="cpu", steps=50)
    os.environ["OMP_NUM_THREADS"] = "1"  # of the runs, which start with a copy of this
    table = pd.DataFrame({count: together(count, options) for count in RUNS[options.device]}).T
    print(machine(options.device, processors=os.cpu_count(), steps=options.steps))
    print(f"{heading(options.size)}; one thread a run\n")
    table["slowdown"] = table["step, median ms"] / table["step, median ms"][1]
    table["throughput"] = table["steps/s"] / table["steps/s"][1]
    print(table.rename_axis("runs").to_string(float_format="{:.2f}".format))
    print("slowdown and throughput against one run alone")
    print("a step on a CPU that takes much longer than its processor time had to wait for other programs")


if __name__ == "__main__":
    main()
