"""Losses in exact values."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from pekoe.algo import loss as loss_module
from pekoe.algo.loss import chosen_logprobs, cross_entropy, ppo
from pekoe.algo.packing import MicroBatch, pack
from pekoe.core.config import AlgoSection
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


def test_kl_is_the_k3_estimator():
    micro = replace(batch([0.0]), reference_logprobs=torch.tensor([-1.5]))
    loss, sums = ppo(torch.tensor([-1.0]), torch.zeros(1), micro, AlgoSection(kl=0.1))
    k3 = np.exp(-0.5) + 0.5 - 1
    assert float(sums["reference_kl"]) == pytest.approx(k3)
    assert float(loss) == pytest.approx(0.1 * k3)


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
