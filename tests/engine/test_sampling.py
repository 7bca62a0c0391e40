"""Sampling: its statistics, and I8 (a token depends on its logits and its key alone)."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from pekoe.core.types import SamplingParams
from pekoe.engine import sampling
from pekoe.engine.sampling import sample, sequence_key, uniforms

NUM_DRAWS = 20_000


def draw(logits: torch.Tensor, params: SamplingParams, num: int = NUM_DRAWS, **more: Any) -> tuple[list[int], Any]:
    """`num` draws from one distribution, each by a sequence of its own."""
    keys = np.array([sequence_key(params, "p", 0, i) for i in range(num)], np.uint64)
    uniform = uniforms(keys, np.zeros(num, np.int64))
    tokens, logprobs = sample(logits.expand(num, -1), uniform, params, **more)
    return tokens.tolist(), torch.from_numpy(logprobs)


def chi_square(tokens: list[int], probs: torch.Tensor) -> float:
    """(chi-square statistic - its mean) / its standard deviation."""
    support = (probs > 0).nonzero()[:, 0].tolist()
    counts = Counter(tokens)
    assert set(counts) <= set(support), "a token of probability 0 was drawn"
    expected = [len(tokens) * float(probs[t]) for t in support]
    statistic = sum((counts[t] - e) ** 2 / e for t, e in zip(support, expected, strict=True))
    freedom = len(support) - 1
    return (statistic - freedom) / np.sqrt(2 * max(1, freedom))


@pytest.fixture(params=["fused", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of sampling: the CPU kernel, and torch's operations."""
    if request.param == "torch":

        def plain(logits: Any, uniform: Any, params: SamplingParams, rows: Any) -> Any:
            return sampling._sample_torch(logits, uniform, params, rows, np.zeros(len(rows), np.bool_))

        monkeypatch.setattr(sampling, "_sample_fused", plain)
    return request.param


LOGITS = torch.tensor([[1.0, 0.0, 2.0, -1.0, 0.5, 1.5, -2.0, 0.9]])


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_temperature(temperature: float):
    params = SamplingParams(temperature=temperature)
    tokens, logprobs = draw(LOGITS, params)
    expected = torch.softmax(LOGITS[0] / temperature, -1)
    assert chi_square(tokens, expected) < 4
    torch.testing.assert_close(logprobs, expected.log()[tokens])


@pytest.mark.parametrize(("top_k", "top_p"), [(3, 1.0), (0, 0.7), (5, 0.6), (1, 1.0), (0, 0.01), (100, 1.0)])
def test_truncation(top_k: int, top_p: float):
    params = SamplingParams(top_k=top_k, top_p=top_p)
    tokens, logprobs = draw(LOGITS, params)
    full = torch.softmax(LOGITS[0], -1)
    order = full.argsort(descending=True).tolist()
    kept, mass = order[: top_k or None], 0.0
    nucleus: list[int] = []
    for token in kept:
        if mass >= top_p * float(full[kept].sum()):
            break
        nucleus.append(token)
        mass += float(full[token])
    truncated = torch.zeros_like(full)
    truncated[nucleus] = full[nucleus] / full[nucleus].sum()
    assert chi_square(tokens, truncated) < 4
    torch.testing.assert_close(logprobs, full.log()[tokens])  # before truncation


def test_greedy_gives_logprobs_at_temperature_one():
    tokens, logprobs = draw(LOGITS, SamplingParams(temperature=0), num=1)
    assert tokens == [2]
    torch.testing.assert_close(logprobs, torch.log_softmax(LOGITS, -1)[:, 2])


def test_min_new_tokens_bans_stop_tokens():
    params = SamplingParams(stop_token_ids=(2, 5), min_new_tokens=1)
    tokens, logprobs = draw(LOGITS, params, 500, ban=np.ones(500, np.bool_))
    assert not {2, 5} & set(tokens)
    torch.testing.assert_close(logprobs, torch.log_softmax(LOGITS[0], -1)[tokens])
    assert {2, 5} & set(draw(LOGITS, params, 500, ban=np.zeros(500, np.bool_))[0])


@pytest.mark.parametrize("lead", [5.0, 20.0, 200.0])
def test_a_banned_token_that_all_but_surely_came_leaves_the_others_as_they_were(lead: float):
    logits = LOGITS.clone()
    logits[0, 2] += lead
    params = SamplingParams(stop_token_ids=(2,), min_new_tokens=1, temperature=0.5)
    tokens, logprobs = draw(logits, params, 4000, ban=np.ones(4000, np.bool_))
    rest = logits[0].clone()
    rest[2] = -torch.inf
    assert chi_square(tokens, torch.softmax(rest / 0.5, -1)) < 4
    torch.testing.assert_close(logprobs, torch.log_softmax(logits[0] / 0.5, -1)[tokens])


