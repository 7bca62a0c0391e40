"""Losses in exact values."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from pekoe.algo import loss as loss_module
from pekoe.algo.loss import Sums, chosen_logprobs, cross_entropy, denominator, logprob_diffs_by_lag, ppo
from pekoe.algo.packing import MicroBatch, pack
from pekoe.config.recipes import AlgoSection
from pekoe.core.loop import StepStats
from pekoe.core.types import Sample


def batch(advantages: list[float]) -> MicroBatch:
    num = len(advantages)
    tokens = np.arange(num + 1)
    mask = tokens > 0
    values = np.array([0.0, *advantages], np.float32)
    return pack([Sample(tokens, mask, np.zeros(num + 1, np.float32), values)])


def test_ppo_takes_the_worse_of_plain_and_clipped():
    ratios = torch.tensor([1.0, 1.5, 0.5, 1.5, 0.5])
    micro = batch([1.0, 1.0, 1.0, -1.0, -1.0])
    loss, sums = ppo(ratios.log(), torch.zeros(5), micro, AlgoSection())
    # A > 0: -min(r, clip r); A < 0: max(r, clip r)
    assert float(loss) == pytest.approx(-1.0 - 1.2 - 0.5 + 1.5 + 0.8)
    assert int(sums["clip_fraction"]) == 2
    assert float(sums["ratio"]) == pytest.approx(5.0)


def test_the_upper_clip_may_be_wider():
    loss, _ = ppo(torch.tensor([1.5]).log(), torch.zeros(1), batch([1.0]), AlgoSection(clip_high=0.28))
    assert float(loss) == pytest.approx(-1.28)


def test_a_clipped_token_has_no_gradient():
    logprobs = torch.tensor([np.log(1.5), np.log(1.1)], requires_grad=True)
    ppo(logprobs, torch.zeros(2), batch([1.0, 1.0]), AlgoSection())[0].backward()
    assert logprobs.grad is not None
    np.testing.assert_allclose(logprobs.grad, [0.0, -1.1], rtol=1e-6)


def test_recomputed_proximal_logprobs_replace_the_engines():
    micro = replace(batch([1.0]), behaviour_logprobs=torch.tensor([-3.0]), proximal_logprobs=torch.tensor([-1.0]))
    loss, sums = ppo(torch.tensor([-1.0]), torch.zeros(1), micro, AlgoSection())
    assert float(loss) == pytest.approx(-1.0)  # ratio 1 against the proximal policy
    assert float(sums["logprob_diff"]) == pytest.approx(2.0)  # the mismatch is against the engine always


def by_lag(lags: list[int], gaps: list[float], proximal: bool = True) -> MicroBatch:
    """Tokens that an engine sampled with log-prob -1, of these lags; the trainer's log-probs are this much larger."""
    micro = replace(
        batch([1.0] * len(lags)), behaviour_logprobs=torch.full((len(lags),), -1.0), lags=torch.tensor(lags)
    )
    return replace(micro, proximal_logprobs=torch.tensor(gaps) - 1) if proximal else micro


def stats_of(sums: Sums, num: int) -> StepStats:
    means = {name: float(value) / (1 if name.endswith("_max") else num) for name, value in sums.items()}
    return StepStats(0.0, 0.0, 0.0, num, num, 1, means)


def test_differences_of_logprobs_are_told_by_lag():
    micro, moved = by_lag([0, 2, 2, 0], [1e-6, 0.5, -1.5, -3e-6]), torch.tensor([-9.0] * 4)
    loss, sums = ppo(moved, torch.zeros(4), micro, AlgoSection(), num_lags=4)
    alone, fewer = ppo(moved, torch.zeros(4), replace(micro, lags=None), AlgoSection())
    assert torch.equal(loss, alone)
    assert all(torch.equal(sums[name], value) for name, value in fewer.items())
    diffs = logprob_diffs_by_lag([stats_of(sums, 4)])
    assert diffs["lag_logprob_diff"] == pytest.approx({"0": 2e-6, "2": 1.0}, rel=0.1)
    assert diffs["lag_logprob_diff_max"] == pytest.approx({"0": 3e-6, "2": 1.5}, rel=0.1)
    assert logprob_diffs_by_lag([stats_of(fewer, 4)]) == {}


