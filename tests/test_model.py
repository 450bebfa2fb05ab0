"""Attention, matching, losses and feedback against oracles: PyTorch's modules, brute force, plain loops."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import generator, random_maps, tail_mask
from torch import nn
from torch.testing import assert_close

from selfdetr.attention import Anchors, QueryAttention, SelfAttention, attend, hide_keys
from selfdetr.designs import make_model, preset
from selfdetr.feedback import FeedbackConfig, feedback_loss
from selfdetr.losses import LossConfig, SetCriterion
from selfdetr.matcher import MatchCost, match
from selfdetr.model import ModelConfig, Output, SelfDETR
from selfdetr.speed import accelerate, release
from selfdetr.variants import DesignConfig

SEEDS = st.integers(0, 2**31 - 1)
few = settings(max_examples=25)


def random_mask(seed, batch, steps):
    "Any steps may be padding, but one of each window is not."
    mask = torch.rand(batch, steps, generator=generator(seed)) < 0.4
    mask[torch.arange(batch), torch.randint(steps, (batch,), generator=generator(seed))] = False
    return mask


def tiny_model(seed=0, **changes):
    torch.manual_seed(seed)
    sizes = dict(channels=6, classes=3, dim=16, heads=2, hidden=16, queries=5, norm_groups=2, decoder_layers=3)
    return SelfDETR(ModelConfig(**{**sizes, **changes}))


def random_output(seed, layers, counts, queries, classes, steps=4):
    "An output as the model could return it, and targets with that many instances a window."
    g, batch = generator(seed), len(counts)
    output = Output(
        2 * torch.randn(layers, batch, queries, classes, generator=g),
        torch.rand(layers, batch, queries, 2, generator=g),
        torch.rand(1, batch, steps, steps, generator=g).softmax(-1),
        torch.rand(layers, batch, queries, queries, generator=g).softmax(-1),
        torch.rand(layers, batch, queries, steps, generator=g).softmax(-1),
        torch.zeros(batch, steps, dtype=torch.bool),
    )
    targets = [
        {"segments": torch.rand(n, 2, generator=g), "labels": torch.randint(classes, (n,), generator=g)} for n in counts
    ]
    return output, targets


# ---- attention


@few
@given(SEEDS, st.integers(1, 3), st.integers(1, 7), st.sampled_from([(8, 1), (8, 2), (12, 3), (16, 8)]), st.booleans())
def test_self_attention_and_its_gradients_are_pytorchs(seed, batch, steps, size, masked):
    torch.manual_seed(seed)
    ours, theirs = SelfAttention(*size), nn.MultiheadAttention(*size, batch_first=True)
    for parameter in ours.parameters():
        nn.init.normal_(parameter, std=0.4)
    pairs = [
        (ours.in_proj.weight, theirs.in_proj_weight),
        (ours.in_proj.bias, theirs.in_proj_bias),
        (ours.out_proj.weight, theirs.out_proj.weight),
        (ours.out_proj.bias, theirs.out_proj.bias),
    ]
    for a, b in pairs:
        b.data.copy_(a.data)
    mask = random_mask(seed, batch, steps) if masked else None
    x, position = torch.randn(2, batch, steps, size[0]).requires_grad_().unbind()
    weigh, weigh_map = torch.randn(batch, steps, size[0]), torch.randn(batch, steps, steps)
    output, attention_map = ours(x, position, mask)
    expected, expected_map = theirs(x + position, x + position, x, key_padding_mask=mask)
    assert_close(output, expected, atol=1e-5, rtol=1e-4)
    assert_close(attention_map, expected_map, atol=1e-6, rtol=1e-4)

    def gradients(y, m, parameters):
        return torch.autograd.grad((y * weigh).sum() + (m * weigh_map).sum(), [x, position, *parameters])

    found = gradients(output, attention_map, [a for a, _ in pairs])
    for a, b in zip(found, gradients(expected, expected_map, [b for _, b in pairs])):
        assert_close(a, b, atol=1e-4, rtol=1e-3)


@few
@given(SEEDS, st.integers(1, 3), st.integers(1, 5), st.integers(1, 6), st.integers(1, 3), st.integers(1, 6))
def test_attend_with_narrow_values(seed, batch, queries, keys, heads, width):
    "The conditional cross-attention's case: queries and keys are wider than values, and there are fewer queries."
    g = generator(seed)
    q, k = torch.randn(batch, heads, queries, 8, generator=g), torch.randn(batch, heads, keys, 8, generator=g)
    v, mask = torch.randn(batch, heads, keys, width, generator=g), random_mask(seed, batch, keys)
    output, attention_map = attend(q, k, v, hide_keys(mask))
    theirs = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=~mask[:, None, None])
    assert_close(output, theirs.transpose(1, 2).flatten(2), atol=1e-5, rtol=1e-4)
    for b, i in itertools.product(range(batch), range(queries)):
        row = np.zeros(keys)
        for h in range(heads):
            e = [0 if mask[b, j] else math.exp(float(q[b, h, i] @ k[b, h, j]) / 8**0.5) for j in range(keys)]
            row += np.array(e) / sum(e) / heads
        assert np.allclose(attention_map[b, i].numpy(), row, atol=1e-5)


def test_query_attention_is_pytorchs_on_projected_inputs():
    torch.manual_seed(1)
    ours, theirs = QueryAttention(12, 3, 0.0), nn.MultiheadAttention(12, 3, bias=True, batch_first=True)
    theirs.in_proj_weight.data.copy_(torch.eye(12).repeat(3, 1))
    theirs.in_proj_bias.data.zero_()
    theirs.out_proj.load_state_dict(ours.out_proj.state_dict())
    x, position = torch.randn(2, 2, 5, 12)
    q = ours.q_content(x) + ours.q_position(position)
    k = ours.k_content(x) + ours.k_position(position)
    for found, expected in zip(ours(x, Anchors(x, position, position)), theirs(q, k, ours.value(x))):
        assert_close(found, expected, atol=1e-6, rtol=1e-4)


def test_a_window_of_padding_alone_gives_no_nan():
    attention, x = SelfAttention(8, 2), torch.randn(2, 4, 8, requires_grad=True)
    output, attention_map = attention(x, torch.zeros(2, 4, 8), torch.tensor([[True] * 4, [False] * 4]))
    output.sum().backward()
    assert output.isfinite().all() and attention_map.isfinite().all() and x.grad.isfinite().all()


# ---- padding


@few
@given(SEEDS, st.lists(st.integers(1, 9), min_size=1, max_size=3), st.sampled_from([0.0, 1e4, math.nan, math.inf]))
def test_padding_changes_no_output_loss_or_gradient(seed, lengths, garbage):
    model = tiny_model(seed)
    model.eval()  # no dropout; gradients all the same
    mask = tail_mask(lengths, 9)
    features = torch.randn(len(lengths), 9, 6, generator=generator(seed))
    _, targets = random_output(seed, 1, [2] * len(lengths), 5, 3)

    def results(fill):
        model.zero_grad()
        output = model(features.masked_fill(mask[..., None], fill), mask)
        criterion = SetCriterion()
        total = criterion.total(criterion(output, targets) | feedback_loss(output))
        total.backward()
        return output, total, [p.grad.clone() for p in model.parameters()]

    output, total, gradients = results(garbage)
    expected, expected_total, expected_gradients = results(0.0)
    valid = ~mask
    assert torch.equal(output.logits, expected.logits) and torch.equal(output.segments, expected.segments)
    assert torch.equal(total, expected_total) and total.isfinite()
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected_gradients))
    assert (output.cross_maps * mask[:, None]).abs().max() == 0
    assert (output.encoder_maps[:, valid] * mask[:, None].expand(-1, 9, -1)[valid]).abs().max() == 0


def test_a_window_gives_the_same_alone_as_in_a_batch():
    model = tiny_model().eval()
    mask, features = tail_mask([9, 4, 9], 9), torch.randn(3, 9, 6)
    together = model(features, mask)
    for i in range(3):
        alone = model(features[i : i + 1], mask[i : i + 1])
        assert_close(together.logits[:, i], alone.logits[:, 0], atol=1e-5, rtol=1e-4)
        assert_close(together.segments[:, i], alone.segments[:, 0], atol=1e-5, rtol=1e-4)
    whole, unmasked = model(features, torch.zeros(3, 9, dtype=torch.bool)), model(features)
    assert torch.equal(whole.logits, unmasked.logits) and not unmasked.mask.any()


# ---- matching and losses


def plain_cost(p, segment, label, target, cost):
    "Eq. 7 for one query and one instance, in plain Python."
    positive = -cost.alpha * (1 - p[label]) ** cost.gamma * math.log(p[label] + 1e-8)
    negative = -(1 - cost.alpha) * p[label] ** cost.gamma * math.log(1 - p[label] + 1e-8)
    l1 = abs(segment[0] - target[0]) + abs(segment[1] - target[1])
    return cost.classes * (positive - negative) + cost.l1 * l1 - cost.iou * plain_iou(segment, target)


def plain_iou(a, b):
    (s, e), (t, f) = ((c - w / 2, c + w / 2) for c, w in (a, b))
    inter = max(0.0, min(e, f) - max(s, t))
    union = e - s + f - t - inter
    return inter / union if union > 0 else 0.0


COUNTS = st.lists(st.integers(0, 5), min_size=1, max_size=3)


@few
@given(SEEDS, COUNTS, st.integers(1, 3), st.integers(1, 4), st.integers(1, 3))
def test_matching_is_the_best_of_all_assignments(seed, counts, layers, queries, classes):
    "Every layer and window on its own, windows without instances and with more instances than queries included."
    output, targets = random_output(seed, layers, counts, queries, classes)
    matches, cost = match(output, targets), MatchCost()
    assert len(matches.query) == layers * sum(min(n, queries) for n in counts)
    for layer, video in itertools.product(range(layers), range(len(counts))):
        pairs, n = matches.pairs(layer, video), counts[video]
        assert len(pairs) == len({q for q, _ in pairs}) == len({t for _, t in pairs}) == min(n, queries)
        p, s = output.logits[layer, video].double().sigmoid().tolist(), output.segments[layer, video].tolist()
        labels, t = targets[video]["labels"].tolist(), targets[video]["segments"].tolist()
        c = [[plain_cost(p[i], s[i], labels[j], t[j], cost) for j in range(n)] for i in range(queries)]
        if n <= queries:
            best = min(sum(c[i][j] for j, i in enumerate(a)) for a in itertools.permutations(range(queries), n))
        else:
            best = min(sum(c[i][j] for i, j in enumerate(a)) for a in itertools.permutations(range(n), queries))
        assert sum(c[i][j] for i, j in pairs) == pytest.approx(best, abs=1e-4)
        maps = [x[layer : layer + 1, video : video + 1] for x in vars(output).values() if x.dim() > 2]
        alone = Output(*maps, output.mask[video : video + 1])
        assert match(alone, targets[video : video + 1]).pairs(0, 0) == pairs


@few
@given(SEEDS, COUNTS, st.integers(1, 3), st.integers(1, 5), st.integers(1, 3))
def test_every_loss_term_is_that_of_plain_loops(seed, counts, layers, queries, classes):
    output, targets = random_output(seed, layers, counts, queries, classes)
    config = LossConfig(alpha=0.3, gamma=1.5)
    terms, matches = SetCriterion(config)(output, targets), match(output, targets)
    assert len(terms) == 3 * layers
    instances = max(1, sum(counts))
    for layer in range(layers):
        classes_sum = l1 = iou = 0.0
        for video in range(len(counts)):
            truth = dict(matches.pairs(layer, video))
            for q, c in itertools.product(range(queries), range(classes)):
                p = 1 / (1 + math.exp(-float(output.logits[layer, video, q, c])))
                if q in truth and int(targets[video]["labels"][truth[q]]) == c:
                    classes_sum += -0.3 * (1 - p) ** 1.5 * math.log(p)
                else:
                    classes_sum += -0.7 * p**1.5 * math.log(1 - p)
            for q, t in truth.items():
                a, b = output.segments[layer, video, q].tolist(), targets[video]["segments"][t].tolist()
                l1 += abs(a[0] - b[0]) + abs(a[1] - b[1])
                iou += 1 - plain_iou(a, b)
        suffix = f"_{layer}" if layer < layers - 1 else ""
        for name, expected in (("class", classes_sum), ("l1", l1), ("iou", iou)):
            assert float(terms[name + suffix]) == pytest.approx(expected / instances, rel=1e-4, abs=1e-5), name


def test_total_is_the_weighted_sum_of_all_layers():
    output, targets = random_output(3, 4, [2, 0, 3], 4, 2)
    criterion = SetCriterion(LossConfig(classes=1.5, l1=0.0, iou=3.0, feedback_encoder=0.5, feedback_decoder=7.0))
    terms = criterion(output, targets) | feedback_loss(output)
    layers = ("", "_0", "_1", "_2")
    expected = sum(1.5 * terms["class" + i] + 3 * terms["iou" + i] for i in layers)
    expected = expected + 0.5 * terms["feedback_encoder"] + 7 * terms["feedback_decoder"]
    assert_close(criterion.total(terms), expected)


@pytest.mark.parametrize("counts", [[0], [0, 0], [0, 3]])
def test_windows_without_instances_train(counts):
    model = tiny_model()
    _, targets = random_output(0, 1, counts, 5, 3)
    output, criterion = model(torch.randn(len(counts), 9, 6)), SetCriterion()
    terms = criterion(output, targets) | feedback_loss(output)
    criterion.total(terms).backward()
    assert all(value.isfinite() for value in terms.values()) and terms["class"] > 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    if not sum(counts):  # nothing to regress to; the refinement is trained by nothing then
        assert all(terms[n] == 0 for n in terms if n.startswith(("l1", "iou")))


# ---- feedback, written again from the paper's equations in numpy


def np_rows(x, keep):
    root = np.where(keep, np.sqrt(x + 1e-7), 0)
    return root / root.sum(-1, keepdims=True)


def np_kl(p, q):
    return (p * (np.log(p + 1e-7) - np.log(q + 1e-7))).sum(-1)


def np_feedback(encoder_maps, decoder_maps, cross_maps, mask, config):
    "Eqs. 2-6, one window at a time."
    encoder, decoder = [], []
    layers, batch = cross_maps.shape[:2]
    for b in range(batch):
        keep, a = ~mask[b], encoder_maps[:, b]
        c = sum(cross_maps[:, b]) / layers
        guidance = np_rows(c.T @ c, keep)
        if config.encoder == "matmul":
            h = a[0]
            for layer in a[1:]:
                h = np_rows(h @ layer.T, keep)
        else:
            h = a.mean(0) if config.encoder == "average" else a[-1]
        rows = np_kl(guidance, h) if config.kl == "guidance" else np_kl(h, guidance)
        encoder += list(rows[keep])
        d, cross = decoder_maps[:, b], cross_maps[:, b]
        if config.decoder == "average":
            d, cross = d.mean(0)[None], cross.mean(0)[None]
        elif config.decoder == "last":
            d, cross = d[-1:], cross[-1:]
        guidances = [np_rows(x @ x.T, True) for x in cross]
        found = [np_kl(g, m) if config.kl == "guidance" else np_kl(m, g) for g, m in zip(guidances, d)]
        decoder.append([f.mean() for f in found])
    by_layer = np.mean(decoder, axis=0)
    return np.mean(encoder), by_layer.mean() if config.layers == "mean" else by_layer.sum()


@settings(max_examples=60)
@given(
    SEEDS,
    st.lists(st.integers(1, 6), min_size=1, max_size=3),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 4),
    st.builds(
        FeedbackConfig,
        encoder=st.sampled_from(["matmul", "average", "last"]),
        decoder=st.sampled_from(["layer", "last", "average"]),
        kl=st.sampled_from(["guidance", "map"]),
        layers=st.sampled_from(["mean", "sum"]),
    ),
)
def test_feedback_is_the_papers(seed, lengths, encoder_layers, decoder_layers, queries, config):
    batch, steps = len(lengths), 6
    mask = tail_mask(lengths, steps)
    hide = (~mask).double()[:, None]
    encoder = random_maps(seed, encoder_layers, batch, steps, steps) * hide
    cross = random_maps(seed + 1, decoder_layers, batch, queries, steps) * hide
    encoder, cross = encoder / encoder.sum(-1, keepdim=True), cross / cross.sum(-1, keepdim=True)
    decoder = random_maps(seed + 2, decoder_layers, batch, queries, queries)
    none = torch.zeros(0)
    found = feedback_loss(Output(none, none, encoder, decoder, cross, mask), config)
    expected = np_feedback(encoder.numpy(), decoder.numpy(), cross.numpy(), mask.numpy(), config)
    assert float(found["feedback_encoder"]) == pytest.approx(expected[0], rel=1e-4, abs=1e-5)
    assert float(found["feedback_decoder"]) == pytest.approx(expected[1], rel=1e-4, abs=1e-5)


@given(SEEDS, st.sampled_from(["guidance", "map"]))
@few
def test_gradient_of_the_divergence_is_the_derivative_on_paper(seed, kl):
    "d/dA of sum G (log G - log A) is -G / A; of sum A (log A - log G) it is log A - log G + 1 (1e-7 in every log)."
    maps = random_maps(seed, 2, 1, 4, 4).float().requires_grad_()
    cross = random_maps(seed + 1, 2, 1, 4, 5).float().requires_grad_()
    none, mask = torch.zeros(0), torch.zeros(1, 5, dtype=torch.bool)
    feedback_loss(Output(none, none, none, maps, cross, mask), FeedbackConfig(kl=kl))["feedback_decoder"].backward()
    assert cross.grad is None
    c, a = cross.detach(), maps.detach()
    g = (c @ c.mT + 1e-7).sqrt()
    g = g / g.sum(-1, keepdim=True)
    eps = 1e-7
    expected = -g / (a + eps) if kl == "guidance" else ((a + eps) / (g + eps)).log() + a / (a + eps)
    assert_close(maps.grad, expected / 8, atol=2e-4, rtol=2e-3)  # a mean over 2 layers of 4 rows


def touched(model, name, config=None):
    "The parameters that one feedback term has a gradient for."
    model.zero_grad(set_to_none=True)
    output = model(torch.randn(2, 9, 6, generator=generator(0)), tail_mask([9, 7], 9))
    feedback_loss(output, config or FeedbackConfig())[name].backward()
    return {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}


@pytest.mark.parametrize("kl", ["guidance", "map"])
def test_encoder_feedback_reaches_every_encoder_layer_and_nothing_behind_it(kl):
    found = touched(tiny_model(), "feedback_encoder", FeedbackConfig(kl=kl))
    assert {f"encoder.layers.{i}.self_attention.in_proj.weight" for i in range(2)} <= found
    assert "input_projection.linear.weight" in found
    assert not [n for n in found if not n.startswith(("encoder.", "input_projection."))]
    assert not [n for n in found if n.startswith("encoder.layers.1.") and "in_proj" not in n]  # behind the last map


@pytest.mark.parametrize("kl", ["guidance", "map"])
@pytest.mark.parametrize("decoder", ["layer", "average"])
def test_decoder_feedback_reaches_self_attention_and_never_its_guidance(kl, decoder):
    found = touched(tiny_model(), "feedback_decoder", FeedbackConfig(kl=kl, decoder=decoder))
    for i in range(3):
        assert {f"decoder.layers.{i}.self_attention.{p}_position.weight" for p in "qk"} <= found
    # Behind the last self-attention map there is only what makes the last guidance map, and the heads.
    last = ("cross_attention.", "feed_forward.", "norm2.", "self_attention.value.", "self_attention.out_proj.")
    assert not [n for n in found if n.startswith(tuple(f"decoder.layers.2.{part}" for part in last))]
    assert not [n for n in found if n.startswith(("class_head.", "decoder.norm.", "decoder.segment_head."))]


def test_only_decoder_layers_that_are_compared_are_guided():
    "With one decoder layer nothing of its cross-attention, the query scale or the encoder is in the graph."
    found = touched(tiny_model(decoder_layers=1), "feedback_decoder")
    assert found and not [n for n in found if "cross_attention" in n or n.startswith(("encoder.", "input_projection."))]
    assert {n.split(".")[3] for n in found if n.startswith("decoder.layers.")} == {"self_attention"}


@pytest.mark.parametrize("name", ["self-detr", "tadtr", "react"])
def test_it_starts_as_the_reference_does(name):
    "Layers of a stack share their vectors and draw their own matrices; the segment head keeps PyTorch's start."
    torch.manual_seed(0)
    model = make_model(preset(name, channels=8, dim=64, hidden=128, norm_groups=8))
    for layers in (model.encoder.layers, model.decoder.layers):
        first = dict(layers[0].named_parameters())
        for layer in layers[1:]:
            for key, value in layer.named_parameters():
                same = torch.equal(value, first[key])
                assert same if value.dim() == 1 or "sampling" in key or "attention_weights" in key else not same, key
    head, dim = model.decoder.segment_head, model.config.dim
    assert head[0].weight.abs().max() <= dim**-0.5 and head[0].bias.abs().max() > 0  # Xavier reaches (3 / dim) ** 0.5
    assert not head[-1].weight.any() and not head[-1].bias.any()
    assert model.encoder.layers[0].feed_forward.linear1.weight.abs().max() > dim**-0.5  # and here it is Xavier


@pytest.mark.parametrize("encoder", ["standard", "relative"])
@pytest.mark.parametrize("fast", [False, True])
def test_maps_of_training_are_read_where_the_configuration_says(encoder, fast):
    sizes = dict(channels=8, dim=32, heads=4, hidden=64, queries=6, norm_groups=4, dropout=0.3)
    features = torch.randn(2, 20, 8, generator=generator(0))
    for maps in ("after", "before"):
        torch.manual_seed(0)
        model = make_model(DesignConfig(**sizes, encoder_attention=encoder, maps=maps))
        if fast:
            accelerate(model, torch.device("cpu"))
        for training in (True, False):
            output = model.train(training)(features)
            for found in (output.encoder_maps, output.decoder_maps, output.cross_maps):
                ones = torch.isclose(found.sum(-1), torch.ones(()), atol=1e-4)
                assert ones.all() if maps == "before" or not training else ones.float().mean() < 0.2
        release(model)
