"""What engines are held against: the model's own forward, and statistics that tell what tokens were drawn from.

Shapes: [R] response tokens, [V] vocabulary, [N] draws.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from pekoe.core.types import Completion, Request, SamplingParams
from pekoe.model import Decoder, PackedAttention

Pair = tuple[Request, Completion]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

Z_LIMIT = 4.5
"""Deviations that a statistic may be off: one right engine in 300,000 fails a test by chance, at any number of bins."""


@torch.no_grad()
def logits_of(model: Decoder, sequences: Sequence[Ints]) -> list[Floats]:
    """The logits after every token of each sequence, by one packed forward: [L, V] each."""
    bounds = np.cumsum([0, *map(len, sequences)]).tolist()
    positions = np.concatenate([np.arange(len(sequence)) for sequence in sequences])
    hidden = model(torch.from_numpy(np.concatenate(sequences)), torch.from_numpy(positions), PackedAttention(bounds))
    logits = model.logits(hidden).double().numpy()
    return [logits[start:end] for start, end in pairwise(bounds)]


def response_logits(model: Decoder, pairs: Sequence[Pair]) -> list[Floats]:
    """The logits that each response token was drawn from, given the true tokens before it: [R, V] each."""
    logits = logits_of(model, [np.concatenate([r.tokens, c.tokens]) for r, c in pairs])
    return [each[len(r.tokens) - 1 : -1] for each, (r, _) in zip(logits, pairs, strict=True)]


def logprobs_of(model: Decoder, pairs: Sequence[Pair]) -> list[Floats]:
    """The log-prob [R] of each response token at its temperature (0: at 1), before any truncation."""
    logprobs: list[Floats] = []
    for (request, completion), logits in zip(pairs, response_logits(model, pairs), strict=True):
        scaled = logits / (request.params.temperature or 1.0)
        chosen = np.take_along_axis(scaled, completion.tokens[:, None], -1)[:, 0]
        logprobs.append(chosen - np.logaddexp.reduce(scaled, -1))
    return logprobs


def versions_by_token(completion: Completion) -> Ints:
    """The policy version of every response token, [R]."""
    starts = [start for _, start in completion.versions]
    lengths = np.diff([*starts, completion.num_tokens])
    return np.repeat([version for version, _ in completion.versions], lengths)


def worst_difference(models: Mapping[int, Decoder], pairs: Iterable[Pair]) -> float:
    """The largest difference between a token's log-prob and that of the model of the token's own version."""
    pairs, worst = [(r, c) for r, c in pairs if c.num_tokens], 0.0
    for version, model in models.items():
        crossing = [(r, c) for r, c in pairs if version in dict(c.versions)]
        if not crossing:
            continue
        for (_, completion), expected in zip(crossing, logprobs_of(model, crossing), strict=True):
            mine = versions_by_token(completion) == version
            worst = max(worst, float(np.abs(completion.logprobs - expected)[mine].max()))
    return worst


def probabilities(logits: Floats, params: SamplingParams, positions: Ints | None = None) -> Floats:
    """What tokens are drawn from, [N, V], given their logits [N, V]: early stops banned, then top-k, then top-p.

    `positions` [N] are places in the response (None: beyond `min_new_tokens`). Top-p is of what top-k left.
    """
    scaled = logits / params.temperature
    if positions is not None and params.stops:
        scaled[np.ix_(np.flatnonzero(positions < params.min_new_tokens), np.array(params.stops))] = -np.inf
    probs = np.exp(scaled - np.logaddexp.reduce(scaled, -1, keepdims=True))
    order = np.argsort(-probs, -1, kind="stable")
    ordered = np.take_along_axis(probs, order, -1)
    if params.top_k:
        ordered[:, params.top_k :] = 0
        ordered /= ordered.sum(-1, keepdims=True)
    ordered[ordered.cumsum(-1) - ordered >= params.top_p] = 0
    np.put_along_axis(probs, order, ordered / ordered.sum(-1, keepdims=True), -1)
    return probs


def uniforms_of(probs: Floats, tokens: Ints, seed: int = 0) -> Floats:
    """A number in [0, 1) for each token [N]: uniform and independent if, and only if, drawn from `probs` [N, V].

    The randomised probability integral transform (Rosenblatt 1952): the mass of all likelier tokens, and a random part
    of the token's own. By falling probability, so that a distribution too flat or too peaked shows as a slope.
    """
    own = np.take_along_axis(probs, tokens[:, None], -1)
    assert own.min() > 0, f"token {tokens[own[:, 0].argmin()]} was sampled, which has no probability"
    likelier = (probs * (probs > own)).sum(-1)
    return likelier + own[:, 0] * np.random.default_rng(seed).random(len(tokens))


def chi_square_limit(degrees: int) -> float:
    """What chi-square passes by chance as seldom as a normal passes Z_LIMIT deviations (Wilson and Hilferty 1931)."""
    width = 2 / (9 * degrees)
    return degrees * (1 - width + Z_LIMIT * math.sqrt(width)) ** 3


def assert_drawn_from(counts: NDArray[np.int64], expected: Floats) -> None:
    """Chi-square of counts against expected ones; cells of less than 5 expected are joined into one."""
    assert not counts[expected == 0].any(), "a token was sampled that has no probability"
    rare = expected < 5
    observed, wanted = counts[~rare].astype(float), expected[~rare]
    if expected[rare].sum() >= 1:
        observed, wanted = np.append(observed, counts[rare].sum()), np.append(wanted, expected[rare].sum())
    assert len(wanted) > 1, "too few draws to tell anything"
    statistic = float(((observed - wanted) ** 2 / wanted).sum())
    limit = chi_square_limit(len(wanted) - 1)
    assert statistic <= limit, f"chi-square {statistic:.1f} over {len(wanted)} cells, expected at most {limit:.1f}"


def assert_uniform(numbers: Floats, num_bins: int = 16) -> None:
    """Chi-square of numbers in [0, 1) against the uniform distribution."""
    counts, _ = np.histogram(numbers, num_bins, (0, 1))
    assert_drawn_from(counts, np.full(num_bins, len(numbers) / num_bins))


def assert_independent(first: Floats, second: Floats, num_bins: int = 5) -> None:
    """Chi-square of pairs of numbers in [0, 1) against the uniform distribution on the square."""
    counts, _, _ = np.histogram2d(first, second, num_bins, ((0, 1), (0, 1)))
    assert_drawn_from(counts.astype(np.int64).ravel(), np.full(num_bins**2, len(first) / num_bins**2))
