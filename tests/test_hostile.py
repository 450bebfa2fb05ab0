"""Files that mean harm: only DataErrors come out of a reader, soon and in one line; nothing leads out of a folder.

Hypothesis changes valid files of every kind, as what they mean and as bytes. It shrinks a file that does harm, keeps it
in `.hypothesis` and sends it again in the next run. `make fuzz INPUTS=100000` sends that many files to all readers.
"""

import ast
import copy
import csv
import io
import json
import math
import os
import pickle
import re
import resource
import signal
import subprocess
import sys
import time
import unicodedata
import warnings
import zipfile
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from selfdetr.check import check_folder, import_segments
from selfdetr.data import DataError, TimeGrid, WindowConfig, load_dataset, read_annotations
from selfdetr.data.annotations import labels_in_one_form
from selfdetr.data.features import FeatureFiles, check_features, read_features
from selfdetr.data.files import read_json, shown
from selfdetr.data.framewise import _read_bundle, read_labels, read_mapping
from selfdetr.data.releases import PLACES, all_settings, describe_videos  # fmt: skip
from selfdetr.data import test_windows as windows_for_testing
from selfdetr.detector import Detector
from selfdetr.evaluation import evaluate
from selfdetr.protocols import read_detections, read_ground_truth
from selfdetr.detector import DetectorConfig, read_detector, write_detector
from selfdetr.fusion import read_video_scores
from selfdetr.inference import InferenceConfig, write_results  # fmt: skip
from selfdetr.checkpoint import load_model, save_model
from selfdetr.designs import make_model
from selfdetr.model import ModelConfig
from selfdetr.simulate import make_dataset
from selfdetr.study.cache import seal
from selfdetr.study import RunSpec, read_run, read_table, runs, write_claims
from selfdetr.video import read_video_entries

ROOT = Path(__file__).resolve().parent.parent


class Stopped(BaseException):
    "Not an Exception, so that no reader takes it for damage in the file."


def stop(*_):
    raise Stopped


@pytest.fixture(autouse=True)
def no_waiting():
    "A reader that waits for a pipe fails its test. (SIGPROF, which counts processor time, is for single files.)"
    before = [signal.signal(number, stop) for number in (signal.SIGALRM, signal.SIGPROF)]
    signal.alarm(120 if INPUTS <= USUAL else 0)
    yield
    signal.alarm(0)
    for number, handler in zip((signal.SIGALRM, signal.SIGPROF), before):
        signal.signal(number, handler)


# ---- a folder with a valid file for every reader


def action(label, start, end, **more):
    return {"label": label, "segment": [start, end]} | more


FRAMES = {"subset": "training", "duration": 4.0, "fps": 10}
ENTRIES = {
    "a": FRAMES | {"annotations": [action("run", 0.5, 1.5), action("jump", 1, 3)]},
    "b": {"subset": "training", "duration": 4.0, "annotations": [action("jump", 0, 3.5)]},
    "c": FRAMES | {"subset": "test", "annotations": [action("run", 1, 2.5)]},
}
GRID = {"fps": 10, "stride": 1, "snippet": 1}
FOUND = [action("run", 0.5, 1.4, score=0.9), action("jump", 1, 2, score=0.2)]
CONTENTS = {
    "annotations.json": {"database": ENTRIES, "feature": GRID | {"dim": 4}},
    "dataset.json": GRID | {
        "subsets": {"train": ["training"], "test": "test"}, "classes": ["run", "jump"], "min_seconds": 0.1,
        "ignore_labels": ["Ambiguous"], "in_memory": True, "features": "features", "resize": 32, "prefix": "",
        "feature_format": "npy", "annotations": "annotations.json", "channels_first": False,
        "description": {"by": "us"}},
    "results.json": {"version": "1", "external_data": {}, "results": {"a": FOUND, "c": FOUND[:1]}},
    "scores.json": {"results": {"a": [{"label": "run", "score": 0.9}], "c": [{"label": "jump", "score": 0.2}]}},
    "by_class.json": {"class": ["run", "jump"], "results": {"a": [0.9, 0.1], "c": [0.5, 0.5]}},
    "videos.json": {"database": {"a": {"duration": 4.0, "fps": 10, "frames": 40, "steps": 40, "annotations": []}}},
    "run/metrics.json": {
        "epochs": 2, "average": 12.5, "mAP": {"0.5": 12.5}, "per_class": {"run": {"0.5": 1.0}}, "seconds_train": 1.5,
        "source": "0123", "test_instances": 3, "protocol": "all",
        "diversity": [{"part": "decoder", "layer": 1, "diversity": 0.5}]},
    "here/table9.json": {
        "table": "table9", "title": "A table.", "dataset": "x", "profile": "quick", "seeds": [0, 1], "source": "0123",
        "claims": [{"text": "a is more than b", "whose": "paper", "verdict": "open", "evidence": "+1.0", "mean": 1.0,
                    "error": 0.5, "n": 2, "unit": "mAP", "paper": None, "margin": None}],
        "rows": [{"name": "base", "mAP": {"0.5": [1.0, 2.0]}, "average": [1.0, 2.0]}]},
}  # fmt: skip
TABLE = "video,start,end,label,subset,duration\n"
TABLE += "a.mp4,0.5,1.5,run,training,4\nb,0:01,3,jump,training,4\nc,1,2,run,test,4\n"
SIZE = ModelConfig(channels=4, classes=2, dim=8, heads=2, hidden=8, encoder_layers=1, decoder_layers=1, queries=3,
                   norm_groups=2)  # fmt: skip


