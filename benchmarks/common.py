"""What the benchmarks share: their options, the sizes, models and steps that they measure, and how they measure.

The calls of the package that train and detect stand here once. No script of its own.
"""

import argparse
import json
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

import numpy as np
import pandas as pd
import torch
from torch.utils.benchmark import Timer

from selfdetr.data import Batch, TimeGrid, test_windows
from selfdetr.feedback import FeedbackConfig
from selfdetr.inference import InferenceConfig, detect, detect_dataset
from selfdetr.losses import LossConfig, SetCriterion
from selfdetr.matcher import match
from selfdetr.model import ModelConfig, SelfDETR
from selfdetr.study import PROFILES
from selfdetr.trainer import TrainConfig, make_fabric, prepare, train_step

NOTES = {"paper": "the paper's size", "quick": "the quick profile", "tiny": "for --smoke, says nothing"}
SIZES = ("paper", "quick")
HOWS = {
    "fast": "as the package trains",
    "plain": "without its acceleration",
    "eager": "a common eager implementation, benchmarks/eager.py",
}
GRID = TimeGrid(fps=24, stride=4, snippet=16)  # six steps a second
TINY = dict(dim=16, heads=2, hidden=16, queries=4, encoder_layers=1, decoder_layers=2, norm_groups=4)


# ---- options


def options_of(doc: str, argv: list[str] | None, **more: Any) -> argparse.Namespace:
    "The options of a script: --smoke and those named here, each a default or a dictionary for `add_argument`."
    usual = {
        "size": dict(choices=SIZES, help="one size only"),
        "how": dict(choices=tuple(HOWS), help="one way to train only"),
        "device": dict(default="cpu", choices=("cpu", "cuda", "mps"), help="default: %(default)s"),
        "threads": dict(type=int, default=1, help="CPU threads, default: %(default)s"),
        "steps": dict(type=int, help="timed steps, default: %(default)s"),
        "json": dict(action="store_true", help="print the raw values, for another program"),
    }
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="only see that the script runs, in seconds")
    for name, given in more.items():
        given = given if isinstance(given, dict) else {} if given is None else {"default": given}
        parser.add_argument(f"--{name.replace('_', '-')}", **(usual.get(name, {}) | given))
    options = parser.parse_args(argv)
    counts = [n for n in vars(options).values() if isinstance(n, (int, float)) and not isinstance(n, bool)]
    if any(n <= 0 for n in counts):
        parser.error("numbers must be above 0")
    there = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}
    device = getattr(options, "device", "cpu")
    if not there.get(device, lambda: True)():
        parser.error(f"--device {device}: there is no such device here")
    if "size" in more and options.smoke:
        options.size = "tiny"
    if "steps" in more and options.smoke:
        options.steps = 2
    torch.set_num_threads(getattr(options, "threads", None) or 1)
    return options


def apart(script: str, *arguments: Any, threads: int = 1, start: tuple[str, ...] = ()) -> Any:
    "The JSON in the last line that a script prints, run in a process of its own."
    command = [sys.executable, *start, str(Path(script).resolve()), *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, stdout=subprocess.PIPE, env=environment, text=True)
    if done.returncode:
        raise SystemExit(f"a measurement ended with status {done.returncode}, see above")
    return json.loads(done.stdout.splitlines()[-1])


# ---- what is measured


def settings_of(size: str) -> tuple[ModelConfig, TrainConfig, int]:
    "Model, training and steps of a window."
    if size == "paper":
        return ModelConfig(), TrainConfig(), TrainConfig().window
    if size == "tiny":
        return ModelConfig(channels=8, classes=3, **TINY), TrainConfig(batch=2), 16
    quick = PROFILES["quick"]
    model, train = ModelConfig(channels=64, classes=5, **quick["model"]), TrainConfig(**quick["train"])
    return model, train, quick["train"]["window"]


def make_model(config: ModelConfig) -> Any:
    "A model with random weights."
    torch.manual_seed(0)
    return SelfDETR(config).eval()


def make_batch(config: ModelConfig, windows: int, window: int) -> Batch:
    "Windows of noise with one to six instances each; what the features hold does not change the time."
    generator = torch.Generator().manual_seed(0)
    targets = []
    for count in torch.randint(1, 7, (windows,), generator=generator).tolist():
        width = 0.05 + 0.25 * torch.rand(count, generator=generator)
        centre = width / 2 + (1 - width) * torch.rand(count, generator=generator)
        labels = torch.randint(config.classes, (count,), generator=generator)
        targets.append({"segments": torch.stack((centre, width), -1), "labels": labels})
    features = torch.randn(windows, window, config.channels, generator=generator)
    return Batch(features, torch.zeros(windows, window, dtype=torch.bool), targets)


