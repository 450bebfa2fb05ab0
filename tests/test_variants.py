"""Other kinds of attention: TadTR's own layer, a loop, padding, training of every design, and what is refused."""

import importlib.util

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from selfdetr import trainer
from selfdetr.data import Batch
from selfdetr.deformable import DeformableAttention, find_taps, gather_taps, read_taps, scatter_taps
from selfdetr.denoising import DINO
from selfdetr.designs import PRESETS, check_feedback, make_model, make_objective, preset
from selfdetr.losses import LossConfig
from selfdetr.model import ModelConfig, SelfDETR
from selfdetr.relational import unrelated
from selfdetr.scores import DesignLoss
from selfdetr.trainer import TrainConfig, make_optimizer, prepare, train_step
from selfdetr.variants import DesignConfig, VariantDETR

SIZES = dict(channels=8, classes=3, dim=32, heads=4, hidden=64, queries=6, norm_groups=4, decoder_layers=3)
TRAIN = TrainConfig(epochs=1, batch=4, lr=1e-3)
FEEDBACK = {"loss.feedback_encoder": 5.0, "loss.feedback_decoder": 5.0}
DESIGNS = PRESETS | {
    "dino": PRESETS["dino"] | {"model.denoising": 8},
    "tadtr + feedback": PRESETS["tadtr"] | FEEDBACK,
    "react + feedback": PRESETS["react"] | FEEDBACK,
    "react + dino": PRESETS["react"] | {"model.denoising": 8},
    "encoder without attention": PRESETS["detr"] | {"model.encoder_attention": "none"},
}
pytestmark = pytest.mark.usefixtures("one_thread")


def settings_of(name):
    "Model and loss configuration of a design, at a size for tests."
    parts = {"model": dict(SIZES), "loss": {}}
    for key, value in DESIGNS[name].items():
        part, field = key.split(".")
        if part in parts:
            parts[part][field] = value
    return DesignConfig(**parts["model"]), DesignLoss(**parts["loss"])


def new_model(name, seed=0):
    torch.manual_seed(seed)
    return make_model(settings_of(name)[0])


# ---- deformable attention


@pytest.mark.parametrize("kind", ["points", "segments"])
def test_the_layer_of_tadtr(golden, kind):
    spec = importlib.util.spec_from_file_location("fill", golden / "fill.py")
    fill = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fill)
    stored = np.load(golden / "temporal_deformable_attention.npz")
    there = {name: torch.from_numpy(stored[name]) for name in stored}
    layer = DeformableAttention(256, 8)
    assert torch.equal(layer.sampling_offsets.bias, there["offsets_bias"])
    names = dict(sampling_offsets="sampling_offsets", attention_weights="attention_weights")
    for ours, theirs in (names | {"value": "value_proj", "out_proj": "output_proj"}).items():
        for part, parameter in getattr(layer, ours).named_parameters():
            value = fill.weight(f"deform.{theirs}.{part}", tuple(parameter.shape))
            parameter.data = torch.from_numpy(value)
    layer.sampling_offsets.bias.data = there["offsets_bias"]
    what = (there["query"], 128 * there[kind])  # the reference counts in windows, the layer in steps
    with torch.no_grad():
        output, attention_map = layer(*what, there["value"], there["mask"])
        taps = layer.taps(*what, 128, there["mask"], 2)
    assert (output - there[f"output_{kind}"]).abs().max() < 1e-4  # rounding differs between processors
    time = 128 * there[f"locations_{kind}"][:, :, :, 0, :, 0]
    expected = find_taps(time, torch.full_like(time, 0.25), 128, there["mask"])
    inside = expected.weight > 1e-3  # where rounding cannot change the step
    assert torch.equal(taps.step[inside], expected.step[inside])
    assert attention_map.shape == (2, 40, 128) and (attention_map[1, :, 100:] == 0).all()


