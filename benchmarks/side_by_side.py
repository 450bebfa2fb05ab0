"""What several training runs at the same moment cost each other: a step of one run alone, then of K runs together.

python benchmarks/side_by_side.py [--runs K ...] [--size paper|quick] [--device cpu|cuda] [--how fast|plain|eager]
                                  [--steps N] [--json]
"""

import argparse
import json
import multiprocessing
import os
import queue
import statistics
import time

from train_step import HOWS, NOTES, check_device, make_step, waiter

WARM_UP = 5  # steps
LIMIT = {"cpu": 600, "cuda": 1800}  # seconds until all runs must be ready; compiling on a GPU takes long


def train(number, options, start, finished, results):
    "One run: warm up, wait for the others, time the steps, and keep on until the last one has finished."
    import torch

    torch.set_num_threads(1)
    setup = make_step(options.size, options.how, options.device)
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
    while finished.value < start.parties:  # those that are still timed must not get the machine to themselves
        setup.step()
    results.put({"run": number, "steps": times, "seconds": whole, "processor": processor})


def together(count, options):
    "Seconds of every step, of the whole and of the processor in each of this many runs at once."
    context = multiprocessing.get_context("spawn")
    start, finished, results = context.Barrier(count), context.Value("i", 0), context.Queue()
    runs = [context.Process(target=train, args=(i, options, start, finished, results)) for i in range(count)]
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


def show(found, options):
    "The table as text."
    step = {count: statistics.median(t for run in runs for t in run["steps"]) for count, runs in found.items()}
    rate = {count: sum(options.steps / run["seconds"] for run in runs) for count, runs in found.items()}
    lines = [
        f"device {options.device}, {options.size} ({NOTES[options.size]}), {options.how}, one thread a run, "
        f"{os.cpu_count()} processors, steps {options.steps}\n",
        f"{'runs':<5}{'step, median ms':>16}{'processor ms':>14}{'slowdown':>10}{'steps/s':>12}{'throughput':>12}",
    ]
    for count, runs in found.items():
        processor = statistics.mean(run["processor"] for run in runs) / options.steps
        lines.append(
            f"{count:<5}{1e3 * step[count]:>16.1f}{1e3 * processor:>14.1f}{step[count] / step[1]:>10.2f}"
            f"{rate[count]:>12.1f}{rate[count] / rate[1]:>12.2f}"
        )
    lines.append("slowdown and throughput against one run alone")
    if options.device == "cpu":
        lines.append("a step that takes much longer than its processor time had to wait for other programs")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, nargs="+", help="runs at once (default: 2 on cpu; 2, 4 and 8 on cuda)")
    parser.add_argument("--size", default="quick", choices=tuple(NOTES), help="default: quick")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="default: cpu")
    parser.add_argument("--how", default="fast", choices=tuple(HOWS), help="default: fast")
    parser.add_argument("--steps", type=int, default=50, help="timed steps of a run (default: 50)")
    parser.add_argument("--json", action="store_true", help="print the raw times")
    options = parser.parse_args()
    counts = options.runs or {"cpu": [2], "cuda": [2, 4, 8]}[options.device]
    if min(counts) < 1 or options.steps < 1:
        parser.error("--runs and --steps must be at least 1")
    check_device(parser, options.device)
    os.environ["OMP_NUM_THREADS"] = "1"  # of the runs, which start with a copy of this
    found = {count: together(count, options) for count in sorted({1, *counts})}
    print(json.dumps(found) if options.json else show(found, options))


if __name__ == "__main__":
    main()
