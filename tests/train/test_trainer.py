"""The trainer: I2 (packing and splitting change nothing) and I3 (one token denominator a step)."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch

from pekoe.algo.loss import cross_entropy, ppo
from pekoe.config.recipes import AlgoSection, OptimSection
from pekoe.core.errors import StopRequested
from pekoe.core.types import Sample
from pekoe.model import Decoder, load_model
from pekoe.train import Trainer
from pekoe.train.trainer import learning_rate

MakeModel = Callable[..., Decoder]
OPTIM = OptimSection(lr=1e-3, warmup_fraction=0.0, grad_clip=1e9)
PPO = partial(ppo, algo=AlgoSection())
LENGTHS = [(3, 9), (5, 1), (2, 20), (7, 4), (1, 13), (4, 6), (10, 2)]


def make_samples(seed: int = 0) -> list[Sample]:
    rng = np.random.default_rng(seed)
    samples = []
    for group, (prompt, response) in enumerate(LENGTHS):
        length = prompt + response
        mask = np.arange(length) >= prompt
        behaviour = np.where(mask, rng.normal(-3, 0.3, length), 0).astype(np.float32)
        advantages = np.where(mask, rng.normal(), 0).astype(np.float32)
        samples.append(Sample(rng.integers(0, 32, length), mask, behaviour, advantages, group))
    return samples


class Recorder(Trainer):
    """Keeps the gradients that the optimizer step saw."""

    def gradients(self, samples: list[Sample], objective: Callable[..., object] = PPO) -> dict[str, torch.Tensor]:
        kept: dict[str, torch.Tensor] = {}

        def keep(*_: object) -> None:
            kept.update({n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None})

        handle = self.optimizer.register_step_pre_hook(keep)
        self.step(samples, objective)  # type: ignore[arg-type]
        handle.remove()
        return kept


def one_by_one(model: Decoder, samples: list[Sample]) -> dict[str, torch.Tensor]:
    """Gradients of the same loss without packing, masks or micro-batches: a plain loop over tokens' log-probs."""
    from pekoe.model import PackedAttention

    total = sum(int(s.loss_mask.sum()) for s in samples)
    model.zero_grad()
    for s in samples:
        tokens = torch.from_numpy(s.tokens)
        hidden = model(tokens, torch.arange(len(s)), PackedAttention(torch.tensor([0, len(s)], dtype=torch.int32)))
        logprobs = torch.log_softmax(model.logits(hidden), -1)
        loss = torch.zeros((), dtype=logprobs.dtype)
        for t in np.flatnonzero(s.loss_mask):
            ratio = (logprobs[t - 1, tokens[t]] - float(s.behaviour_logprobs[t])).exp()
            advantage = float(s.advantages[t])
            loss = loss + torch.maximum(-advantage * ratio, -advantage * ratio.clamp(0.8, 1.2))
        (loss / total).backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return grads


def relative(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[n] - b[n]).norm() / b[n].norm()) for n in a)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("budget", [1000, 40, 23])
def test_i2_packed_gradients_equal_one_by_one(make_model: MakeModel, dtype: torch.dtype, bound: float, budget: int):
    model = make_model(dtype=dtype, scale=1.0)
    samples = make_samples()
    expected = one_by_one(model, samples)
    trainer = Recorder(model, OPTIM, budget, 10)
    assert relative(trainer.gradients(samples), expected) <= bound


@pytest.mark.parametrize("tied", [True, False])
def test_i2_i3_loss_and_update_do_not_depend_on_the_split(make_model: MakeModel, tied: bool):
    """Sequences of very different lengths: a mean of micro-batch means would fail here."""
    results = []
    for budget in (1000, 40, 23):
        model = make_model(dtype=torch.float64, scale=1.0, tied_embeddings=tied)
        trainer = Trainer(model, OPTIM, budget, 10)
        stats = [trainer.step(make_samples(seed), PPO) for seed in range(3)]
        results.append((stats, torch.cat([p.detach().flatten() for p in model.parameters()])))
    (whole, weights), *others = results
    assert whole[0].num_microbatches == 1
    for stats, other in others:
        assert stats[0].num_microbatches > 1
        for a, b in zip(whole, stats, strict=True):
            assert a.loss == pytest.approx(b.loss, rel=1e-12)
            assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-9)
            for name, value in a.means.items():
                assert value == pytest.approx(b.means[name], rel=1e-9), name
        assert float((weights - other).abs().max()) <= 1e-12