class Setup(NamedTuple):
    "A model that is ready to be trained, and a training step of it."

    step: Callable[..., Any]  # of the batch, or of another one
    model: Any
    batch: Batch
    device: torch.device
    fabric: Any = None  # None: the eager model, which does without


def training(
    config: ModelConfig, train: TrainConfig, window: int, device: str = "cpu", how: str = "fast", feedback: bool = True
) -> Setup:
    "`fast` and `plain` are the package's own step, `eager` is the step of `eager.py`."
    model, batch = make_model(config), make_batch(config, train.batch, window)
    if how == "eager":
        import eager

        torch.manual_seed(0)
        there = make_fabric(device, train.precision).device
        model, optimizer = eager.make(config, train, there)
        batch = batch._replace(features=batch.features.to(there), mask=batch.mask.to(there))
        return Setup(lambda: eager.train_step(model, optimizer, batch, train.clip), model, batch, there)
    fabric, model, optimizer = prepare(model, train, device, fast=how == "fast")
    mine = slice(fabric.global_rank, None, fabric.world_size)  # under torchrun a part of the batch, as in the trainer
    batch = batch._replace(features=fabric.to_device(batch.features[mine]), mask=None, targets=batch.targets[mine])
    model.train()
    off = {} if feedback else dict(feedback_encoder=0, feedback_decoder=0)
    losses = SetCriterion(LossConfig(**off)), FeedbackConfig() if feedback else None

    def step(batch: Batch = batch) -> Any:
        return train_step(fabric, model, optimizer, *losses, batch, train.clip)

    return Setup(step, model, batch, fabric.device, fabric)


def training_of(size: str, how: str = "fast", device: str = "cpu", precision: str = "32-true") -> Setup:
    config, train, window = settings_of(size)
    return training(config, replace(train, precision=precision), window, device, how)


def watch(setup: Setup, now: Callable[[], Any]) -> dict[str, Any]:
    "Note when the forward and the backward pass of a step begin and end, and what the model returned."
    seen: dict[str, Any] = {}

    def backward(*args: Any, run: Callable[..., Any] = setup.fabric.backward, **kwargs: Any) -> None:
        seen["losses"] = now()
        run(*args, **kwargs)
        seen["backward"] = now()

    setup.model.register_forward_pre_hook(lambda *_: seen.update(begin=now()))
    setup.model.register_forward_hook(lambda model, args, output: seen.update(forward=now(), output=output))
    setup.fabric.backward = backward
    return seen


def search(model: Any, features: Any, window: int, **config: Any) -> pd.DataFrame:
    "Detections in one recording at GRID."
    return detect(model, features, GRID, config=InferenceConfig(window=window, **config))


def search_dataset(model: Any, dataset: Any, window: int, **config: Any) -> pd.DataFrame:
    "Detections in the test half of a data set."
    return detect_dataset(model, test_windows(dataset, length=window), InferenceConfig(window=window, **config))


def match_again(output: Any, batch: Batch) -> None:
    match(output, batch.targets)


# ---- how it is measured


def waiter(device: Any) -> Callable[[], Any]:
    "A function that waits until the device has finished."
    kind = torch.device(device).type
    return {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(kind, lambda: None)


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


def shortest(call: Callable[[], Any], seconds: float = 0.5, timer: Callable[[], float] | None = None) -> float:
    "The shortest time of a call, of as many as fit into the seconds; by the clock (that waits for a GPU) if not said."
    clock = {} if timer is None else {"timer": timer}
    found = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads(), **clock)  # type: ignore
    return min(found.blocked_autorange(min_run_time=seconds).times)


def resident(name: str = "VmHWM") -> float | None:
    "The largest memory of this process so far, or with VmRSS the memory now, in MB; None where it cannot be known."
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(name)) / 1e3
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


def peak_memory(device: Any) -> float | None:
    "The largest memory so far in MB: of the process on a CPU, allocated on a GPU."
    kind = torch.device(device).type
    return {"cuda": lambda: torch.cuda.max_memory_allocated(device) / 1e6, "mps": lambda: None}.get(kind, resident)()


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


# ---- what is printed


def verdict(value: float, aim: float) -> str:
    return "met" if value <= aim else "MISSED"


def machine(device: str, **more: Any) -> str:
    name = torch.cuda.get_device_name() if device == "cuda" else device
    return ", ".join([f"device {name}, torch {torch.__version__}", *(f"{key} {value}" for key, value in more.items())])


def heading(size: str) -> str:
    c, train, window = settings_of(size)
    return (f"{size} ({NOTES[size]}): batch {train.batch}, {window} steps, {c.channels} channels, D {c.dim}, "
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


def noise(steps: int, channels: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((steps, channels), dtype=np.float32)
