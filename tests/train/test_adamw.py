"""Moments in bfloat16 or in the host's memory: the steps are AdamW's."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from pekoe.algo.loss import cross_entropy
from pekoe.config.recipes import OptimSection
from pekoe.core.errors import UserError
from pekoe.model import Decoder
from pekoe.train import Trainer, adamw
from pekoe.train.adamw import LeanAdamW
from pekoe.train.memory_estimate import predict
from tests.train.ranks import make_samples

OPTIM = OptimSection(lr=1e-2, warmup_fraction=0.0, weight_decay=0.1)
Low = dict[str, Any]


def trainer_of(make_model: Callable[..., Decoder], dtype: torch.dtype = torch.float64, **moments: Any) -> Trainer:
    return Trainer(make_model(dtype=dtype, vocab_size=50), OPTIM, 40, 20, **moments)


def steps(trainer: Trainer, number: int) -> list[float]:
    return [trainer.step(make_samples(), cross_entropy).loss for _ in range(number)]


def test_on_the_host_in_pieces_the_steps_are_torchs(
    make_model: Callable[..., Decoder], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(adamw, "_CHUNK", 37)
    plain, ours = trainer_of(make_model), trainer_of(make_model, moments_on_host=True)
    assert isinstance(ours.optimizer, LeanAdamW)
    assert not isinstance(plain.optimizer, LeanAdamW)
    torch.testing.assert_close(steps(ours, 5), steps(plain, 5), rtol=1e-12, atol=0)
    for a, b in zip(ours.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
        for name in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(
                ours.optimizer.state[a][name], plain.optimizer.state[b][name], rtol=1e-10, atol=1e-15
            )


def test_moments_in_bfloat16_are_rounded_and_learn_as_much(make_model: Callable[..., Decoder]):
    plain, ours = (trainer_of(make_model, torch.float32, moments=d) for d in (torch.float32, torch.bfloat16))
    wide, low = steps(plain, 20), steps(ours, 20)
    assert low[0] == wide[0]
    assert low != wide
    assert wide[-1] < wide[0] / 2
    torch.testing.assert_close(low, wide, rtol=0.02, atol=0.02)
    for parameter in ours.model.parameters():
        state = ours.optimizer.state[parameter]
        assert state["exp_avg"].dtype is state["exp_avg_sq"].dtype is torch.bfloat16
        assert parameter.dtype is torch.float32


@pytest.mark.parametrize("moments", [{"moments": torch.bfloat16}, {"moments_on_host": True}])
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_checkpoint_goes_on_to_the_same_bits(make_model: Callable[..., Decoder], tmp_path: Path, moments: Low):
    whole, first, second = (trainer_of(make_model, torch.float32, **moments) for _ in range(3))
    expected = steps(whole, 6)
    begun = steps(first, 3)
    first.snapshot().write(tmp_path / "saved")
    second.load(tmp_path / "saved")
    assert begun + steps(second, 3) == expected
    assert all(torch.equal(a, b) for a, b in zip(second.model.parameters(), whole.model.parameters(), strict=True))


def test_bfloat16_would_lose_small_updates():
    """The second moment of a gradient of 1 after a long time of 0: at beta2 = 0.999 it stops short of it, below not."""
    for beta2, share in ((0.95, 0.9), (0.999, 0.5)):
        weight = torch.nn.Parameter(torch.zeros(4))
        optimizer = LeanAdamW([{"params": [weight]}], 1e-3, (0.9, beta2), 1e-8, torch.bfloat16)
        for _ in range(8000):
            weight.grad = torch.ones(4)
            optimizer.step()
        reached = float(optimizer.state[weight]["exp_avg_sq"][0])
        assert (reached > share) == (beta2 == 0.95), reached


def test_settings_that_cannot_be(make_model: Callable[..., Decoder]):
    optim = OptimSection(beta2=0.999)
    with pytest.raises(
        UserError, match=r"expected 'float32' with optim\.beta2 = 0\.999, got 'bfloat16'.*nearest: .* 0\.995"
    ):
        Trainer(make_model(), optim, 40, 3, moments=torch.bfloat16)
    Trainer(make_model(), OptimSection(beta2=0.995), 40, 3, moments=torch.bfloat16)


def test_memory_is_predicted_with_them(make_model: Callable[..., Decoder]):
    of = partial(predict, make_model().spec, 64, 32)
    assert [of(moment_bytes=n).moments for n in (4, 2, 0)] == [
        n * 2 * make_model().spec.num_parameters for n in (4, 2, 0)
    ]
    assert math.isclose(of(moment_bytes=2).activations, of().activations)