def test_differences_by_lag_are_of_all_optimizer_steps_and_keep_a_nan():
    parts = [([0, 1], [0.25, 0.5]), ([0, 0, 0, 0], [0.0, 0.0, 0.0, 0.5]), ([1], [float("nan")])]
    stats = [
        stats_of(
            ppo(torch.zeros(len(lags)), torch.zeros(len(lags)), by_lag(lags, gaps), AlgoSection(), 2)[1], len(lags)
        )
        for lags, gaps in parts
    ]
    diffs = logprob_diffs_by_lag(stats)
    assert (diffs["lag_logprob_diff"]["0"], diffs["lag_logprob_diff_max"]["0"]) == (pytest.approx(0.15), 0.5)
    assert np.isnan(diffs["lag_logprob_diff"]["1"])
    assert np.isnan(diffs["lag_logprob_diff_max"]["1"])


def test_without_proximal_logprobs_those_of_the_forward_are_compared():
    _, sums = ppo(torch.tensor([-1.0, -3.0]), torch.zeros(2), by_lag([0, 1], [], False), AlgoSection(), num_lags=2)
    assert logprob_diffs_by_lag([stats_of(sums, 2)])["lag_logprob_diff_max"] == {"0": 0.0, "1": 2.0}


def test_a_rank_without_work_has_the_same_statistics():
    """As they are summed over ranks."""
    empty, nothing = pack([]), torch.zeros(0)
    _, sums = ppo(nothing, nothing, empty, AlgoSection(), num_lags=3)
    assert list(sums) == list(ppo(torch.zeros(2), torch.zeros(2), by_lag([0, 1], [0, 0]), AlgoSection(), 3)[1])
    assert all(float(value) == 0 for value in sums.values())


def off_policy(
    correction: str, log_weights: list[float], lengths: list[int], limit: float = 2.0
) -> tuple[Tensor, Sums]:
    """The loss of tokens of advantage 1 and ratio 1, sampled by another policy: minus the sum of their weights."""
    samples: list[Sample] = []
    for length in lengths:
        mask, zeros = np.arange(length + 1) > 0, np.zeros(length + 1, np.float32)
        samples.append(Sample(np.arange(length + 1), mask, zeros, mask.astype(np.float32)))
    proximal = torch.full((len(log_weights),), -1.0)
    micro = replace(pack(samples), proximal_logprobs=proximal, behaviour_logprobs=proximal - torch.tensor(log_weights))
    algo = AlgoSection.model_validate({"proximal": "recompute", "correction": correction, "correction_limit": limit})
    return ppo(proximal, torch.zeros(len(log_weights)), micro, algo)


@pytest.mark.parametrize(
    ("correction", "weights", "bounded"),
    [
        ("off", [1, 1, 1, 1], None),
        ("weight", [1, 3, 1 / 3, 1.5], 0),
        ("truncate", [1, 2, 1 / 3, 1.5], 1),
        ("mask_token", [1, 0, 0, 1.5], 2),
        ("mask_sequence", [1, 3, 1 / 3, 1.5], 0),  # geometric means 1.73 and 0.71
    ],
)
def test_the_engines_policy_is_corrected_for(correction: str, weights: list[float], bounded: int | None):
    loss, sums = off_policy(correction, np.log([1, 3, 1 / 3, 1.5]).tolist(), [2, 2])
    assert float(loss) == pytest.approx(-sum(weights))
    assert sums.get("correction_fraction") == bounded
    if bounded is not None:
        assert float(sums["correction_weight"]) == pytest.approx(sum(weights))


def test_a_sequence_is_masked_as_a_whole():
    loss, sums = off_policy("mask_sequence", np.log([1.2, 1.4, 1.02, 0.9]).tolist(), [2, 2], limit=1.1)
    assert float(loss) == pytest.approx(-(1.02 + 0.9))
    assert sums["correction_fraction"] == 2


@pytest.mark.parametrize("correction", ["mask_token", "mask_sequence"])
def test_what_overflows_is_masked(correction: str):
    loss, _ = off_policy(correction, [1000.0, 0.0], [1, 1])
    assert float(loss) == pytest.approx(-1.0)


