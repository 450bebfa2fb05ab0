"""What the benchmarks share: their options, the sizes, models and steps that they measure, and how they measure.

The calls of the package that train and detect stand here once. No script of its own.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import eager
import pandas as pd
import torch

from selfdetr.data.timegrid import TimeGrid
from selfdetr.data.windows import Batch, WindowConfig
from selfdetr.designs import make_objective
from selfdetr.feedback import FeedbackConfig
from selfdetr.losses import LossConfig
from selfdetr.model import ModelConfig, SelfDETR
from selfdetr.processes import make_fabric
from selfdetr.study.spec import PROFILES
from selfdetr.trainer import TrainConfig, prepare, train_step

GRID = TimeGrid(fps=24, stride=4, snippet=16)  # six steps a second
WARM_UP = 3  # steps, which pay for memory, for the optimiser's state and, on a GPU, for compiling


def options_of(doc: str, argv: list[str] | None, **more: Any) -> argparse.Namespace:
    "The options of a script: --smoke and those named here, each a default or a dictionary for `add_argument`."
    usual = {
        "size": dict(choices=("paper", "quick"), help="one size only"),
        "device": dict(choices=("cpu", "cuda"), help="default: %(default)s"),
        "threads": dict(type=int, help="CPU threads, default: %(default)s"),
        "steps": dict(type=int, help="timed steps, default: %(default)s"),
        "json": dict(action="store_true", help=argparse.SUPPRESS),  # for `apart`
        "csv": dict(help="write all rows there"),
        "plot": dict(help="write the picture there"),
    }
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="only see that the script runs, in seconds")
    for name, given in more.items():
        given = given if isinstance(given, dict) else {} if given is None else {"default": given}
        parser.add_argument(f"--{name}", **(usual.get(name, {}) | given))
    options = parser.parse_args(argv)
    if any(type(n) in (int, float) and n <= 0 for n in vars(options).values()):
        parser.error("numbers must be above 0")
    if options.smoke:
        tiny = dict(size="tiny", steps=2) | ({} if torch.cuda.is_available() else dict(device="cpu"))
        vars(options).update({name: value for name, value in tiny.items() if name in more})
    if getattr(options, "device", "cpu") == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no such device here")
    torch.set_num_threads(getattr(options, "threads", 1))
    return options


def apart(script: str, *arguments: Any, threads: int = 1, start: tuple[str, ...] = ()) -> Any:
    "The JSON in the last line that a script prints, run in a process of its own."
    command = [sys.executable, *start, str(Path(script).resolve()), *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, stdout=subprocess.PIPE, env=environment, text=True)
    if done.returncode:
        raise SystemExit(f"a measurement ended with status {done.returncode}, see above")
    return json.loads(done.stdout.splitlines()[-1])


class Size(NamedTuple):
    "How large everything is."

    model: ModelConfig
    train: TrainConfig
    steps: int = WindowConfig.length  # of a window


QUICK = PROFILES["quick"]
TINY = dict(dim=16, heads=2, hidden=16, queries=4, encoder_layers=1, decoder_layers=2, norm_groups=4)
QUICK_MODEL = ModelConfig(channels=64, classes=5, **QUICK["model"])
SIZES = {
    "paper": Size(ModelConfig(), TrainConfig()),
    "quick": Size(QUICK_MODEL, TrainConfig(**QUICK["train"]), QUICK["windows"]["length"]),
    "tiny": Size(ModelConfig(channels=8, classes=3, **TINY), TrainConfig(batch=2), 16),
}


def make_model(config: ModelConfig) -> Any:
    "A model with random weights."
    torch.manual_seed(0)
    return SelfDETR(config).eval()


def make_batch(config: ModelConfig, count: int, steps: int) -> Batch:
    "Windows of noise with one to six instances each; what the features hold does not change the time."
    generator = torch.Generator().manual_seed(0)
    targets = []
    for instances in torch.randint(1, 7, (count,), generator=generator).tolist():
        width = 0.05 + 0.25 * torch.rand(instances, generator=generator)
        centre = width / 2 + (1 - width) * torch.rand(instances, generator=generator)
        labels = torch.randint(config.classes, (instances,), generator=generator)
        targets.append({"segments": torch.stack((centre, width), -1), "labels": labels})
    features = torch.randn(count, steps, config.channels, generator=generator)
    return Batch(features, torch.zeros(count, steps, dtype=torch.bool), targets)


class Setup(NamedTuple):
    "A model that is ready to be trained, and a training step of it."

    step: Callable[..., Any]  # of the batch, or of another one
    model: Any
    batch: Batch
    device: torch.device
    fabric: Any = None  # None: the eager model, which does without


def training(size: Size, device: str = "cpu", how: str = "fast", feedback: bool = True) -> Setup:
    "`fast`, `half` and `plain` are the package's own step, `eager` is the step of `eager.py`."
    config, train, steps = size
    train = replace(train, precision="bf16-mixed") if how == "half" else train
    model, batch = make_model(config), make_batch(config, train.batch, steps)
    if how == "eager":
        there = make_fabric(device, train.precision).device
        model, optimizer = eager.make(config, train, there)
        batch = batch._replace(features=batch.features.to(there), mask=batch.mask.to(there))
        return Setup(lambda: eager.train_step(model, optimizer, batch, train.clip), model, batch, there)
    loss = LossConfig() if feedback else LossConfig(feedback_encoder=0, feedback_decoder=0)
    objective = make_objective(model, loss, FeedbackConfig() if feedback else None)
    fabric, model, optimizer = prepare(model, train, device, fast=how != "plain")
    own = slice(fabric.global_rank, None, fabric.world_size)  # under torchrun a part of the batch, as in the trainer
    batch = Batch(fabric.to_device(batch.features[own]), None, batch.targets[own])
    model.train()

    def step(batch: Batch = batch) -> Any:
        return train_step(fabric, model, optimizer, objective, batch, train.clip)

    return Setup(step, model, batch, fabric.device, fabric)


def training_of(options: Any, how: str = "fast") -> Setup:
    "As the options of a script say."
    size = SIZES[options.size]
    train = replace(size.train, precision=getattr(options, "precision", size.train.precision))
    return training(size._replace(train=train), options.device, how)


def waiter(device: Any) -> Callable[[], Any]:
    "A function that waits until the device has finished."
    return torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None


def step_times(setup: Setup, steps: int = WARM_UP) -> list[list[float]]:
    "Seconds of every step by the clock, and of the processor."
    wait, times = waiter(setup.device), []
    for _ in range(steps):
        clock, processor = time.perf_counter(), time.process_time()
        setup.step()
        wait()
        times.append((time.perf_counter() - clock, time.process_time() - processor))
    return [list(each) for each in zip(*times)]


def in_turns(rounds: int, device: Any, work: dict[str, Callable[[], Any]]) -> dict[str, list[float]]:
    "Seconds of every piece of work in every round; the pieces take turns, so that all meet the same machine."
    wait, times = waiter(device), {name: [] for name in work}
    for i in range(rounds + 1):  # the first round warms up
        for name, do in work.items():
            wait()
            start = time.perf_counter()
            do()
            wait()
            times[name] += [time.perf_counter() - start] if i else []
    return times


def resident(name: str = "VmHWM") -> float:
    "The largest memory of this process so far, or with VmRSS the memory now, in MB; NaN where Linux does not tell."
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) / 1e3 for line in lines if line.startswith(name)), math.nan)


def forget_peak() -> bool:
    "Let the peak of the resident memory start from what is resident now, where Linux can."
    if not os.access("/proc/self/clear_refs", os.W_OK):
        return False
    Path("/proc/self/clear_refs").write_text("5")
    return True


def traced_peak(call: Callable[[], Any]) -> float:
    "The most memory in MB that Python and NumPy held during a call; pages of mapped files are not among it."
    tracemalloc.start()
    call()
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return most / 1e6


def verdict(value: float, aim: float) -> str:
    return "met" if value <= aim else "MISSED"


def machine(device: str, **more: Any) -> str:
    name = torch.cuda.get_device_name() if device == "cuda" else device
    return ", ".join([f"device {name}, torch {torch.__version__}", *(f"{key} {value}" for key, value in more.items())])


def heading(name: str) -> str:
    c, t, steps = SIZES[name]
    return (f"{name}: batch {t.batch}, {steps} steps, {c.channels} channels, D {c.dim}, "
            f"{c.encoder_layers}+{c.decoder_layers} layers, {c.queries} queries, {c.classes} classes")  # fmt: skip


def times_table(times: dict[str, Any], whole: str | None = None, unit: float = 1e3) -> str:
    "A row for each kind of times: median, smallest and largest, and the share of a whole."
    rows = {}
    for name, values in times.items():
        middle = statistics.median(values)
        rows[name] = {"median": unit * middle, "min": unit * min(values), "max": unit * max(values)}
        if whole is not None:
            rows[name]["share, %"] = 100 * middle / statistics.median(times[whole])
    table = pd.DataFrame(rows).T.rename_axis(columns="ms" if unit == 1e3 else "s")
    return table.to_string(float_format="{:.2f}".format)


def ratios(times: dict[str, Any], to: str) -> str:
    "How many times longer the others take than one of them."
    middle = {name: statistics.median(values) for name, values in times.items()}
    return "; ".join(f"{name} / {to}: {middle[name] / middle[to]:.2f}" for name in middle if name != to)