@pytest.mark.usefixtures("way")
def test_extreme_uniforms_never_choose_the_impossible():
    logits = torch.tensor([[0.0, -torch.inf, 0.0, -torch.inf]])
    for u in (0.0, 0.5, 1 - 2**-53):
        token = sample(logits, np.array([u]), SamplingParams())[0]
        assert token.item() in (0, 2)


@pytest.mark.parametrize("size", [3, 8, 50, 64, 200, 4096])
def test_both_ways_agree(size: int):
    generator = torch.Generator().manual_seed(size)
    logits = 3 * torch.randn(40, size, generator=generator)
    rows = np.arange(100) % 40
    keys = np.array([sequence_key(SamplingParams(), "p", 0, i) for i in range(100)], np.uint64)
    uniform = uniforms(keys, np.zeros(100, np.int64))
    params = SamplingParams(temperature=0.8)
    fused = sampling._sample_fused(logits, uniform, params, rows)
    plain = sampling._sample_torch(logits, uniform, params, rows, np.zeros(100, np.bool_))
    assert (fused[0] == plain[0]).mean() >= 0.99  # a number at the very border of two tokens may go either way
    same = fused[0] == plain[0]
    np.testing.assert_allclose(fused[1][same], plain[1][same], atol=2e-6, rtol=2e-6)


@pytest.mark.usefixtures("way")
def test_logits_that_are_not_finite_are_seen():
    for bad in (torch.nan, torch.inf):
        logits = LOGITS.clone()
        logits[0, 3] = bad
        _, logprobs = sample(logits, np.array([0.3]), SamplingParams())
        assert not np.isfinite(logprobs).all()


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("top_k", [0, 40])
def test_i8_a_row_does_not_depend_on_its_batch(top_k: int):
    """Fixed logits: each row alone, in a batch, and in another order give the same token and log-prob."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(64, 50, generator=generator)
    params = SamplingParams(temperature=0.9, top_p=0.95 if top_k else 1.0, top_k=top_k)
    keys = np.array([sequence_key(params, f"p{i // 4}", 1, i % 4) for i in range(64)], np.uint64)
    places = np.arange(64) * 3
    uniform = uniforms(keys, places)
    together, logprobs = sample(logits, uniform, params)
    shuffle = torch.randperm(64, generator=generator).numpy()
    shuffled, _ = sample(logits[shuffle], uniform[shuffle], params)
    assert np.array_equal(shuffled, together[shuffle])
    for row in range(64):
        alone = uniforms(keys[row : row + 1], places[row : row + 1])
        token, logprob = sample(logits[row : row + 1], alone, params)
        assert (token[0], logprob[0]) == (together[row], logprobs[row])


def test_i8_every_part_of_the_key_matters():
    base = SamplingParams(seed=1)
    keys = {
        sequence_key(base, "p", 0, 0),
        sequence_key(SamplingParams(seed=2), "p", 0, 0),
        sequence_key(SamplingParams(seed=1, stream="eval"), "p", 0, 0),
        sequence_key(base, "q", 0, 0),
        sequence_key(base, "p", 1, 0),
        sequence_key(base, "p", 0, 1),
    }
    assert len(keys) == 6
    key = np.array([sequence_key(base, "p", 0, 0)] * 1000, np.uint64)
    numbers = uniforms(key, np.arange(1000))
    assert len(set(numbers.tolist())) == 1000
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert abs(numbers.mean() - 0.5) < 0.05


def test_the_random_numbers_are_fixed_forever():
    """A run must be repeatable by a later version: these constants may not change without a Numerics entry."""
    key = sequence_key(SamplingParams(seed=3), "problem", 2, 5)
    assert key == 15640075647220004706
    assert uniforms(np.array([key], np.uint64), np.array([7])).tolist() == [0.6010587717460844]


@pytest.mark.parametrize(
    "wrong",
    [{"n": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"top_k": -1}, {"max_new_tokens": 0}, {"min_new_tokens": 999}],
)
def test_impossible_params_are_refused(wrong: dict[str, Any]):
    with pytest.raises(ValueError, match=f"sampling {next(iter(wrong))}: expected .*, got"):
        SamplingParams(**wrong)