def write_valid(folder):
    for name in ("features", "run", "here"):
        (folder / name).mkdir(parents=True)
    for name, content in CONTENTS.items():
        (folder / name).write_text(json.dumps(content))
    seal(folder / "run", CONTENTS["run/metrics.json"], {})
    (folder / "run" / "spec.json").write_text(replace(RunSpec(), model=SIZE).to_json())
    (folder / "run" / "detections.json").write_text("{}")
    (folder / "run" / "history.csv").write_text("epoch,loss,seconds\n1,1.0,1.0\n2,0.5,2.0\n")
    save_model(make_model(SIZE), folder / "run")
    known = ("run", "jump"), TimeGrid(10), False, None, (0.0,) * 4, (1.0,) * 4
    write_detector(folder / "run", DetectorConfig(*known, WindowConfig(length=16), InferenceConfig()))
    (folder / "table.csv").write_text(TABLE)
    values = np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32)
    for name in ENTRIES:
        np.save(folder / "features" / f"{name}.npy", values)
    np.savez(folder / "features" / "a.npz", features=values)
    torch.save(torch.from_numpy(values), folder / "features" / "a.pt")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for function in (runs, write_claims):  # takes half a second each time, and is no part of reading
        monkeypatch.setattr(f"{function.__module__}.source_hash", lambda: "0123", raising=False)
    write_valid(tmp_path / "set")
    return tmp_path / "set"


# ---- hostile JSON


class Raw(str):
    "Text that stands in a JSON file as it is."


NAMES = ["", ".", "..", "../x", "/etc/passwd", "a/../../b", "C:\\x", "C:x", "..\\x", "a\\b", "\\\\host\\x", "a\0b",
         "\0", "\ud800", "x\udfffy", "\U0001f600", "é", "\u202egpj", "a\nb", "\x1b[31mred", "a" * 300, "a/" * 3000,
         "a" * 20_000, "~", "~root/x", "$HOME", "CON", "nul", "-o", "%s%n{0}{}", "1.5", "nan", "inf", "true", "*"]
NUMBERS = [0, -0.0, -1, 1, 2, 0.5, 1e-9, 5e-324, 1e-300, 1e12, 1e13, 1e18, 1e300, -1e300, 1.7e308, 2**31, 2**53 + 1,
           2**63, 2**64, 10**12, 10**30, 10**400, math.nan, math.inf, -math.inf, True, False,
           *map(Raw, ("1e999", "-1e999", "1" * 5000, "0." + "1" * 5000, "1E400", "-0", "01"))]
OTHERS = [None, [], {}, [[]], [None], [0, 1], [1, 0], ["a"], {"": None}, {"a": 1}, {"database": {}}, [[0, 1], [2]],
          [{}] * 3, *map(Raw, ("[" * 40 + "]" * 40, "[" * 30_000 + "]" * 30_000, '{"a":' * 900 + "1" + "}" * 900,
          "[" * 30_000, '{"a": 1, "a": 2}', '"\\ud800"', '"\\u0000"', "'a'", "undefined", ""))]  # fmt: skip
names = st.sampled_from(NAMES)
values = st.one_of(names, *map(st.sampled_from, (NUMBERS, OTHERS)), st.integers(), st.floats(), st.text(max_size=20))
SIGNS = [b"", b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"[", b"{", b'"', b",", b"-", b"9" * 400, b"\\ud800", b"\n", b"e99"]


def dump(tree):
    "JSON text; what is `Raw` stands there as it is."
    raw = []

    def mark(node):
        if isinstance(node, Raw):
            raw.append(str(node))
            return f"@raw{len(raw) - 1}@"
        if isinstance(node, dict):
            return {key: mark(below) for key, below in node.items()}
        return [mark(below) for below in node] if isinstance(node, list) else node

    text = json.dumps(mark(tree))
    for number, part in enumerate(raw):
        text = text.replace(f'"@raw{number}@"', part)
    return text


def places(tree):
    "(container, key) of everything in a tree of lists and dictionaries."
    found, left = [], [tree]
    while left:
        here = left.pop()
        keys = list(here) if isinstance(here, dict) else range(len(here)) if isinstance(here, list) else []
        found += [(here, key) for key in keys]
        left += [here[key] for key in keys]
    return found


@st.composite
def changed(draw, tree):
    "The tree with one to four things in it changed."
    box = [copy.deepcopy(tree)]
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 4]))):
        if not box:
            break
        holder, key = draw(st.sampled_from(places(box)))
        value = copy.deepcopy(draw(values))
        how = draw(st.sampled_from(["replace"] * 5 + ["delete", "rename", "add", "repeat", "wrap", "swap"]))
        if how == "delete":
            del holder[key]
        elif how == "rename" and isinstance(holder, dict):
            holder[draw(names)] = holder.pop(key)
        elif how == "add" and isinstance(holder, dict):
            holder[draw(st.sampled_from([*NAMES, *CONTENTS["dataset.json"], "video_scores", "protocol"]))] = value
        elif how in ("add", "repeat") and isinstance(holder, list):
            holder.append(value if how == "add" else copy.deepcopy(holder[key]))
        elif how == "wrap":
            holder[key] = [holder[key]]
        elif how == "swap":
            other, place = draw(st.sampled_from(places(box)))
            if not any(isinstance(each, (dict, list)) for each in (holder[key], other[place])):
                holder[key], other[place] = other[place], holder[key]
        else:
            holder[key] = value
    return box[0] if box else None


@st.composite
def enlarged(draw, tree):
    "The tree with one of its lists or objects made long, of short or of long parts."
    box = [copy.deepcopy(tree)]
    holder, key = draw(st.sampled_from(places(box)))
    part, (times, letters) = json.dumps(holder[key]), draw(st.sampled_from([(2000, 1), (30, 300), (300, 300)]))
    for number in range(times):
        more = json.loads(re.sub(r'(?<=: )"(\w+)"', lambda found, n=number: f'"{found[1] * letters}{n}"', part))
        if isinstance(more, dict) and "segment" in more:
            more["segment"] = [number * 1e-5, 1 + number * 1e-5]
        if isinstance(holder, dict):
            holder["name" * letters + str(number)] = more
        else:
            holder.append(more)
    return box[0]