def test_the_weights_make_an_expectation_under_the_engine_one_under_the_proximal_policy():
    """Unbiased: the gradient at pi = pi_proximal from samples of another policy is that of pi_proximal's own."""
    generator = torch.Generator().manual_seed(0)
    policy = torch.randn(6, generator=generator, dtype=torch.float64, requires_grad=True)
    behaviour = torch.log_softmax(torch.randn(6, generator=generator, dtype=torch.float64), -1)
    reward = torch.randn(6, generator=generator, dtype=torch.float64)
    log_policy = torch.log_softmax(policy, -1)
    exact = torch.autograd.grad((log_policy.exp() * reward).sum(), policy, retain_graph=True)[0]
    chosen = torch.arange(6)  # each token once, its advantage times the probability that the engine draws it
    micro = replace(
        batch([1.0] * 6),
        advantages=reward * behaviour.exp(),
        behaviour_logprobs=behaviour,
        proximal_logprobs=log_policy.detach(),
    )
    algo = AlgoSection(proximal="recompute", correction="weight")
    loss, _ = ppo(log_policy[chosen], torch.zeros(6), micro, algo)
    torch.testing.assert_close(-torch.autograd.grad(loss, policy)[0], exact)


def test_a_correction_needs_proximal_logprobs_of_its_own():
    with pytest.raises(ValueError, match=r"algo.correction: expected 'off' .* nearest: algo.proximal = 'recompute'"):
        AlgoSection(correction="truncate")


def test_kl_is_the_k3_estimator():
    micro = replace(batch([0.0]), reference_logprobs=torch.tensor([-1.5]))
    loss, sums = ppo(torch.tensor([-1.0]), torch.zeros(1), micro, AlgoSection(kl=0.1))
    k3 = np.exp(-0.5) + 0.5 - 1
    assert float(sums["reference_kl"]) == pytest.approx(k3)
    assert float(loss) == pytest.approx(0.1 * k3)


def test_by_sequence_each_response_counts_alike():
    """GRPO, eq. 3: the mean over responses of means over tokens; the trainer divides by their number."""
    samples: list[Sample] = []
    for length, advantage in ((4, 1.0), (1, -2.0)):
        mask, zeros = np.arange(length + 2) > 1, np.zeros(length + 2, np.float32)
        samples.append(Sample(np.arange(length + 2), mask, zeros, mask.astype(np.float32) * np.float32(advantage)))
    micro = replace(pack(samples), reference_logprobs=torch.tensor([-0.5, 0.0, 0.0, 0.0, 0.0]))
    algo = AlgoSection(normalise="sequence", kl=0.1)
    loss, sums = ppo(torch.zeros(5), torch.zeros(5), micro, algo)
    k3 = np.exp(-0.5) + 0.5 - 1
    assert float(loss) == pytest.approx(-1.0 + 2.0 + 0.1 * k3 / 4)
    assert float(sums["reference_kl"]) == pytest.approx(k3)  # a mean over tokens, as every statistic
    assert float(ppo(torch.zeros(5), torch.zeros(5), micro, AlgoSection())[0]) == pytest.approx(-4.0 + 2.0)


def test_the_denominator_is_the_minibatchs():
    divisors = [denominator(AlgoSection(normalise=how), 8, 100) for how in ("token", "sequence", "max_length")]
    assert divisors == [None, 8.0, 800.0]


def test_cross_entropy_is_a_sum():
    assert float(cross_entropy(torch.tensor([-1.0, -2.0]), torch.zeros(2), batch([1, 1]))[0]) == 3.0


def test_chunked_logprobs_and_their_gradients_equal_the_whole(monkeypatch: pytest.MonkeyPatch):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(50, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    head = torch.randn(20, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 20, (50,), generator=generator)
    expected = torch.log_softmax(hidden @ head.T / 0.7, -1)
    entropy = torch.distributions.Categorical(logits=expected.detach()).entropy()
    whole = torch.autograd.grad(expected.gather(1, targets[:, None]).sum(), (hidden, head))
    monkeypatch.setattr(loss_module, "CHUNK_VALUES", 20 * 7)
    logprobs, entropies = chosen_logprobs(hidden, head, targets, 0.7)
    torch.testing.assert_close(logprobs, expected.gather(1, targets[:, None])[:, 0])
    torch.testing.assert_close(entropies, entropy)
    for grad, reference in zip(torch.autograd.grad(logprobs.sum(), (hidden, head)), whole, strict=True):
        torch.testing.assert_close(grad, reference)
