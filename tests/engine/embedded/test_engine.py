"""The embedded engine against the model's own forward: I1, I4, I7, I8; futures that always end; work that is saved."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, wait
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pekoe.config.engine import EngineSection
from pekoe.core.errors import RunError, UserError
from pekoe.core.types import Completion, Request, SamplingParams
from pekoe.engine import EmbeddedEngine
from pekoe.engine.base import Broadcast, BroadcastGroup, requests_of
from pekoe.engine.embedded import model_runner
from pekoe.engine.embedded.engine import _left
from pekoe.kernels import packed_linear
from pekoe.kernels.packed_linear import available
from pekoe.model import Decoder, PackedAttention, save_model
from tests.engine.embedded.checks import (
    assert_well_formed,
    collect,
    reference_logprobs,
    tokens_of,
    worst_difference,
)

MakeModel = Callable[..., Decoder]
MakeRequests = Callable[..., list[Request]]
SMALL = EngineSection(kv_tokens=2048, block_tokens=4, max_running=64)
LONG = SamplingParams(n=4, max_new_tokens=100)
BROADCAST = Broadcast(BroadcastGroup("group", "127.0.0.1", 1, 2, "gloo", 10), 2**20)


def at_forward(engine: EmbeddedEngine, number: int, action: Callable[[], None]) -> threading.Event:
    """Call `action` once that many forwards are done, from a thread of its own that the next forward waits for.

    The event says that it has returned.
    """
    done, forwards, step = threading.Event(), 0, engine._step

    def run() -> None:
        action()
        done.set()

    def stepped() -> Any:
        nonlocal forwards
        ended = step()
        forwards += 1
        if forwards == number:
            threading.Thread(target=run).start()
            while not engine._num_waiting and not done.is_set():
                time.sleep(0.0005)
        return ended

    engine._step = stepped
    return done


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_i1_sampling_logprobs_equal_the_training_forward(
    make_model: MakeModel, make_requests: MakeRequests, family: str, temperature: float
):
    model = make_model(family=family, qkv_bias=family == "qwen2", qk_norm=family == "qwen3")
    params = SamplingParams(n=5, max_new_tokens=24, temperature=temperature, top_p=0.9, stop_token_ids=(7,))
    requests = [r for i, length in enumerate([1, 3, 4, 5, 17, 30]) for r in make_requests(f"p{i}", length, params)]
    assert worst_difference({0: model}, collect(EmbeddedEngine(model, SMALL), requests).values()) <= 1e-4


def test_greedy_equals_the_reference_token_for_token(make_model: MakeModel, make_requests: MakeRequests):
    model, params = make_model(), SamplingParams(temperature=0, max_new_tokens=20)
    requests = [r for i, length in enumerate([2, 9, 16]) for r in make_requests(f"p{i}", length, params)]
    sampled = tokens_of(collect(EmbeddedEngine(model, SMALL), requests))
    for request in requests:
        tokens = torch.from_numpy(request.tokens)
        for _ in range(20):
            with torch.no_grad():
                logits = model.logits(model(tokens, torch.arange(len(tokens)), PackedAttention([0, len(tokens)])))
            tokens = torch.cat([tokens, logits[-1:].argmax(-1)])
        assert sampled[request.uid, 0, 0] == tokens[len(request.tokens) :].tolist()


def test_finish_reasons_and_lengths(make_model: MakeModel, make_requests: MakeRequests):
    params = SamplingParams(n=32, max_new_tokens=12, min_new_tokens=3, stop_token_ids=(5, 6, 8, 9, 10))
    sampled = collect(EmbeddedEngine(make_model(), SMALL), make_requests("p", 6, params))
    assert {completion.finish for _, completion in sampled.values()} == {"stop", "length"}


def test_generate_answers_in_the_prompts_order(make_model: MakeModel):
    completions = EmbeddedEngine(make_model(), SMALL).generate([[1, 2, 3], [4]], SamplingParams(n=3, max_new_tokens=5))
    assert [[c.num_tokens for c in group] for group in completions] == [[5] * 3] * 2
    assert completions[1][2].handle.resolve().tokens[0] == 4


# Work that is saved


def test_a_groups_prompt_is_computed_once(make_model: MakeModel, make_requests: MakeRequests):
    """Counted, not timed: prefill work for a group of 16 equals that of one prompt."""
    params = SamplingParams(n=16, max_new_tokens=6)
    engine = EmbeddedEngine(make_model(), SMALL)
    collect(engine, make_requests("a", 13, params) + make_requests("b", 16, params))
    stats = engine.stats()
    assert stats.num_prefill_tokens == 13 + 16
    assert stats.num_shared_tokens == 15 * (13 + 16)
    assert stats.num_decode_tokens == 2 * 16 * 6
    assert stats.busy_s > 0
    assert engine.stats() == stats


def test_prefixes_are_reused_across_requests_and_flushed(make_model: MakeModel, make_requests: MakeRequests):
    model = make_model()
    engine, requests = EmbeddedEngine(model, SMALL), make_requests("p", 15, SamplingParams(max_new_tokens=4))
    first = collect(engine, requests)
    before = engine.stats()
    second = collect(engine, requests)
    assert tokens_of(second) == tokens_of(first)
    assert [c.num_cached_tokens for _, c in [*first.values(), *second.values()]] == [0, 12]
    after = engine.stats()
    assert after.num_cached_tokens - before.num_cached_tokens == 12  # three full blocks of four
    assert after.num_prefill_tokens - before.num_prefill_tokens == 3
    for forget in (lambda: engine.update_weights(model, 1), engine.flush_cache):
        forget()
        collect(engine, requests)
        assert engine.stats().num_cached_tokens == after.num_cached_tokens
    assert engine.version == 1


# Weights


def test_i4_after_an_update_in_place_the_new_weights_answer(make_model: MakeModel, make_requests: MakeRequests):
    """The trainer changes the shared parameters under the engine; KV of the old ones must not be read."""
    model = make_model()
    engine, requests = EmbeddedEngine(model, SMALL), make_requests("p", 30, SamplingParams(max_new_tokens=8))
    collect(engine, requests)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    engine.update_weights(model, 1)
    sampled = collect(engine, requests)
    assert worst_difference({1: model}, sampled.values()) <= 1e-4
    assert {completion.versions for _, completion in sampled.values()} == {((1, 0),)}


@pytest.mark.parametrize("forwards", [[1], [5], [2, 3, 30]])
@pytest.mark.parametrize("prefill_tokens", [8, 8192])
def test_updates_while_requests_run(
    make_model: MakeModel, make_requests: MakeRequests, forwards: list[int], prefill_tokens: int
):
    """Also while prompts are computed in chunks: KV is recomputed, and each span of tokens has its own version."""
    models = {version: make_model(seed=version % 2) for version in range(4)}
    engine = EmbeddedEngine(models[0], EngineSection(kv_tokens=512, block_tokens=4, prefill_tokens=prefill_tokens))
    for version, forward in enumerate(forwards, 1):
        at_forward(engine, forward, lambda v=version: engine.update_weights(models[v], v))
    params = SamplingParams(n=6, max_new_tokens=40, stop_token_ids=(5,))
    sampled = collect(engine, [r for i in range(3) for r in make_requests(f"p{i}", 9 + 9 * i, params)])
    versions = {version for _, completion in sampled.values() for version, _ in completion.versions}
    assert len(forwards) in versions
    assert forwards == [1] or any(len(completion.versions) > 1 for _, completion in sampled.values())
    assert worst_difference(models, sampled.values()) <= 1e-4


def test_weights_come_from_a_directory(make_model: MakeModel, make_requests: MakeRequests, tmp_path: Path):
    new = make_model(seed=1)
    save_model(new, tmp_path / "model")
    engine = EmbeddedEngine(make_model(), SMALL)
    engine.update_weights(tmp_path / "model", 3)
    sampled = collect(engine, make_requests("p", 9, SamplingParams(max_new_tokens=8)))
    assert worst_difference({3: new}, sampled.values()) <= 1e-4
    assert engine.checksums() == EmbeddedEngine(new, SMALL).checksums()
    assert engine.holds(new)


def test_wrong_weights_are_refused_and_the_old_ones_go_on(
    make_model: MakeModel, make_requests: MakeRequests, tmp_path: Path
):
    model = make_model()
    engine = EmbeddedEngine(model, SMALL)
    for source in (make_model(intermediate_size=64), tmp_path / "absent"):
        with pytest.raises(UserError, match=r"expected .* got"):
            engine.update_weights(source, 1)
    assert engine.version == 0
    sampled = collect(engine, make_requests("p", 9, SamplingParams(max_new_tokens=8)))
    assert worst_difference({0: model}, sampled.values()) <= 1e-4


def test_a_broadcast_is_received_between_two_forwards(make_model: MakeModel, make_requests: MakeRequests):
    model, new = make_model(), make_model(seed=1)
    old = make_model()

    def receive(target: Decoder, source: Broadcast) -> None:
        assert (target, source) == (model, BROADCAST)
        with torch.no_grad():
            for mine, theirs in zip(target.parameters(), new.parameters(), strict=True):
                mine.fill_(torch.nan)
                time.sleep(0.005)
                mine.copy_(theirs)

    engine = EmbeddedEngine(model, SMALL, owns_model=True, receive=receive)
    at_forward(engine, 5, lambda: engine.update_weights(BROADCAST, 1))
    sampled = collect(engine, make_requests("p", 9, SamplingParams(n=8, max_new_tokens=20)))
    assert {completion.versions for _, completion in sampled.values()} == {((0, 0), (1, 5))}
    assert worst_difference({0: old, 1: new}, sampled.values()) <= 1e-4


def test_after_a_broadcast_that_breaks_off_requests_wait_for_other_weights(
    make_model: MakeModel, make_requests: MakeRequests
):
    def receive(target: Decoder, source: Broadcast) -> None:
        raise ConnectionError("rank 0 is gone")

    model = make_model()
    engine = EmbeddedEngine(model, SMALL, owns_model=True, receive=receive)
    errors: list[BaseException] = []

    def update() -> None:
        with pytest.raises(RunError, match="rank 0 is gone") as info:
            engine.update_weights(BROADCAST, 1)
        errors.append(info.value)

    requests = make_requests("p", 9, LONG)
    updated = at_forward(engine, 5, update)
    futures = engine.submit(requests)
    assert updated.wait(30)
    assert errors
    with pytest.raises(RunError, match="update_weights"):
        engine.submit(requests)
    time.sleep(0.1)
    assert engine.stats().num_decode_tokens == 5 * LONG.n
    engine.update_weights(model, 1)
    completions = [future.result(30) for future in futures]
    assert {completion.versions for completion in completions} == {((0, 0), (1, 5))}
    assert worst_difference({0: model, 1: model}, zip(requests, completions, strict=True)) <= 1e-4
    updated = at_forward(engine, 5, update)
    (future, *_) = engine.submit(requests)
    assert updated.wait(30)
    engine.close()  # also while it has no weights
    with pytest.raises(RunError, match="closed"):
        future.result(0)


@pytest.mark.skipif(not available(), reason="needs oneDNN on x86-64")
def test_packed_copies_follow_an_update_in_place(make_model: MakeModel, make_requests: MakeRequests, monkeypatch):
    monkeypatch.setattr(packed_linear, "_WORTHWHILE", 0)
    model = make_model(head_dim=8, scale=2.0)
    engine = EmbeddedEngine(model, EngineSection(block_tokens=8, prefill_tokens=4))  # also forwards without a logit
    assert any(isinstance(module, packed_linear.PackedLinear) for module in engine._runner.sampled.modules())
    for version in (1, 2):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.1)
        assert not engine.holds(model)
        with pytest.raises(RunError, match="packed copies"):
            engine.checksums()
        engine.update_weights(model, version)
        assert engine.holds(model)
        sampled = collect(engine, make_requests("p", 30, SamplingParams(n=3, max_new_tokens=8)))
        assert worst_difference({version: model}, sampled.values()) <= 1e-4


@pytest.mark.parametrize("owns_model", [False, True])
def test_memory_is_given_back_and_taken_again(make_model: MakeModel, make_requests: MakeRequests, owns_model: bool):
    model, new, requests = make_model(), make_model(seed=1), make_requests("p", 9, LONG)
    engine = EmbeddedEngine(model, SMALL, owns_model=owns_model)
    collect(engine, requests)
    for version in (1, 2):
        engine.offload()
        engine.offload()
        assert engine.kv_bytes == 0
        assert (next(engine.model.parameters()).untyped_storage().nbytes() == 0) == owns_model
        for use in (lambda: engine.submit(requests), lambda: engine.update_weights(new, 9)):
            with pytest.raises(RunError, match="onload"):
                use()
        engine.onload()
        engine.onload()
        with pytest.raises(RunError, match="update_weights"):
            engine.submit(requests)
        if owns_model:
            with torch.no_grad():
                for mine, theirs in zip(model.parameters(), new.parameters(), strict=True):
                    mine.copy_(theirs)
        engine.update_weights(model if owns_model else new, version)
        assert worst_difference({version: new}, collect(engine, requests).values()) <= 1e-4
    futures = engine.submit(requests)
    with pytest.raises(RunError, match="4 requests are unfinished"):
        engine.offload()
    wait(futures)


# I8: whatever shares the batch


def test_i8_tokens_do_not_depend_on_the_batch(make_model: MakeModel, make_requests: MakeRequests):
    model = make_model(dtype=torch.float64)  # so that no rounding of another batch shape moves a logit
    params = SamplingParams(n=4, max_new_tokens=16, seed=3)
    groups = [make_requests(f"p{i}", 4 + i, params) for i in range(6)]
    together = tokens_of(collect(EmbeddedEngine(model, SMALL), [r for group in groups for r in group]))
    for group in groups:
        alone = tokens_of(collect(EmbeddedEngine(model, SMALL), group))
        assert alone == {name: together[name] for name in alone}
    other = [r for i in range(6) for r in make_requests(f"p{i}", 4 + i, SamplingParams(n=4, max_new_tokens=16))]
    assert tokens_of(collect(EmbeddedEngine(model, SMALL), other)) != together


MIXED = [
    SamplingParams(max_new_tokens=20),
    SamplingParams(max_new_tokens=30, temperature=0.7, seed=3),
    SamplingParams(max_new_tokens=20, temperature=0),
    SamplingParams(max_new_tokens=25, top_p=0.8, stop_token_ids=(3, 4, 5)),
    SamplingParams(max_new_tokens=20, top_k=3, stream="eval"),
    SamplingParams(max_new_tokens=20, min_new_tokens=8, stop_token_ids=(3, 4, 5, 6, 7, 8)),
    SamplingParams(max_new_tokens=20, min_new_tokens=2, stop_token_ids=(3, 4, 5, 6, 7, 8)),
    SamplingParams(max_new_tokens=20, stop_token_ids=(9, 10, 11)),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_i8_params_of_ones_own_give_what_they_give_alone(make_model: MakeModel, dtype: torch.dtype):
    """float32: by the kernel that samples on a CPU; of its logits' last bits, which another batch moves, none shows."""
    model = make_model(dtype=dtype)
    tokens = np.arange(1, 10)
    requests = [Request("p", 0, i, tokens, params) for i, params in enumerate(MIXED * 2)]
    together = collect(EmbeddedEngine(model, SMALL), requests)
    for request in requests:
        alone = collect(EmbeddedEngine(model, SMALL), [request])
        (name,) = alone
        assert tokens_of(alone)[name] == tokens_of(together)[name]
        assert alone[name][1].finish == together[name][1].finish
    assert worst_difference({0: model}, together.values()) <= 1e-4
    assert {completion.finish for _, completion in together.values()} == {"stop", "length"}


