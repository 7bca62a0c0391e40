"""Sampling at a temperature on a CPU in one pass over the logits. The reference in plain torch: `engine.sampling`."""

# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportCallIssue=false
from __future__ import annotations

import numpy as np

from pekoe.kernels.jit import kernel
from pekoe.kernels.simd import add, exp, larger, largest_of, load, mul, splat, store, sum_of

_SPAN = 64  # tokens whose probabilities are summed before any is looked at


@kernel
def draw(first, last, logits, size, rows, uniform, scale, tokens, logprobs):
    """By the inverse of the cumulative distribution over token ids; -1 where it is not finite."""
    room = (size + _SPAN - 1) // _SPAN * _SPAN
    weights, spans = np.empty(room, np.float32), np.empty(room // _SPAN, np.float32)
    for i in range(first, last):
        at = rows[i] * size
        top = splat(np.float32(-np.inf))
        for t in range(0, size - 7, 8):
            top = larger(load(logits, at + t), top)
        largest = largest_of(top)
        for t in range(size - size % 8, size):
            largest = max(largest, logits[at + t])
        shift, factor = splat(-largest), splat(np.float32(scale))
        weights[size:] = -np.inf
        for t in range(0, size - 7, 8):
            store(weights, t, mul(add(load(logits, at + t), shift), factor))
        for t in range(size - size % 8, size):
            weights[t] = (logits[at + t] - largest) * np.float32(scale)
        total = 0.0
        for span in range(room // _SPAN):
            part = splat(np.float32(0))
            for t in range(span * _SPAN, (span + 1) * _SPAN, 8):
                x = exp(load(weights, t))
                store(weights, t, x)
                part = add(part, x)
            spans[span] = sum_of(part)
            total += spans[span]
        goal, span, chosen = uniform[i] * total, 0, -1
        while span < len(spans) - 1 and goal >= spans[span]:
            goal -= spans[span]
            span += 1
        for t in range(span * _SPAN, min(size, (span + 1) * _SPAN)):
            if weights[t] > np.float32(1e-37):  # the smallest that `exp` gives stands for 0
                chosen = t
                goal -= weights[t]
                if goal < 0:
                    break
        tokens[i] = chosen if np.isfinite(total) else -1
        logprobs[i] = (logits[at + chosen] - largest) * scale - np.log(total)
