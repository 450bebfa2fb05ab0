"""Maps replaced at test time: what they are, in which part, and that a model is as it was afterwards."""

from typing import get_args

import numpy as np
import pytest
import torch
from models import SIZE, some_model
from torch.testing import assert_close

from selfdetr.attention import attend
from selfdetr.data.windows import WindowConfig
from selfdetr.designs import make_model, preset
from selfdetr.diversity import diversity
from selfdetr.feedback import decoder_guidance, encoder_guidance
from selfdetr.inference import InferenceConfig, detect_dataset
from selfdetr.intervention import How, Part, Replaced, attend_with, mean_row

CASES = [(how, part) for how in get_args(How) for part in get_args(Part)]
MASK = torch.arange(12) >= torch.tensor([[12], [8], [5]])


def heads(seed, rows=12, columns=12):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(3, 2, n, 4, generator=g) for n in (rows, columns, columns)]


@pytest.mark.parametrize("mask", [None, MASK[:, None, None]], ids=["whole", "padded"])
def test_with_its_own_map_attention_is_what_it_was(mask):
    expected, given = attend(*heads(0), mask), attend_with(lambda own, _: own, *heads(0), mask)
    assert_close(given[0], expected[0])
    assert_close(given[1], expected[1])


def test_the_mean_row_is_that_of_real_rows():
    _, maps = attend_with(mean_row, *heads(1), MASK[:, None, None])
    _, own = attend(*heads(1), MASK[:, None, None])
    for i, valid in enumerate((~MASK).sum(1)):
        expected = own[i, :valid].numpy().mean(axis=0)
        assert np.allclose(maps[i].numpy(), expected, atol=1e-6)  # each row
    assert_close(maps.sum(-1), torch.ones(3, 12))


@torch.no_grad()
@pytest.mark.parametrize("how, part", CASES)
def test_only_the_maps_of_one_part_are_replaced_and_only_for_the_call(how, part):
    model, features = some_model(), torch.randn(3, 12, 8)
    before = model(features, MASK)
    given = Replaced(model, how, part)(features, MASK)
    after = model(features, MASK)
    assert torch.equal(before.logits, after.logits) and torch.equal(before.segments, after.segments)
    maps = given.encoder_maps if part == "encoder" else given.decoder_maps
    if how == "identity":
        assert torch.equal(maps, torch.eye(maps.shape[-1]).expand_as(maps))
    elif how == "guidance":
        expected = decoder_guidance(before.cross_maps)
        assert_close(maps, expected if part == "decoder" else encoder_guidance(before.cross_maps, MASK).expand_as(maps))
    elif part == "decoder":
        assert diversity(maps).max() < 1e-5 < diversity(before.decoder_maps).min()
    if part == "decoder":
        assert torch.equal(given.encoder_maps, before.encoder_maps)
    assert not torch.equal(given.logits, before.logits)


def test_a_model_is_as_before_when_a_call_fails():
    model = some_model()
    with pytest.raises(ValueError, match="features have shape"):
        Replaced(model, "identity", "encoder")(torch.randn(2, 12, 3))
    assert model.encoder.layers[0].self_attention.attend is attend


def test_parts_without_maps_are_refused():
    for name in ("rtd", "tadtr"):
        model = some_model(**{key: value for key, value in vars(preset(name)).items() if key.endswith("attention")})
        with pytest.raises(ValueError, match="encoder of this model has no self-attention with maps"):
            Replaced(model, "identity", "encoder")
        Replaced(model, "identity", "decoder")
    with pytest.raises(ValueError, match="choose one of"):
        Replaced(some_model(), "zero", "encoder")
    ensemble = make_model(preset("recommended", channels=8, classes=3, **SIZE))
    with pytest.raises(ValueError, match="no self-attention with maps"):
        Replaced(ensemble, "mean row", "encoder")
    relational = Replaced(some_model(decoder_self_attention="relational"), "mean row", "decoder")
    with pytest.raises(ValueError, match="no mean row"):
        relational(torch.randn(2, 12, 8))


def test_a_replaced_model_detects(tiny):
    windows, config = WindowConfig(length=32), InferenceConfig(top=20)
    model = some_model()
    both = model, Replaced(model, "mean row", "encoder")
    own, other = (detect_dataset(each, tiny, config, windows) for each in both)
    assert len(own) and len(other) and not own.equals(other)
