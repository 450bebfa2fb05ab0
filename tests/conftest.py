"""What every test shares: no window system, one thread (timings and sums are the same everywhere), a tiny data set."""

import gc
import os
import shutil
import tracemalloc
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import sports  # noqa: E402
import torch  # noqa: E402

hypothesis.settings.register_profile("unhurried", deadline=None)  # a busy machine is no failure
hypothesis.settings.register_profile("fuzz", deadline=None, max_examples=int(os.environ.get("INPUTS", 100_000)))
hypothesis.settings.load_profile("unhurried")

HERE = Path(__file__).resolve().parent


def find_golden() -> Path | None:
    "The folder of the reference's outputs: beside the real data ($SELFDETR_DATA), else in a `shared` folder above."
    places = [folder / "shared" for start in (Path.cwd(), HERE) for folder in (start, *start.parents)]
    if os.environ.get("SELFDETR_DATA"):
        places.insert(0, Path(os.environ["SELFDETR_DATA"]).parent)
    return next((p / "golden" for p in places if (p / "golden" / "reference.json").is_file()), None)


@pytest.fixture(scope="session")
def golden() -> Path:
    folder = find_golden()
    if folder is None:
        pytest.skip("the reference outputs (shared/golden) are not here")
    return folder


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    "A simulated data set small enough to train on in a second."
    from selfdetr.simulate import SimulatorConfig, make_dataset

    config = SimulatorConfig(train_videos=3, test_videos=2, classes=3, channels=8, video_seconds=45, bout_gap=6)
    return make_dataset(tmp_path_factory.mktemp("data") / "tiny", 5, config)


@pytest.fixture
def tiny(tiny_folder):
    "That data set, loaded again: a test may change it."
    from selfdetr.data import load_dataset

    return load_dataset(tiny_folder)


@pytest.fixture(scope="session")
def folds_folder(tiny_folder, tmp_path_factory) -> Path:
    "Its five recordings as three folds, which test on 2, 2 and 1 of them."
    from selfdetr.simulate import make_folds

    return make_folds(tmp_path_factory.mktemp("data") / "folded", tiny_folder)


@pytest.fixture
def folder(tmp_path) -> Path:
    "The small data set of `sports.py`, which a test may change."
    return sports.write(tmp_path / "sports")


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    "That data set, loaded; not to be changed."
    from selfdetr.data import load_dataset

    return load_dataset(sports.write(tmp_path_factory.mktemp("data") / "sports"))


@pytest.fixture
def one_thread():
    "Sums are in the same order on one thread only."
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def no_pictures_left():
    yield
    import matplotlib.pyplot as plt

    plt.close("all")


@pytest.fixture
def peak_bytes():
    "A function that calls another and returns the most bytes held at once meanwhile, and the result."

    def measure(work, times=2):
        readings = []
        for _ in range(times):  # the least of them: other threads of the process are counted too, but do not come again
            gc.collect()
            tracemalloc.start()
            result = work()
            readings.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
        return min(readings), result

    return measure


@pytest.fixture(scope="session")
def finished(tiny_folder, tmp_path_factory):
    "One run, computed once for all tests; copy it before changing it."
    from small_runs import SMALL

    from selfdetr import study
    from selfdetr.data import load_dataset

    torch.set_num_threads(1)
    data = load_dataset(tiny_folder)
    spec = study.make_spec("tiny", "smoke", data, overrides=SMALL)
    return study.run(spec, data, runs_root=tmp_path_factory.mktemp("runs"), device="cpu", progress=False)


@pytest.fixture
def copied(finished, tmp_path):
    "A cache that holds a copy of that run, to be changed."
    from selfdetr import study

    return study.read_run(shutil.copytree(finished.folder, tmp_path / "runs" / finished.folder.name))


@pytest.fixture(scope="session")
def hub(tmp_path_factory):
    "A repository as torch.hub reads it."
    folder = tmp_path_factory.mktemp("hub")
    (folder / "hubconf.py").write_text(
        "from torch import nn\n"
        "def small(pretrained=False):\n"
        "    if pretrained:\n"
        "        raise ValueError('no weights here')\n"
        "    return nn.Sequential(nn.Conv3d(3, 4, (4, 9, 9), stride=16), nn.AdaptiveAvgPool3d(1), nn.Flatten(),\n"
        "                         nn.Linear(4, 9))\n")
    return folder


@pytest.fixture
def windows(tiny):
    "Short windows of the tiny data set, to train on."
    from selfdetr.data import training_windows

    return training_windows(tiny, 32, 0.25)
