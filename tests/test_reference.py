"""The whole model and criterion against the reference implementation's own outputs, to 1e-4."""

import importlib.util
import json

import numpy as np
import pytest
import torch

from selfdetr.feedback import FeedbackConfig, feedback_loss
from selfdetr.losses import LossConfig, SetCriterion
from selfdetr.matcher import match
from selfdetr.model import SelfDETR

RENAMES = {
    "encoder.layers.{i}.": {
        "self_attention.in_proj.weight": "self_attn.in_proj_weight",
        "self_attention.in_proj.bias": "self_attn.in_proj_bias",
        "self_attention.out_proj.": "self_attn.out_proj.",
        "norm.": "norm1.",
        "feed_forward.norm.": "norm2.",
    },
    "decoder.layers.{i}.": {
        "self_attention.q_content.": "sa_qcontent_proj.",
        "self_attention.q_position.": "sa_qpos_proj.",
        "self_attention.k_content.": "sa_kcontent_proj.",
        "self_attention.k_position.": "sa_kpos_proj.",
        "self_attention.value.": "sa_v_proj.",
        "self_attention.out_proj.": "self_attn.out_proj.",
        "cross_attention.q_content.": "ca_qcontent_proj.",
        "cross_attention.q_position.": "ca_qpos_proj.",
        "cross_attention.k_content.": "ca_kcontent_proj.",
        "cross_attention.k_position.": "ca_kpos_proj.",
        "cross_attention.q_sine.": "ca_qpos_sine_proj.",
        "cross_attention.value.": "ca_v_proj.",
        "cross_attention.out_proj.": "cross_attn.out_proj.",
        "feed_forward.norm.": "norm3.",
    },
}
WHOLE = {
    "input_projection.linear.": "input_proj.0.0.",
    "input_projection.norm.": "input_proj.0.1.",
    "class_head.": "class_embed.",
    "anchors": "refpoint_embed.weight",
}
MLPS = {
    "encoder.position_scale.": "transformer.encoder.query_scale.",
    "decoder.query_scale.": "transformer.decoder.query_scale.",
    "decoder.anchor_embedding.": "transformer.decoder.ref_point_head.",
    "decoder.width_scale.": "transformer.decoder.ref_anchor_head.",
    "decoder.segment_head.": "transformer.decoder.segment_embed.",
}


def reference_name(name: str) -> str:
    "The reference's name of one of our parameters."
    for ours, theirs in WHOLE.items():
        if name.startswith(ours):
            return theirs + name[len(ours) :]
    for ours, theirs in MLPS.items():
        if name.startswith(ours):
            index, kind = name[len(ours) :].split(".")
            return f"{theirs}layers.{int(index) // 2}.{kind}"
    part, layers, i, rest = name.split(".", 3) if ".layers." in name else (name, "", "", "")
    for ours, theirs in RENAMES.get(f"{part}.{layers}.{{i}}.", {}).items():
        if rest.startswith(ours):
            return f"transformer.{part}.layers.{i}.{theirs}{rest[len(ours) :]}"
    return "transformer." + name.replace("feed_forward.", "")


@pytest.fixture(scope="module")
def fill(golden):
    "The module that makes the reference's weights and inputs."
    spec = importlib.util.spec_from_file_location("fill", golden / "fill.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def reference(golden):
    return json.loads((golden / "reference.json").read_text())


def load_reference_weights(model, reference, fill):
    used = set()
    for name, parameter in model.named_parameters():
        theirs = reference_name(name)
        used.add(theirs)
        value = fill.weight(theirs, tuple(reference["parameters"][theirs]))
        parameter.data = torch.from_numpy(value).reshape(parameter.shape)
    assert used == set(reference["parameters"])
    return model


@pytest.fixture(scope="module")
def model(reference, fill):
    return load_reference_weights(SelfDETR().eval(), reference, fill)


@pytest.fixture(scope="module")
def outputs(model, fill):
    features, mask = (torch.from_numpy(a) for a in fill.inputs())
    with torch.no_grad():
        return {"full": model(features), "padded": model(features.masked_fill(mask[..., None], 0), mask)}


@pytest.fixture(scope="module")
def targets(reference):
    return [{name: torch.tensor(t[name]) for name in ("segments", "labels")} for t in reference["targets"]]


@pytest.mark.parametrize("case", ["full", "padded"])
@pytest.mark.parametrize("what", ["logits", "segments", "encoder_maps", "decoder_maps", "cross_maps"])
def test_outputs_agree(outputs, golden, case, what):
    expected = np.load(golden / "reference_outputs.npz")[f"{case}_{what}"]
    ours = getattr(outputs[case], what).numpy()
    if case == "padded" and what == "encoder_maps":  # rows of padded steps are nobody's
        ours, expected = ours.copy(), expected.copy()
        ours[:, 1, 100:], expected[:, 1, 100:] = 0, 0
    assert ours.shape == expected.shape
    assert np.abs(ours - expected).max() < 1e-4


def test_matching_agrees(outputs, targets, reference):
    matches = match(outputs["full"], targets)
    assert [sorted(matches.pairs(3, video)) for video in range(2)] == [
        sorted(map(tuple, pairs)) for pairs in reference["matched"]
    ]


def test_every_loss_term_agrees(outputs, targets, reference):
    criterion = SetCriterion(LossConfig())
    terms = criterion(outputs["full"], targets) | feedback_loss(outputs["full"], FeedbackConfig())
    names = {"class": "loss_ce", "l1": "loss_segments", "iou": "loss_iou"}
    names |= {f"{ours}_{i}": f"{theirs}_{i}" for ours, theirs in names.items() for i in range(3)}
    names |= {"feedback_encoder": "loss_KK", "feedback_decoder": "loss_QQ"}
    assert set(names) == set(terms)
    for ours, theirs in names.items():
        assert float(terms[ours]) == pytest.approx(reference["losses"][theirs], abs=1e-4), ours
    assert float(criterion.total(terms)) == pytest.approx(reference["total"], abs=1e-4)
