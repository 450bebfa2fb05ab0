"""What several cores or GPUs do for ONE run: the same step, on the same batch, in one process, with more threads, and
in several processes that torchrun starts, each with its part of the batch.
"""

import json
import os
import statistics

import pandas as pd
from common import apart, heading, machine, options_of, step_times, training_of


def measure(options):
    "Seconds of every step in this process, one of those that torchrun started or the only one."
    setup = training_of(options)
    step_times(setup)
    return step_times(setup, options.steps)[0]


def main(argv=None):
    options = options_of(__doc__, argv, processes=dict(type=int, default=2, help="and threads in their stead"),
                         size="paper", device="cpu", threads=1, steps=20, json=None)  # fmt: skip
    if options.json:
        times = measure(options)
        return print(json.dumps(times)) if os.environ.get("RANK", "0") == "0" else None
    n, found = options.processes, {}
    ways = {"one process": (1, 1)}  # name -> processes, threads of each
    if not options.smoke:
        ways |= {f"one process, {n} threads": (1, n)} if options.device == "cpu" else {}
        ways |= {f"{n} processes": (n, 1)}
    for name, (processes, threads) in ways.items():
        start = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}") * (processes > 1)
        arguments = [f"--{key}={vars(options)[key]}" for key in ("size", "device", "steps")]
        found[name] = measure(options) if options.smoke else apart(
            __file__, "--json", f"--threads={threads}", *arguments, threads=threads, start=start)  # fmt: skip
    print(f"{machine(options.device, processors=os.cpu_count(), steps=options.steps)}\n{heading(options.size)}\n")
    table = pd.DataFrame({"step, median ms": {name: 1e3 * statistics.median(times) for name, times in found.items()}})
    table["faster"] = table["step, median ms"].iloc[0] / table["step, median ms"]
    print(table.rename_axis("one run in").to_string(float_format="{:.2f}".format))


if __name__ == "__main__":
    main()