def test_running_out_of_kv_preempts_and_changes_nothing(make_model: MakeModel, make_requests: MakeRequests):
    model, params = make_model(dtype=torch.float64), SamplingParams(n=4, max_new_tokens=30)
    requests = [r for i in range(4) for r in make_requests(f"p{i}", 6 + i, params)]
    roomy = tokens_of(collect(EmbeddedEngine(model, SMALL), requests))
    tight = EmbeddedEngine(model, EngineSection(kv_tokens=160, block_tokens=4, max_running=64))
    sampled = collect(tight, requests)
    assert tight.stats().num_preemptions > 0
    assert tokens_of(sampled) == roomy
    assert worst_difference({0: model}, sampled.values()) <= 1e-5


# Requests at any time


def test_requests_come_from_several_threads_while_others_run(make_model: MakeModel, make_requests: MakeRequests):
    model = make_model(dtype=torch.float64)
    engine = EmbeddedEngine(model, EngineSection(kv_tokens=400, block_tokens=4, max_running=12, prefill_tokens=24))
    params = SamplingParams(n=3, max_new_tokens=12, stop_token_ids=(5,))
    asked = {f"t{i}-{k}": make_requests(f"t{i}-{k}", 3 + 2 * i + k, params) for i in range(4) for k in range(6)}
    asked |= {f"same{i}": requests_of(f"same{i}", 0, [1, 2, 3, 4, 5, 6, 7, 8, 9], params) for i in range(4)}
    futures: dict[str, list[Future[Completion]]] = {}

    def submit(number: int) -> None:
        for uid in sorted(asked)[number::4]:
            futures[uid] = engine.submit(asked[uid])

    threads = [threading.Thread(target=submit, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for uid, requests in asked.items():
        pairs = list(zip(requests, (future.result(60) for future in futures[uid]), strict=True))
        for request, completion in pairs:
            assert_well_formed(request, completion)
        alone = collect(EmbeddedEngine(model, SMALL), requests) if uid[-1] == "0" else {}
        assert all(tokens_of(alone)[uid, 0, r.sample] == c.tokens.tolist() for r, c in pairs if alone)
    engine.check_integrity()
    assert engine._scheduler.cache.num_in_use == 0


def test_higher_priorities_are_sampled_first(make_model: MakeModel):
    engine = EmbeddedEngine(make_model(), EngineSection(kv_tokens=512, block_tokens=4, max_running=2))
    params, order = SamplingParams(max_new_tokens=4), list[str]()
    priorities = {"a": 0, "b": 0, "c": 1, "d": 2, "e": 1, "f": -1, "g": 0}
    requests = [Request(uid, 0, 0, np.array([1, 2, 3]), params, p) for uid, p in priorities.items()]
    futures = engine.submit(requests)
    for request, future in zip(requests, futures, strict=True):
        future.add_done_callback(lambda _, uid=request.uid: order.append(uid))
    wait(futures)
    assert sorted(order[:2]) == ["c", "d"]  # two run at a time
    assert order[2] == "e" or order[3] == "e"
    assert order[4:] == ["b", "g", "f"] or order[-1] == "f"


def test_a_callback_may_ask_for_more(make_model: MakeModel, make_requests: MakeRequests):
    engine, rounds = EmbeddedEngine(make_model(), SMALL), list[int]()
    done = threading.Event()

    def again(_: Future[Completion]) -> None:
        rounds.append(1)
        if len(rounds) == 5:
            done.set()
            return
        engine.abort(["nobody"])
        engine.submit(make_requests(f"p{len(rounds)}", 6, LONG))[0].add_done_callback(again)

    engine.submit(make_requests("p", 6, SamplingParams(max_new_tokens=4)))[0].add_done_callback(again)
    assert done.wait(30)


# A future always ends


def test_abort_of_one_and_of_all(make_model: MakeModel, make_requests: MakeRequests):
    engine = EmbeddedEngine(make_model(), EngineSection(kv_tokens=512, block_tokens=4, max_running=6))
    requests = [r for i in range(3) for r in make_requests(f"p{i}", 6, SamplingParams(n=4, max_new_tokens=40))]
    at_forward(engine, 10, lambda: engine.abort(["p2"]))  # six run at once: p2 still waits
    sampled = collect(engine, requests)
    assert {uid for (uid, _, _), (_, c) in sampled.items() if c.finish == "abort"} == {"p2"}
    assert {c.finish for (uid, _, _), (_, c) in sampled.items() if uid != "p2"} == {"length"}
    at_forward(engine, 10, engine.abort)
    sampled = collect(engine, requests)
    assert {c.finish for _, c in sampled.values()} == {"abort"}
    assert sorted(c.num_tokens for _, c in sampled.values()) == [0] * 6 + [10] * 6
    assert worst_difference({0: engine.model}, [p for p in sampled.values() if p[1].num_tokens]) <= 1e-4
    assert engine._scheduler.cache.num_in_use == 0


def test_a_cancelled_future_ends_its_request(make_model: MakeModel, make_requests: MakeRequests):
    engine = EmbeddedEngine(make_model(), EngineSection(kv_tokens=512, block_tokens=4, max_running=2))
    requests = make_requests("p", 6, SamplingParams(n=4, max_new_tokens=50))
    futures = engine.submit(requests)
    assert all(futures[i].cancel() for i in (0, 3))
    wait(futures)
    assert [future.cancelled() for future in futures] == [True, False, False, True]
    assert engine.stats().num_decode_tokens < 4 * 50
    with pytest.raises(CancelledError):
        futures[0].result()
    engine.check_integrity()
    assert engine._scheduler.cache.num_in_use == 0


def test_weights_that_are_not_finite_end_all_with_an_error(make_model: MakeModel, make_requests: MakeRequests):
    model, requests = make_model(), make_requests("p", 6, LONG)
    engine = EmbeddedEngine(model, EngineSection(kv_tokens=512, block_tokens=4, max_running=2))
    saved = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        model.get_parameter("model.norm.weight").fill_(torch.nan)
    engine.update_weights(model, 1)
    for future in engine.submit(requests):
        with pytest.raises(RunError, match=r"logits are not finite \(version 1\)"):
            future.result(30)
    engine.check_integrity()
    model.load_state_dict(saved, strict=False)
    engine.update_weights(model, 2)
    assert worst_difference({2: model}, collect(engine, requests).values()) <= 1e-4


def test_an_error_in_a_forward_ends_all_with_it(make_model: MakeModel, make_requests: MakeRequests, monkeypatch):
    engine, requests = EmbeddedEngine(make_model(), SMALL), make_requests("p", 6, LONG)
    with monkeypatch.context() as patch:
        patch.setattr(engine._runner, "copy_blocks", lambda _: 1 / 0)
        for future in engine.submit(requests):
            with pytest.raises(RunError, match="ZeroDivisionError") as info:
                future.result(30)
            assert isinstance(info.value.__cause__, ZeroDivisionError)
    engine.check_integrity()
    collect(engine, requests)


def test_closing_ends_what_is_unfinished(make_model: MakeModel, make_requests: MakeRequests):
    engine = EmbeddedEngine(make_model(), EngineSection(kv_tokens=512, block_tokens=4, max_running=2))
    threads = set(threading.enumerate())
    futures = engine.submit(make_requests("p", 6, LONG))
    engine.close()
    engine.close()
    assert not engine.health()
    assert {t for t in threading.enumerate() if t.name == "pekoe-engine"} <= threads
    for future in futures:
        with pytest.raises(RunError, match="closed while requests were unfinished"):
            future.result(0)
    for use in (
        lambda: engine.submit(make_requests("p", 6, LONG)),
        lambda: engine.update_weights(engine.model, 1),
        engine.offload,
        engine.onload,
    ):
        with pytest.raises(RunError, match="closed"):
            use()


def test_an_engine_that_nobody_holds_goes_away(make_model: MakeModel, make_requests: MakeRequests):
    """Neither a thread nor the futures that it gave keep its memory."""
    engine = EmbeddedEngine(make_model(), SMALL)
    futures = engine.submit(make_requests("p", 6, LONG))
    wait(futures)
    engine.check_integrity()
    gone = weakref.ref(engine._runner)
    del engine
    deadline = time.monotonic() + 10
    while gone() is not None and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.01)
    assert gone() is None
    assert futures[0].result().num_tokens == 100


def test_the_users_mistakes_are_refused_before_sampling(make_model: MakeModel, make_requests: MakeRequests):
    engine = EmbeddedEngine(make_model(), EngineSection(kv_tokens=64, block_tokens=4), max_sequence_tokens=48)
    cases: list[tuple[list[int], dict[str, Any], str]] = [
        ([], {}, "at least one token"),
        ([1, 32], {}, r"ids in \[0, 32\), got 32"),
        ([1, -2], {}, "got -2"),
        ([1] * 40, {}, "most new tokens that fit: 8"),
        ([1] * 4, {"stop_token_ids": (99,)}, "stop token"),
    ]
    good = make_requests("good", 4, SamplingParams(max_new_tokens=4))
    for tokens, more, message in cases:
        with pytest.raises(UserError, match=message):
            engine.submit(good + requests_of("p", 0, tokens, SamplingParams(max_new_tokens=9, **more)))
    with pytest.raises(UnicodeEncodeError):
        engine.submit(good + make_requests("\ud800", 6))
    assert engine.submit([]) == []
    assert engine.stats().num_forwards == 0
    collect(engine, good)


# Everything at once


@given(data=st.data())
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_happens_every_future_ends_and_every_account_holds(make_model: MakeModel, data: st.DataObject):
    models = {version: make_model(seed=version % 2) for version in (0, 1)}
    engine = EmbeddedEngine(
        models[0],
        EngineSection(
            kv_tokens=data.draw(st.sampled_from([160, 240, 2048])),
            block_tokens=4,
            max_running=data.draw(st.sampled_from([2, 7, 32])),
            prefill_tokens=data.draw(st.sampled_from([4, 24, 512])),
        ),
    )
    pairs: list[tuple[Request, Future[Completion]]] = []
    prompts = st.sampled_from([[1], [1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 6, 7, 8, 9], [9] * 17, [1, 2, 3, 4] * 6])
    for number in range(data.draw(st.integers(1, 8))):
        match data.draw(st.sampled_from(["submit", "submit", "submit", "update", "abort", "cancel", "flush", "sleep"])):
            case "submit":
                params = data.draw(st.sampled_from(MIXED))
                requests = [
                    Request(f"p{number}", 0, i, np.array(data.draw(prompts)), params, data.draw(st.integers(0, 2)))
                    for i in range(data.draw(st.integers(1, 6)))
                ]
                pairs += zip(requests, engine.submit(requests), strict=True)
            case "update":
                version = engine.version + 1
                models[version] = models[version % 2]
                engine.update_weights(models[version], version)
            case "abort":
                engine.abort(data.draw(st.sampled_from([None, ["p0"], ["p1", "p2"]])))
            case "cancel":
                for _, future in pairs[:: data.draw(st.integers(2, 4))]:
                    future.cancel()
            case "flush":
                engine.flush_cache()
            case _:
                time.sleep(0.002)
        engine.check_integrity()
    if data.draw(st.booleans()):
        wait([future for _, future in pairs])
    engine.close()
    done: list[tuple[Request, Completion]] = []
    for request, future in pairs:
        if not future.cancelled() and future.exception(0) is None:
            assert_well_formed(request, future.result())
            done.append((request, future.result()))
    assert worst_difference(models, [pair for pair in done if pair[1].num_tokens]) <= 1e-4


@pytest.mark.parametrize("chunked", [False, True])
def test_rows_split_among_threads_sample_the_same(
    make_model: MakeModel, make_requests: MakeRequests, chunked: bool, monkeypatch: pytest.MonkeyPatch
):
    """Many rows, so that each thread takes some through all layers; with and without chunks of prompts beside them."""
    model = make_model(head_dim=8)
    params = SamplingParams(n=16, max_new_tokens=12)
    requests = [r for i in range(12) for r in make_requests(f"p{i}", 5 + 3 * i, params)]
    section = EngineSection(prefill_tokens=250 if chunked else 8192, block_tokens=8)
    monkeypatch.setattr(model_runner, "_LITTLE", 0)  # as if the model were large
    found: list[dict[Any, list[int]]] = []
    numbers: list[int] = []  # of shares that forwards were split into
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        engine = EmbeddedEngine(model, section)
        split = engine._runner.shares

        def shares(*args: Any, split: Any = split) -> Any:
            assert torch.get_num_threads() == threads  # noqa: B023
            result = split(*args)
            numbers.append(len(result[0]))
            return result

        monkeypatch.setattr(engine._runner, "shares", shares)
        found.append(tokens_of(collect(engine, requests)))
    torch.set_num_threads(before)
    assert set(numbers) == {1, 2}
    same = [found[0][key] == found[1][key] for key in found[0]]
    assert len(same) == 192
    assert np.mean(same) > 0.97  # matrix products differ in the last bits with their shape: at a border a token may too


def test_the_reference_is_not_the_engine(make_model: MakeModel, make_requests: MakeRequests):
    """Other weights are seen by the comparison that the tests above make."""
    (pair,) = collect(
        EmbeddedEngine(make_model(), SMALL), make_requests("p", 9, SamplingParams(max_new_tokens=8))
    ).values()
    assert np.abs(reference_logprobs(make_model(seed=1), *pair) - pair[1].logprobs).max() > 0.1


@pytest.mark.parametrize("changes", [{"kv_tokens": 2**31 - 1}, {"max_running": 2**31 - 1}])
def test_more_memory_than_there_is_is_refused(make_model: MakeModel, changes: dict[str, Any]):
    with pytest.raises(UserError, match=f"engine.{next(iter(changes))}: expected what the memory of cpu holds"):
        EmbeddedEngine(make_model(hidden_size=64, num_heads=8, num_kv_heads=8), EngineSection(**changes))


def test_kv_takes_what_a_gpu_has_left(monkeypatch: pytest.MonkeyPatch):
    """A tenth is kept free; what torch keeps for later counts as free, and what others will take does not."""
    gpu = torch.device("cuda")
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda _: (60 << 30, 80 << 30))
    monkeypatch.setattr("torch.cuda.memory_reserved", lambda _: 8 << 30)
    monkeypatch.setattr("torch.cuda.memory_allocated", lambda _: 6 << 30)
    assert _left(gpu, 10 << 30, 3 << 30) == pytest.approx((60 + 2 - 8 - 3 - 10) * 2**30, abs=1)
    assert _left(gpu, None, 0) is None
    assert _left(torch.device("cpu"), 0, 0) is None
    section = EngineSection()
    assert (section.kv_bytes(), section.kv_bytes(5 << 30), section.kv_bytes(-1)) == (2 << 30, 5 << 30, 0)
    assert EngineSection(kv_gib=1.5).kv_bytes(5 << 30) == 3 << 29
