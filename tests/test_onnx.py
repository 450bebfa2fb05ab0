"An exported network finds what the model finds; where it runs; what it refuses."

import errno
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from models import close, refused, some_model

from selfdetr import onnx
from selfdetr.cli import main
from selfdetr.data.timegrid import TimeGrid
from selfdetr.data.windows import WindowConfig
from selfdetr.detector import Detector, DetectorConfig, export_detector, write_detector
from selfdetr.inference import InferenceConfig
from selfdetr.onnx import export_onnx

CONFIG = DetectorConfig(
    ("a", "b", "c"), TimeGrid(10), False, None, (), (), WindowConfig(length=32), InferenceConfig(batch=5)
)


CPU = "CPUExecutionProvider"


@pytest.mark.parametrize("there, providers, device, chosen", [
    ((True, False), True, "auto", [("CUDAExecutionProvider", {"device_id": 0}), CPU]),
    ((True, False), True, "cuda:1", [("CUDAExecutionProvider", {"device_id": 1}), CPU]),
    ((True, False), False, "auto", [CPU]),
    ((True, False), False, "cuda", "onnxruntime-gpu"),
    ((False, True), False, "auto", [CPU]),
    ((False, True), False, "mps", "on 'cpu' or 'cuda'"),
    ((False, False), False, "cpu", [CPU]),
])  # fmt: skip
def test_where_an_exported_network_runs(monkeypatch, there, providers, device, chosen):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there[0])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: there[1])
    kinds = ["CUDAExecutionProvider"] * providers + [CPU]
    if isinstance(chosen, str):
        assert chosen in refused(lambda: onnx._onnx_providers(device, kinds))
    else:
        assert onnx._onnx_providers(device, kinds) == chosen


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    "A model with most that is hard to export (ranked proposals, every other kind of attention), and its file."
    pytest.importorskip("onnx", reason="the packages of selfdetr[onnx] are not installed")
    pytest.importorskip("onnxscript", reason="the packages of selfdetr[onnx] are not installed")
    pytest.importorskip("onnxruntime", reason="the packages of selfdetr[onnx] are not installed")
    changes = dict(denoising=4, encoder_attention="relative")
    changes |= dict(decoder_self_attention="relational", cross_attention="deformable")
    original = Detector(some_model(**changes), CONFIG)
    return original, export_detector(original, tmp_path_factory.mktemp("onnx") / "new" / "model.onnx")


def test_an_exported_model_finds_the_same(exported):
    original, path = exported
    other = Detector.load(path, "cpu")
    values = np.random.default_rng(0).standard_normal((90, 8), dtype=np.float32)
    for features in (values, values[:3], values[:32], values[:33]):  # padded, and not
        assert close(other.detect(features), original.detect(features))
    wide = {"length": 50, "batch": 1}
    assert close(other.using(**wide).detect(values), original.using(**wide).detect(values))
    assert {file.name for file in path.parent.iterdir()} == {"model.onnx", "detector.json"}


def test_an_exported_detector_keeps_cut_and_voting(exported, tmp_path):
    original, path = exported
    changed = original.using(cut=0.3, voting=0.6)
    (tmp_path / "model.onnx").write_bytes(path.read_bytes())
    write_detector(tmp_path, changed.config)
    values = np.random.default_rng(0).standard_normal((90, 8), dtype=np.float32)
    other, found = Detector.load(tmp_path / "model.onnx", "cpu"), changed.detect(values)
    assert other.config == changed.config and close(other.detect(values), found)
    assert not close(found, original.detect(values))


def test_the_command_takes_an_exported_file(exported, tmp_path):
    original, path = exported
    target, values = tmp_path / "found.json", np.random.default_rng(0).standard_normal((90, 8), dtype=np.float32)
    np.save(tmp_path / "a.npy", values)
    assert main(["detect", str(path), str(tmp_path / "a.npy"), "-o", str(target), "--top", "5"]) == 0
    entries, best = json.loads(target.read_text())["results"]["a"], original.detect(values).head(5)
    assert len(best) == 5 and [e["label"] for e in entries] == best.label.tolist()
    assert np.allclose([(*e["segment"], e["score"]) for e in entries], best[["start", "end", "score"]], atol=1e-4)


def test_an_exported_file_says_nothing_of_where_it_was_made(exported):
    content = exported[1].read_bytes()
    assert b".py" not in content and str(Path.cwd()).encode() not in content


def test_an_export_that_the_system_refuses_names_the_file_and_leaves_the_old_one(tmp_path, monkeypatch):
    pytest.importorskip("onnxscript", reason="the packages of selfdetr[onnx] are not installed")

    def full(part, path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "model.onnx").write_bytes(b"old")
    program = SimpleNamespace(model=SimpleNamespace(graph=[]), model_proto=SimpleNamespace(SerializeToString=bytes))
    monkeypatch.setattr(torch.export, "export", lambda *_, **__: None)  # another export would take ten seconds
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: program)
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match=r"model.onnx: cannot be written .*make room there"):
        export_onnx(some_model(), tmp_path / "model.onnx")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("model.onnx", b"old")]


def test_exported_files_that_do_not_fit(exported, tmp_path):
    write_detector(tmp_path, replace(CONFIG, classes=("a",)))
    (tmp_path / "model.onnx").write_bytes(exported[1].read_bytes())
    assert "1 classes, the model has 3" in refused(lambda: Detector.load(tmp_path / "model.onnx"))
    (tmp_path / "model.onnx").write_bytes(b"cut")
    assert "model.onnx: not a network" in refused(lambda: Detector.load(tmp_path / "model.onnx"))
    write_detector(tmp_path, replace(CONFIG, mean=(0.0,) * 5, deviation=(1.0,) * 5))
    (tmp_path / "model.onnx").write_bytes(exported[1].read_bytes())
    assert "a scale not of 8 channels" in refused(lambda: Detector.load(tmp_path / "model.onnx"))


def test_missing_packages_are_named(tmp_path, monkeypatch):
    write_detector(tmp_path, CONFIG)
    for name in ("onnx", "onnxscript", "onnxruntime"):
        monkeypatch.setitem(sys.modules, name, None)
    (tmp_path / "model.onnx").write_bytes(b"")
    loading = lambda: Detector.load(tmp_path / "model.onnx")  # noqa: E731
    for action in (loading, lambda: export_onnx(some_model(), tmp_path / "x")):
        assert "pip install 'selfdetr[onnx]'" in refused(action)
    assert not (tmp_path / "x").exists()
