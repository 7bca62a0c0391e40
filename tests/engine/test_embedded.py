"""The embedded engine against the model's own forward: I1, I4, I7, I8, and the counts of work saved."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from pekoe.config.engine import EngineSection
from pekoe.core.errors import RunError, UserError
from pekoe.core.types import Prompt, Rollout, SamplingParams
from pekoe.engine import EmbeddedEngine
from pekoe.engine.embedded import engine as embedded
from pekoe.kernels import packed_linear
from pekoe.kernels.packed_linear import available
from pekoe.model import Decoder, PackedAttention

MakeModel = Callable[..., Decoder]
MakePrompt = Callable[..., Prompt]
SMALL = EngineSection(kv_tokens=2048, block_tokens=4, max_running=64)


@torch.no_grad()
def reference_logprobs(model: Decoder, rollout: Rollout, temperature: float = 1.0) -> np.ndarray:
    """Log-probs [R] by one packed forward over prompt and response."""
    payload = rollout.payload.resolve()
    tokens = torch.from_numpy(np.concatenate([payload.prompt_tokens, payload.tokens]))
    bounds = torch.tensor([0, len(tokens)], dtype=torch.int32)
    logits = model.logits(model(tokens, torch.arange(len(tokens)), PackedAttention(bounds)))
    logprobs = torch.log_softmax(logits / temperature, -1)
    start = len(payload.prompt_tokens)
    return logprobs[torch.arange(start, len(tokens)) - 1, tokens[start:]].numpy()


def collect(engine: EmbeddedEngine, prompts: list[Prompt], params: SamplingParams) -> dict[tuple[str, int], Rollout]:
    rollouts: dict[tuple[str, int], Rollout] = {}
    for rollout in engine.generate(prompts, params):
        assert (rollout.uid, rollout.sample_index) not in rollouts
        rollouts[rollout.uid, rollout.sample_index] = rollout
        engine.check_integrity()
    assert len(rollouts) == len(prompts) * params.n
    return rollouts


def tokens_of(rollouts: dict[tuple[str, int], Rollout]) -> dict[tuple[str, int], list[int]]:
    return {key: rollout.payload.resolve().tokens.tolist() for key, rollout in rollouts.items()}


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_i1_sampling_logprobs_equal_the_training_forward(
    make_model: MakeModel, make_prompt: MakePrompt, family: str, temperature: float
):
    model = make_model(family=family, qkv_bias=family == "qwen2", qk_norm=family == "qwen3")
    engine = EmbeddedEngine(model, SMALL)
    prompts = [make_prompt(f"p{i}", length) for i, length in enumerate([1, 3, 4, 5, 17, 30])]
    params = SamplingParams(n=5, max_new_tokens=24, temperature=temperature, top_p=0.9, stop_token_ids=(7,))
    for rollout in collect(engine, prompts, params).values():
        difference = np.abs(rollout.payload.resolve().logprobs - reference_logprobs(model, rollout, temperature))
        assert difference.max() <= 1e-4


def test_greedy_equals_the_reference_token_for_token(make_model: MakeModel, make_prompt: MakePrompt):
    model = make_model()
    prompts = [make_prompt(f"p{i}", length) for i, length in enumerate([2, 9, 16])]
    rollouts = collect(EmbeddedEngine(model, SMALL), prompts, SamplingParams(temperature=0, max_new_tokens=20))
    for prompt in prompts:
        tokens = torch.from_numpy(prompt.tokens)
        for _ in range(20):
            attention = PackedAttention(torch.tensor([0, len(tokens)], dtype=torch.int32))
            with torch.no_grad():
                logits = model.logits(model(tokens, torch.arange(len(tokens)), attention))
            tokens = torch.cat([tokens, logits[-1:].argmax(-1)])
        assert tokens_of(rollouts)[prompt.uid, 0] == tokens[len(prompt.tokens) :].tolist()


def test_finish_reasons_and_lengths(make_model: MakeModel, make_prompt: MakePrompt):
    engine = EmbeddedEngine(make_model(), SMALL)
    params = SamplingParams(n=32, max_new_tokens=12, min_new_tokens=3, stop_token_ids=(5, 6, 8, 9, 10))
    reasons = set()
    for rollout in collect(engine, [make_prompt("p", 6)], params).values():
        tokens = rollout.payload.resolve().tokens.tolist()
        reasons.add(rollout.finish_reason)
        stops = [t in params.stop_token_ids for t in tokens]
        assert not any(stops[:-1])
        assert not any(stops[:2])
        if rollout.finish_reason == "stop":
            assert stops[-1]
        else:
            assert len(tokens) == 12
    assert reasons == {"stop", "length"}


def test_a_groups_prompt_is_computed_once(make_model: MakeModel, make_prompt: MakePrompt):
    """Counted, not timed: prefill work for a group of 16 equals that of one prompt."""
    prompts = [make_prompt("a", 13), make_prompt("b", 16)]
    engine = EmbeddedEngine(make_model(), SMALL)
    collect(engine, prompts, SamplingParams(n=16, max_new_tokens=6))
    stats = engine.stats()
    assert stats.num_prefill_tokens == 13 + 16
    assert stats.num_shared_tokens == 15 * (13 + 16)
    assert stats.num_decode_tokens == 2 * 16 * 6


def test_prefixes_are_reused_across_requests_and_flushed_on_update(make_model: MakeModel, make_prompt: MakePrompt):
    model = make_model()
    engine = EmbeddedEngine(model, SMALL)
    prompt = make_prompt("p", 15)
    params = SamplingParams(max_new_tokens=4)
    first = collect(engine, [prompt], params)
    before = engine.stats()
    assert tokens_of(collect(engine, [prompt], params)) == tokens_of(first)
    after = engine.stats()
    assert after.num_cached_tokens - before.num_cached_tokens == 12  # three full blocks of four
    assert after.num_prefill_tokens - before.num_prefill_tokens == 3
    engine.update_weights(model, 1)
    collect(engine, [prompt], params)
    assert engine.stats().num_cached_tokens == after.num_cached_tokens
    assert engine.version == 1


def test_i4_after_an_update_in_place_the_new_weights_answer(make_model: MakeModel, make_prompt: MakePrompt):
    """The trainer changes the shared parameters under the engine; KV of the old ones must not be read."""
    model = make_model()
    engine = EmbeddedEngine(model, SMALL)
    prompt, params = make_prompt("p", 30), SamplingParams(max_new_tokens=8)
    collect(engine, [prompt], params)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    engine.update_weights(model, 1)
    (rollout,) = collect(engine, [prompt], params).values()
    assert np.abs(rollout.payload.resolve().logprobs - reference_logprobs(model, rollout)).max() <= 1e-4
    assert rollout.versions == ((1, 0),)


def test_an_update_in_mid_flight_recomputes_kv_and_tags_versions(make_model: MakeModel, make_prompt: MakePrompt):
    old, new = make_model(seed=0), make_model(seed=1)
    engine = EmbeddedEngine(old, SMALL)
    params = SamplingParams(n=16, max_new_tokens=30, stop_token_ids=(5, 6, 7, 8))
    stream = engine.generate([make_prompt("p", 9)], params)
    rollouts = [next(stream)]
    engine.update_weights(new, 1)
    rollouts += list(stream)
    crossed = [r for r in rollouts if len(r.versions) == 2]
    assert crossed
    for rollout in crossed:
        assert [version for version, _ in rollout.versions] == [0, 1]
        change = rollout.versions[1][1]
        logprobs = rollout.payload.resolve().logprobs
        assert np.abs(logprobs[:change] - reference_logprobs(old, rollout)[:change]).max() <= 1e-4
        assert np.abs(logprobs[change:] - reference_logprobs(new, rollout)[change:]).max() <= 1e-4


def test_i8_tokens_do_not_depend_on_the_batch(make_model: MakeModel, make_prompt: MakePrompt):
    model = make_model(dtype=torch.float64)  # so that no rounding of another batch shape moves a logit
    prompts = [make_prompt(f"p{i}", 4 + i) for i in range(6)]
    params = SamplingParams(n=4, max_new_tokens=16, seed=3)
    together = tokens_of(collect(EmbeddedEngine(model, SMALL), prompts, params))
    for prompt in prompts:
        alone = tokens_of(collect(EmbeddedEngine(model, SMALL), [prompt], params))
        assert alone == {key: together[key] for key in alone}
    assert tokens_of(collect(EmbeddedEngine(model, SMALL), prompts, SamplingParams(n=4, max_new_tokens=16))) != together


def test_running_out_of_kv_preempts_and_changes_nothing(make_model: MakeModel, make_prompt: MakePrompt):
    model = make_model(dtype=torch.float64)
    prompts = [make_prompt(f"p{i}", 6 + i) for i in range(4)]
    params = SamplingParams(n=4, max_new_tokens=30)
    roomy = tokens_of(collect(EmbeddedEngine(model, SMALL), prompts, params))
    tight = EmbeddedEngine(model, EngineSection(kv_tokens=160, block_tokens=4, max_running=64))
    rollouts = collect(tight, prompts, params)
    assert tight.stats().num_preemptions > 0
    assert tokens_of(rollouts) == roomy
    for rollout in rollouts.values():
        assert np.abs(rollout.payload.resolve().logprobs - reference_logprobs(model, rollout)).max() <= 1e-6


def test_abort_of_one_and_of_all(make_model: MakeModel, make_prompt: MakePrompt):
    engine = EmbeddedEngine(make_model(), EngineSection(kv_tokens=512, block_tokens=4, max_running=6))
    prompts = [make_prompt(f"p{i}", 6) for i in range(3)]
    stream = engine.generate(prompts, SamplingParams(n=4, max_new_tokens=40))
    first = next(stream)  # six run at once: p2 still waits
    engine.abort(["p2"])
    engine.check_integrity()
    rest = [next(stream) for _ in range(9)]
    assert {r.uid for r in rest if r.finish_reason == "abort"} == {"p2"}
    engine.abort()
    rest += list(stream)
    assert len({(r.uid, r.sample_index) for r in [first, *rest]}) == 12
    assert [r.finish_reason for r in rest[9:]] == ["abort", "abort"]
    assert {r.finish_reason for r in rest[:5]} == {"length"}
    engine.check_integrity()
    assert engine._scheduler.pool.num_in_use == 0


def test_closing_the_iterator_early_frees_everything(make_model: MakeModel, make_prompt: MakePrompt):
    engine = EmbeddedEngine(make_model(), SMALL)
    for _ in range(3):
        stream = engine.generate([make_prompt("p", 6)], SamplingParams(n=8, max_new_tokens=40, stop_token_ids=(5, 6)))
        next(stream)
        with pytest.raises(RunError, match="generating already"):
            next(engine.generate([make_prompt("q", 6)], SamplingParams(max_new_tokens=4)))
        stream.close()
        engine.check_integrity()
        assert engine._scheduler.pool.num_in_use == 0


def test_the_users_mistakes_are_refused_before_sampling(make_model: MakeModel, make_prompt: MakePrompt):
    engine = EmbeddedEngine(make_model(), EngineSection(kv_tokens=64, block_tokens=4), max_sequence_tokens=48)
    cases = [
        (Prompt("p", 0, np.array([], np.int64)), {}, "at least one token"),
        (Prompt("p", 0, np.array([1, 32])), {}, r"ids in \[0, 32\), got 32"),
        (Prompt("p", 0, np.array([1, -2])), {}, "got -2"),
        (make_prompt("p", 40), {}, "most new tokens that fit: 8"),
        (make_prompt("p", 4), {"stop_token_ids": (99,)}, "stop token"),
    ]
    for prompt, more, message in cases:
        with pytest.raises(UserError, match=message):
            engine.generate([prompt], SamplingParams(max_new_tokens=9, **more))


def test_pause_and_close(make_model: MakeModel, make_prompt: MakePrompt):
    engine = EmbeddedEngine(make_model(), SMALL)
    stream = engine.generate([make_prompt("p", 6)], SamplingParams(n=2, max_new_tokens=4))
    engine.pause()
    with pytest.raises(RunError, match="paused"):
        next(stream)
    stream = engine.generate([make_prompt("p", 6)], SamplingParams(n=2, max_new_tokens=4))
    engine.resume()
    first = next(stream)
    engine.pause()
    engine.abort()
    assert [first.finish_reason, *(r.finish_reason for r in stream)] == ["length", "length"]  # both ended at once
    engine.resume()
    assert len(list(engine.generate([make_prompt("p", 6)], SamplingParams(n=2, max_new_tokens=4)))) == 2
    begun = engine.generate([make_prompt("p", 6)], SamplingParams(n=2, max_new_tokens=4))
    engine.close()
    engine.close()
    assert not engine.health()
    for use in (
        lambda: engine.generate([make_prompt("p", 6)], SamplingParams()),
        lambda: next(begun),
        lambda: engine.update_weights(engine.model, 1),
    ):
        with pytest.raises(RunError, match="closed"):
            use()


def test_what_was_aborted_while_paused_comes_back(make_model: MakeModel, make_prompt: MakePrompt):
    engine = EmbeddedEngine(make_model(), SMALL)
    prompts = [make_prompt("short", 6), make_prompt("long", 6)]
    stream = engine.generate(prompts, SamplingParams(max_new_tokens=20), lambda uid, _: 2 if uid == "short" else 20)
    assert next(stream).uid == "short"
    engine.pause()
    engine.abort()
    assert [(r.uid, r.finish_reason) for r in stream] == [("long", "abort")]


def test_work_that_cannot_be_queued_leaves_none_behind(make_model: MakeModel, make_prompt: MakePrompt):
    engine = EmbeddedEngine(make_model(), SMALL)
    with pytest.raises(UnicodeEncodeError):
        list(engine.generate([make_prompt("p", 6), make_prompt("\ud800", 6)], SamplingParams(max_new_tokens=4)))
    assert [r.uid for r in engine.generate([make_prompt("q", 6)], SamplingParams(max_new_tokens=4))] == ["q"]


@pytest.mark.skipif(not available(), reason="needs oneDNN on x86-64")
def test_packed_copies_follow_an_update_in_place(make_model: MakeModel, make_prompt: MakePrompt, monkeypatch):
    monkeypatch.setattr(packed_linear, "_WORTHWHILE", 0)
    model = make_model(head_dim=8, scale=2.0)
    engine = EmbeddedEngine(model, EngineSection(block_tokens=8, prefill_tokens=4))  # also forwards without a logit
    assert any(isinstance(module, packed_linear.PackedLinear) for module in engine._sampled.modules())
    for version in (1, 2):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.1)
        assert not engine.holds(model)
        engine.update_weights(model, version)
        assert engine.holds(model)
        rollouts = list(engine.generate([make_prompt("p", 30)], SamplingParams(n=3, max_new_tokens=8)))
        for rollout in rollouts:
            difference = np.abs(rollout.payload.resolve().logprobs - reference_logprobs(model, rollout))
            assert difference.max() <= 1e-4


def test_a_soak_of_random_work_keeps_every_account(make_model: MakeModel, make_prompt: MakePrompt):
    model, rng = make_model(), np.random.default_rng(0)
    engine = EmbeddedEngine(model, EngineSection(kv_tokens=240, block_tokens=4, max_running=12, prefill_tokens=32))
    for step in range(15):
        prompts = [make_prompt(f"{step}-{i}", int(rng.integers(1, 20))) for i in range(rng.integers(1, 6))]
        params = SamplingParams(n=int(rng.integers(1, 5)), max_new_tokens=int(rng.integers(1, 25)), stop_token_ids=(5,))
        got = 0
        for rollout in engine.generate(prompts, params):
            got += 1
            assert rollout.num_tokens == len(rollout.payload.resolve().tokens)
            match rng.integers(0, 20):
                case 0:
                    engine.abort([prompts[0].uid])
                case 1:
                    engine.update_weights(model, engine.version + 1)
                case _:
                    pass
            engine.check_integrity()
        assert got == len(prompts) * params.n
    assert engine._scheduler.pool.num_in_use == 0
    assert engine.stats().num_preemptions > 0


@pytest.mark.parametrize("chunked", [False, True])
def test_rows_split_among_threads_sample_the_same(make_model, make_prompt, chunked: bool, monkeypatch):
    """Many rows, so that each thread takes some through all layers; with and without chunks of prompts beside them."""
    model = make_model(head_dim=8)
    prompts = [make_prompt(uid=f"p{i}", length=5 + 3 * i) for i in range(12)]
    params = SamplingParams(n=16, max_new_tokens=12)
    section = EngineSection(prefill_tokens=250 if chunked else 8192, block_tokens=8)
    monkeypatch.setattr(embedded, "_LITTLE", 0)  # as if the model were large
    found: list[dict[tuple[str, int], list[int]]] = []
    numbers: list[int] = []  # of shares that forwards were split into
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        engine = EmbeddedEngine(model, section)
        shares = engine._shares
        monkeypatch.setattr(engine, "_shares", lambda *a, split=shares: numbers.append(len(split(*a)[0])) or split(*a))
        found.append(
            {(r.uid, r.sample_index): r.payload.resolve().tokens.tolist() for r in engine.generate(prompts, params)}
        )
        engine.check_integrity()
    torch.set_num_threads(before)
    assert set(numbers) == {1, 2}
    same = [found[0][key] == found[1][key] for key in found[0]]
    assert len(same) == 192
    assert np.mean(same) > 0.97  # matrix products differ in the last bits with their shape: at a border a token may too
