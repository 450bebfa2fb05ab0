"""The same numbers as before: first weights, five steps of training, and detections of every design.

`numbers.json` was written by the code before its modules were rearranged (`write` below). A change that is meant to
change numbers writes it again; any other must leave this test passing.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from selfdetr.designs import PRESETS, make_model, make_objective
from selfdetr.scores import DesignLoss
from selfdetr.variants import DesignConfig

RECORDED = Path(__file__).with_name("numbers.json")
QUICK = dict(channels=64, classes=5, dim=64, heads=4, hidden=256, queries=20, norm_groups=8)  # of the quick profile
SMALL = dict(channels=8, classes=3, dim=32, heads=4, hidden=64, queries=6, norm_groups=4, decoder_layers=3)
CASES = {"quick": (QUICK, {})} | {name: (SMALL, overrides) for name, overrides in PRESETS.items()}
CASES["dino"] = (SMALL, PRESETS["dino"] | {"model.denoising": 8})
FEEDBACK = {"loss.feedback_encoder": 5.0, "loss.feedback_decoder": 5.0}
CASES["react, feedback"] = (SMALL, PRESETS["react"] | FEEDBACK)
CASES["quality"] = (SMALL, PRESETS["tadtr"] | {"loss.quality": True})
CASES["relative"] = (SMALL, {"model.encoder_attention": "relative"})


def draw_batch(channels, classes, steps=64):
    "Four windows, the second padded, with up to three instances; features from the instances and noise."
    padding, features, targets = torch.zeros(4, steps, dtype=torch.bool), torch.randn(4, steps, channels), []
    padding[1, steps // 2 :] = True
    for i, n in enumerate((2, 1, 0, 3)):
        segments = torch.stack([0.2 + 0.6 * torch.rand(n), 0.1 + 0.2 * torch.rand(n)], -1)
        labels = torch.randint(classes, (n,))
        for (centre, width), label in zip(segments.tolist(), labels.tolist()):
            features[i, int(steps * (centre - width / 2)) : int(steps * (centre + width / 2)), label] += 3
        targets.append({"segments": segments, "labels": labels})
    return SimpleNamespace(features=features, mask=padding, targets=targets)


def compute(name):
    "What is recorded of a case."
    size, overrides = CASES[name]
    parts = {"model": dict(size), "loss": {}}
    for key, value in overrides.items():
        part, field = key.split(".")
        parts.setdefault(part, {})[field] = value
    torch.manual_seed(0)
    model = make_model(DesignConfig(**parts["model"]))
    weights = torch.cat([p.detach().flatten() for p in model.parameters()]).double()
    objective = make_objective(model, DesignLoss(**parts["loss"]))
    optimizer, history = torch.optim.AdamW(model.parameters(), lr=1e-3), []
    for _ in range(5):
        batch = draw_batch(size["channels"], size["classes"])
        terms = objective(model.train(), batch)
        total = objective.total(terms)
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        history.append([round(value.item(), 7) for value in (*terms.values(), total)])
    with torch.no_grad():
        output = model.eval()(batch.features[:2], batch.mask[:2])
    seen = torch.cat([output.logits[-1], output.segments[-1]], -1).flatten()
    return {
        "weights": [len(weights), float(weights.sum()), float(weights.norm())],
        "terms": [*terms, "total"],
        "history": history,
        "output": [round(value, 6) for value in seen.tolist()],
    }


def write():
    "Record what the code at hand computes."
    torch.set_num_threads(1)
    RECORDED.write_text(json.dumps({name: compute(name) for name in CASES}, indent=0) + "\n", encoding="utf-8")


@pytest.mark.parametrize("name", CASES)
def test_numbers_are_those_of_before(one_thread, name):
    recorded, found = json.loads(RECORDED.read_text(encoding="utf-8"))[name], compute(name)
    assert found["weights"] == pytest.approx(recorded["weights"], rel=1e-5, abs=1e-5 * recorded["weights"][2])
    assert found["terms"] == recorded["terms"]
    for ours, theirs in zip(found["history"], recorded["history"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    assert found["output"] == pytest.approx(recorded["output"], rel=1e-4, abs=1e-4)