def by_definition(value, time, weight, mask):
    "Linear interpolation as the hat function of every step, all pairs; output and map."
    centres = torch.arange(value.shape[1], dtype=value.dtype) + 0.5
    hat = (1 - (time[..., None] - centres).abs()).clamp(min=0) * ~mask[:, None, None, None]
    dense = (hat * weight[..., None]).sum(3)  # (batch, queries, heads, steps)
    return torch.einsum("bqhs,bshc->bqhc", dense, value).flatten(2), dense.mean(2)


@settings(max_examples=25)
@given(st.integers(0, 2**31 - 1), st.integers(1, 3), st.integers(1, 9), st.integers(1, 5), st.integers(1, 4))
def test_taps_are_linear_interpolation_and_so_are_their_gradients(seed, batch, steps, heads, points):
    g = torch.Generator().manual_seed(seed)
    random = dict(generator=g, dtype=torch.float64)
    value, weight = torch.randn(batch, steps, heads, 3, **random), torch.rand(batch, 4, heads, points, **random)
    time = (steps + 3) * torch.rand(batch, 4, heads, points, **random) - 1.5
    mask = torch.rand(batch, steps, generator=g) < 0.3
    inputs = [x.requires_grad_() for x in (value, time, weight)]
    output, attention_map = by_definition(*inputs, mask)
    to_output, to_map = torch.randn(output.shape, **random), torch.randn(attention_map.shape, **random)
    expected = torch.autograd.grad((output * to_output).sum() + (attention_map * to_map).sum(), inputs)
    for read in (read_taps, gather_taps):
        taps = find_taps(time, weight, steps, mask)
        ours, our_map = read(value, taps), scatter_taps(taps, steps)
        assert_close(ours, output)
        assert_close(our_map, attention_map)
        gradients = torch.autograd.grad((ours * to_output).sum() + (our_map * to_map).sum(), inputs)
        for a, b in zip(gradients, expected):
            assert_close(a, b)


# ---- relational attention


@settings(max_examples=25)
@given(st.integers(0, 2**31 - 1))
def test_the_relation_pair_by_pair(seed):
    "Some queries are copies of others, in the same place (never attended) or far from it (attended)."
    g = torch.Generator().manual_seed(seed)
    content, centre = torch.randn(6, 4, generator=g), 0.1 + 0.3 * torch.rand(6, generator=g)
    segments = torch.stack((centre, 0.05 + 0.1 * torch.rand(6, generator=g)), -1)
    content = torch.cat([content, content[:4] * 2])
    segments = torch.cat([segments, segments[:2], segments[2:4] + torch.tensor([0.5, 0.0])])
    hidden = unrelated(content[None], segments[None])[0]
    assert hidden[[0, 1], [6, 7]].all() and not hidden[[2, 3], [8, 9]].any()
    for i, j in np.ndindex(10, 10):
        (a, b), (u, v) = content[[i, j]].double().numpy(), segments[[i, j]].double().numpy()
        cosine = a @ b / np.sqrt((a @ a) * (b @ b))
        shared = max(0.0, min(u[0] + u[1] / 2, v[0] + v[1] / 2) - max(u[0] - u[1] / 2, v[0] - v[1] / 2))
        iou = shared / (u[1] + v[1] - shared)
        if min(abs(cosine - 0.2), abs(iou - 0.2)) > 1e-5:  # not where rounding decides
            assert hidden[i, j] == (i != j and not (cosine > 0.2 and iou <= 0.2))


