"""Files of features: nothing in them is run, and several arrays are refused with the way to save one."""

import json
import re

import numpy as np
import pytest
import torch
from sports import CHANNELS, COMPOSED, DECOMPOSED, database, edit, save

from selfdetr.data.dataset import load_dataset
from selfdetr.data.features import FeatureFiles, drop_pages, read_features
from selfdetr.data.files import DataError


def saved_by(message, folder, monkeypatch):
    "What the line of Python in a message saves."
    monkeypatch.chdir(folder)
    exec(re.search(r"np\.save\(.*\)$", message)[0], {"np": np, "torch": torch})
    return read_features(folder / "b.npy")


RGB, FLOW = np.ones((7, 3), np.float32), np.zeros((7, 2), np.float32)


SEVERAL = {
    "npz, two streams": ("npz", dict(flow=FLOW, rgb=RGB), ["'flow', 'rgb'"], np.hstack([RGB, FLOW])),
    "npz": ("npz", dict(frames=RGB, times=FLOW), ["'frames', 'times'", "features"], RGB),
    "a dict": ("pt", {"fc7": torch.tensor(RGB), "n": 3}, ["a dict", "'fc7'"], RGB),
    "a dict of two streams": ("pt", {"flow": torch.tensor(FLOW), "rgb": torch.tensor(RGB)},
                              ["'flow', 'rgb'"], np.hstack([RGB, FLOW])),
    "a list": ("pt", [torch.tensor(RGB).half(), torch.tensor(FLOW)], ["a list", "0, 1"], RGB)}


@pytest.mark.parametrize("kind, content, words, wanted", SEVERAL.values(), ids=SEVERAL)
def test_a_file_of_several_arrays_says_how_to_save_one(folder, monkeypatch, kind, content, words, wanted):
    path = folder / "features" / f"b.{kind}"
    (folder / "features" / "b.npy").unlink()
    np.savez(path, **content) if kind == "npz" else torch.save(content, path)
    with pytest.raises(DataError) as caught:
        read_features(path)
    message = str(caught.value)
    assert [word for word in ["video 'b'", *words] if word not in message] == [], message
    assert "\n" not in message and "extract" not in message
    assert np.array_equal(saved_by(message, path.parent, monkeypatch), wanted)


@pytest.mark.parametrize("content, words", [
    ({"a": {"b": 1}}, ["a dict", "no array in it"]), ([], ["a list", "no array in it"]), (3.5, ["holds 3.5"])])
def test_a_pt_file_without_tensors(tmp_path, content, words):
    torch.save(content, tmp_path / "b.pt")
    with pytest.raises(DataError) as caught:
        read_features(tmp_path / "b.pt")
    assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)


@pytest.mark.filterwarnings("ignore:.*every window will unpack")
@pytest.mark.parametrize("feature_format", ["npy", "npz", "pt"])
@pytest.mark.parametrize("in_memory", [True, False])
def test_formats_and_orders_give_the_same_data(folder, dataset, feature_format, in_memory):
    for path in list((folder / "features").iterdir()):
        turned = np.load(path).T.copy()
        path.unlink()
        if feature_format == "npy":
            np.save(path, turned)
        elif feature_format == "npz":
            np.savez(path.with_suffix(".npz"), turned)
        else:
            torch.save(torch.from_numpy(turned), path.with_suffix(".pt"))
    loaded = load_dataset(folder, feature_format=feature_format, channels_first=True, in_memory=in_memory)
    assert loaded.hash() == dataset.hash()
    assert np.array_equal(loaded.features("d"), dataset.features("d"))


@pytest.mark.parametrize("written, there", [(COMPOSED, DECOMPOSED), (DECOMPOSED, COMPOSED)])
@pytest.mark.parametrize("place", ["", "{}/"])
@pytest.mark.parametrize("in_memory", [True, False])
def test_a_file_in_another_form_is_found_and_reported(folder, dataset, written, there, place, in_memory):
    edit(lambda d: d.update({place.format(written) + written: d.pop("b")}))(folder)
    path = folder / "features" / place.format(there) / f"{there}.npy"
    path.parent.mkdir(exist_ok=True)
    (folder / "features" / "b.npy").rename(path)
    loaded = load_dataset(folder, in_memory=in_memory)
    name = place.format(written) + written
    assert np.array_equal(loaded.features(name), dataset.features("b")) and "no features" not in loaded.report
    assert np.array_equal(loaded.features(place.format(there) + there), dataset.features("b"))
    (case,) = loaded.report["other form"]
    assert ascii(name) in case and ascii(f"{there}.npy") in case
    assert "names in another Unicode form, matched: 1" in loaded.summary()


def test_the_exact_name_goes_before_another_form(folder):
    edit(lambda d: d.update({COMPOSED: d.pop("b")}))(folder)
    save(np.ones((200, CHANNELS), np.float32), COMPOSED)(folder)
    save(np.zeros((200, CHANNELS), np.float32), DECOMPOSED)(folder)
    loaded = load_dataset(folder)
    assert loaded.features(COMPOSED).all() and "other form" not in loaded.report


def test_one_file_for_two_videos_is_refused(folder):
    edit(lambda d: d.update({COMPOSED: d.pop("b"), DECOMPOSED: d.pop("c")}))(folder)
    save(np.ones((200, CHANNELS), np.float32), COMPOSED)(folder)
    with pytest.raises(DataError) as caught:
        load_dataset(folder)
    assert ascii(COMPOSED) in str(caught.value) and ascii(DECOMPOSED) in str(caught.value)
    save(np.ones((50, CHANNELS), np.float32), DECOMPOSED)(folder)
    assert len(load_dataset(folder).videos) == 5


def test_stated_channel_count_is_held_to(folder):
    content = {"database": database(), "feature": {"dim": 7}}
    (folder / "annotations.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="'a': has 6 channels, the annotation file says 7"):
        load_dataset(folder)


def test_changes_to_a_private_map_are_not_dropped(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((50, 8), np.float32))
    features = np.load(tmp_path / "a.npy", mmap_mode="c")
    features[7] = 1
    drop_pages(features)
    assert features[7].min() == 1 and np.load(tmp_path / "a.npy").max() == 0


@pytest.mark.parametrize("kind", ["npy", "pt"])
@pytest.mark.parametrize("content", [b"<!DOCTYPE html><html>404</html>", b"\x93NU"])
def test_a_page_that_was_saved_in_place_of_features_is_not_said_to_be_pickled(tmp_path, kind, content):
    (tmp_path / f"a.{kind}").write_bytes(content)
    with pytest.raises(DataError, match=f"video 'a': is no .{kind} file; copy or extract it again"):
        read_features(tmp_path / f"a.{kind}")


def test_a_message_names_the_video_and_not_its_file(tmp_path):
    np.save(tmp_path / "v_b.npy", np.zeros(8))
    with pytest.raises(DataError, match="v_b.npy: video 'b': has the shape"):
        FeatureFiles(tmp_path, "v_").read("b")
    with pytest.raises(DataError, match="v_b.npy: video 'v_b': has the shape"):
        read_features(tmp_path / "v_b.npy")


def test_complex_numbers_do_not_lose_a_part(tmp_path):
    torch.save(torch.ones(3, 2, dtype=torch.complex64), tmp_path / "a.pt")
    with pytest.raises(DataError, match="video 'a': holds complex numbers; save real ones"):
        read_features(tmp_path / "a.pt")
