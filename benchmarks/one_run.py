"""What several cores or GPUs do for ONE run: the same step in one process, with more threads, and in several processes.

python benchmarks/one_run.py [--processes N] [--size paper|quick] [--device cpu|cuda] [--steps N] [--json]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

from train_step import NOTES, check_device, make_step, waiter

WARM_UP = 5  # steps


def measure(options):
    "Seconds of every step in this process, one of those that torchrun started or the only one; printed by the first."
    import torch

    from selfdetr.trainer import is_first

    torch.set_num_threads(options.threads)
    setup = make_step(options.size, "fast", options.device)
    wait, times = waiter(setup.device), []
    for step in range(WARM_UP + options.steps):
        before = time.perf_counter()
        setup.step()
        wait()
        times += [time.perf_counter() - before] if step >= WARM_UP else []
    if is_first():
        print(json.dumps(times))


def in_children(options, processes, threads):
    "What `measure` prints, from processes of its own."
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    if processes == 1:
        command = [sys.executable]
    command += [__file__, "--measure", f"--threads={threads}", f"--size={options.size}"]
    command += [f"--device={options.device}", f"--steps={options.steps}"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
    if done.returncode:
        raise SystemExit("a measurement ended with an error, see above")
    return json.loads(done.stdout.splitlines()[-1])


def ways(options):
    "Name -> processes, threads of each."
    n = options.processes
    found = {"one process": (1, 1)}
    if options.device == "cpu":
        found[f"one process, {n} threads"] = (1, n)
    return found | {f"{n} processes": (n, 1)}


def show(found, options):
    "The table as text."
    step = {name: statistics.median(times) for name, times in found.items()}
    first = step["one process"]
    lines = [
        f"device {options.device}, {options.size} ({NOTES[options.size]}), {os.cpu_count()} processors, "
        f"steps {options.steps}, the same batch in all rows",
        "",
        f"{'one run in':<30}{'step, median ms':>16}{'of one process':>16}{'faster':>8}",
    ]
    lines += [f"{n:<30}{1e3 * t:>16.1f}{t / first:>16.2f}{first / t:>8.2f}" for n, t in step.items()]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=2, help="processes, and threads in their stead (default: 2)")
    parser.add_argument("--size", default="paper", choices=tuple(NOTES), help="default: paper")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="default: cpu")
    parser.add_argument("--steps", type=int, default=20, help="timed steps (default: 20)")
    parser.add_argument("--json", action="store_true", help="print the raw times")
    parser.add_argument("--threads", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        return measure(options)
    if options.processes < 2 or options.steps < 1:
        parser.error("--processes must be at least 2 and --steps at least 1")
    check_device(parser, options.device)
    found = {name: in_children(options, *way) for name, way in ways(options).items()}
    print(json.dumps(found) if options.json else show(found, options))


if __name__ == "__main__":
    main()