def test_relation_holds_in_the_model_and_denoising_queries_stay_unseen():
    "Every layer attends as the relation of its own input says; other queries' groups change nothing."
    model = new_model("react + dino").train()
    for module in model.modules():
        if hasattr(module, "dropout") and isinstance(module.dropout, float):
            module.dropout = 0.0
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    seen = []
    for layer in model.decoder.layers:
        layer.register_forward_pre_hook(lambda module, what: seen.append((what[0].detach(), what[1].segments.detach())))
    features = torch.randn(2, 16, 8)
    targets = [{"segments": torch.tensor([[0.3, 0.2]]), "labels": torch.tensor([1])}] * 2
    with torch.no_grad():
        alone = model(features)
        noised = model(features, targets=targets)
    for name in ("logits", "segments", "decoder_maps", "cross_maps"):
        assert_close(getattr(noised, name), getattr(alone, name))
    for i in range(3):
        hidden = unrelated(*seen[i])
        assert torch.equal(alone.decoder_maps[i] == 0, hidden) and hidden.any()


# ---- every design


@pytest.mark.parametrize("name", DESIGNS)
def test_padding_changes_nothing(name):
    model = new_model(name).eval()
    features, mask = torch.randn(2, 20, 8), torch.arange(20) >= torch.tensor([[20], [13]])
    outputs = []
    for garbage in (0.0, 1e4):
        model.zero_grad()
        output = model(torch.where(mask[..., None], garbage, features), mask)
        (output.logits.sum() + output.segments.sum()).backward()
        outputs.append((output, [p.grad for p in model.parameters()]))
    (a, gradients), (b, others) = outputs
    assert torch.equal(a.logits, b.logits) and torch.equal(a.segments, b.segments)
    assert all(x is y is None or torch.equal(x, y) for x, y in zip(gradients, others))
    assert (a.cross_maps[:, 1, :, 13:] == 0).all() and (a.encoder_maps[:, 1, :, 13:] == 0).all()


def random_batch(seed):
    g, targets = torch.Generator().manual_seed(seed), []
    for n in (2, 0, 1, 3):
        segments = 0.1 + 0.8 * torch.rand(n, 2, generator=g)
        targets.append({"segments": segments, "labels": torch.randint(3, (n,), generator=g)})
    return Batch(torch.randn(4, 32, 8, generator=g), torch.arange(32) >= torch.tensor([[32], [20], [32], [9]]), targets)


@pytest.mark.parametrize("name", DESIGNS)
def test_a_design_trains_and_shows_its_maps(name):
    "Fast and plain agree for three steps, every parameter learns, and the maps have the shapes that others rely on."
    config, loss = settings_of(name)
    models = [new_model(name).train() for _ in range(2)]
    before = [p.detach().clone() for p in models[0].parameters()]
    sides = [(make_objective(m, loss), prepare(m, TRAIN, "cpu", fast)) for m, fast in zip(models, (True, False))]
    for step in range(3):
        values = []
        for objective, side in sides:
            torch.manual_seed(step)
            values.append(train_step(*side, objective, random_batch(step), 0.1).read())
        assert values[0] == pytest.approx(values[1], rel=1e-3 if step else 1e-5)
    still = [name for (name, p), old in zip(models[0].named_parameters(), before) if torch.equal(p, old)]
    assert not still
    output = models[1].eval()(torch.randn(2, 16, 8))
    encoder, decoder = (0 if config.encoder_attention in ("mlp", "none") else 2 * config.members), 3 * config.members
    assert output.encoder_maps.shape == (encoder, 2, 16, 16) and output.decoder_maps.shape == (decoder, 2, 6, 6)
    assert output.cross_maps.shape == (decoder, 2, 6, 16) and output.logits.shape[2] == 6 * config.members
    for maps in (output.encoder_maps, output.decoder_maps, output.cross_maps):
        assert (maps >= 0).all() and (maps.sum(-1) <= 1 + 1e-5).all()