def test_i3_the_loss_is_the_mean_over_all_tokens(make_model: MakeModel):
    samples = make_samples()
    trainer = Trainer(make_model(scale=1.0), OPTIM, 23, 10)
    logprobs = trainer.logprobs(samples)
    total = sum(int(s.loss_mask.sum()) for s in samples)
    expected = -sum(float(x.sum()) for x in logprobs) / total
    stats = trainer.step(samples, cross_entropy)
    assert stats.num_targets == total
    assert stats.loss == pytest.approx(expected, rel=1e-5)


def test_a_fixed_denominator_scales_the_loss(make_model: MakeModel):
    samples = make_samples()
    total = sum(int(s.loss_mask.sum()) for s in samples)
    a = Trainer(make_model(scale=1.0), OPTIM, 1000, 10).step(samples, PPO)
    b = Trainer(make_model(scale=1.0), OPTIM, 1000, 10).step(samples, PPO, denominator=2.0 * total)
    assert b.loss == pytest.approx(a.loss / 2)
    assert b.grad_norm == pytest.approx(a.grad_norm / 2, rel=1e-4)


def test_a_mean_by_sequence_does_not_depend_on_the_split(make_model: MakeModel):
    samples, objective = make_samples(), partial(ppo, algo=AlgoSection(normalise="sequence"))
    whole, split = (
        Trainer(make_model(scale=1.0, dtype=torch.float64), OPTIM, budget, 10).step(
            samples, objective, denominator=float(len(samples))
        )
        for budget in (1000, 23)
    )
    assert split.num_microbatches > whole.num_microbatches == 1
    assert split.loss == pytest.approx(whole.loss, rel=1e-9)
    assert split.grad_norm == pytest.approx(whole.grad_norm, rel=1e-9)


def test_logprobs_are_at_the_sampling_temperature(make_model: MakeModel):
    model = make_model()
    samples = make_samples()
    hot = Trainer(model, OPTIM, 1000, 10, temperature=2.0).logprobs(samples)
    plain = Trainer(model, OPTIM, 1000, 10).logprobs(samples)
    assert not np.allclose(hot[0], plain[0])
    assert not hot[0][~samples[0].loss_mask].any()


def test_a_wild_importance_ratio_skips_the_update_whatever_the_split(make_model: MakeModel):
    samples = make_samples()
    samples[2].behaviour_logprobs[samples[2].loss_mask] -= 20
    for budget in (1000, 23):
        model = make_model(scale=1.0)
        before = [p.clone() for p in model.parameters()]
        stats = Trainer(model, OPTIM, budget, 10).step(samples, PPO, max_mean_ratio=5.0)
        assert stats.skipped
        assert "importance ratio" in stats.skipped
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_gradient_that_is_not_finite_skips_the_update(make_model: MakeModel):
    samples = make_samples()
    samples[0].advantages[samples[0].loss_mask] = np.nan
    model = make_model(scale=1.0)
    before = [p.clone() for p in model.parameters()]
    trainer = Trainer(model, OPTIM, 1000, 10)
    for number in (1, 2):
        assert trainer.step(samples, PPO).skipped == "not finite: loss nan, gradient norm nan"
        assert trainer.num_not_finite == number
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    again = Trainer(make_model(), OPTIM, 1000, 10)
    again.load_state_dict(trainer.state_dict())
    assert again.num_not_finite == 2
    assert trainer.step(make_samples(), PPO).skipped is None
    assert trainer.num_not_finite == 0


def test_weight_decay_spares_biases_and_norms(make_model: MakeModel):
    trainer = Trainer(make_model(), OptimSection(weight_decay=0.3), 1000, 10)
    decay = {id(p): g["weight_decay"] for g in trainer.optimizer.param_groups for p in g["params"]}
    assert len(decay) == len(list(trainer.model.parameters()))
    for name, parameter in trainer.model.named_parameters():
        spared = name.endswith("bias") or "norm" in name
        assert decay[id(parameter)] == (0.0 if spared else 0.3), name


def test_learning_rate():
    constant = OptimSection(lr=1.0, warmup_fraction=0.1)
    assert [learning_rate(constant, i, 20) for i in (0, 1, 2, 19)] == [0.5, 1.0, 1.0, 1.0]
    cosine = OptimSection(lr=1.0, warmup_fraction=0.0, schedule="cosine")
    assert learning_rate(cosine, 0, 10) == 1.0
    assert learning_rate(cosine, 5, 10) == pytest.approx(0.5)
    assert learning_rate(cosine, 10, 10) == pytest.approx(0.0)
    linear = OptimSection(lr=1.0, warmup_fraction=0.2, schedule="linear")
    assert [learning_rate(linear, i, 10) for i in (0, 1, 2, 6, 10)] == [0.5, 1.0, 1.0, 0.5, 0.0]


