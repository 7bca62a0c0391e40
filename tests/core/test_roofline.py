"""Operations and bytes: by hand for a small shape, and what a roofline makes of them."""

from __future__ import annotations

import pytest

from pekoe.core.roofline import (
    Ceilings,
    adapter_parameters,
    sampling_bytes,
    sampling_flops,
    training_bytes,
    training_flops,
)
from pekoe.core.spec import ModelSpec

SPEC = ModelSpec("qwen2", 10, 4, 2, 2, 1, 2, 8, 64)
LAYER = 4 * 2 * (2 * 2 + 2 * 1) + 3 * 4 * 8  # q, k, v, o and the three of the MLP: 144 weights
HEAD = 10 * 4


def test_training_takes_three_passes_over_all_tokens_and_the_head_at_the_targets():
    count = training_flops(SPEC, [3, 5], 6)
    assert count.linear == 3 * 2 * (2 * LAYER) * 8
    assert count.head == 3 * 2 * HEAD * 6
    assert count.attention == 3 * 2 * 2 * (2 * 2 * 2) * (6 + 15)  # passes, 2 a multiply-add, products, layers x H x D


def test_a_group_computes_its_prompt_once_and_its_last_tokens_never():
    alone = sampling_flops(SPEC, [(3, [4])])
    assert alone.linear == 2 * (2 * LAYER) * (3 + 3)
    assert alone.head == 2 * HEAD * 4  # the first token is chosen after the prompt
    assert alone.attention == 4 * 2 * 2 * 2 * (6 * 7 // 2)
    both = sampling_flops(SPEC, [(3, [4, 2])])
    assert both.linear - alone.linear == 2 * (2 * LAYER) * 1
    assert both.attention - alone.attention == 4 * 2 * 2 * 2 * 4  # one more token, which sees four
    apart = sampling_flops(SPEC, [(3, [4]), (3, [2])])
    assert apart.linear - both.linear == 2 * (2 * LAYER) * 3


def test_bytes_are_those_of_weights_kv_and_the_optimizer():
    kv = 2 * 2 * 1 * 2  # keys and values, layers, K, D
    weights = SPEC.num_parameters - HEAD  # not the embeddings, of which a token reads a row
    own, prompts = (1 + 2 + 3 + 4) + (1 + 2), 3 * 4  # the prompt's as often as the longer response goes on
    assert sampling_bytes(SPEC, [(3, [4, 2])], 5, "bfloat16") == 2 * (5 * weights + kv * (own + prompts))
    assert training_bytes(SPEC, 2, 1, "float32") == SPEC.num_parameters * (2 * 3 * 4 + 28)


def test_beside_an_adapter_frozen_weights_have_no_gradient():
    adapter = adapter_parameters(SPEC, 2)
    sizes = (4 + 4) + 2 * (4 + 2) + (4 + 4) + 3 * (4 + 8)  # inputs and outputs: q and o, k and v, the MLP's
    assert adapter == 2 * 2 * sizes
    assert adapter_parameters(SPEC, 2, ("q_proj", "model.layers.1.mlp.up_proj")) == 2 * (2 * 8 + 12)
    full, low = training_flops(SPEC, [3, 5], 6), training_flops(SPEC, [3, 5], 6, adapter)
    assert low.linear == pytest.approx(2 * 2 * (2 * LAYER) * 8 + 3 * 2 * adapter * 8)
    assert low.head == pytest.approx(2 * 2 * HEAD * 6)
    assert low.attention == full.attention
    each = 2 * 4 * (2 * SPEC.num_parameters + 3 * adapter)
    assert training_bytes(SPEC, 2, 1, "float32", adapter) == each + 28 * adapter


def test_the_larger_of_the_two_least_times_bounds():
    ceilings = Ceilings(flop_s=100.0, byte_s=10.0)
    assert ceilings.reached(50.0, 1.0, 2.0) == (pytest.approx(0.25), "arithmetic")
    assert ceilings.reached(50.0, 10.0, 2.0) == (pytest.approx(0.5), "memory")
