"""What several training runs at the same moment cost each other: a step of one run alone, then of K runs together.

A run that is done goes on until all are, so that none has the machine to itself while it is timed.
"""

import json
import multiprocessing
import os
import queue
import statistics
import time

import pandas as pd
from common import heading, machine, options_of, torch, training_of, waiter

WARM_UP = 5  # steps
LIMIT = {"cpu": 600, "cuda": 1800}  # seconds until all runs must be ready; compiling on a GPU takes long


def train(options, start, finished, results):
    "One run: warm up, wait for the others, time the steps, and keep on until the last one has finished."
    torch.set_num_threads(1)
    setup = training_of(options.size, options.how, options.device)
    wait = waiter(setup.device)
    for _ in range(WARM_UP):
        setup.step()
    wait()
    start.wait(LIMIT[options.device])
    begin, processor, times = time.perf_counter(), time.process_time(), []
    for _ in range(options.steps):
        before = time.perf_counter()
        setup.step()
        wait()
        times.append(time.perf_counter() - before)
    whole, processor = time.perf_counter() - begin, time.process_time() - processor
    with finished.get_lock():
        finished.value += 1
    while finished.value < start.parties:
        setup.step()
    results.put({"steps": times, "seconds": whole, "processor": processor})


def together(count, options):
    "Seconds of every step, of the whole and of the processor in each of this many runs at once."
    context = multiprocessing.get_context("fork" if options.smoke else "spawn")
    start, finished, results = context.Barrier(count), context.Value("i", 0), context.Queue()
    runs = [context.Process(target=train, args=(options, start, finished, results)) for _ in range(count)]
    for run in runs:
        run.start()
    try:
        return [result_of(runs, results) for _ in runs]
    finally:
        for run in runs:
            run.terminate()
            run.join()


def result_of(runs, results):
    "The next result; a run that died ends the script, whose other runs would wait for it for ever."
    while True:
        try:
            return results.get(timeout=1)
        except queue.Empty:
            if any(run.exitcode for run in runs):
                raise SystemExit("a run ended with an error, see above") from None


def main(argv=None):
    runs = dict(type=int, nargs="+", help="runs at once (default: 2 on cpu; 2, 4 and 8 on cuda)")
    options = options_of(__doc__, argv, runs=runs, size="quick", device=dict(choices=("cpu", "cuda")),
                         how="fast", steps=50, json=None)  # fmt: skip
    os.environ["OMP_NUM_THREADS"] = "1"  # of the runs, which start with a copy of this
    counts = sorted({1, *(options.runs or {"cpu": [2], "cuda": [2, 4, 8]}[options.device])})
    found = {count: together(count, options) for count in counts}
    if options.json:
        return print(json.dumps(found))
    print(machine(options.device, processors=os.cpu_count(), steps=options.steps))
    print(f"{heading(options.size)}; {options.how}, one thread a run\n")
    table = pd.DataFrame({count: {
        "step, median ms": 1e3 * statistics.median(t for run in runs for t in run["steps"]),
        "processor ms": 1e3 * statistics.mean(run["processor"] for run in runs) / options.steps,
        "steps/s": sum(options.steps / run["seconds"] for run in runs),
    } for count, runs in found.items()}).T  # fmt: skip
    table["slowdown"] = table["step, median ms"] / table["step, median ms"][1]
    table["throughput"] = table["steps/s"] / table["steps/s"][1]
    print(table.rename_axis("runs").to_string(float_format="{:.2f}".format))
    print("slowdown and throughput against one run alone")
    if options.device == "cpu":
        print("a step that takes much longer than its processor time had to wait for other programs")


if __name__ == "__main__":
    main()
