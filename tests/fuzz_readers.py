"""Hostile files for every reader: mutations of valid files, of which nothing but a DataError may come out.

    python tests/fuzz_readers.py --inputs 100000 --seed 0

A valid file of each kind is changed: as what it means (a number becomes a list, a name leads out of the folder, a shape
becomes huge, a list becomes long and its texts too) and as bytes. A reader may accept what comes out or raise
`DataError` with a message that is one line, short and printable. Anything else fails: another exception, an input that
takes longer than `--seconds` of processor time, and memory beyond `--megabytes`.
"""

import argparse
import copy
import csv
import io
import json
import math
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import unicodedata
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from selfdetr import check, data, deploy, evaluation, inference, model, study, video
from selfdetr.data import DataError

Random = random.Random


# What is put into JSON in place of something valid.


class Raw(str):
    """Text that goes into a JSON file as it is."""


DEEP = 30_000
NAMES = ["", ".", "..", "../x", "/etc/passwd", "a/../../b", "C:\\x", "C:x", "..\\x", "a\\b", "\\\\host\\x", "a\0b",
         "\0",
         "\ud800", "x\udfffy", "\U0001f600", "é", "\u202egpj", "a\nb", "\x1b[31mred", "a" * 300, "a/" * 3000,
         "a" * 20_000, "~", "~root/x", "$HOME", "CON", "nul", "-o", "%s%n{0}{}", "1.5", "nan", "inf", "true", "a b",
         " ", "*", "x\u0000y/../.."]
NUMBERS = [0, -0.0, -1, 1, 2, 0.5, 1e-9, 5e-324, 1e-300, 1e12, 1e13, 1e18, 1e300, -1e300, 1.7e308, 2**31, 2**53 + 1,
           2**63, 2**64, 10**12, 10**30, 10**400, math.nan, math.inf, -math.inf, True, False,
           Raw("1e999"), Raw("-1e999"), Raw("1" * 5000), Raw("0." + "1" * 5000), Raw("1E400"), Raw("-0"), Raw("01")]
OTHERS = [None, [], {}, [[]], [None], [0, 1], [1, 0], ["a"], {"": None}, {"a": 1}, {"database": {}}, [[0, 1], [2]],
          [{}] * 3, Raw("[" * 40 + "]" * 40), Raw("[" * DEEP + "]" * DEEP), Raw('{"a":' * 900 + "1" + "}" * 900),
          Raw("[" * DEEP), Raw('{"a": 1, "a": 2}'), Raw('"\\ud800"'), Raw('"\\u0000"'), Raw("'a'"), Raw("undefined"),
          Raw("")]


def value(chance: Random) -> Any:
    return copy.deepcopy(chance.choice(chance.choice([NAMES, NUMBERS, OTHERS])))