@st.composite
def mangled(draw, content):
    "Bytes, some of them changed, cut out, doubled or put in."
    found = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(found)))
        end = draw(st.sampled_from([at, at + 1, at + 2, at + 8, at + 64, at + 4096, len(found)]))
        same = bytes(found[at:end])
        found[at:end] = draw(st.sampled_from([*SIGNS, same * 2, same * 50]) | st.binary(min_size=1, max_size=4))
    return bytes(found)


@st.composite
def hostile_json(draw, content):
    coded = ["utf-16", "utf-8-sig", "utf-32"]
    how = draw(st.sampled_from(["tree"] * 68 + ["bytes"] * 25 + ["both"] * 5 + [*coded, "long"]))
    if how == "bytes":
        return draw(mangled(content))
    text = dump(draw((enlarged if how == "long" else changed)(json.loads(content))))
    if how == "both":
        return draw(mangled(text.encode()))
    return text.encode(how if how in coded else "utf-8")


# ---- hostile arrays, weights and tables

KINDS = ["<f4", ">f4", "<f2", "<f8", "<f16", "<i8", "|b1", "<c8", "|O", "|V0", "|V8", "<U0", "<U4", "|S0", "<M8[s]",
         "|u1", "<i4", "f", "", "object", "(3,)<f4", "<f4,<f4", None, 7, [("a", "<f4")], [("a", "|O")],
         ("<f4", (2, 2)), [["a", "<f4"]]]  # fmt: skip
SIZES = [0, 1, 2, 3, 4, 40, -1, -3, 2**31, 2**32, 2**33, 2**63, 2**64, 10**12, 10**18, 10**30, True, None, 1.5, "a"]
HEADERS = ["(" * 3000 + ")" * 3000, "__import__('os')", "{" * 90, "", "0" * 20_000, "{}\0", "9**9**9"]


def mostly(usual, *others):
    "The usual value about two times in three."
    return st.sampled_from([usual] * max(2, 2 * len(others)) + list(others))


@st.composite
def hostile_npy(draw, _=b""):
    "A .npy file that may be wrong in its header, its version or its data."
    shape = draw(mostly((40, 4), None)) or tuple(draw(st.lists(st.sampled_from(SIZES), max_size=3) | st.just([2] * 33)))
    about = {"descr": draw(mostly("<f4", *KINDS)), "fortran_order": draw(mostly(False, True)), "shape": shape}
    if change := draw(mostly("", *about, "extra", "less")):
        about[change] = draw(values)
        about.pop("less" if change != "less" else draw(st.sampled_from(sorted(about))), None)
    text = draw(mostly(repr(about), "twice", *HEADERS)).replace("twice", repr(about) * 2)
    numbers = np.random.default_rng(0).normal(size=(40, 4)) * draw(mostly(1, 1e300, math.nan, math.inf))
    with np.errstate(over="ignore"):
        content = numbers.astype(draw(mostly("<f4", "<f8", ">f4"))).tobytes()
    version = draw(mostly(b"\x01\x00", b"\x02\x00", b"\x03\x00", b"\x09\x00"))
    header, wide = text.encode("latin-1", "replace") + b"\n", 2 if version[0] == 1 else 4
    size = draw(mostly(len(header), 256**wide - 1)).to_bytes(wide, "little")
    found = b"\x93NUMPY" + version + size + header + content[: draw(mostly(len(content), 0, 3, 100))]
    return draw(mangled(found)) if draw(mostly(False, True)) else found


@st.composite
def archive(draw, parts):
    "A zip of these parts; its sizes may be untrue, in the local header and in the directory."
    out = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(out, "w", draw(st.sampled_from([0, 8]))) as file:
        warnings.simplefilter("ignore")
        for name, content in parts.items():
            file.writestr(name, content)
    found, size = bytearray(out.getvalue()), draw(mostly(None, 0, 1, 2**31 - 1, 2**32 - 2))
    for sign, offset in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)) if size is not None else ():
        at = found.find(sign)
        if at >= 0 and draw(st.booleans()):
            found[at + offset : at + offset + 4] = size.to_bytes(4, "little")
    return bytes(found)


@st.composite
def hostile_npz(draw, content):
    if draw(mostly(False, True)):
        return draw(mangled(content))
    inside = ["features.npy", "a.npy", "../../x.npy", "/etc/x.npy", "a", "a.npy/", "\u00e9.npy", "x" * 5000]
    return draw(archive(draw(st.dictionaries(st.sampled_from(inside), hostile_npy(), max_size=2))))


BASE = torch.zeros(40, 4)
ONE = torch.zeros(1)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # quantised tensors are deprecated
    TENSORS = [
        BASE, BASE.half(), BASE.bfloat16(), BASE.int(), BASE.bool(), BASE.to(torch.complex64), BASE.to_sparse(),
        BASE.to("meta"), ONE.expand(10**6, 10**6), ONE.half().expand(10**6, 10**6), ONE.as_strided((40, 4), (0, 0)),
        torch.zeros(0, 4), torch.zeros(4, 0), torch.zeros(40), torch.zeros(2, 2, 2), torch.tensor(1.0), BASE * math.nan,
        torch.nn.Parameter(BASE), {"a": BASE}, [BASE], None, 1, "a", BASE.T, BASE[::2],
        torch.quantize_per_tensor(BASE, 1, 0, torch.qint8)]  # fmt: skip


