"""The feedback for other DETRs: the same losses, indifferent to order and precision; clear refusals; a few steps."""

import sys
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from torch.testing import assert_close

from selfdetr.anywhere import attention_maps, diversity_report, layer_maps, self_feedback
from selfdetr.diversity import diversity
from selfdetr.feedback import FeedbackConfig, decoder_guidance, feedback_loss
from selfdetr.model import ModelConfig, SelfDETR

pytestmark = pytest.mark.usefixtures("one_thread")
PARTS = ("encoder", "decoder", "cross")


@pytest.fixture(scope="module")
def transformers():
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):  # RuntimeError: built for another PyTorch; transformers then does without
        sys.modules["torchvision"] = None
    library = pytest.importorskip("transformers", reason="the extra `huggingface` (transformers) is not installed")
    library.logging.set_verbosity_error()
    return library


def detr(transformers, name, attn_implementation="eager"):
    "A tiny detector with random weights, from a configuration."
    torch.manual_seed(0)
    backbone = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )
    sizes = {f"{part}_{size}": n for part in PARTS[:2] for size, n in {"attention_heads": 2, "ffn_dim": 32}.items()}
    config = getattr(transformers, f"{name}Config")(
        backbone_config=backbone, backbone=None, use_timm_backbone=False, use_pretrained_backbone=False,
        d_model=32, encoder_layers=2, decoder_layers=2, num_queries=9, num_labels=2, dropout=0.0, init_std=0.15,
        attn_implementation=attn_implementation, **sizes,
    )
    return getattr(transformers, f"{name}ForObjectDetection")(config)


def query_key_weights(model, *places):
    "Weights of the projections of queries and keys, of the attention modules in these places."
    for name, weight in model.named_parameters():
        other = any(part in name for part in ("norm", "v_proj", "o_proj", "out_proj"))
        if name.endswith("weight") and not other and any(place in name for place in places):
            yield weight


def batch():
    generator = torch.Generator().manual_seed(1)
    pixel_mask = torch.ones(2, 32, 64)
    pixel_mask[1, 16:], pixel_mask[1, :, 40:] = 0, 0
    return {"pixel_values": torch.randn(2, 3, 32, 64, generator=generator), "pixel_mask": pixel_mask}


def random_output(seed=0, layers=3, batch=2, heads=4, queries=5, positions=7):
    torch.manual_seed(seed)
    sizes = {"encoder": (positions, positions), "decoder": (queries, queries), "cross": (queries, positions)}
    maps = {p: [torch.randn(batch, heads, *s).softmax(-1) for _ in range(layers)] for p, s in sizes.items()}
    return SimpleNamespace(**{f"{part}_attentions": layers for part, layers in maps.items()})


def changed(output, change):
    "The output with `change` applied to every map; `change` may be a function for each part."
    by_part = change if isinstance(change, dict) else dict.fromkeys(PARTS, change)
    maps = {part: getattr(output, f"{part}_attentions") for part in PARTS}
    return SimpleNamespace(**{f"{part}_attentions": [by_part[part](a) for a in maps[part]] for part in PARTS})


@pytest.mark.parametrize("name", ["Detr", "ConditionalDetr"])
def test_the_losses_and_the_report_are_those_of_the_same_maps(transformers, name):
    inputs = batch()
    output = detr(transformers, name).eval()(**inputs, output_attentions=True)
    mask = torch.nn.functional.interpolate(inputs["pixel_mask"][None], size=(4, 8))[0].flatten(1) == 0
    ours = {f"{p}_maps": torch.stack([a.mean(1) for a in output[f"{p}_attentions"]]) for p in PARTS}
    for config in (FeedbackConfig(), FeedbackConfig("average", "last", "map", "sum", "identity")):
        assert_close(self_feedback(output, config), feedback_loss(SimpleNamespace(**ours, mask=mask), config))
    valid = ~mask[1]
    second = diversity(ours["encoder_maps"][:, 1, valid][..., valid])
    expected = (diversity(ours["encoder_maps"][:, 0]) + second) / 2
    report = diversity_report(output)
    assert_close(torch.tensor(report[report.part == "encoder"].diversity.to_numpy()), expected.double())
    assert report.groupby("part").size().to_dict() == {"encoder": 2, "decoder": 2, "cross": 2}


@pytest.mark.parametrize("name", ["Detr", "ConditionalDetr"])
def test_the_gradient_reaches_every_self_attention_and_no_last_cross_attention(transformers, name):
    model = detr(transformers, name)
    sum(self_feedback(model(**batch(), output_attentions=True)).values()).backward()
    learning = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    assert all(gradient.isfinite().all() for gradient in learning.values())
    for layer in ("encoder.layers.0", "encoder.layers.1", "decoder.layers.0", "decoder.layers.1"):
        of_layer = [g for key, g in learning.items() if layer in key and ("self_attn." in key or ".sa_" in key)]
        assert max(g.abs().max() for g in of_layer) > 0
    last = [key for key in learning if "decoder.layers.1.encoder_attn" in key or "decoder.layers.1.ca_" in key]
    assert not [key for key in last if learning[key].abs().max() > 0]
    assert not [key for key in learning if "class_labels_classifier" in key or "bbox_predictor" in key]