def places(tree: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything in a tree of lists and dictionaries."""
    found = []
    left = [tree]
    while left:
        here = left.pop()
        keys = list(here) if isinstance(here, dict) else range(len(here)) if isinstance(here, list) else []
        found += [(here, key) for key in keys]
        left += [here[key] for key in keys]
    return found


def change(tree: Any, chance: Random) -> Any:
    """The tree with one thing changed."""
    box = [tree]
    holder, key = chance.choice(places(box))
    how = chance.randrange(10)
    if how < 5:
        holder[key] = value(chance)
    elif how == 5:
        del holder[key]
    elif how == 6 and isinstance(holder, dict):
        holder[chance.choice(NAMES)] = holder.pop(key)
    elif how == 7 and isinstance(holder, dict):
        holder[chance.choice([*NAMES, *data.SETTINGS])] = value(chance)
    elif how == 8 and isinstance(holder, list):
        holder.append(chance.choice([value(chance), copy.deepcopy(holder[key])]))
    else:
        other, place = chance.choice(places(box))
        if isinstance(holder[key], (int, float, str)) and isinstance(other[place], (int, float, str)):
            holder[key], other[place] = other[place], holder[key]
        else:
            holder[key] = [holder[key]]
    return box[0] if box else None


def other(part: Any, number: int, chance: Random) -> Any:
    """Nearly the same part of a tree: its texts long, its numbers a little larger."""
    if isinstance(part, dict):
        return {key: other(below, number, chance) for key, below in part.items()}
    if isinstance(part, list):
        return [other(below, number, chance) for below in part]
    if isinstance(part, str):
        return part * (900 // (len(part) or 1)) + "".join(chance.choices("ab", k=20))
    return part + number * 1e-5 if isinstance(part, (int, float)) and not isinstance(part, bool) else part


def enlarge(tree: Any, chance: Random) -> Any:
    """The tree with one of its lists or objects, not an empty one, made long: of the same, or of long other parts."""
    holder = chance.choice([holder for holder, _ in places([tree])])
    parts = list(holder.values()) if isinstance(holder, dict) else list(holder)
    times, alike = chance.choice([(2000, True), (30, False), (300, False)])
    for number in range(1, times):
        part = copy.deepcopy(parts[0]) if alike else other(parts[0], number, chance)
        if alike and isinstance(part, dict) and "segment" in part:
            part = part | {"segment": other(part["segment"], number, chance)}
        if isinstance(holder, dict):
            holder[f"more {number}" if alike else other("name", number, chance)[-200:]] = part
        else:
            holder.append(part)
    return tree


def dump(tree: Any) -> str:
    """JSON text; what is `Raw` stands there as it is."""
    raw: list[str] = []

    def mark(node: Any) -> Any:
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


SIGNS = [b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"[", b"{", b'"', b",", b"-", b"9" * 400, b"\\ud800", b"\n", b"e99"]


def mangle(content: bytes, chance: Random) -> bytes:
    """Bytes with a few of them changed, cut out, doubled or put in."""
    found = bytearray(content)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(found) + 1)
        end = min(len(found), at + chance.choice([1, 1, 2, 8, 64, 4096]))
        how = chance.randrange(6)
        if how == 0 and at < len(found):
            found[at] = chance.randrange(256)
        elif how == 1:
            del found[at:end]
        elif how == 2:
            found[at:at] = found[at:end] * chance.choice([1, 3, 50])
        elif how == 3:
            found[at:at] = chance.choice(SIGNS)
        elif how == 4:
            del found[at:]
        elif at < len(found):
            found[at] ^= 1 << chance.randrange(8)
    return bytes(found)


def mutate_json(content: bytes, chance: Random) -> bytes:
    how = chance.random()
    if how < 0.25:
        return mangle(content, chance)
    tree = json.loads(content)
    if how > 0.99:
        return dump(enlarge(tree, chance)).encode()
    for _ in range(chance.choice([1, 1, 1, 2, 4])):
        tree = change(tree, chance)
    text = dump(tree)
    if how < 0.30:
        return mangle(text.encode(), chance)
    return text.encode(chance.choice(["utf-16", "utf-8-sig", "utf-32"])) if how < 0.32 else text.encode()


# What is put into arrays.

KINDS = ["<f4", ">f4", "<f2", "<f8", "<f16", "<i8", "|b1", "<c8", "|O", "|V0", "|V8", "<U0", "<U4", "|S0", "<M8[s]",
         "|u1", "<i4", "f", "", "object", "(3,)<f4", "<f4,<f4", None, 7, [("a", "<f4")], [("a", "|O")],
         ("<f4", (2, 2)), [["a", "<f4"]]]
SIZES = [0, 1, 2, 3, 40, -1, -3, 2**31, 2**32, 2**33, 2**62, 2**63, 2**64, 10**12, 10**18, 10**30, True, None, 1.5, "a",
         (2,)]
HEADERS = ["(" * 3000 + ")" * 3000, "__import__('os')", "{" * 90, "", "0" * 20_000, "{}\0", "9**9**9"]


def npy(chance: Random, steps: int = 40, channels: int = 4) -> bytes:
    """A .npy file that may be wrong in its header, its version or its data."""
    shape: Any = (steps, channels)
    if chance.random() < 0.5:
        shape = tuple(chance.choice([*SIZES, steps, channels]) for _ in range(chance.choice([0, 1, 2, 2, 2, 3, 33])))
    about = {"descr": chance.choice([*KINDS, *["<f4"] * 12]), "fortran_order": chance.random() < 0.2, "shape": shape}
    if chance.random() < 0.1:
        key = chance.choice(["descr", "fortran_order", "shape", "extra"])
        about[key] = chance.choice([value(chance), None, [1], "x"])
    if chance.random() < 0.05:
        about.pop(chance.choice(list(about)))
    text = repr(about)
    if chance.random() < 0.1:
        text = chance.choice([*HEADERS, text * 2, text + "\0"])
    values = np.random.default_rng(chance.randrange(1000)).normal(size=(steps, channels))
    with np.errstate(over="ignore"):
        values *= chance.choice([1, 1, 1, 1e300, math.nan, math.inf])
        content = values.astype(chance.choice(["<f4", "<f8", ">f4"])).tobytes()
    content = content[: chance.choice([len(content)] * 6 + [0, 3, 100])]
    version = chance.choice([b"\x01\x00"] * 8 + [b"\x02\x00", b"\x03\x00", b"\x09\x00"])
    header = text.encode("latin-1", "replace") + b"\n"
    size = len(header).to_bytes(2 if version[0] == 1 else 4, "little")
    if chance.random() < 0.05:
        size = b"\xff" * len(size)
    found = b"\x93NUMPY" + version + size + header + content
    return mangle(found, chance) if chance.random() < 0.2 else found


def archive(parts: dict[str, bytes], chance: Random, packed: bool) -> bytes:
    out = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(out, "w", 8 if packed else 0) as file:
        warnings.simplefilter("ignore")
        for name, content in parts.items():
            file.writestr(name, content)
    found = bytearray(out.getvalue())
    if chance.random() < 0.2:  # sizes that are not true, in the local header and in the directory
        number = chance.choice([0, 1, 2**31 - 1, 2**32 - 2]).to_bytes(4, "little")
        for sign, offset in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
            at = found.find(sign)
            if at >= 0 and chance.random() < 0.7:
                found[at + offset : at + offset + 4] = number
    return bytes(found)


def npz(content: bytes, chance: Random) -> bytes:
    if chance.random() < 0.3:
        return mangle(content, chance)
    names = ["features.npy", "a.npy", "../../x.npy", "/etc/x.npy", "a", "a.npy/", "\u00e9.npy", "x" * 5000]
    parts = {name: npy(chance) for name in chance.sample(names, chance.choice([1, 1, 1, 2, 0]))}
    return archive(parts, chance, chance.random() < 0.5)


def tensors(chance: Random) -> Any:
    """Things that torch.save takes."""
    base = torch.zeros(40, 4)
    return chance.choice([
        base, base.half(), base.bfloat16(), base.int(), base.bool(), base.to(torch.complex64), base.to_sparse(),
        base.to("meta"), torch.zeros(1).expand(10**6, 10**6), torch.zeros(1).half().expand(10**6, 10**6),
        torch.zeros(1).as_strided((40, 4), (0, 0)), torch.zeros(0, 4), torch.zeros(4, 0), torch.zeros(40),
        torch.zeros(2, 2, 2), torch.tensor(1.0), base * math.nan, torch.nn.Parameter(base), {"a": base}, [base], None,
        1, "a", base.T, base[::2], torch.quantize_per_tensor(base, 1, 0, torch.qint8),
    ])


def pt(content: bytes, chance: Random) -> bytes:
    out = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(tensors(chance), out, _use_new_zipfile_serialization=chance.random() < 0.8)
    found = out.getvalue()
    if chance.random() < 0.5 and found[:2] == b"PK":
        with zipfile.ZipFile(io.BytesIO(found)) as file:
            parts = {name: file.read(name) for name in file.namelist()}
        name = chance.choice(sorted(parts))
        parts[name] = chance.choice([mangle(parts[name], chance), b"", parts[name] * 2])
        if name.endswith("data.pkl") and chance.random() < 0.5:
            parts[name] = parts[name].replace(b"K\xa0", b"J\xff\xff\xff\x7f").replace(b"K(K", b"J\x00\x00\x00\x01K")
        return archive(parts, chance, chance.random() < 0.3)
    return mangle(found, chance) if chance.random() < 0.5 else found


def safetensors(content: bytes, chance: Random) -> bytes:
    """Weights with another header."""
    if chance.random() < 0.4:
        return mangle(content, chance)
    size = int.from_bytes(content[:8], "little")
    header, weights = content[8 : 8 + size], content[8 + size :]
    text = mutate_json(header, chance)
    given = len(text) if chance.random() < 0.9 else chance.choice([0, 2**40, 2**63, 2**64 - 1, 1])
    return given.to_bytes(8, "little") + text + weights


def table(content: bytes, chance: Random) -> bytes:
    """A table of segments with other cells."""
    if chance.random() < 0.4:
        return mangle(content, chance)
    rows = list(csv.reader(io.StringIO(content.decode())))
    for _ in range(chance.choice([1, 1, 2, 5])):
        row = chance.choice(rows)
        row[chance.randrange(len(row))] = str(value(chance))[:20_000]
        if chance.random() < 0.1:
            row.append("more")
        if chance.random() < 0.1:
            rows.append(chance.choice(rows))
    out = io.StringIO()
    csv.writer(out, delimiter=chance.choice(",,,\t;"), escapechar="\\").writerows(rows)
    return out.getvalue().encode("utf-8", "surrogatepass")


# The readers, each with a folder of valid files and the one that is changed.


@dataclass
class Reader:
    file: str  # that is changed, in the reader's folder
    mutate: Callable[[bytes, Random], bytes]
    read: Callable[[Path], Any]
    share: int  # of the inputs
    valid: bytes = b""


def within(folder: Path, path: Path) -> None:
    if not path.resolve().is_relative_to(folder.resolve()):
        raise AssertionError(f"{path} is not in {folder}")


def read_whole(folder: Path) -> None:
    dataset = data.load_dataset(folder)
    dataset.summary(), dataset.ground_truth(None), dataset.hash()
    files = data.FeatureFiles(folder / "features")
    for each in dataset.videos:
        within(folder, files.path(each.name))
    windows = data.test_windows(dataset, 16)
    windows.batch(range(min(4, len(windows))))


def read_annotations(folder: Path) -> None:
    found = data.read_annotations(folder / "annotations.json")
    found.summary()
    for each in found.videos:
        try:
            within(folder, data.FeatureFiles(folder / "features").path(each.name))
        except DataError:
            pass


def read_settings(folder: Path) -> None:
    settings = data.all_settings(folder)
    for part in ("annotations", "features"):
        within(folder, data.find_part(folder, settings[part]))
    json.dumps(settings)
    data.describe_videos(folder, settings)


def find_faults(folder: Path) -> None:
    findings = check.check_folder(folder, window=16)
    str(findings).encode(), findings.markdown().encode(), json.dumps(findings.to_dict(), ensure_ascii=False).encode()


def import_table(folder: Path) -> None:
    shutil.rmtree(folder / "new", ignore_errors=True)
    written = check.import_segments(folder / "table.csv", folder / "new")
    data.read_annotations(written.path)


def judge(folder: Path) -> None:
    result = evaluation.evaluate(folder / "annotations.json", folder / "results.json")
    result.markdown(True).encode(), json.dumps(result.to_dict())


def read_truth(folder: Path) -> None:
    evaluation.read_ground_truth(folder / "annotations.json", "thumos14-212")
    evaluation.read_durations(folder / "annotations.json")


def read_a_run(folder: Path) -> None:
    found = study.read_run(folder / "run")
    json.dumps(asdict(found.spec)), repr(found)
    study.runs(folder)


def claims(folder: Path) -> None:
    study.read_table(folder / "here" / "table9.json")
    study.write_claims(folder).read_text()


def features(name: str) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        found = data.read_features(folder / name)
        data.check_features(found, name)
        np.array(found, dtype=np.float32)
    return read


def read_extracted(folder: Path) -> None:
    video.is_complete(folder, "a", video.read_entries(folder))


def from_spec(folder: Path) -> None:
    spec = study.RunSpec.from_json((folder / "run" / "spec.json").read_bytes().decode("utf-8", "replace"))
    study.RunSpec.from_json(spec.to_json())


READERS: dict[str, Reader] = {
    "annotations": Reader("annotations.json", mutate_json, read_annotations, 24),
    "ground truth": Reader("annotations.json", mutate_json, read_truth, 10),
    "settings": Reader("dataset.json", mutate_json, read_settings, 16),
    "data set, annotations": Reader("annotations.json", mutate_json, read_whole, 6),
    "data set, settings": Reader("dataset.json", mutate_json, read_whole, 3),
    "results": Reader("results.json", mutate_json, lambda f: inference.write_results(
        evaluation.read_detections(f / "results.json"), f / "again.json"), 14),
    "evaluation": Reader("results.json", mutate_json, judge, 2),
    "video scores": Reader("scores.json", mutate_json, lambda f: inference.read_video_scores(f / "scores.json"), 8),
    "video scores, by class": Reader("by_class.json", mutate_json,
                                     lambda f: inference.read_video_scores(f / "by_class.json"), 4),
    "npy": Reader("features/a.npy", lambda _, chance: npy(chance), features("features/a.npy"), 16),
    "npz": Reader("features/a.npz", npz, features("features/a.npz"), 8),
    "pt": Reader("features/a.pt", pt, features("features/a.pt"), 8),
    "check, annotations": Reader("annotations.json", mutate_json, find_faults, 4),
    "check, settings": Reader("dataset.json", mutate_json, find_faults, 2),
    "import": Reader("table.csv", table, import_table, 8),
    "detector": Reader("run/detector.json", mutate_json, lambda f: inference.read_detector(f / "run"), 8),
    "model, size": Reader("run/config.json", mutate_json, lambda f: deploy.Detector.load(f / "run", "cpu"), 4),
    "model, weights": Reader("run/checkpoint.safetensors", safetensors, lambda f: model.load_model(f / "run"), 4),
    "spec": Reader("run/spec.json", mutate_json, from_spec, 8),
    "run, spec": Reader("run/spec.json", mutate_json, read_a_run, 2),
    "run, metrics": Reader("run/metrics.json", mutate_json, read_a_run, 4),
    "run, history": Reader("run/history.csv", table, read_a_run, 4),
    "table": Reader("here/table9.json", mutate_json, claims, 6),
    "extracted": Reader("videos.json", mutate_json, read_extracted, 4),
}


def entries() -> dict[str, Any]:
    def action(label: str, start: float, end: float) -> dict[str, Any]:
        return {"label": label, "segment": [start, end]}

    return {
        "a": {"subset": "training", "duration": 4.0, "fps": 10,
              "annotations": [action("run", 0.5, 1.5), action("jump", 1, 3)]},
        "b": {"subset": "training", "duration": 4.0, "annotations": [action("jump", 0, 3.5)]},
        "c": {"subset": "test", "duration": 4.0, "fps": 10, "annotations": [action("run", 1, 2.5)]},
    }


def write_valid(folder: Path) -> None:
    """One folder that has a valid file for every reader."""
    for name in ("features", "run", "here"):
        (folder / name).mkdir(parents=True)
    grid = {"fps": 10, "stride": 1, "snippet": 1}
    settings = grid | {"subsets": {"train": ["training"], "test": "test"}, "classes": ["run", "jump"],
                       "min_seconds": 0.1, "ignore_labels": ["Ambiguous"], "in_memory": True,
                       "features": "features", "prefix": "", "feature_format": "npy", "channels_first": False,
                       "annotations": "annotations.json", "resize": 32, "description": {"by": "nobody"}}
    found = [{"label": "run", "segment": [0.5, 1.4], "score": 0.9}, {"label": "jump", "segment": [1, 2], "score": 0.2}]
    config = model.ModelConfig(channels=4, classes=2, dim=8, heads=2, hidden=8, encoder_layers=1, decoder_layers=1,
                               queries=3, norm_groups=2)
    spec = replace(study.RunSpec(), model=config)
    claim = {"text": "a is more than b", "verdict": "reproduced", "evidence": "+1.0"}
    contents = {
        "annotations.json": {"database": entries(), "feature": grid | {"dim": 4}},
        "dataset.json": settings,
        "results.json": {"version": "1", "external_data": {}, "results": {"a": found, "c": found[:1]}},
        "scores.json": {"results": {"a": [{"label": "run", "score": 0.9}], "c": [{"label": "jump", "score": 0.2}]}},
        "by_class.json": {"class": ["run", "jump"], "results": {"a": [0.9, 0.1], "c": [0.5, 0.5]}},
        "videos.json": {"database": {"a": {"duration": 4.0, "fps": 10, "frames": 40, "steps": 40, "annotations": []}}},
        "run/metrics.json": {"epochs": 2, "average": 12.5, "mAP": {"0.5": 12.5}, "per_class": {"run": {"0.5": 1.0}},
                             "seconds_train": 1.5, "source": "0123", "test_instances": 3, "protocol": "all",
                             "diversity": [{"part": "decoder", "layer": 1, "diversity": 0.5}]},
        "here/table9.json": {"table": "table9", "title": "A table.", "dataset": "x", "profile": "quick",
                             "seeds": [0, 1], "source": "0123", "claims": [claim],
                             "rows": [{"name": "base", "mAP": {"0.5": [1.0, 2.0]}, "average": [1.0, 2.0]}]},
    }
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content))
    (folder / "run" / "spec.json").write_text(spec.to_json())
    (folder / "run" / "history.csv").write_text("epoch,loss,seconds\n1,1.0,1.0\n2,0.5,2.0\n")
    model.save_model(model.make_model(config), folder / "run")
    scale = np.stack([np.zeros(4), np.ones(4)]).astype(np.float32)
    inference.write_detector(folder / "run", inference.DetectorConfig(
        ("run", "jump"), data.TimeGrid(10), False, None, scale, inference.InferenceConfig(window=16)))
    (folder / "table.csv").write_text(
        "video,start,end,label,subset,duration\na.mp4,0.5,1.5,run,training,4\nb,0:01,3,jump,training,4\nc,1,2,run,test,4\n")
    values = np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32)
    for name in entries():
        np.save(folder / "features" / f"{name}.npy", values)
    np.savez(folder / "features" / "a.npz", features=values)
    torch.save(torch.from_numpy(values), folder / "features" / "a.pt")


class TooSlow(BaseException):
    """Not an Exception, so that no reader takes it for damage in the file."""


def stop(*_: Any) -> None:
    raise TooSlow


class Fuzzer:
    """Sends inputs to readers and keeps what came out."""

    def __init__(self, root: Path, seconds: float = 5.0):
        self.seconds, self.folders = seconds, dict[str, Path]()
        self.accepted, self.refused, self.slowest = Counter[str](), Counter[str](), Counter[str]()
        self.failures: list[tuple[str, bytes, str]] = []
        study.source_hash = lambda: "0123"  # half a second, and no part of reading
        for number, (name, reader) in enumerate(READERS.items()):
            self.folders[name] = folder = root / str(number)
            write_valid(folder)
            reader.valid = (folder / reader.file).read_bytes()
            reader.read(folder)  # what is valid is accepted

    def send(self, name: str, content: bytes) -> str:
        """What is wrong with how a reader takes this content; nothing if all is well."""
        reader, folder, wrong = READERS[name], self.folders[name], ""
        (folder / reader.file).write_bytes(content)
        started = time.process_time()
        signal.setitimer(signal.ITIMER_PROF, self.seconds)
        try:
            reader.read(folder)
            self.accepted[name] += 1
        except DataError as error:
            self.refused[name] += 1
            wrong = poor_message(str(error))
        except TooSlow:
            wrong = f"took more than {self.seconds:g} s"
        except Exception:
            wrong = traceback.format_exc(limit=-4)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        self.slowest[name] = max(self.slowest[name], round(1000 * (time.process_time() - started)))
        if wrong:
            self.failures.append((name, content, wrong))
        return wrong

    def run(self, inputs: int, seed: int, report: Callable[[str], Any] = lambda _: None) -> None:
        """Mutated files, for each reader as many as its share says."""
        chance, last = random.Random(seed), time.monotonic()
        names, shares = list(READERS), [reader.share for reader in READERS.values()]
        before = signal.signal(signal.SIGPROF, stop)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                for number, name in enumerate(chance.choices(names, shares, k=inputs)):
                    self.send(name, READERS[name].mutate(READERS[name].valid, chance))
                    if time.monotonic() - last > 30:
                        last = time.monotonic()
                        report(f"{number + 1} inputs, {len(self.failures)} failures")
        finally:
            signal.signal(signal.SIGPROF, before)

    @property
    def counts(self) -> pd.DataFrame:
        """Inputs by reader: accepted, refused, failed, and the longest time in milliseconds."""
        failed = Counter(name for name, *_ in self.failures)
        rows = {name: (self.accepted[name], self.refused[name], failed[name], self.slowest[name]) for name in READERS}
        return pd.DataFrame.from_dict(rows, "index", columns=["accepted", "refused", "failed", "slowest_ms"])


def poor_message(text: str) -> str:
    """What is wrong with the message of a refusal; nothing if it can be shown to a person."""
    if not text or len(text) > 3000:
        return f"a message of {len(text)} characters: {text[:200]!r}"
    strange = [c for c in text if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp")]
    return f"a message with {strange[0]!r}: {text[:300]!r}" if strange else ""


def peak_megabytes() -> float:
    """The most memory this process has ever held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << (20 if sys.platform == "darwin" else 10))


