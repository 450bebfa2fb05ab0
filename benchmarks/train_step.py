"""Time and peak memory of one training step at the paper's size and at the quick size, part by part, and how much
longer it takes without the package's acceleration and in a common eager implementation.

python benchmarks/train_step.py [--threads N] [--steps N] [--device cpu|cuda|mps] [--size paper|quick]
                                [--how fast|plain|eager]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

PARTS = ("forward", "matching", "losses", "backward", "update")
NOTES = {
    "paper": "the paper's size",
    "quick": "the quick profile",
}
HOWS = {
    "fast": "as the package trains",
    "plain": "without its acceleration",
    "eager": "a common eager implementation, benchmarks/eager.py",
}
LIMIT_SHARE = 25.0  # per cent of a step for matching and losses together
LIMIT_MS = {"quick": 50.0}  # a step on one core


def settings_of(size):
    "Model configuration, batch and window of a size."
    from selfdetr.model import ModelConfig
    from selfdetr.study import PROFILES
    from selfdetr.trainer import TrainConfig

    if size == "paper":
        return ModelConfig(), TrainConfig()
    quick = PROFILES["quick"]
    return ModelConfig(channels=64, classes=5, **quick["model"]), TrainConfig(**quick["train"])


def make_batch(config, train):
    "Windows of noise with one to six instances each; what the features hold does not change the time."
    import torch

    from selfdetr.data import Batch

    generator = torch.Generator().manual_seed(0)
    targets = []
    for count in torch.randint(1, 7, (train.batch,), generator=generator).tolist():
        width = 0.05 + 0.25 * torch.rand(count, generator=generator)
        centre = width / 2 + (1 - width) * torch.rand(count, generator=generator)
        labels = torch.randint(config.classes, (count,), generator=generator)
        targets.append({"segments": torch.stack((centre, width), -1), "labels": labels})
    features = torch.randn(train.batch, train.window, config.channels, generator=generator)
    return Batch(features, torch.zeros(train.batch, train.window, dtype=torch.bool), targets)


def peak_memory(device):
    "Largest memory so far in MB: of the process on a CPU, allocated on a GPU; None where it cannot be known."
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    if device.type == "mps":
        return None
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) / 1e3
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


class Setup(NamedTuple):
    "A model that is ready to be trained, and one training step of it."

    step: Callable[[], Any]
    model: Any
    batch: Any
    device: Any  # torch.device
    fabric: Any = None  # None: the eager model, which does without


def make_step(size, how, device, precision="32-true"):
    "The setup of a size; `fast` and `plain` are the package's own step, `eager` is the step of `eager.py`."
    import torch

    from selfdetr.feedback import FeedbackConfig
    from selfdetr.losses import SetCriterion
    from selfdetr.model import SelfDETR
    from selfdetr.trainer import make_fabric, prepare, train_step

    torch.manual_seed(0)
    config, train = settings_of(size)
    train = replace(train, precision=precision)
    batch, criterion, feedback = make_batch(config, train), SetCriterion(), FeedbackConfig()
    if how == "eager":
        import eager

        there = make_fabric(device, precision).device
        model, optimizer = eager.make(config, train, there)
        batch = batch._replace(features=batch.features.to(there), mask=batch.mask.to(there))
        return Setup(lambda: eager.train_step(model, optimizer, batch, train.clip), model, batch, there)
    fabric, model, optimizer = prepare(SelfDETR(config), train, device, fast=how == "fast")
    mine = slice(fabric.global_rank, None, fabric.world_size)  # under torchrun a part of the batch, as in the trainer
    batch = batch._replace(features=fabric.to_device(batch.features[mine]), mask=None, targets=batch.targets[mine])
    model.train()

    def step():
        return train_step(fabric, model, optimizer, criterion, feedback, batch, train.clip)

    return Setup(step, model, batch, fabric.device, fabric)


def waiter(device):
    "A function that waits until the device has finished."
    import torch

    return {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(device.type, lambda: None)


def watch(setup, now):
    "Note in a dictionary when the forward and the backward pass of a step begin and end, and what the model returned."
    seen = {}

    def backward(*args, run=setup.fabric.backward, **kwargs):
        seen["losses"] = now()
        run(*args, **kwargs)
        seen["backward"] = now()

    setup.model.register_forward_pre_hook(lambda *_: seen.update(begin=now()))
    setup.model.register_forward_hook(lambda model, args, output: seen.update(forward=now(), output=output))
    setup.fabric.backward = backward
    return seen


def measure_parts(setup, steps, now):
    "Seconds of every part in every step; a wait between the parts keeps a GPU's work in the part it belongs to."
    from selfdetr.matcher import match

    seen = watch(setup, now)

    def step():
        seen.clear()  # the last step's output would take memory
        start = now()
        setup.step()
        end = now()
        # The criterion matches too; matching the same output again tells how much of its time that was.
        match(seen["output"], setup.batch.targets)
        matching = now() - end
        return {
            "forward": seen["forward"] - seen["begin"],
            "matching": matching,
            "losses": max(seen["losses"] - seen["forward"] - matching, 0.0),
            "backward": seen["backward"] - seen["losses"],
            "update": seen["begin"] - start + end - seen["backward"],
            "parts": end - start,
        }

    step()
    times = [step() for _ in range(steps)]
    return {name: [t[name] for t in times] for name in times[0]}


def measure(size, how, threads, steps, device):
    "Seconds of every step and of its parts, and the peak memory before and after. Runs alone in its process."
    import torch

    torch.set_num_threads(threads)
    config, train = settings_of(size)
    setup = make_step(size, how, device)
    wait = waiter(setup.device)

    def now():
        wait()
        return time.perf_counter()

    def step():
        start, cpu = now(), time.process_time()
        setup.step()
        return now() - start, time.process_time() - cpu

    memory_before = peak_memory(setup.device)
    for _ in range(3):  # the first steps pay for memory, for the optimiser's state and, on a GPU, for compiling
        step()
    wall, cpu = zip(*(step() for _ in range(steps)))
    memory = [memory_before, peak_memory(setup.device)]
    parts = measure_parts(setup, steps, now) if setup.fabric else {}
    return {
        "times": {"step": wall, "cpu": cpu} | parts,
        "memory": memory,
        "device": torch.cuda.get_device_name() if setup.device.type == "cuda" else setup.device.type,
        "torch": torch.__version__,
        "model": {name: getattr(config, name) for name in ("channels", "classes", "dim", "queries")}
        | {"layers": f"{config.encoder_layers}+{config.decoder_layers}", "batch": train.batch, "window": train.window},
        "parameters": sum(p.numel() for p in setup.model.parameters()),
    }


def heading(size, found):
    m = found["model"]
    return (
        f"{size} ({NOTES[size]}): batch {m['batch']}, {m['window']} steps, {m['channels']} channels, D {m['dim']}, "
        f"{m['layers']} layers, {m['queries']} queries, {m['classes']} classes, feedback on; "
        f"{found['parameters']:,} parameters"
    )


def row(name, seconds, whole=None):
    "A line of a table: median, smallest and largest time, and the share of a whole."
    values = [1e3 * t for t in seconds]
    line = f"{name:<22}{statistics.median(values):>11.1f}{f'{min(values):.1f} - {max(values):.1f}':>20}"
    return line if whole is None else f"{line}{100 * statistics.median(seconds) / whole:>8.1f}%"


def show_parts(times):
    "The parts as text."
    whole = statistics.median(times["parts"])
    lines = [row(name, times[name], whole) for name in PARTS]
    ratios = [(a + b) / s for a, b, s in zip(times["matching"], times["losses"], times["parts"])]
    share = 100 * statistics.median(ratios)
    spread = f"{100 * min(ratios):.1f} - {100 * max(ratios):.1f} %"
    met = verdict(share, LIMIT_SHARE)
    lines.append(f"matching + losses: {share:.1f} % of a step ({spread}); aim: under {LIMIT_SHARE:.0f} %: {met}")
    return lines


def show(size, how, found, threads):
    "What was measured of one size and one way to train, as text."
    times, cpu = found["times"], found["device"] == "cpu"
    step = 1e3 * statistics.median(times["step"])
    lines = [f"{how}: {HOWS[how]}", f"{'part':<22}{'median ms':>11}{'min - max ms':>20}{'share':>9}"]
    lines.append(row("step", times["step"]))
    if "parts" in times:
        lines += show_parts(times)
    if cpu:
        lines.append(f"processor time of a step, all threads: {1e3 * statistics.median(times['cpu']):.1f} ms")
    if cpu and threads == 1 and how == "fast" and size in LIMIT_MS:
        limit = LIMIT_MS[size]
        lines.append(f"step: {step:.1f} ms; aim: at most {limit:.0f} ms: {verdict(step, limit)}")
    before, peak = found["memory"]
    if peak is None:
        lines.append("peak memory: not known on this device")
    else:
        of = "process" if cpu else "device"
        lines.append(f"peak memory: {peak:.0f} MB ({of}), of it {before:.0f} MB before the first step")
    return "\n".join(lines)


def ratios(found):
    "How much longer the other ways take than the fast one, as text."
    middle = {how: statistics.median(f["times"]["step"]) for how, f in found.items()}
    return "; ".join(f"{how} / fast: {middle[how] / middle['fast']:.2f}" for how in middle if how != "fast")


def verdict(value, limit):
    return "met" if value <= limit else "MISSED"


def check_device(parser, device):
    "Stop with one line where a device is asked for that is not here."
    import torch

    if not {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}.get(device, lambda: True)():
        parser.error(f"--device {device}: there is no such device here")


def measure_apart(size, how, options):
    "What `measure` returns, from a process of its own, so that its peak memory is its own."
    command = [sys.executable, str(Path(__file__).resolve()), "--json", "--size", size, "--how", how]
    command += ["--device", options.device, "--threads", str(options.threads), "--steps", str(options.steps)]
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads)}
    done = subprocess.run(command, stdout=subprocess.PIPE, env=environment, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    return json.loads(done.stdout.splitlines()[-1])


def parse():
    parser = argparse.ArgumentParser(description=" ".join(__doc__.split("\n\n")[0].split()))
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--steps", type=int, default=20, help="timed steps, after 3 that are not timed (default: 20)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda", "mps"), help="default: cpu")
    parser.add_argument("--size", choices=tuple(NOTES), help="one size only (default: both)")
    parser.add_argument("--how", choices=tuple(HOWS), help="one way to train only (default: all)")
    parser.add_argument("--json", action="store_true", help="print the raw times (needs --size and --how)")
    options = parser.parse_args()
    if options.threads < 1 or options.steps < 1:
        parser.error("--threads and --steps must be at least 1")
    if options.json and not (options.size and options.how):
        parser.error("--json needs --size and --how")
    check_device(parser, options.device)
    return options


def main():
    options = parse()
    if options.json:
        print(json.dumps(measure(options.size, options.how, options.threads, options.steps, options.device)))
        return
    first = True
    for size in [options.size] if options.size else NOTES:
        found = {}
        for how in [options.how] if options.how else HOWS:
            found[how] = one = measure_apart(size, how, options)
            if first:
                print(f"device {one['device']}, threads {options.threads}, torch {one['torch']}", end=", ")
                print(f"steps {options.steps}\n")
            if len(found) == 1:
                print(heading(size, one))
            print("\n" + show(size, how, one, options.threads), flush=True)
            first = False
        print("\n" + ratios(found) + "\n" if len(found) > 1 else "")


if __name__ == "__main__":
    main()
