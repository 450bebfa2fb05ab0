"""DINO: nothing leaks, whatever the batch is like; losses by plain loops; fast, resumed and detecting as the others."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import generator, same_weights, tail_mask
from torch import nn
from torch.testing import assert_close

from selfdetr import denoising, speed
from selfdetr.data import Batch
from selfdetr.denoising import DenoisedOutput, Denoising, DenoisingCriterion, _count_groups
from selfdetr.designs import Objective, make_model, make_objective
from selfdetr.feedback import feedback_loss
from selfdetr.losses import LossConfig, SetCriterion
from selfdetr.model import ModelConfig, Output, SelfDETR
from selfdetr.resume import State
from selfdetr.speed import accelerate
from selfdetr.trainer import TrainConfig, prepare, train, train_step
from selfdetr.variants import DesignConfig

SIZES = dict(channels=8, classes=3, dim=16, heads=2, hidden=16, queries=5, norm_groups=2, decoder_layers=3)
CONFIG = TrainConfig(epochs=3, batch=4, lr=1e-3, milestones=(2,))
PLAIN_FIELDS = ("logits", "segments", "encoder_maps", "decoder_maps", "cross_maps", "mask")
SEEDS = st.integers(0, 2**31 - 1)
COUNTS = st.lists(st.integers(0, 4), min_size=1, max_size=3)
few = settings(max_examples=25)


pytestmark = pytest.mark.usefixtures("one_thread")


def new_model(seed=0, **changes):
    "A DINO whose segment heads move the anchors, as a trained one's do."
    torch.manual_seed(seed)
    model = make_model(DesignConfig(**{**SIZES, "denoising": 12, **changes}))
    for head in (model.decoder.segment_head, model.proposals.segment_head):
        nn.init.normal_(head[-1].weight, std=0.3)
    return model.train()


def random_targets(seed, counts):
    g = generator(seed)
    return [
        {"segments": 0.05 + 0.9 * torch.rand(n, 2, generator=g), "labels": torch.randint(3, (n,), generator=g)}
        for n in counts
    ]


def forward(model, features, mask, targets, seed=1):
    torch.manual_seed(seed)
    return model(features, mask, targets=targets)


def objective_for(model, **weights):
    off = {} if model.config.encoder_layers else {"feedback_encoder": 0.0}
    off |= {} if model.config.decoder_self_attention != "none" else {"feedback_decoder": 0.0}
    return make_objective(model, LossConfig(**{**off, **weights}))


def loss(model, output, targets):
    criterion = objective_for(model).criterion
    return criterion.total(criterion(output, targets) | feedback_loss(output))


# ---- the leak


@few
@given(
    SEEDS,
    st.lists(st.integers(0, 3), min_size=1, max_size=3).filter(any),
    st.sampled_from([{}, {"maps": "before"}, {"encoder_layers": 0}, {"decoder_self_attention": "none"}]),
    st.booleans(),
)
def test_other_denoising_queries_leave_outputs_losses_and_gradients_of_the_rest_alone(seed, counts, changes, fast):
    "To the bit, with dropout, in the plain and in the fused form: anchors and labels of all slots are replaced."
    model, targets = new_model(seed, **changes), random_targets(seed, counts)
    if fast:
        accelerate(model, torch.device("cpu"))
    features, mask = torch.randn(len(counts), 9, 8, generator=generator(seed)), tail_mask([9, 6, 9][: len(counts)], 9)
    original, found, g = denoising._noised_queries, [], generator(seed + 1)

    def replaced(*arguments):
        noised = original(*arguments)
        anchors = torch.rand(noised.anchors.shape, generator=g).clamp(1e-3, 1 - 1e-3)
        return noised._replace(anchors=anchors, labels=torch.randint(3, noised.labels.shape, generator=g))

    with pytest.MonkeyPatch.context() as patch:
        for make in (original, replaced, replaced):
            patch.setattr(denoising, "_noised_queries", make)
            model.zero_grad(set_to_none=True)
            output = forward(model, features, mask, targets)
            plain = SetCriterion(objective_for(model).criterion.config)
            terms = plain(output, targets) | feedback_loss(output)
            plain.total(terms).backward()
            assert model.label_embedding.weight.grad is None or not model.label_embedding.weight.grad.any()
            found.append((output, terms, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (first, terms, gradients), *others = found
    for output, other_terms, other_gradients in others:
        assert all(torch.equal(getattr(first, name), getattr(output, name)) for name in PLAIN_FIELDS)
        assert all(torch.equal(terms[name], other_terms[name]) for name in terms)
        assert all(torch.equal(g, other_gradients[name]) for name, g in gradients.items())
        assert not torch.equal(first.denoised_segments, output.denoised_segments)
    if len(first.decoder_maps) and changes.get("maps") == "before":
        assert_close(first.decoder_maps.sum(-1), torch.ones(3, len(counts), 5))


@few
@given(SEEDS, COUNTS.filter(any))
def test_empty_slots_are_seen_by_nobody_and_cost_nothing(seed, counts):
    model, targets = new_model(seed, dropout=0.0), random_targets(seed, counts)
    features, results = torch.randn(len(counts), 9, 8, generator=generator(seed)), []
    original = denoising._noised_queries

    def spoiled(*arguments):
        noised, g = original(*arguments), generator(seed)
        anchors = torch.where(noised.padding[..., None], torch.rand(noised.anchors.shape, generator=g), noised.anchors)
        other = torch.randint(3, noised.labels.shape, generator=g)
        return noised._replace(anchors=anchors, labels=torch.where(noised.padding, other, noised.labels))

    with pytest.MonkeyPatch.context() as patch:
        for make in (original, spoiled):
            patch.setattr(denoising, "_noised_queries", make)
            output = forward(model, features, None, targets)
            parameters = list(model.parameters())
            results.append((output, torch.autograd.grad(loss(model, output, targets), parameters)))
    (before, gradients), (after, spoiled_gradients) = results
    real = ~before.noised.padding
    assert int(real.sum()) == 2 * before.noised.groups * sum(counts)
    assert torch.equal(before.denoised_logits[:, real], after.denoised_logits[:, real])
    assert all(torch.equal(a, b) for a, b in zip(gradients, spoiled_gradients))


# ---- groups and slots


@given(st.integers(1, 300), COUNTS)
def test_slots_are_as_many_as_asked_for_or_one_group(wanted, counts):
    targets, most = random_targets(0, counts), max(counts)
    groups = _count_groups(wanted, targets)
    noised = denoising._noised_queries(targets, wanted, 3, Denoising(), torch.device("cpu"))
    slots = 2 * groups * most
    assert noised.anchors.shape == (len(counts), slots, 2) and noised.groups == groups >= 1
    assert slots <= wanted < slots + 2 * most or groups == 1 or not most
    for window, n in enumerate(counts):
        made = list(zip(noised.group.tolist(), noised.positive.tolist(), noised.instance.tolist()))
        real = [slot for slot, empty in zip(made, noised.padding[window].tolist()) if not empty]
        assert sorted(real) == [(g, p, i) for g in range(groups) for p in (False, True) for i in range(n)]


@few
@given(SEEDS, COUNTS.filter(any))
def test_a_slot_is_made_from_its_own_instance(seed, counts):
    "Instances in the middle of the window, where nothing is cut: the centre moves by no more than the boundaries."
    targets = random_targets(seed, counts)
    for target in targets:
        target["segments"] = target["segments"] * torch.tensor([0.4, 0.2]) + torch.tensor([0.3, 0.0])
    torch.manual_seed(seed)
    noised = denoising._noised_queries(targets, 40, 3, Denoising(label_noise=0), torch.device("cpu"))
    for window, target in enumerate(targets):
        real = ~noised.padding[window]
        own = noised.instance[real]
        assert torch.equal(noised.labels[window, real], target["labels"][own])
        centre, width = target["segments"][own].unbind(-1)
        bound = torch.where(noised.positive[real], width / 2, width)
        assert ((noised.anchors[window, real, 0] - centre).abs() <= bound + 1e-6).all()


# ---- unusual batches


@pytest.mark.parametrize("counts", [[0], [0, 0], [0, 3], [9, 1], [30]])
@pytest.mark.parametrize("wanted", [1, 12])
def test_windows_with_no_instances_and_with_more_than_there_are_queries_train(counts, wanted):
    model, targets = new_model(denoising=wanted), random_targets(0, counts)
    output = forward(model, torch.randn(len(counts), 9, 8), None, targets)
    assert isinstance(output, DenoisedOutput)
    terms = DenoisingCriterion()(output, targets)
    loss(model, output, targets).backward()
    assert all(value.isfinite() for value in terms.values())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    denoised = [value for name, value in terms.items() if "denoising" in name]
    assert len(denoised) == 9 and all((value > 0) == any(counts) for value in denoised)
    assert output.noised.groups == max(1, wanted // (2 * max(1, *counts, 1)))


@few
@given(SEEDS, st.lists(st.integers(1, 9), min_size=1, max_size=3), st.sampled_from([0.0, 1e4, math.nan]))
def test_padding_changes_no_output_loss_or_gradient_and_is_never_proposed(seed, lengths, garbage):
    "Windows of fewer steps than queries included."
    model, targets = new_model(seed, dropout=0.0), random_targets(seed, [2] * len(lengths))
    mask, features = tail_mask(lengths, 9), torch.randn(len(lengths), 9, 8, generator=generator(seed))
    results = []
    for fill in (0.0, garbage):
        output = forward(model, features.masked_fill(mask[..., None], fill), mask, targets)
        total = loss(model, output, targets)
        results.append((output, total, torch.autograd.grad(total, list(model.parameters()))))
    (output, total, gradients), (other, other_total, other_gradients) = results
    for name in ("logits", "segments", "denoised_logits", "denoised_segments", "proposed_logits", "proposed_segments"):
        assert torch.equal(getattr(output, name), getattr(other, name)), name
    assert torch.equal(total, other_total) and total.isfinite()
    assert all(torch.equal(a, b) for a, b in zip(gradients, other_gradients))
    for i, n in enumerate(lengths):
        found, repeated = denoising._best_steps(torch.randn(1, 9, 3, generator=generator(seed)), mask[i : i + 1], 5)
        assert found.max() < n and len(set(found[0].tolist())) == min(n, 5) == 5 - int(repeated.sum())


# ---- the losses, in plain Python


def focal(p, wanted):
    return 0.25 * (1 - p) ** 2 * -math.log(p) if wanted else 0.75 * p**2 * -math.log(1 - p)


@few
@given(SEEDS, COUNTS)
def test_every_denoising_term_is_that_of_plain_loops(seed, counts):
    model, targets = new_model(seed), random_targets(seed, counts)
    output = forward(model, torch.randn(len(counts), 9, 8, generator=generator(seed)), None, targets)
    terms, noised = DenoisingCriterion()(output, targets), output.noised
    divisor = max(1, sum(counts)) * noised.groups
    for layer in range(3):
        classes = l1 = iou = 0.0
        for window, target in enumerate(targets):
            for slot in range(len(noised.group)):
                i, keep = int(noised.instance[slot]), bool(noised.positive[slot])
                if i >= counts[window]:
                    continue
                for c in range(3):
                    p = 1 / (1 + math.exp(-output.denoised_logits[layer, window, slot, c].item()))
                    classes += focal(p, keep and c == int(target["labels"][i]))
                if keep:
                    c, w = output.denoised_segments[layer, window, slot].tolist()
                    d, v = target["segments"][i].tolist()
                    shared = max(0.0, min(c + w / 2, d + v / 2) - max(c - w / 2, d - v / 2))
                    l1, iou = l1 + abs(c - d) + abs(w - v), iou + 1 - shared / (w + v - shared)
        suffix = f"_{layer}" if layer < 2 else ""
        for name, expected in (("class", classes), ("l1", l1), ("iou", iou)):
            assert terms[f"{name}_denoising{suffix}"].item() == pytest.approx(expected / divisor, rel=1e-3, abs=1e-5)


@few
@given(SEEDS, COUNTS)
def test_proposals_are_matched_as_a_decoder_layer_is(seed, counts):
    model, targets = new_model(seed), random_targets(seed, counts)
    output = forward(model, torch.randn(len(counts), 9, 8, generator=generator(seed)), None, targets)
    none = torch.empty(0)
    layer = Output(output.proposed_logits[None], output.proposed_segments[None], none, none, none, none)
    terms = DenoisingCriterion()(output, targets)
    for name, value in SetCriterion()(layer, targets).items():
        assert torch.equal(terms[f"{name}_proposal"], value)


def test_the_gradient_of_the_queries_stops_at_the_proposals():
    "Their anchors are proposed segments, from which no loss of the decoder flows back into the heads of the proposals."
    model, targets = new_model(), random_targets(0, [2, 1])
    output = forward(model, torch.randn(2, 9, 8), None, targets)
    terms = DenoisingCriterion()(output, targets)
    heads = list(model.proposals.parameters())

    def reached(names):
        total = torch.stack([terms[name] for name in names]).sum()
        return [g is not None for g in torch.autograd.grad(total, heads, allow_unused=True, retain_graph=True)]

    assert not any(reached([name for name in terms if "proposal" not in name]))
    assert all(reached([name for name in terms if "proposal" in name]))


def test_no_term_of_a_dino_is_dropped():
    model, targets = new_model(), random_targets(0, [2, 1])
    output = forward(model, torch.randn(2, 9, 8), None, targets)
    config = LossConfig(classes=1.5, l1=0.5, iou=3.0, feedback_encoder=0.0, feedback_decoder=7.0)
    criterion = DenoisingCriterion(config)
    terms = criterion(output, targets) | feedback_loss(output)
    assert len(terms) == 3 * 3 + 3 * 3 + 3 + 2
    weights = {"class": 1.5, "l1": 0.5, "iou": 3.0}
    expected = 7 * terms["feedback_decoder"]
    for name, value in terms.items():
        expected = expected + weights.get(name.split("_")[0], 0) * value
    assert_close(criterion.total(terms), expected)
    with pytest.raises(KeyError, match="class_noising"):
        criterion.total(terms | {"class_noising": torch.tensor(1.0)})
    del terms["iou"]  # its kin, iou_0, iou_denoising and iou_proposal, cannot stand in for it
    with pytest.raises(KeyError, match="'iou'"):
        criterion.total(terms)


# ---- training


def test_a_dino_is_not_trained_by_a_criterion_that_ignores_half_of_it(windows):
    model, before = new_model(), new_model()
    with pytest.raises(ValueError, match="DenoisingCriterion"):
        fit(model, windows, objective=Objective(SetCriterion()))
    assert same_weights(model, before)


@pytest.mark.parametrize("changes", [{}, {"encoder_layers": 0}, {"decoder_self_attention": "none"}], ids=str)
def test_fast_and_plain_agree(changes):
    """Ten steps, with dropout and noise drawn from the same numbers.

    Each starts from equal weights: once rounding has made two proposals change places, two runs go different ways.
    """
    models = [new_model(**changes) for _ in range(2)]
    sides = [prepare(m, CONFIG, "cpu", fast) for m, fast in zip(models, (True, False))]
    objective = objective_for(models[0])
    for step in range(10):
        models[0].load_state_dict(models[1].state_dict())
        mask = tail_mask([32, 20, 32, 9], 32) if step % 2 else None
        features = torch.randn(4, 32, 8, generator=generator(step))
        batch, values = Batch(features, mask, random_targets(step, [2, 0, 1, 3])), []
        for side in sides:
            torch.manual_seed(step)
            values.append(train_step(*side, objective, batch, 0.1).read())
        fast, plain = values
        assert {"class_proposal", "iou_denoising_0"} < set(fast) and fast == pytest.approx(plain, rel=1e-4, abs=1e-6)
        a, b = (torch.cat([p.grad.flatten() for p in m.parameters()]) for m in models)
        assert (a - b).norm() < 1e-4 * b.norm()


def fit(model, windows, config=CONFIG, objective=None, **options):
    objective = objective or make_objective(model)
    return train(model, windows, objective, config, device="cpu", progress=False, seed=3, **options)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_lost_run_is_continued_to_the_same_bits(windows, tmp_path, precision):
    config = TrainConfig(**{**vars(CONFIG), "precision": precision})

    def stop(epochs):
        if epochs == 2:
            raise KeyboardInterrupt

    whole, resumed = new_model(), new_model(seed=99)
    history = fit(whole, windows, config)
    assert np.isfinite(history.to_numpy()).all()
    with pytest.raises(KeyboardInterrupt):
        fit(new_model(), windows, config, state=State(tmp_path, save_seconds=0), on_epoch=stop)
    torch.manual_seed(12345)
    continued = fit(resumed, windows, config, state=State(tmp_path))
    assert same_weights(whole, resumed) and {p.dtype for p in whole.parameters()} == {torch.float32}
    pd.testing.assert_frame_equal(*(h.drop(columns="seconds") for h in (history, continued)), check_exact=True)


def test_on_cuda_a_dino_is_not_compiled(monkeypatch):
    "The number of its queries changes with the batch."
    monkeypatch.setattr(speed, "find_spec", lambda _: True)
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, **_: compiled.append(type(self)))
    for model in (new_model(), SelfDETR(ModelConfig(**SIZES))):
        accelerate(model, torch.device("cuda"))
    assert compiled == [SelfDETR]


# ---- afterwards it is a model like the others


def test_denoising_is_over_when_training_is():
    model = new_model().eval()
    other = make_model(DesignConfig(**{**SIZES, "denoising": 300})).eval()
    other.load_state_dict(model.state_dict())
    features, targets = torch.randn(2, 9, 8), random_targets(0, [2, 1])
    a, b = model(features), other(features, targets=targets)
    assert all(torch.equal(getattr(a, name), getattr(b, name)) for name in PLAIN_FIELDS)