@pytest.mark.parametrize("name", ["Detr", "ConditionalDetr"])
def test_a_few_steps_of_feedback_raise_the_diversity_to_that_of_the_guidance(transformers, name):
    """Of the decoder's first layer, where the target stands still: its output does not depend on its own map."""
    model, inputs = detr(transformers, name), batch()
    with torch.no_grad():
        for weight in query_key_weights(model, ".encoder_attn.", ".ca_"):
            weight *= 8  # a cross-attention that looks at something
    first_layer = list(query_key_weights(model, "decoder.layers.0.self_attn.", "decoder.layers.0.sa_"))
    optimizer, losses, found, targets = torch.optim.Adam(first_layer, lr=1e-2), [], [], []
    for _ in range(31):
        output = model(**inputs, output_attentions=True)
        losses.append(self_feedback(output)["feedback_decoder"])
        found.append(diversity_report(output).set_index(["part", "layer"]).diversity["decoder", 1])
        targets.append(diversity(decoder_guidance(layer_maps(output, "cross"))[0]).mean().item())
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert torch.stack(losses).isfinite().all() and losses[-1] < losses[0]
    assert found[0] < 0.2 * targets[0] and found[-1] > 0.5 * targets[-1]
    assert_close(targets[-1], targets[0], rtol=1e-4, atol=0)


def test_a_model_that_returns_no_maps_is_told_what_to_do(transformers):
    model, inputs = detr(transformers, "Detr", None), batch()
    for asked in (False, True):
        if asked and model.config._attn_implementation == "eager":
            continue  # version 4 has no other kernels for DETR, and gives what it is asked for
        output = model(**inputs, output_attentions=asked)
        for function in (self_feedback, diversity_report):
            with pytest.raises(ValueError, match=r"output_attentions=True.*set_attn_implementation\(\"eager\"\)"):
                function(output)
    model.set_attn_implementation("eager")
    assert len(self_feedback(model(**inputs, output_attentions=True))) == 2


def test_our_own_model_gives_the_same_through_this_door():
    torch.manual_seed(0)
    model = SelfDETR(ModelConfig(channels=8, classes=2, dim=32, heads=4, hidden=64, queries=6, norm_groups=4)).eval()
    mask = torch.arange(20) >= torch.tensor([[20], [13]])
    output = model(torch.randn(2, 20, 8), mask)
    outside = SimpleNamespace(**{f"{p}_attentions": getattr(output, f"{p}_maps").unbind() for p in PARTS})
    assert attention_maps(outside).mask.equal(mask)
    assert_close(self_feedback(outside), feedback_loss(output))


@pytest.mark.parametrize("change", [lambda a: a.mean(1), lambda a: a.flip(1)], ids=["averaged", "heads reversed"])
def test_only_the_mean_over_heads_counts(change):
    output = random_output()
    assert_close(self_feedback(changed(output, change)), self_feedback(output))
    assert_close(attention_maps(changed(output, change)).cross_maps, attention_maps(output).cross_maps)


def test_half_precision_is_averaged_in_single_precision():
    output = random_output()
    half = attention_maps(changed(output, torch.Tensor.bfloat16))
    assert {m.dtype for m in (half.encoder_maps, half.decoder_maps, half.cross_maps)} == {torch.float32}
    reports = [diversity_report(o).diversity.tolist() for o in (changed(output, torch.Tensor.bfloat16), output)]
    assert_close(*reports, rtol=0.02, atol=0.02)


def test_the_order_of_positions_and_of_images_does_not_matter():
    output, order = random_output(), torch.randperm(7, generator=torch.Generator().manual_seed(0))
    move = {
        "encoder": lambda a: a.flip(0)[..., order, :][..., order],
        "decoder": lambda a: a.flip(0),
        "cross": lambda a: a.flip(0)[..., order],
    }
    moved = changed(output, move)
    assert_close(self_feedback(moved), self_feedback(output))
    pd.testing.assert_frame_equal(diversity_report(moved), diversity_report(output))


@pytest.mark.parametrize(
    "part, maps, says",
    [
        ("encoder", None, "no encoder_attentions"),
        ("decoder", [None, None, None], "no decoder_attentions"),
        ("cross", [torch.rand(2, 5, 4, 1, 4)] * 3, r"\(2, 5, 4, 1, 4\).*deformable"),
        ("cross", [torch.rand(2, 4, 5, 7)] * 2 + [torch.rand(2, 4, 5, 6)], r"\(2, 4, 5, 6\).*every layer"),
        ("cross", [torch.rand(2, 4, 5, 9)] * 3, r"\(3, 2, 5, 9\) do not fit together"),
        ("decoder", [torch.rand(2, 4, 5, 5)] * 2, r"\(2, 2, 5, 5\).*do not fit together"),
        ("encoder", [torch.rand(1, 4, 7, 7)], r"\(1, 1, 7, 7\).*do not fit together"),
    ],
)
def test_maps_that_cannot_be_used_are_refused(part, maps, says):
    output = random_output()
    setattr(output, f"{part}_attentions", maps)
    with pytest.raises(ValueError, match=says):
        self_feedback(output)


def test_a_missing_attribute_is_the_same_as_no_maps():
    with pytest.raises(ValueError, match="no cross_attentions"):
        layer_maps(object(), "cross")