def test_state_goes_round(make_model: MakeModel):
    samples = make_samples()
    a = Trainer(make_model(seed=1), OPTIM, 1000, 10)
    a.step(samples, PPO)
    b = Trainer(make_model(seed=2), OPTIM, 1000, 10)
    b.load_state_dict(a.state_dict())
    assert b.num_updates == 1
    ours, theirs = (replace(trainer.step(samples, PPO), peak_bytes=None) for trainer in (a, b))
    assert ours == theirs


def test_a_snapshot_is_of_its_moment_and_loads(make_model: MakeModel, tmp_path: Path):
    samples = make_samples()
    trainer = Trainer(make_model(seed=1), OPTIM, 1000, 10)
    trainer.skip(3)
    first = trainer.step(samples, PPO)
    snapshot = trainer.snapshot()
    second = replace(trainer.step(samples, PPO), peak_bytes=None)
    snapshot.write(tmp_path / "trainer")
    snapshot.export(tmp_path / "model")
    other = Trainer(make_model(seed=2), OPTIM, 1000, 10)
    other.load(tmp_path / "trainer")
    assert other.num_updates == 4
    exported = load_model(tmp_path / "model")
    assert all(torch.equal(a, b) for a, b in zip(other.model.parameters(), exported.parameters(), strict=True))
    assert replace(other.step(samples, PPO), peak_bytes=None) == second
    assert trainer.counters()["num_tokens"] == first.num_tokens + second.num_tokens
    assert trainer.counters()["busy_s"] > 0


def saved_bytes(trainer: Trainer, samples: list[Sample]) -> int:
    """Bytes that one micro-batch's forward keeps for its backward, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in trainer.model.parameters()}
    kept: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        trainer.step(samples, PPO)
    return sum(kept.values())


def test_recomputed_layers_give_the_same_bits_and_keep_less(make_model: MakeModel):
    samples = make_samples()
    trainers = [
        Recorder(make_model(num_layers=4), OPTIM, 100, 1, activation_checkpointing=again) for again in (False, True)
    ]
    plain, again = (trainer.gradients(samples) for trainer in trainers)
    assert all(torch.equal(plain[name], again[name]) for name in plain)
    kept = [
        saved_bytes(Trainer(make_model(num_layers=4), OPTIM, 100, 1, activation_checkpointing=r), samples)
        for r in (False, True)
    ]
    assert kept[1] < 0.4 * kept[0]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.filterwarnings("default")  # torch's own, of its own making
@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_layers_give_the_same_gradients(make_model: MakeModel, recompute: bool):
    plain = Recorder(make_model(), OPTIM, 100, 1).gradients(make_samples())
    trainer = Recorder(make_model(), OPTIM, 100, 1, compile=True, activation_checkpointing=recompute)
    torch._dynamo.reset()
    calls = torch._dynamo.utils.counters["stats"]["calls_captured"]
    found = trainer.gradients(make_samples())
    assert torch._dynamo.utils.counters["stats"]["calls_captured"] > calls, "nothing was compiled"
    for name, expected in plain.items():
        assert (found[name] - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_stop_is_asked_for_at_each_layer_and_leaves_the_weights(make_model: MakeModel, checkpointing: bool):
    def new() -> Trainer:
        return Trainer(make_model(), OPTIM, 64, 1, activation_checkpointing=checkpointing)

    def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}

    samples, undisturbed, begun, asked = make_samples(), new(), new(), list[int]()
    undisturbed.step(samples, PPO)
    begun.stopping = lambda: asked.append(1) is not None  # never
    num_microbatches = begun.step(samples, PPO).num_microbatches
    each = 2 * (3 if checkpointing else 2)  # two layers: forward, backward, and forward again where it is recomputed
    assert len(asked) == each * num_microbatches > each
    before = weights(trainer := new())
    for number in range(1, len(asked) + 1):
        asks = count(1)
        trainer.stopping = lambda asks=asks, number=number: next(asks) == number
        with pytest.raises(StopRequested):
            trainer.step(samples, PPO)
    trainer.stopping = lambda: True
    with pytest.raises(StopRequested):
        trainer.logprobs(samples)
    assert trainer.num_updates == 0
    assert all(p.grad is None for p in trainer.model.parameters())
    assert all(torch.equal(before[name], p) for name, p in weights(trainer).items())
    trainer.stopping = None
    trainer.step(samples, PPO)
    for other in (begun, trainer):
        assert all(torch.equal(p, weights(other)[name]) for name, p in weights(undisturbed).items())
