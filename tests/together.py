"""What the processes of test_processes.py compute; also imported by it, to compute the same in one process."""

import contextlib
import json
import sys
from pathlib import Path
from unittest.mock import patch

import torch
from safetensors.torch import save_file

from selfdetr import denoising, study, trainer
from selfdetr.data import Batch, load_dataset, training_windows
from selfdetr.designs import make_model, make_objective
from selfdetr.feedback import FeedbackConfig
from selfdetr.processes import check_shared, make_fabric
from selfdetr.scores import DesignLoss
from selfdetr.resume import State
from selfdetr.trainer import TrainConfig, prepare, train, train_step
from selfdetr.variants import DesignConfig

SIZES = dict(
    channels=8, classes=3, dim=16, heads=4, hidden=16, queries=5, norm_groups=2, decoder_layers=2, dropout=0.0
)
CASES: dict[str, tuple[dict, dict]] = {  # name -> changes of the model, of the feedback
    "method": ({}, {}),
    "other choices": ({}, {"kl": "map", "layers": "sum", "encoder": "average", "decoder": "average"}),
    "identity": ({}, {"guidance": "identity"}),
    "diversity": ({}, {"guidance": "diversity"}),
    "relative": ({"encoder_attention": "relative"}, {"decoder": "last", "encoder": "last"}),
    "no encoder": ({"encoder_layers": 0}, {}),
    "one layer": ({"decoder_layers": 1}, {}),
    "dino": ({"denoising": 8}, {}),
    "react": ({"encoder_attention": "deformable", "cross_attention": "deformable",
               "decoder_self_attention": "relational"}, {}),
}


def whole_batch() -> Batch:
    "Five windows of different lengths; the first, third and fifth have nearly all of the instances."
    random = torch.Generator().manual_seed(1)
    lengths, instances = torch.tensor([24, 9, 17, 24, 12]), (4, 0, 3, 1, 4)
    targets = []
    for n in instances:
        segments = torch.rand(n, 2, generator=random) * 0.4 + 0.1
        targets.append({"segments": segments, "labels": torch.randint(3, (n,), generator=random)})
    mask = torch.arange(24) >= lengths[:, None]
    return Batch(torch.randn(5, 24, 8, generator=random), mask, targets)


def without_noise():
    "Denoising queries that are the instances, the same in every process."
    return patch.multiple(
        denoising,
        _noise_segments=lambda segments, positive, noise: segments.clamp(noise.smallest, 1 - noise.smallest),
        _noise_labels=lambda labels, classes, noise: labels,
    )


def one_step(name: str, rank: int = 0, processes: int = 1) -> dict[str, torch.Tensor]:
    "Gradient of every parameter and every logged number of one step on this process's part of the batch."
    changes, choices = CASES[name]
    torch.manual_seed(0)
    model = make_model(DesignConfig(**{**SIZES, **changes}))
    weights = DesignLoss(feedback_encoder=5.0 if model.config.encoder_layers else 0.0, query_overlap=1.0)
    objective = make_objective(model, weights, FeedbackConfig(**choices))
    fabric, wrapped, optimizer = prepare(model.train(), TrainConfig(lr=1e-12), "cpu", fast=False)
    features, mask, targets = whole_batch()
    part = Batch(features[rank::processes], mask[rank::processes], targets[rank::processes])
    with without_noise():
        values = train_step(fabric, wrapped, optimizer, objective, part, clip=1e9)
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return gradients | {f"term {n}": torch.tensor(v) for n, v in values.read().items()}


class Stopped(Exception):
    "The end of a run that is continued later."


def stop_after(epochs: int):
    "Training that ends before its next epoch, as after a kill; in all processes at once."
    train_epoch = trainer.train_epoch

    def stops(*args):
        if args[-1] >= epochs:
            raise Stopped
        return train_epoch(*args)

    return patch.object(trainer, "train_epoch", stops)


def begin_run(data: str, folder: str) -> None:
    "The first two epochs of a run of three."
    with stop_after(2), contextlib.suppress(Stopped):
        whole_run(data, folder)


def whole_run(data: str, folder: str | None, epochs: int = 3, batch: int = 0, denoising: int = 0) -> dict:
    "History and weights of a run."
    torch.manual_seed(0)
    model = make_model(DesignConfig(**{**SIZES, "denoising": denoising, "dropout": 0.1 if folder else 0.0}))
    windows = training_windows(load_dataset(data), 32, 0.25)
    batch = batch or len(windows) // 2 * 2 - 1  # odd: parts of different size
    config, state = TrainConfig(epochs=epochs, batch=batch, lr=1e-2), State(folder, save_seconds=0) if folder else None
    start = torch.cat([p.detach().flatten() for p in model.parameters()])
    history = train(model, windows, make_objective(model), config, device="cpu", state=state, progress=False)
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    lists = {"start": start.tolist(), "weights": weights.tolist()}
    return {"history": history.drop(columns="seconds").to_dict("list"), **lists}


def study_run(data: str, runs: Path) -> dict:
    "Log and metrics of a run of a study, computed by all processes and then found by all."
    dataset = load_dataset(data)
    spec = study.make_spec("tiny", "smoke", dataset, overrides={"model.dropout": 0.0})
    first, again = (study.run(spec, dataset, runs_root=runs, device="cpu", progress=False) for _ in range(2))
    assert first.metrics == again.metrics
    return {"metrics": first.metrics, "history": first.history.drop(columns="seconds").to_dict("list")}


def main(out: Path, data: str) -> None:
    torch.set_num_threads(1)
    prepare(make_model(DesignConfig(**SIZES)), device="cpu")  # starts the processes' conversation
    rank, processes = torch.distributed.get_rank(), torch.distributed.get_world_size()
    for name in CASES:
        save_file(one_step(name, rank, processes), out / f"{name} {rank}.safetensors")
    found = {"run": whole_run(data, None), "dino": whole_run(data, None, epochs=1, denoising=8)}
    found["undisturbed"] = whole_run(data, str(out / "undisturbed"))
    begin_run(data, str(out / "resumed"))
    found["resumed"] = whole_run(data, str(out / "resumed"))
    begin_run(data, str(out / "left"))
    found["taken over"] = whole_run(data, str(out / "of one process"))
    try:
        whole_run(data, None, batch=1)
    except ValueError as error:
        found["refused"] = str(error)
    try:  # as on machines that do not share the folder
        check_shared(make_fabric("cpu"), out / f"only here {rank}" if rank else out)
    except ValueError as error:
        found["apart"] = str(error)
    found["study"] = study_run(data, out / "runs")
    (out / f"{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
