"""Time and peak memory of one training step, part by part, at the paper's size and at the quick size.

python benchmarks/train_step.py [--threads N] [--steps N] [--device cpu|cuda|mps] [--size paper|quick]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

PARTS = ("forward", "matching", "losses", "backward", "update")
NOTES = {
    "paper": "the paper's size",
    "quick": "the quick profile",
}
LIMIT_SHARE = 25.0  # per cent of a step for matching and losses together
LIMIT_MS = {"quick": 80.0}  # a step on one core


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


def measure(size, threads, steps, device):
    "Seconds of every part in every step, and the peak memory before and after. Runs alone in its process."
    import torch

    torch.set_num_threads(threads)
    from selfdetr.feedback import feedback_loss
    from selfdetr.losses import SetCriterion
    from selfdetr.matcher import match
    from selfdetr.model import SelfDETR
    from selfdetr.trainer import make_fabric, make_optimizer

    torch.manual_seed(0)
    config, train = settings_of(size)
    fabric = make_fabric(device, train.precision)
    model = SelfDETR(config).to(fabric.device)
    model, optimizer = fabric.setup(model, make_optimizer(model, train, fabric.device.type))
    criterion, batch = SetCriterion(), make_batch(config, train)
    batch = batch._replace(features=fabric.to_device(batch.features), mask=fabric.to_device(batch.mask))
    wait = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(fabric.device.type, lambda: None)

    def now():
        wait()
        return time.perf_counter()

    def step():
        start, cpu = now(), time.process_time()
        optimizer.zero_grad(set_to_none=True)
        output = model(batch.features, batch.mask)
        forward = now()
        terms = criterion(output, batch.targets) | feedback_loss(output)
        total = criterion.total(terms)
        torch.stack([*terms.values(), total]).tolist()
        losses = now()
        fabric.backward(total)
        backward = now()
        fabric.clip_gradients(model, optimizer, max_norm=train.clip, error_if_nonfinite=False)
        optimizer.step()
        update, cpu = now(), time.process_time() - cpu
        # The criterion matches too; matching the same output again tells how much of its time that was.
        match(output, batch.targets)
        matching = now() - update
        return {
            "forward": forward - start,
            "matching": matching,
            "losses": max(losses - forward - matching, 0.0),
            "backward": backward - losses,
            "update": update - backward,
            "step": update - start,
            "cpu": cpu,
        }

    model.train()
    memory_before = peak_memory(fabric.device)
    for _ in range(3):  # the first steps pay for memory and for the optimiser's state
        step()
    times = [step() for _ in range(steps)]
    return {
        "times": {name: [t[name] for t in times] for name in times[0]},
        "memory": [memory_before, peak_memory(fabric.device)],
        "device": torch.cuda.get_device_name() if fabric.device.type == "cuda" else fabric.device.type,
        "torch": torch.__version__,
        "model": {name: getattr(config, name) for name in ("channels", "classes", "dim", "queries")}
        | {"layers": f"{config.encoder_layers}+{config.decoder_layers}", "batch": train.batch, "window": train.window},
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def show(size, found, threads):
    "The table of one size as text."
    m, times = found["model"], found["times"]
    step = statistics.median(times["step"])
    lines = [
        f"{size} ({NOTES[size]}): batch {m['batch']}, {m['window']} steps, {m['channels']} channels, D {m['dim']}, "
        f"{m['layers']} layers, {m['queries']} queries, {m['classes']} classes, feedback on; "
        f"{found['parameters']:,} parameters",
        f"{'part':<22}{'median ms':>11}{'min - max ms':>20}{'share':>9}",
    ]
    for name in (*PARTS, "step"):
        values = [1e3 * t for t in times[name]]
        middle, spread = statistics.median(values), f"{min(values):.1f} - {max(values):.1f}"
        lines.append(f"{name:<22}{middle:>11.1f}{spread:>20}{100 * middle / 1e3 / step:>8.1f}%")
    ratios = [(a + b) / s for a, b, s in zip(times["matching"], times["losses"], times["step"])]
    share = 100 * statistics.median(ratios)
    spread = f"{100 * min(ratios):.1f} - {100 * max(ratios):.1f} %"
    met = verdict(share, LIMIT_SHARE)
    lines.append(f"matching + losses: {share:.1f} % of a step ({spread}); aim: under {LIMIT_SHARE:.0f} %: {met}")
    if found["device"] == "cpu":
        cpu = 1e3 * statistics.median(times["cpu"])
        lines.append(f"processor time of a step, all threads: {cpu:.1f} ms")
    if size in LIMIT_MS and found["device"] == "cpu" and threads == 1:
        lines.append(
            f"step: {1e3 * step:.1f} ms; aim: at most {LIMIT_MS[size]:.0f} ms: {verdict(1e3 * step, LIMIT_MS[size])}"
        )
    before, peak = found["memory"]
    if peak is None:
        lines.append("peak memory: not known on this device")
    else:
        of = "process" if found["device"] == "cpu" else "device"
        lines.append(f"peak memory: {peak:.0f} MB ({of}), of it {before:.0f} MB before the first step")
    return "\n".join(lines)


def verdict(value, limit):
    return "met" if value <= limit else "MISSED"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--steps", type=int, default=20, help="timed steps, after 3 that are not timed (default: 20)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda", "mps"), help="default: cpu")
    parser.add_argument("--size", choices=tuple(NOTES), help="one size only (default: both)")
    parser.add_argument("--json", action="store_true", help="print the raw times of one size (needs --size)")
    options = parser.parse_args()
    if options.threads < 1 or options.steps < 1:
        parser.error("--threads and --steps must be at least 1")
    if options.json:
        if not options.size:
            parser.error("--json needs --size")
        print(json.dumps(measure(options.size, options.threads, options.steps, options.device)))
        return
    for size in [options.size] if options.size else NOTES:
        # Every size in a process of its own, so that its peak memory is its own.
        command = [sys.executable, str(Path(__file__).resolve()), "--json", "--size", size, "--device", options.device]
        command += ["--threads", str(options.threads), "--steps", str(options.steps)]
        environment = os.environ | {"OMP_NUM_THREADS": str(options.threads)}
        done = subprocess.run(command, stdout=subprocess.PIPE, env=environment, text=True)
        if done.returncode:
            sys.exit(done.returncode)
        found = json.loads(done.stdout.splitlines()[-1])
        if size == (options.size or next(iter(NOTES))):
            print(
                f"device {found['device']}, threads {options.threads}, torch {found['torch']}, steps {options.steps}\n"
            )
        print(show(size, found, options.threads), end="\n\n")


if __name__ == "__main__":
    main()