def limit_memory(megabytes: int) -> None:
    """So much more address space than there is now, and no more."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + (megabytes << 20), resource.RLIM_INFINITY))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=5.0, help="of processor time for one input")
    parser.add_argument("--megabytes", type=int, default=512, help="more memory than at the start")
    parser.add_argument("--keep", metavar="FOLDER", help="write the inputs that failed there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    fast = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=fast if fast.is_dir() else None) as root:
        fuzzer, before, started = Fuzzer(Path(root), options.seconds), peak_megabytes(), time.monotonic()
        if sys.platform == "linux":
            limit_memory(4 * options.megabytes)
        fuzzer.run(options.inputs, options.seed, lambda line: print(line, flush=True))
        grown = peak_megabytes() - before
    print(fuzzer.counts.to_string())
    kinds = Counter((name, wrong.strip().splitlines()[-1][:150]) for name, _, wrong in fuzzer.failures)
    for (name, wrong), times in kinds.most_common(60):
        print(f"\n{times} x {name}: {wrong}")
        print(next(text for reader, _, text in fuzzer.failures if reader == name and wrong in text))
    for number, (name, content, _) in enumerate(fuzzer.failures[:200] if options.keep else []):
        Path(options.keep).mkdir(parents=True, exist_ok=True)
        (Path(options.keep) / f"{number}-{name}").write_bytes(content)
    much = grown > options.megabytes
    print(f"\n{options.inputs} inputs in {time.monotonic() - started:.0f} s, seed {options.seed}: "
          f"{len(fuzzer.failures)} failures; memory grew by {grown:.0f} MB" + (", which is too much" if much else ""))
    return int(bool(fuzzer.failures) or much)


if __name__ == "__main__":
    sys.exit(main())