@st.composite
def hostile_pt(draw, _):
    out, way = io.BytesIO(), draw(st.sampled_from(["parts", "parts", "bytes", "whole", "old"]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(TENSORS[draw(st.integers(0, len(TENSORS) - 1))], out, _use_new_zipfile_serialization=way != "old")
    if way != "parts":
        return draw(mangled(out.getvalue())) if way == "bytes" else out.getvalue()
    with zipfile.ZipFile(out) as file:
        parts = {name: file.read(name) for name in file.namelist()}
    name = draw(st.sampled_from(sorted(parts)))
    part = draw(st.sampled_from([parts[name], b"", parts[name] * 2]) | mangled(parts[name]))
    if name.endswith("data.pkl") and draw(st.booleans()):  # other sizes than those of the values
        part = part.replace(b"K\xa0", b"J\xff\xff\xff\x7f").replace(b"K(K", b"J\x00\x00\x00\x01K")
    return draw(archive(parts | {name: part}))


@st.composite
def hostile_safetensors(draw, content):
    if draw(mostly(False, True)):
        return draw(mangled(content))
    size = int.from_bytes(content[:8], "little")
    header = draw(hostile_json(content[8 : 8 + size]))
    given_size = draw(mostly(len(header), 0, 1, 2**40, 2**63, 2**64 - 1))
    return given_size.to_bytes(8, "little") + header + content[8 + size :]


@st.composite
def hostile_csv(draw, content):
    if draw(mostly(False, True)):
        return draw(mangled(content))
    rows = list(csv.reader(io.StringIO(content.decode())))
    for _ in range(draw(st.integers(1, 5))):
        row = draw(st.sampled_from(rows))
        row[draw(st.integers(0, len(row) - 1))] = str(draw(values))[:20_000]
        row += draw(mostly([], ["more"]))
        rows += draw(mostly([], [row]))
    out = io.StringIO()
    csv.writer(out, delimiter=draw(mostly(",", "\t", ";")), escapechar="\\").writerows(rows)
    return out.getvalue().encode("utf-8", "surrogatepass")


# ---- the readers


def read_whole(folder):
    dataset, files = load_dataset(folder), FeatureFiles(folder / "features")
    dataset.summary(), dataset.ground_truth(None), dataset.hash()
    assert all(files.path(each.name).resolve().is_relative_to(folder.resolve()) for each in dataset.videos)
    windows_for_testing(dataset, 16).batch(range(2))


def show_findings(folder):
    findings = check_folder(folder, window=16)
    str(findings).encode(), findings.markdown().encode(), json.dumps(findings.to_dict(), ensure_ascii=False).encode()


def judge(folder):
    result = evaluate(folder / "annotations.json", folder / "results.json")
    result.markdown(True).encode(), json.dumps(result.to_dict())


def show_run(folder):
    found = read_run(folder / "run")
    json.dumps(asdict(found.spec)), repr(found), runs(folder)


def read_spec(folder):
    text = (folder / "run" / "spec.json").read_bytes().decode("utf-8", "replace")
    RunSpec.from_json(RunSpec.from_json(text).to_json())


def read_array(path):
    check_features(found := read_features(path), path.name)
    np.array(found, dtype=np.float32)


# Name: the file that is changed, how, what reads it in the folder, its share of the inputs, what else it writes.
READERS = {
    "annotations": ("annotations.json", hostile_json, lambda f: read_annotations(f).summary(), 24),
    "ground truth": ("annotations.json", hostile_json,
                     lambda f: read_ground_truth(f / "annotations.json", "thumos14-212"), 10),
    "settings": ("dataset.json", hostile_json, lambda f: describe_videos(f, all_settings(f)), 16),
    "data set, annotations": ("annotations.json", hostile_json, read_whole, 6),
    "data set, settings": ("dataset.json", hostile_json, read_whole, 3),
    "results": ("results.json", hostile_json,
                lambda f: write_results(read_detections(f / "results.json"), f / "again.json"), 14, "again.json"),
    "evaluation": ("results.json", hostile_json, judge, 2),
    "video scores": ("scores.json", hostile_json, lambda f: read_video_scores(f / "scores.json"), 8),
    "video scores, by class": ("by_class.json", hostile_json, lambda f: read_video_scores(f / "by_class.json"), 4),
    "npy": ("features/a.npy", hostile_npy, lambda f: read_array(f / "features/a.npy"), 16),
    "npz": ("features/a.npz", hostile_npz, lambda f: read_array(f / "features/a.npz"), 8),
    "pt": ("features/a.pt", hostile_pt, lambda f: read_array(f / "features/a.pt"), 8),
    "check, annotations": ("annotations.json", hostile_json, show_findings, 4),
    "check, settings": ("dataset.json", hostile_json, show_findings, 2),
    "import": ("table.csv", hostile_csv,
               lambda f: read_annotations(import_segments(f / "table.csv", f / "new").path), 8, "new"),
    "detector": ("run/detector.json", hostile_json, lambda f: read_detector(f / "run"), 8),
    "model, size": ("run/config.json", hostile_json, lambda f: Detector.load(f / "run", "cpu"), 4),
    "model, weights": ("run/checkpoint.safetensors", hostile_safetensors, lambda f: load_model(f / "run"), 4),
    "spec": ("run/spec.json", hostile_json, read_spec, 8),
    "run, spec": ("run/spec.json", hostile_json, show_run, 2),
    "run, metrics": ("run/metrics.json", hostile_json, show_run, 4),
    "run, history": ("run/history.csv", hostile_csv, show_run, 4),
    "table": ("here/table9.json", hostile_json, lambda f: read_table(f / "here/table9.json"), 3),
    "claims": ("here/table9.json", hostile_json, lambda f: write_claims(f).read_text(), 3, "claims.md"),
    "extracted": ("videos.json", hostile_json, read_video_entries, 4),
}  # fmt: skip
SHARES = sum(share for _, _, _, share, *_ in READERS.values())
USUAL = 700  # inputs of an ordinary run, always the same ones
INPUTS = max(USUAL, settings.default.max_examples)  # `make fuzz` loads a profile of more


def poor_message(text):
    "What is wrong with the message of a refusal; nothing if it can be shown to a person."
    if not text or len(text) > 3000:
        return f"a message of {len(text)} characters: {text[:200]!r}"
    strange = [c for c in text if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp")]
    return f"a message with {strange[0]!r}: {text[:300]!r}" if strange else ""


def accepts(read, folder, seconds=5.0):
    "Is the folder accepted? It may be refused by a DataError; any other exception and a long wait fail."
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        read(folder)
        return True
    except DataError as error:
        assert not poor_message(str(error)), poor_message(str(error))
        return False
    except Stopped:
        raise AssertionError(f"took more than {seconds:g} s of processor time") from None
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


@pytest.fixture
def bounded():
    "An input must not need 2 GB more, and all of a reader must not leave half a GB behind."
    most, limits = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, resource.getrlimit(resource.RLIMIT_AS)
    if sys.platform == "linux":
        now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + (2 << 30), limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - most
    assert grown < (512 << (20 if sys.platform == "darwin" else 10))


@pytest.mark.parametrize("name", READERS)
def test_hostile_files_give_data_errors_only(folder, bounded, name):
    file, hostile, read, share, *writes = READERS[name]
    counts, there, valid = Counter(), set(folder.parent.rglob("*")), (folder / file).read_bytes()

    def try_one(content):
        (folder / file).write_bytes(content)
        try:
            counts[accepts(read, folder)] += 1
        finally:
            new = set(folder.parent.rglob("*")) - there
            for path in sorted(new, reverse=True):
                path.rmdir() if path.is_dir() else path.unlink()
        assert all(path.relative_to(folder).parts[0] in writes for path in new), new

    try_one.__name__ = "try_" + re.sub(r"\W+", "_", name)  # under which Hypothesis keeps what failed
    rules = settings(max_examples=max(5, round(INPUTS * share / SHARES)), derandomize=INPUTS == USUAL,
                     suppress_health_check=list(HealthCheck))  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try_one(valid)
        rules(given(hostile(valid))(try_one))()
    assert counts[True] and (counts[False] or read is show_findings)
    print(f"{name}: {counts[True]} accepted, {counts[False]} refused")


HARM = [TypeError("x"), MemoryError(), DataError("x" * 9999), DataError("a\nb"), DataError(""), None]


@pytest.mark.parametrize("harm", HARM, ids=lambda harm: repr(harm)[:15])
def test_harm_is_seen(tmp_path, harm):
    def read(_):
        while harm is None:
            pass
        raise harm

    with pytest.raises((TypeError, MemoryError, AssertionError)):
        accepts(read, tmp_path, seconds=0.05)


# ---- JSON


def refused(read, *words):
    "The message of the refusal, which has all the words, is short and in one line."
    with pytest.raises(DataError) as caught:
        read()
    message = str(caught.value)
    assert poor_message(message) == "" and len(message) < 1000
    assert [word for word in words if word not in message] == [], message


def change(path, *keys_and_value):
    "A valid JSON file with another value in one place."
    *keys, last, value = keys_and_value
    content = part = json.loads(path.read_text())
    for key in keys:
        part = part[key]
    part[last] = value
    path.write_text(dump(content))


def limited(monkeypatch, function, name, value):
    "Another value of a name in the module that has the function."
    monkeypatch.setattr(f"{function.__module__}.{name}", value)


BROKEN = {
    "cut short": b'{"database": {"a"', "deep and open": b"[" * 100_000, "deep": b"[" * 100_000 + b"]" * 100_000,
    "half deep": b'{"a":' * 50 + b"1" + b"}" * 50, "many digits": b'{"database": {"a": {"b": ' + b"1" * 5000 + b"}}}",
    "no object": b"[1]", "half a character": b'{"a": "\\ud800"}', "raw NUL": b'{"a": "\0"}', "empty": b"",
    "twice": b'{"a": 1, "a": 2}', "a word": b"nul", "comment": b"{} // x", "UTF-16": b"\xff\xfe{\0}\0",
    "two byte order marks": b"\xef\xbb\xbf\xef\xbb\xbf{}", "surrogate": b'{"a": "\xed\xa0\x80"}',
    "byte": b"\x80"}  # fmt: skip


@pytest.mark.parametrize("name", READERS)
def test_broken_files_and_pipes_are_refused_by_every_reader(folder, name):
    file, hostile, read, *_ = READERS[name]
    path = folder / file
    for content in BROKEN.values() if hostile is hostile_json else ():
        path.write_bytes(content)
        assert not accepts(read, folder) or read is show_findings, content
    for make in (os.mkfifo, Path.mkdir, lambda path: path.symlink_to("/dev/null")) if name != "spec" else ():
        path.rmdir() if path.is_dir() else path.unlink()
        make(path)
        assert not accepts(read, folder) or read is show_findings, make


def test_a_pipe_is_named_and_one_byte_order_mark_is_read_over(folder):
    path = folder / "annotations.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(read_annotations(path).videos) == 3
    for file in ("features/c.npy", "dataset.json"):
        (folder / file).unlink()
        os.mkfifo(folder / file)
        refused(lambda: load_dataset(folder), Path(file).name, "is a pipe or a device")


def test_a_text_has_a_largest_size(folder, monkeypatch):
    limited(monkeypatch, read_json, "LARGEST_TEXT", 100)
    refused(lambda: read_annotations(folder), "annotations.json", "LARGEST_TEXT")
    refused(lambda: import_segments(folder / "table.csv", folder / "new"), "table.csv", "LARGEST_TEXT")


# ---- values of every wrong kind

WRONG = [None, True, "1", "", [], {}, [1], math.nan, math.inf, -1, 10**400, 1e300, Raw("1e999"), {"a": [1]}]
DETECTION = {"label": "a", "segment": [1, 2], "score": 1}
LABELS = (None, True, 1, "", [], ["run"], {}, "a" * 1001, "two\nlines", "\x1b[2J")
CASES = {  # file -> its reader, a word of the refusal, and keys with wrong values
    "annotations.json": (read_annotations, "annotations.json: video 'a'", {
        "database a": [{}, 3, None, []], "database a duration": WRONG, "database a annotations 0 segment": WRONG,
        "database a annotations 0 segment 1": WRONG, "database a annotations 0 label": LABELS}),
    "dataset.json": (load_dataset, "dataset.json", {
        key: (None, [1], [None], {"train": [1]}, 10**400, math.nan, [["a"]])
        for key in ("video_scores", *CONTENTS["dataset.json"]) if key != "description"}),
    "results.json": (lambda f: read_detections(f / "results.json"), "a", {"results a": [
        [None], [{}], [[1, 2]], "ab", {"a": 1}, *([DETECTION | {key: value}] for key, value in (
            ("segment", "12"), ("label", [1]), ("segment", [1, 10**400]), ("segment", [[1], [2]]),
            ("segment", [1, 1e300]), ("score", 10**400), ("score", {})))]}),
    "run/config.json": (lambda f: load_model(f / "run"), "run/", {
        **dict.fromkeys(("channels", "hidden", "queries", "classes", "decoder_layers"), [10**9]), "heads": [True],
        "dim": [10**12, 16, "8", 8.5], "encoder_layers": [10**9, 0], "dropout": [Raw("1e999")], "maps": [["before"]],
        "denoising": [10**12], "members": [10**9, 2], "norm_groups": [0], "width": [1]}),
    "run/detector.json": (lambda f: read_detector(f / "run"), "detector.json", {
        "inference": [[]], "windows length": [10**9, "16"], "inference nms": [[]], "inference speed": [1],
        "grid": [None], "grid fps": [0, True], "grid hop": [1], "resize": [10**12, True],
        "mean": [3, [math.inf] * 4, "abcd", [1]], "deviation": [[0] * 4], "fps_varies": [1],
        "classes": ["ab", [7, "a"], ["a\nb", "a"]]}),
    "run/spec.json": (lambda f: read_run(f / "run"), "spec.json", {
        "seed": ["0", 10**30, None], "dataset": [["a"]], "profile": [3], "model": [None], "model dim": ["64"],
        "train milestones": [[[1]], 3], "loss l1": [10**400], "windows length": [10**12], "feedback kl": [{}],
        "more": [1]}),
    "run/metrics.json": (lambda f: read_run(f / "run"), "", {
        "epochs": ["2", 3], "average": [None], "seconds_train": [{}], "source": [1], "mAP": [3, {}, {"0.5": "x"}],
        "test_instances": [None], "protocol": [None], "diversity": [[3], [{"part": "decoder"}]]}),
    "here/table9.json": (write_claims, "table9.json", {
        "claims": [{}, [3], [{"text": 3}]], "claims 0 n": ["5", None], "claims 0 error": ["0"],
        "claims 0 whose": ["me"], "claims 0 mean": [None, 10**400], "title": [None], "rows": [1], "seeds": ["ab"],
        "profile": ["a/../../b", "a\0b"]}),
}  # fmt: skip


def on_meta_only(config, make=make_model):
    assert torch.empty(0).device.type == "meta", "a model was made that takes memory"
    return make(config)


@pytest.mark.parametrize("file", CASES)
def test_wrong_values_are_refused(folder, monkeypatch, file):
    "A model is made in memory only when its weights have the size that its configuration says."
    limited(monkeypatch, load_model, "make_model", on_meta_only)
    (read, word, cases), whole = CASES[file], (folder / file).read_text()
    for keys, wrong in cases.items():
        for value in wrong:
            change(folder / file, *(int(key) if key.isdigit() else key for key in keys.split()), value)
            refused(lambda: read(folder), word)
            if file == "annotations.json" and "label" not in keys:
                refused(lambda: make_dataset(folder / "made", annotations=folder / file), "annotations.json: video")
            if file == "dataset.json" and value == wrong[0]:
                assert not check_folder(folder, window=16).ok
            (folder / file).write_text(whole)
    assert not (folder / "made").exists()


@pytest.mark.parametrize("value", [None, []], ids=repr)
def test_simulated_recordings_may_have_no_annotations(folder, value):
    change(folder / "annotations.json", "database", "a", "annotations", value)
    made = make_dataset(folder / "made", annotations=folder / "annotations.json")
    assert json.loads((made / "annotations.json").read_text())["database"]["a"]["annotations"] == []


# ---- names that lead out

OUTSIDE = ["..", "../x", "a/../../x", "/etc/x", "C:\\x", "C:x", "..\\x", "\\\\host\\x", "a/..", "a\nb", "a" * 300]


@pytest.mark.parametrize("name", OUTSIDE, ids=lambda name: name[:12])
def test_no_name_of_a_video_leads_out(folder, tmp_path, name):
    content = json.loads((folder / "annotations.json").read_text())
    content["database"][name] = content["database"].pop("a")
    (folder / "annotations.json").write_text(json.dumps(content))
    before = sorted(tmp_path.rglob("*"))
    refused(lambda: load_dataset(folder), "annotations.json", "no name inside the folder")
    assert "video name" in str(check_folder(folder, window=16))
    refused(lambda: make_dataset(tmp_path / "made", annotations=folder / "annotations.json"))
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("key", PLACES)
def test_no_setting_leads_out(folder, key):
    for name in OUTSIDE:
        change(folder / "dataset.json", key, name)
        refused(lambda: load_dataset(folder), f"dataset.json: {key}", "no name inside the folder")
        if key == "annotations":  # where the import writes
            refused(lambda: import_segments(folder / "table.csv", folder, force=True), "no name inside the folder")


def test_prefix_and_name_do_not_lead_out_together(folder):
    refused(lambda: FeatureFiles(folder, prefix="a/.").path("./../x"), "no name inside the folder")
    refused(lambda: load_dataset(folder, prefix="../features/"), "no name inside the folder")


def test_a_table_names_no_file_elsewhere(folder):
    (folder / "table.csv").write_text(TABLE.replace("a.mp4", "../../elsewhere/a.mp4"))
    written = import_segments(folder / "table.csv", folder / "new")
    assert sorted(json.loads(written.path.read_text())["database"]) == ["a", "b", "c"]  # names without their folders
    (folder / "table.csv").write_text(TABLE.replace("a.mp4", "x/.."))
    refused(lambda: import_segments(folder / "table.csv", folder / "two"), "table.csv, line 2", "no name inside")
    assert not (folder / "two").exists()


def test_links_are_followed_and_a_call_may_name_any_folder(folder, tmp_path):
    (folder / "features").rename(tmp_path / "disk")
    assert len(load_dataset(folder, features=str(tmp_path / "disk")).videos) == 3
    (folder / "features").symlink_to(tmp_path / "disk")
    (tmp_path / "disk" / "a.npy").rename(tmp_path / "cached")
    (tmp_path / "disk" / "a.npy").symlink_to(tmp_path / "cached")
    assert len(load_dataset(folder).videos) == 3


# ---- arrays


def test_arrays_of_other_layouts_are_read_as_what_they_are(tmp_path):
    values = np.arange(80, dtype=np.float32).reshape(20, 4)
    for array in (values.astype(">f4"), np.asfortranarray(values), values.astype("<f8"), values.astype("<i2")):
        np.save(tmp_path / "a.npy", array)
        np.savez_compressed(tmp_path / "a.npz", array)
        for name in ("a.npy", "a.npz"):
            assert np.array_equal(read_features(tmp_path / name), values)


def header(path, shape, kind="<f4"):
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": kind, "fortran_order": False, "shape": shape})
        file.write(bytes(320))
    return path


def test_shapes_that_the_file_does_not_have(tmp_path):
    for shape in ((10**12, 4), (2**62, 2**62), (-5, -16), (2**63, 4), (80,), (), (2, 10, 4), (10**18, 0)):
        with zipfile.ZipFile(tmp_path / "a.npz", "w") as file:
            file.write(header(tmp_path / "a.npy", shape), "a.npy")
        for name in ("a.npy", "a.npz"):
            refused(lambda name=name: check_features(read_features(tmp_path / name), name), name)


@pytest.mark.parametrize("version", [1, 2])
def test_kinds_that_are_no_numbers(tmp_path, version):
    path = tmp_path / "a.npy"
    for kind in ("|O", "|V16", "<U4", "<M8[s]", "<c8", "|b1", "|V0", [("a", "<f4"), ("b", "<f4")], [("a", "|O")]):
        header(path, (5, 4), kind)
        refused(lambda: check_features(read_features(path), "a.npy"), "a.npy")
    for kind in ("<U0", "|S0", "|V0"):  # NumPy divides by the size when it maps a file, which ended the process
        text = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': (3, 2), }}\n".encode()
        length = len(text).to_bytes(2 if version == 1 else 4, "little")
        path.write_bytes(b"\x93NUMPY" + bytes([version, 0]) + length + text + bytes(64))
        refused(lambda: read_features(path), "have no size")


def test_an_archive_that_claims_more_than_it_may(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "a.npz", np.zeros((1000, 100)))
    torch.save(torch.zeros(1000, 100), tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as file:
        parts = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(tmp_path / "a.pt", "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in parts.items():
            file.writestr(name, content)
    assert read_features(tmp_path / "a.npz").shape == read_features(tmp_path / "a.pt").shape == (1000, 100)
    limited(monkeypatch, read_features, "LARGEST_UNPACKED", 100_000)
    for name in ("a.npz", "a.pt"):
        refused(lambda name=name: read_features(tmp_path / name), "video 'a'", "would unpack to")


# ---- more than there is


def unresized(folder):
    "Without the number of steps that every recording is brought to."
    path = folder / "dataset.json"
    path.write_text(path.read_text().replace('"resize": 32, ', ""))


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere no limit of the address space holds")
def test_a_sparse_file_under_a_limit_of_memory_is_a_data_error(folder):
    np.lib.format.open_memmap(folder / "features" / "b.npy", "w+", np.float16, (50_000_000, 4))
    unresized(folder)
    script = f"""
import resource
from selfdetr.data import DataError, load_dataset
now = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + (700 << 20), resource.RLIM_INFINITY))
try:
    load_dataset({str(folder)!r})
except DataError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.count("\n") == 1 and '"in_memory": false' in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("kind", ["npz", "npy"])
def test_mapping_what_cannot_be_mapped_is_a_warning(folder, kind):
    unresized(folder)
    for name in "bc":
        np.savez(folder / "features" / f"{name}.npz", features=np.load(folder / "features" / f"{name}.npy"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load_dataset(folder, in_memory=False, feature_format=kind)
    assert [str(one.message) for one in caught if "every window will unpack its" not in str(one.message)] == []
    assert len(caught) == (kind == "npz")
    findings = str(check_folder(folder, window=16, in_memory=False, feature_format=kind))
    assert ("every window unpacks its whole .npz file" in findings) == (kind == "npz")


def test_names_of_arrays_are_shown_in_one_short_line(tmp_path):
    for key in ("\x1b[2J", "a\nb", "k" * 5000, "'; x='", "{file}", "\u202egpj"):
        torch.save({key: torch.zeros(2, 2)} | {f"{i}": torch.zeros(1) for i in range(500)}, tmp_path / "a.pt")
        refused(lambda: read_features(tmp_path / "a.pt"), "a dict", "save one array", ", ...")
        np.savez(tmp_path / "a.npz", **{"x": np.zeros((2, 2)), key.replace("\n", " "): np.zeros((2, 2))})
        refused(lambda: read_features(tmp_path / "a.npz"), "'x'", "save one array")


def test_many_names_in_another_unicode_form_take_little_time(folder):
    names = [f"\u00fc{i}" for i in range(2000)]
    for name in names:
        (folder / "features" / f"{name}x.npy").touch()
    started = time.process_time()
    assert not any(FeatureFiles(folder / "features").path(name).exists() for name in names[:100])
    rows = {"a": [(0.0, 1.0, f"\u00fc{i}") for i in range(20_000)]}
    assert labels_in_one_form(rows, [], {}) == rows and time.process_time() - started < 5


def test_frame_wise_files_of_many_distinct_lines_take_little_time(tmp_path):
    lines, started = [f"{i} label_{i}" for i in range(30_000)], time.process_time()
    (tmp_path / "lines.txt").write_text("\n".join(lines))
    for read in (read_labels, read_mapping, _read_bundle):
        assert len(read(tmp_path / "lines.txt")) == 30_000
    assert time.process_time() - started < 4


def test_nested_values_are_shown_short():
    deep = "a" * 100
    for _ in range(4):
        deep = [{f"{'k' * 100}{i}": deep for i in range(9)}] * 9
    assert len(shown(deep)) == 243 and len(shown("a" * 1000)) == len(shown(10**300)) == 60


@pytest.mark.parametrize("key", ["duration", "subset", "annotations"])
def test_an_entry_of_many_other_keys_is_refused_soon(folder, key):
    change(folder / "annotations.json", "database", "a", {f"{key}_{i}" + "x" * 40: [1] for i in range(20_000)})
    refused(lambda: read_annotations(folder), "video 'a'")


class Harm:
    "Runs code when it is unpickled."

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_nothing_in_a_file_is_run(tmp_path):
    harm = Harm(tmp_path / "harm")
    np.save(tmp_path / "a.npy", np.array([[harm]], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "a.npz", np.array([[harm]], dtype=object))
    torch.save(harm, tmp_path / "a.pt")
    torch.save(harm, tmp_path / "b.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "c.npy").write_bytes(pickle.dumps(harm))
    for name in ("a.npy", "a.npz", "a.pt", "b.pt", "c.npy"):
        refused(lambda name=name: read_features(tmp_path / name), "never loaded")
    assert not (tmp_path / "harm").exists()
    pickle.loads(pickle.dumps(harm))  # it would have shown
    assert (tmp_path / "harm").is_dir()


# ---- the code


class NoTexts(ast.NodeTransformer):
    def visit_Constant(self, node):
        return ast.Constant("") if isinstance(node.value, str) else node


LIBRARY = "numpy|np|pandas|pd|torch|joblib"
HINT = rf"\b(load|jit|hub|dill|shelve|marshal|yaml)\b|pickle|\b(eval|exec)\(|import ({LIBRARY}) as (?!np|pd)"
UNSAFE = re.compile(rf"""
    \b(np|numpy)\.load\(.*allow_pickle=(?!False) | \btorch\.load\((?!.*weights_only=True) | \bread_pickle\b
    | \b(joblib|pickle|jit|yaml)\.load\b | ^\s*from\ ({LIBRARY})\ import\ .*\b(load|jit|hub)\b
    | ^\s*import\ .*\b({LIBRARY})\ as\ (?!np\b|pd\b)""", re.X | re.M)  # by other names calls would not be seen
IN_PACKAGE = re.compile(r"""
    \b(np|numpy)\.load\((?!.*allow_pickle=False) | (?<![.\w])(eval|exec)\(
    | ^\s*(import|from)\ .*\b(pickle|cPickle|cloudpickle|dill|shelve|marshal|yaml)\b""", re.X | re.M)  # fmt: skip


def unsafe(path, package):
    "Code that might run what is in a file. NumPy does not unless it is told to; the package says so all the same."
    text = path.read_text()
    if path.suffix == ".ipynb":
        cells = ["".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
        text = re.sub(r"^(\s*)[%!].*$", r"\1pass", "\n".join(cells), flags=re.M)
    if not re.search(HINT, text):
        return []
    code = ast.unparse(NoTexts().visit(ast.parse(text)))  # each call on one line
    return [found[0] for pattern in (UNSAFE, *[IN_PACKAGE] * package) for found in pattern.finditer(code)]


def test_nothing_is_unpickled_anywhere():
    found = {}
    for pattern in ("selfdetr/**/*.py", "nbs/*.ipynb", "tests/*.py", "benchmarks/*.py", "docs/*.py"):
        paths = sorted(ROOT.glob(pattern))
        assert paths
        found |= {path.name: bad for path in paths if (bad := unsafe(path, pattern.startswith("selfdetr")))}
    assert found == {}


def test_what_unpickles_would_be_found(tmp_path):
    for text in (
        "np.load(p)", "np.load(p, allow_pickle=True)", "torch.load(p)", "torch.load(p, weights_only=False)",
        "eval(x)", "import pickle", "from pickle import loads", "import pickle as p", "pd.read_pickle(p)",
        "from torch import load", "from torch import load as read", "from torch import hub",
        "import torch as t", "from numpy import load",
        "from joblib import load"):  # fmt: skip
        (tmp_path / "a.py").write_text(text)
        assert unsafe(tmp_path / "a.py", package=True), text
