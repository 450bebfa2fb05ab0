"""Self-DETR as it is commonly written, layer by layer and loss by loss: what the package's speed is compared with.

Parameters and loss terms are those of `selfdetr.model.SelfDETR` and `selfdetr.trainer.train_step`; nothing of them is
used here but the configurations. No script of its own; `train_step.py --how eager` measures it.
"""

import math

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import nn

from selfdetr.losses import LossConfig
from selfdetr.matcher import MatchCost

EPS = 1e-7


def mlp(*dims):
    "Linear layers with ReLU between them."
    layers = [m for before, after in zip(dims[:-1], dims[1:]) for m in (nn.Linear(before, after), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def sine(x, dim):
    "(...) in [0, 1] -> (..., dim), sine and cosine interleaved."
    frequency = 10000 ** (torch.arange(0, dim, 2, dtype=torch.float32, device=x.device) / dim)
    angle = 2 * math.pi * x[..., None] / frequency
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(-2)


def inverse_sigmoid(x, eps=1e-5):
    x = x.clamp(min=0, max=1)
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))


def attention(q, k, v, heads, dropout, training, padding=None):
    "Attention behind its projections: output (batch, queries, dim) and the map, averaged over heads."
    batch, queries, keys = len(q), q.shape[1], k.shape[1]
    q, k, v = (x.view(batch, x.shape[1], heads, -1).transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    scores = torch.bmm(q * q.shape[-1] ** -0.5, k.transpose(1, 2)).view(batch, heads, queries, keys)
    if padding is not None:
        scores = scores.masked_fill(padding[:, None, None], float("-inf"))
    weights = scores.softmax(-1)
    output = torch.bmm(F.dropout(weights, dropout, training).flatten(0, 1), v)
    return output.view(batch, heads, queries, -1).transpose(1, 2).flatten(2), weights.sum(1) / heads


class Layer(nn.Module):
    "What encoder and decoder layers share: the feed-forward network and the dropout."

    def __init__(self, c):
        super().__init__()
        self.linear1, self.linear2 = nn.Linear(c.dim, c.hidden), nn.Linear(c.hidden, c.dim)
        self.activation, self.dropout, self.norm = nn.PReLU(), nn.Dropout(c.dropout), nn.LayerNorm(c.dim)

    def feed_forward(self, x):
        return self.norm(x + self.dropout(self.linear2(self.dropout(self.activation(self.linear1(x))))))


class EncoderLayer(Layer):
    def __init__(self, c):
        super().__init__(c)
        self.attention = nn.MultiheadAttention(c.dim, c.heads, c.dropout, batch_first=True)
        self.norm1 = nn.LayerNorm(c.dim)

    def forward(self, x, position, padding):
        q = k = x + position
        update, weights = self.attention(
            q, k, value=x, key_padding_mask=padding, need_weights=True, average_attn_weights=True
        )
        return self.feed_forward(self.norm1(x + self.dropout(update))), weights


class DecoderLayer(Layer):
    "Self-attention among the queries, conditional cross-attention to the memory, feed-forward network."

    def __init__(self, c, first):
        super().__init__(c)
        self.heads, self.p = c.heads, c.dropout
        names = ("sa_q_content", "sa_q_position", "sa_k_content", "sa_k_position", "sa_value", "sa_out")
        names += ("ca_q_content", "ca_k_content", "ca_q_sine", "ca_k_position", "ca_value", "ca_out")
        for name in (*names, "ca_q_position") if first else names:
            setattr(self, name, nn.Linear(c.dim, c.dim))
        self.first, self.norm1, self.norm2 = first, nn.LayerNorm(c.dim), nn.LayerNorm(c.dim)

    def forward(self, x, anchor, centre, memory, position, padding):
        q = self.sa_q_content(x) + self.sa_q_position(anchor)
        k = self.sa_k_content(x) + self.sa_k_position(anchor)
        update, self_map = attention(q, k, self.sa_value(x), self.heads, self.p, self.training)
        x = self.norm1(x + self.dropout(self.sa_out(update)))
        q, k, k_position = self.ca_q_content(x), self.ca_k_content(memory), self.ca_k_position(position)
        if self.first:
            q, k = q + self.ca_q_position(anchor), k + k_position
        q, k = self.concatenate(q, self.ca_q_sine(centre)), self.concatenate(k, k_position)
        update, cross_map = attention(q, k, self.ca_value(memory), self.heads, self.p, self.training, padding)
        return self.feed_forward(self.norm2(x + self.dropout(self.ca_out(update)))), self_map, cross_map

    def concatenate(self, content, position):
        "Content and position side by side in every head."
        content, position = (x.view(*x.shape[:2], self.heads, -1) for x in (content, position))
        return torch.cat((content, position), dim=-1).flatten(2)


class Model(nn.Module):
    "Input projection, encoder, decoder with anchors refined from layer to layer, and heads."

    def __init__(self, c):
        super().__init__()
        self.config = c
        self.input, self.input_norm = nn.Linear(c.channels, c.dim), nn.GroupNorm(c.norm_groups, c.dim)
        self.encoder = nn.ModuleList(EncoderLayer(c) for _ in range(c.encoder_layers))
        self.decoder = nn.ModuleList(DecoderLayer(c, i == 0) for i in range(c.decoder_layers))
        self.position_scale, self.query_scale = mlp(c.dim, c.dim, c.dim), mlp(c.dim, c.dim, c.dim)
        self.width_scale, self.anchor_head = mlp(c.dim, c.dim, 1), mlp(2 * c.dim, c.dim, c.dim)
        self.norm, self.segment_head = nn.LayerNorm(c.dim), mlp(c.dim, c.dim, c.dim, 2)
        self.class_head, self.anchors = nn.Linear(c.dim, c.classes), nn.Parameter(torch.randn(c.queries, 2))
        for parameter in (*self.encoder.parameters(), *self.decoder.parameters()):
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        nn.init.zeros_(self.segment_head[-1].weight)
        nn.init.zeros_(self.segment_head[-1].bias)
        nn.init.constant_(self.class_head.bias, -math.log(99))

    def forward(self, features, padding):
        "(batch, steps, channels), (batch, steps) -> logits, segments and maps, a list with one entry a layer each."
        c, batch = self.config, len(features)
        steps = (~padding).cumsum(1, dtype=torch.float32)
        position = sine(steps / steps[:, -1:], c.dim)
        x = self.input_norm(self.input(features.masked_fill(padding[..., None], 0)).transpose(1, 2)).transpose(1, 2)
        out = {name: [] for name in ("logits", "segments", "encoder_maps", "decoder_maps", "cross_maps")}
        for layer in self.encoder:
            x, weights = layer(x, position * self.position_scale(x), padding)
            out["encoder_maps"].append(weights)
        content = x.new_zeros(batch, c.queries, c.dim)
        anchor = self.anchors.sigmoid()[None].repeat(batch, 1, 1)
        for i, layer in enumerate(self.decoder):
            embedded = sine(anchor, c.dim)
            centre = embedded[:, :, 0] * (self.width_scale(content).sigmoid() / anchor[..., 1:])
            if i > 0:
                centre = centre * self.query_scale(content)
            content, self_map, cross_map = layer(
                content, self.anchor_head(embedded.flatten(2)), centre, x, position, padding
            )
            normed = self.norm(content)
            out["logits"].append(self.class_head(normed))
            out["segments"].append((self.segment_head(normed) + inverse_sigmoid(anchor)).sigmoid())
            out["decoder_maps"].append(self_map)
            out["cross_maps"].append(cross_map)
            anchor = (self.segment_head(content) + inverse_sigmoid(anchor)).sigmoid().detach()
        return out


def start_end(segments):
    centre, width = segments.unbind(-1)
    return torch.stack((centre - width / 2, centre + width / 2), dim=-1)


def iou(a, b):
    "IoU of segments given by start and end, with broadcasting."
    shared = (torch.min(a[..., 1], b[..., 1]) - torch.max(a[..., 0], b[..., 0])).clamp(min=0)
    return shared / (a[..., 1] - a[..., 0] + b[..., 1] - b[..., 0] - shared)


@torch.no_grad()
def hungarian(logits, segments, targets, cost):
    "The matched (queries, instances) of every window, for one layer: one cost matrix, windows one after the other."
    batch, queries = logits.shape[:2]
    p, flat = logits.flatten(0, 1).sigmoid(), segments.flatten(0, 1)
    labels, true = torch.cat([t["labels"] for t in targets]), torch.cat([t["segments"] for t in targets])
    positive = cost.alpha * (1 - p) ** cost.gamma * -(p + 1e-8).log()
    negative = (1 - cost.alpha) * p**cost.gamma * -(1 - p + 1e-8).log()
    total = cost.classes * (positive[:, labels] - negative[:, labels]) + cost.l1 * torch.cdist(flat, true, p=1)
    total = total - cost.iou * iou(start_end(flat)[:, None], start_end(true)[None])
    by_window = total.view(batch, queries, -1).cpu().split([len(t["labels"]) for t in targets], -1)
    pairs = [linear_sum_assignment(part[i]) for i, part in enumerate(by_window)]
    return [(torch.as_tensor(i, dtype=torch.int64), torch.as_tensor(j, dtype=torch.int64)) for i, j in pairs]


def layer_losses(logits, segments, targets, config, cost, count):
    "Focal, L1 and IoU loss of one decoder layer."
    pairs = hungarian(logits, segments, targets, cost)
    window = torch.cat([torch.full_like(i, n) for n, (i, _) in enumerate(pairs)])
    query = torch.cat([i for i, _ in pairs])
    labels = torch.cat([t["labels"][j] for t, (_, j) in zip(targets, pairs)])
    true = torch.cat([t["segments"][j] for t, (_, j) in zip(targets, pairs)])
    onehot = torch.zeros_like(logits)
    onehot[window, query, labels] = 1
    p, entropy = logits.sigmoid(), F.binary_cross_entropy_with_logits(logits, onehot, reduction="none")
    p_t = p * onehot + (1 - p) * (1 - onehot)
    alpha_t = config.alpha * onehot + (1 - config.alpha) * (1 - onehot)
    predicted = segments[window, query]
    return {
        "class": (alpha_t * (1 - p_t) ** config.gamma * entropy).sum() / count,
        "l1": F.l1_loss(predicted, true, reduction="none").sum() / count,
        "iou": (1 - iou(start_end(predicted), start_end(true))).sum() / count,
    }


def guide(product, padding=None):
    "Square root of a product of maps, rows summing to 1."
    root = (product + EPS).sqrt()
    if padding is not None:
        root = root.masked_fill(padding[:, None], 0)
    return root / root.sum(-1, keepdim=True)


def divergence(target, maps):
    "KL divergence of every row."
    return (target * ((target + EPS).log() - (maps + EPS).log())).sum(-1)


def feedback_losses(out, padding):
    "The self-feedback of encoder and decoder (Eqs. 2-6)."
    cross = [maps.detach() for maps in out["cross_maps"]]
    aggregated = out["encoder_maps"][0]
    for maps in out["encoder_maps"][1:]:
        aggregated = guide(torch.bmm(aggregated, maps.transpose(1, 2)), padding)
    mean = torch.stack(cross).mean(0)
    rows = divergence(guide(torch.bmm(mean.transpose(1, 2), mean), padding), aggregated)
    layers = [divergence(guide(torch.bmm(c, c.transpose(1, 2))), m).mean() for c, m in zip(cross, out["decoder_maps"])]
    return {"feedback_encoder": rows[~padding].mean(), "feedback_decoder": sum(layers) / len(layers)}


def losses(out, targets, padding, config=LossConfig(), cost=MatchCost()):
    "All unweighted terms; those of the early decoder layers end in their number."
    targets = [{name: value.to(padding.device) for name, value in t.items()} for t in targets]
    count = max(sum(len(t["labels"]) for t in targets), 1)
    terms, last = feedback_losses(out, padding), len(out["logits"]) - 1
    for i, (logits, segments) in enumerate(zip(out["logits"], out["segments"])):
        values = layer_losses(logits, segments, targets, config, cost, count)
        terms |= {name if i == last else f"{name}_{i}": value for name, value in values.items()}
    return terms


def make(config, train, device):
    "The model on its device, in training mode, and its optimiser."
    model = Model(config).to(device).train()
    return model, torch.optim.AdamW(model.parameters(), lr=train.lr, weight_decay=train.weight_decay)


def train_step(model, optimizer, batch, clip, weights=LossConfig().weights):
    "One step; returns the loss as a number."
    out = model(batch.features, batch.mask)
    terms = losses(out, batch.targets, batch.mask)
    total = sum(weights[name.rsplit("_", 1)[0] if name[-1].isdigit() else name] * terms[name] for name in terms)
    value = total.item()
    if not math.isfinite(value):
        raise FloatingPointError(f"the loss is {value}")
    optimizer.zero_grad()
    total.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    return value
