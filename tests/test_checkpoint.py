"""A model on disk: what is saved comes back, and damaged weights are refused. Other sizes: test_hostile."""

import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from selfdetr.checkpoint import load_model, save_model
from selfdetr.data import DataError
from selfdetr.designs import make_model, preset
from selfdetr.model import ModelConfig, SelfDETR
from selfdetr.variants import as_design

SIZES = dict(channels=8, classes=3, dim=16, heads=2, hidden=16, queries=5, norm_groups=2, decoder_layers=2)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    torch.manual_seed(0)
    return save_model(SelfDETR(ModelConfig(**SIZES)), tmp_path_factory.mktemp("model"))


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "run")


@pytest.mark.parametrize("name", ["self-detr", "rtd", "tadtr", "react", "dino", "recommended"])
def test_a_saved_design_comes_back(tmp_path, name):
    model = make_model(preset(name, **SIZES)).eval()
    loaded = load_model(save_model(model, tmp_path))
    assert type(loaded) is type(model) and as_design(loaded.config) == model.config
    features = torch.randn(2, 12, 8)
    assert torch.equal(model(features).segments, loaded(features).segments)


def test_a_flipped_bit_is_found_wherever_it_is(folder):
    path = folder / "checkpoint.safetensors"
    whole = path.read_bytes()
    for place in np.linspace(0, len(whole) - 1, 40).astype(int):
        content = bytearray(whole)
        content[place] ^= 1
        path.write_bytes(content)
        with pytest.raises(DataError, match="checkpoint.safetensors: "):
            load_model(folder)


def test_the_weights_of_another_program_have_no_sum(folder):
    path = folder / "checkpoint.safetensors"
    save_file(load_file(path), path)
    load_model(folder)
