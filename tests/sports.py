"""A small data set on disk that tests change and spoil: five recordings of two sports."""

import json

import numpy as np

CHANNELS = 6
COMPOSED, DECOMPOSED = "\u00fcbung_1", "u\u0308bung_1"  # look the same
DURATIONS = {"a": 30.0, "b": 20.0, "c": 5.0, "d": 25.0, "e": 0.1}
INSTANCES = {
    "a": [("run", 1.0, 3.0), ("jump", 2.5, 6.5), ("run", 28.0, 29.95)],
    "b": [("jump", 0.0, 19.0), ("run", 4.0, 4.5)],
    "c": [("run", 1.0, 4.0)],
    "d": [("run", 3.0, 6.0), ("jump", 20.0, 25.0)],
    "e": [],
}


def annotation(label, start, end):
    return {"label": label, "segment": [start, end]}


def database():
    return {name: {"subset": "test" if name in "de" else "training", "duration": duration, "fps": 10,
                   "annotations": [annotation(*row) for row in INSTANCES[name]]}
            for name, duration in DURATIONS.items()}


def write(folder, entries=None, **settings):
    (folder / "features").mkdir(parents=True, exist_ok=True)
    (folder / "annotations.json").write_text(json.dumps({"database": entries or database()}))
    (folder / "dataset.json").write_text(json.dumps({"stride": 1, "snippet": 1, **settings}))
    random = np.random.default_rng(0)
    for name, duration in DURATIONS.items():
        features = random.normal(size=(round(duration * 10), CHANNELS)).astype(np.float32)
        np.save(folder / "features" / f"{name}.npy", features)
    return folder


def edit(change):
    def spoil(folder):
        entries = database()
        change(entries)
        (folder / "annotations.json").write_text(json.dumps({"database": entries}))
    return spoil


def save(array, name="b"):
    return lambda folder: np.save(folder / "features" / f"{name}.npy", array, allow_pickle=True)