@pytest.mark.parametrize("vector", [True, False])
def test_sampling_learns_at_a_tenth_of_the_learning_rate(monkeypatch, vector):
    "The same gradients once with all layers at full speed and once as it is."
    moved = []
    for slow in ({}, trainer._SLOW):
        monkeypatch.setattr(trainer, "_SLOW", slow)
        model = new_model("tadtr")
        starts = {
            n: p for n, p in model.named_parameters() if n.endswith(("sampling_offsets.weight", "weights.weight"))
        }
        assert len(starts) == 2 * 5 and not any(p.any() for p in starts.values())  # the same points for all queries
        before = [p.detach().clone() for p in model.parameters()]
        optimizer = make_optimizer(model, TRAIN, vector=vector)
        generator = torch.Generator().manual_seed(0)
        gradients = [[torch.randn(p.shape, generator=generator) for p in before] for _ in range(3)]
        for step in gradients:
            for p, gradient in zip(model.parameters(), step):
                p.grad = gradient.clone() if p.grad is None else p.grad.copy_(gradient)
            optimizer.step()
        moved.append([p.detach() - old for p, old in zip(model.parameters(), before)])
    slow_ones = 0
    for (name, _), full, ours in zip(model.named_parameters(), *moved):
        slow_ones += "sampling_offsets" in name
        share = 0.1 if "sampling_offsets" in name else 1.0
        assert_close(ours, share * full, rtol=2e-3, atol=2e-6 if share < 1 else 0)
    assert slow_ones == 2 * (2 + 3)  # weight and bias of every layer of encoder and decoder


# ---- what makes no sense


@pytest.mark.parametrize(
    "design, changes, says",
    [
        ("rtd", {}, "feedback for the encoder of .*'relative' or 'deformable'.*set loss.feedback_encoder to 0"),
        ("detr", {"encoder_layers": 0}, "feedback for the encoder of .*0 layers.*at least one layer"),
        ("detr", {"decoder_self_attention": "none"}, "for the decoder of .*'standard' or 'relational'"),
        (
            "detr",
            {"encoder_attention": "none", "decoder_self_attention": "none"},
            "encoder and decoder of .*set loss.feedback_encoder, loss.feedback_decoder to 0",
        ),
    ],
    ids=["mlp", "no encoder", "no decoder", "neither"],
)
def test_feedback_to_maps_that_are_not_there_is_refused(design, changes, says):
    config = preset(design, **SIZES, **changes)
    check_feedback(config, LossConfig(feedback_encoder=0, feedback_decoder=0))
    with pytest.raises(ValueError, match=says):
        check_feedback(config, DesignLoss())
    with pytest.raises(ValueError, match=says):
        make_objective(make_model(config))


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"encoder_attention": "mlp", "encoder_layers": 0}, "encoder_layers is 0, so nothing can be 'mlp'"),
        ({"cross_attention": "none"}, "DesignConfig.cross_attention is 'none'; choose one of .*'deformable'"),
        ({"encoder_attention": "absolute"}, "'absolute'; choose one of .*'standard'"),
        ({"decoder_self_attention": False}, "False; choose one of .*'standard'"),
        ({"maps": "never"}, r"DesignConfig.maps is 'never'; choose one of \('before', 'after'\)"),
        ({"denoising": -1}, "denoising must be >= 0"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_settings_that_cannot_be_are_refused(changes, says):
    with pytest.raises(ValueError, match=says):
        DesignConfig(**changes)


def test_classes_of_the_configuration():
    config = ModelConfig(**SIZES)
    kinds = {"detr": SelfDETR, "rtd": VariantDETR, "tadtr": VariantDETR, "react": VariantDETR, "dino": DINO}
    assert {name: type(make_model(preset(name, **SIZES))) for name in kinds} == kinds
    assert type(make_model(config)) is SelfDETR
    for wrong in ("rtd", "tadtr", "react", "dino"):
        with pytest.raises(ValueError, match="make_model"):
            SelfDETR(preset(wrong, **SIZES))
    with pytest.raises(ValueError, match="make_model"):
        DINO(config)


def test_an_unknown_design_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'actionformer'.*detr, self-detr, rtd, tadtr, react, dino"):
        preset("actionformer")


def test_an_unknown_setting_of_a_design_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="preset 'detr': encoder_atention: .*known are channels, .*encoder_attention"):
        preset("detr", encoder_atention="deformable", queries=10)
