"""What every Engine must do. An engine's own test module subclasses `Contract` and gives it a `Harness`.

Nothing here looks inside an engine: the protocol (`pekoe.engine.base`) and the model itself are all there is. A test
that must meet requests in flight is tried again where the machine was so busy that they had ended.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pekoe.core.errors import RunError, UserError
from pekoe.core.types import Completion, Request, SamplingParams
from pekoe.model import Decoder, save_model
from tests.engine.harness import (
    LIMIT_S,
    LONG,
    SHAPE,
    STOPS,
    VOCAB,
    Engine,
    Futures,
    Harness,
    key_of,
    prompt,
    tokens_of,
    total,
    wait_for_one,
)
from tests.engine.leftovers import Leftovers
from tests.engine.reference import (
    assert_drawn_from,
    assert_independent,
    assert_uniform,
    logits_of,
    probabilities,
    response_logits,
    uniforms_of,
    worst_difference,
)

SAMPLINGS = {
    "T 0.5": SamplingParams(temperature=0.5),
    "T 1": SamplingParams(),
    "T 1.7": SamplingParams(temperature=1.7),
    "top-p": SamplingParams(top_p=0.7),
    "top-k": SamplingParams(top_k=4),
    "top-k, then top-p": SamplingParams(top_k=6, top_p=0.8, temperature=1.7),
}


def short(n: int = 2, **changes: Any) -> SamplingParams:
    return SamplingParams(**({"n": n, "max_new_tokens": 8} | changes))


class Contract:
    """The tests. A subclass has a fixture `harness`."""

    @pytest.fixture
    def harness(self) -> Harness:
        raise NotImplementedError

    @pytest.fixture
    def engine(self, harness: Harness) -> Iterator[Engine]:
        with closing(harness.open()) as engine:
            yield engine

    # What comes out

    def test_a_prompts_samples_are_complete_and_their_tokens_counted(self, harness: Harness, engine: Engine):
        before, params = engine.stats().num_decode_tokens, short(5, max_new_tokens=7)
        sampled = harness.collect(
            engine, [*prompt("a", 9, params), *prompt("b", 20, params), *prompt("a", 9, params, draw=1)]
        )
        assert engine.stats().num_decode_tokens - before == total(sampled) == 3 * 5 * 7
        assert {completion.versions for _, completion in sampled.values()} == {((0, 0),)}
        assert engine.version == 0
        assert engine.health()
        assert engine.submit([]) == []

    def test_generate_gives_completions_by_prompt(self, harness: Harness, engine: Engine):
        prompts = [request.tokens.tolist() for request in (prompt(f"p{n}", n, short(1))[0] for n in (5, 30, 1))]
        params = short(3, max_new_tokens=5)
        rows = engine.generate(prompts, params)
        assert [[c.num_tokens for c in row] for row in rows] == [[5] * 3] * 3
        for row, tokens in zip(rows, prompts, strict=True):
            assert all(c.handle.resolve().tokens[:-5].tolist() == tokens for c in row)
        assert engine.generate([], params) == []

    @pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0, 1.7])
    def test_logprobs_are_the_models_at_the_sampling_temperature(
        self, harness: Harness, engine: Engine, temperature: float
    ):
        params = short(4, max_new_tokens=24, temperature=temperature)
        harness.assert_true(harness.collect(engine, [*prompt("a", 5, params), *prompt("b", 37, params)]))

    @pytest.mark.parametrize("name", ["top_p", "top_k", "min_new_tokens"])
    def test_logprobs_are_those_before_truncation(self, harness: Harness, engine: Engine, name: str):
        cuts = {"top_p": {"top_p": 0.6}, "top_k": {"top_k": 3}, "min_new_tokens": {"min_new_tokens": 16}}
        params = short(4, max_new_tokens=16, stop_token_ids=STOPS, **cuts[name])
        if harness.accepts(name, engine, params):
            harness.assert_true(harness.collect(engine, prompt("p", 11, params)))

    def test_greedy_is_the_models_own_loop(self, harness: Harness, engine: Engine):
        params = short(1, temperature=0, max_new_tokens=24)
        sampled = harness.collect(engine, [r for n in (1, 7, 33) for r in prompt(f"p{n}", n, params)])
        num_compared = 0
        for request, completion in sampled.values():
            tokens = request.tokens
            for place in range(24):
                (logits,) = logits_of(harness.model, [tokens])
                second, first = np.sort(logits[-1])[-2:]
                if first - second < 1e-3:
                    break  # a tie but for rounding: from here on another answer is right too
                tokens = np.append(tokens, logits[-1].argmax())
                assert completion.tokens[place] == tokens[-1]
                num_compared += 1
        assert num_compared > 48

    def test_requests_of_one_submit_may_ask_for_different_sampling(self, harness: Harness, engine: Engine):
        kinds = [
            short(3, temperature=0.5),
            short(2, temperature=0, max_new_tokens=3),
            short(4, max_new_tokens=100),
            short(4, stop_token_ids=STOPS, max_new_tokens=30, seed=5),
        ]
        requests = [r for i, params in enumerate(kinds) for r in prompt(f"p{i}", 7 + i, params)]
        sampled = harness.collect(engine, requests[::2] + requests[1::2])
        harness.assert_true(sampled)
        alone = harness.collect(engine, prompt("p1", 8, kinds[1]))
        assert tokens_of(alone).items() <= tokens_of(sampled).items()

    # How it ends

    def test_stop_tokens_end_responses_and_come_last(self, harness: Harness, engine: Engine):
        sampled = harness.collect(engine, prompt("p", 6, short(32, max_new_tokens=16, stop_token_ids=STOPS)))
        completions = [completion for _, completion in sampled.values()]
        assert {int(c.tokens[-1]) for c in completions if c.finish == "stop"} == set(STOPS)
        assert {c.finish for c in completions} == {"stop", "length"}
        assert len({c.num_tokens for c in completions}) > 3
        harness.assert_true(sampled)

    def test_a_stop_token_in_the_prompt_does_nothing(self, harness: Harness, engine: Engine):
        params = short(8, max_new_tokens=6, stop_token_ids=STOPS)
        requests = [
            replace(request, tokens=np.insert(request.tokens, place, STOPS))
            for place in (0, 5, 9)
            for request in prompt(f"p{place}", 9, params)
        ]
        sampled = harness.collect(engine, requests)
        longest = {uid: max(c.num_tokens for r, c in sampled.values() if r.uid == uid) for uid, *_ in sampled}
        assert min(longest.values()) > 2
        harness.assert_true(sampled)

    def test_ragged_work_is_finished_whole(self, harness: Harness, engine: Engine):
        """Prompts around every boundary of blocks and chunks, responses of every length."""
        params = short(max_new_tokens=40, stop_token_ids=STOPS)
        lengths = (1, 2, 3, 4, 5, 15, 16, 17, 31, 32, 33, 63, 64, 65, 130)
        harness.assert_true(harness.collect(engine, [r for n in lengths for r in prompt(f"p{n}", n, params)]))

    def test_the_longest_sequence_fits(self, harness: Harness, engine: Engine):
        for new in (4, 1):
            requests = prompt("p", engine.max_sequence_tokens - new, short(max_new_tokens=new))
            harness.assert_true(harness.collect(engine, requests))

    # What is shared

    def test_a_groups_prompt_is_computed_once(self, harness: Harness, engine: Engine):
        """Counted, not timed: the prefill work of 16 samples is that of one, and what is left beyond full blocks."""
        length, n, before = 70, 16, engine.stats()
        harness.collect(engine, prompt("p", length, short(n, max_new_tokens=4)))
        after = engine.stats()
        computed = after.num_prefill_tokens - before.num_prefill_tokens
        assert length <= computed <= length + n * harness.prompt_tokens_again(length)
        saved = after.num_cached_tokens + after.num_shared_tokens - before.num_cached_tokens - before.num_shared_tokens
        assert computed + saved >= n * length

    def test_prefixes_are_found_again_until_they_are_flushed(self, harness: Harness, engine: Engine):
        length = 70

        def num_cached() -> int:
            before = engine.stats()
            ((_, completion),) = harness.collect(engine, prompt("p", length, short(1))).values()
            after = engine.stats()
            cached = after.num_cached_tokens - before.num_cached_tokens
            assert after.num_prefill_tokens - before.num_prefill_tokens == length - cached
            assert completion.num_cached_tokens == cached
            return cached

        assert harness.reusable(length) >= 64
        flushes: list[Callable[[], object]] = [
            lambda: None,
            lambda: harness.update(engine, harness.other, 1),
            engine.flush_cache,
        ]
        for flush in flushes:
            flush()
            assert num_cached() == 0
            assert num_cached() == harness.reusable(length)

    # What is drawn

    @pytest.mark.parametrize("name", SAMPLINGS)
    def test_tokens_are_drawn_from_the_models_distribution(self, harness: Harness, engine: Engine, name: str):
        params = replace(SAMPLINGS[name], stream="eval")
        if not harness.accepts(f"{name}, eval", engine, params):
            return
        n = harness.num_draws // 4
        groups = [prompt(f"{name} {i}", 3 + 5 * i, replace(params, n=n, max_new_tokens=1)) for i in range(4)]
        sampled = harness.collect(engine, [request for group in groups for request in group])
        counts = [np.bincount(_first_tokens(sampled, group[0].uid), minlength=VOCAB) for group in groups]
        logits = np.stack([logits[-1] for logits in logits_of(harness.model, [group[0].tokens for group in groups])])
        assert_drawn_from(np.concatenate(counts), probabilities(logits, params).ravel() * n)

        later = harness.collect(engine, prompt("later", 3, replace(params, n=32, max_new_tokens=24, seed=1)))
        pairs = [later[key] for key in sorted(later)]
        rows, tokens = (
            np.concatenate(response_logits(harness.model, pairs)),
            np.concatenate([c.tokens for _, c in pairs]),
        )
        numbers = uniforms_of(probabilities(rows, params), tokens).reshape(32, 24)
        assert_uniform(numbers.ravel())
        assert_uniform(numbers[:, 12:].ravel())
        assert_independent(numbers[:, :-1].ravel(), numbers[:, 1:].ravel())
        assert_independent(numbers[:-1].ravel(), numbers[1:].ravel())

    def test_a_ban_on_early_stops_leaves_the_rest_as_it_was(self, harness: Harness, engine: Engine):
        stops = (0, 12, *STOPS, 42)  # a quarter of all tokens
        params = short(harness.num_draws // 5, min_new_tokens=6, stop_token_ids=stops, stream="eval")
        if harness.accepts("min_new_tokens, eval", engine, params):
            pairs = list(harness.collect(engine, prompt("p", 6, params)).values())
            assert {completion.finish for _, completion in pairs} == {"stop", "length"}
            places = np.concatenate([np.arange(completion.num_tokens) for _, completion in pairs])
            rows = np.concatenate(response_logits(harness.model, pairs))
            tokens = np.concatenate([completion.tokens for _, completion in pairs])
            assert_uniform(uniforms_of(probabilities(rows, params, places), tokens))

    @pytest.mark.parametrize("across", ["sample", "uid", "draw", "seed", "stream"])
    def test_random_numbers_are_independent(self, harness: Harness, engine: Engine, across: str):
        """Of the samples of a group; and of two groups that differ in one thing that keys them."""
        n = harness.num_draws // 3
        params = short(n, max_new_tokens=1, seed=2)
        changes: dict[str, dict[str, Any]] = {
            "sample": {},
            "uid": {"uid": "q"},
            "draw": {"draw": 1},
            "seed": {"params": replace(params, seed=3)},
            "stream": {"params": replace(params, stream="eval")},
        }

        def numbers(n: int, seed: int, **changes: Any) -> np.ndarray:
            requests = [replace(request, **changes) for request in prompt("p", 12, replace(params, n=n))]
            (logits,) = logits_of(harness.model, [requests[0].tokens])
            tokens = _first_tokens(harness.collect(engine, requests), requests[0].uid)
            return uniforms_of(probabilities(logits[-1:].repeat(n, 0), params), tokens, seed)

        if across == "sample":
            both = numbers(2 * n, 0)
            assert_independent(both[::2], both[1::2])
            assert_independent(both[:n], both[n:])
        else:
            assert_independent(numbers(n, 0), numbers(n, 1, **changes[across]))

    def test_i8_a_seed_gives_the_same_tokens_whatever_else_is_asked(self, harness: Harness, engine: Engine):
        """Another batch moves logits in their last bits, so a token in a hundred thousand may differ: none here."""
        harness.need("seeds")
        params = short(4, max_new_tokens=24, seed=3)
        groups = [prompt(f"p{i}", 4 + i, params) for i in range(6)]
        together = tokens_of(harness.collect(engine, [request for group in groups for request in group]))
        again = tokens_of(harness.collect(engine, [request for group in groups[::-1] for request in group]))
        alone = tokens_of(harness.collect(engine, groups[2]))
        assert again == together
        assert alone.items() <= together.items()
        different = set(map(tuple, together.values()))
        assert len(different) == len(together)
        for other in (replace(params, seed=4), replace(params, stream="eval")):
            assert not set(map(tuple, tokens_of(harness.collect(engine, prompt("p0", 4, other))).values())) & different

    # At any time

    def test_more_is_submitted_while_others_run(self, harness: Harness, engine: Engine):
        late = short(3, max_new_tokens=20)
        for attempt in range(5):
            requests = prompt(f"a{attempt}", 9, LONG)
            futures = engine.submit(requests)
            wait_for_one(futures)
            more = [*prompt(f"b{attempt}", 30, late), *prompt(f"a{attempt}", 9, late, draw=1)]
            later = harness.drain(engine, more, engine.submit(more))
            met = not all(future.done() for future in futures)
            harness.assert_true(later | harness.drain(engine, requests, futures))
            if met:
                return
        raise AssertionError("nothing ran any more when the others were done")

    def test_a_higher_priority_overtakes_what_waits(self, harness: Harness):
        with closing(harness.open(room=8)) as engine:
            low = [r for i in range(8) for r in prompt(f"p{i}", 9, short(8, max_new_tokens=60))]
            futures = engine.submit(low)
            high = prompt("q", 9, short(2, max_new_tokens=4), priority=1)
            sampled = harness.drain(engine, high, engine.submit(high))
            assert not all(future.done() for future in futures)
            harness.assert_true(sampled | harness.drain(engine, low, futures))

    def test_little_room_loses_and_doubles_nothing(self, harness: Harness):
        with closing(harness.open(room=3)) as engine:
            params = short(max_new_tokens=30, stop_token_ids=STOPS)
            harness.assert_true(
                harness.collect(engine, [r for i in range(8) for r in prompt(f"p{i}", 3 + 2 * i, params)])
            )
            harness.assert_true(harness.collect(engine, prompt("p0", 3, replace(params, n=7))))  # above the room

    # Abort, the end

    def test_abort_of_one_problem_keeps_what_was_sampled(self, harness: Harness, engine: Engine):
        kept = 0
        for attempt in range(5):
            mine, others = f"c{attempt}", f"d{attempt}"
            requests = [*prompt(mine, 9, LONG), *prompt(others, 9, LONG)]
            futures = engine.submit(requests)
            wait_for_one(futures)
            engine.abort([others, "unknown"])
            sampled = harness.drain(engine, requests, futures)
            aborted = [(r, c) for r, c in sampled.values() if c.finish == "abort"]
            assert {request.uid for request, _ in aborted} <= {others}
            harness.assert_true(sampled)
            kept += sum(completion.num_tokens > 0 for _, completion in aborted)
            if kept >= 4:
                return
        raise AssertionError("nothing was in flight when it was aborted")

    def test_abort_of_all_ends_what_runs_and_what_waits(self, harness: Harness):
        with closing(harness.open(room=8)) as engine:
            engine.abort()  # nothing to abort: nothing happens
            requests = [r for i in range(4) for r in prompt(f"p{i}", 9, LONG)]
            futures = engine.submit(requests)
            wait_for_one(futures)
            engine.abort()
            sampled = harness.drain(engine, requests, futures)
            assert sum(completion.finish == "abort" for _, completion in sampled.values()) >= 3 * LONG.n
            harness.assert_true(sampled)
            harness.collect(engine, prompt("p0", 9, short()))  # it was for once

    def test_every_future_ends_whatever_happens(self, harness: Harness):
        """Submits, aborts and the end, from threads."""
        with closing(harness.open(room=8)) as engine:
            asked: list[tuple[Request, Future[Completion]]] = []

            def ask(thread: int) -> None:
                with contextlib.suppress(RunError):  # it is closed
                    for i in range(20):
                        requests = prompt(f"{thread}", 9, replace(LONG, n=4), draw=i)
                        asked.extend(zip(requests, engine.submit(requests), strict=True))
                        if i % 3 == 2:
                            engine.abort([f"{thread}"])

            threads = [threading.Thread(target=ask, args=(i,)) for i in range(3)]
            for thread in threads:
                thread.start()
            while sum(future.done() for _, future in list(asked)) < 8:
                time.sleep(0.001)
        for thread in threads:
            thread.join()
        assert not wait([future for _, future in asked], LIMIT_S).not_done
        errors = [error for _, future in asked if (error := future.exception())]
        assert all(isinstance(error, RunError) and "closed" in str(error) for error in errors)
        sampled = {key_of(request): (request, future.result()) for request, future in asked if not future.exception()}
        for pair in sampled.values():
            harness.check_form(*pair)
        harness.assert_true(sampled)

    def test_after_close_nothing_is_left(self, harness: Harness):
        left = Leftovers()
        with closing(harness.launch()) as engine:
            futures = engine.submit(prompt("p", 9, LONG))
            wait_for_one(futures)
            left.look()
            assert bool(left.processes) == bool(left.ports) == harness.has_processes
            engine.close()
            engine.close()
            assert not wait(futures, LIMIT_S).not_done
            left.assert_none()
            assert not engine.health()
            with pytest.raises(RunError, match="closed"):
                engine.submit(prompt("p", 9, LONG))

    # Weights

    @pytest.mark.parametrize("from_directory", [False, True])
    def test_i4_after_an_update_the_new_weights_answer(
        self, harness: Harness, engine: Engine, tmp_path: Path, from_directory: bool
    ):
        """Drained. The same prompt before and after: its old KV would put log-probs off by more than 0.1."""
        requests = prompt("p", 70, short(4, max_new_tokens=12))
        harness.collect(engine, requests)
        for version, model, before in ((1, harness.other, harness.model), (7, harness.model, harness.other)):
            if from_directory:
                save_model(model, tmp_path / f"{version}")
            harness.update(engine, tmp_path / f"{version}" if from_directory else model, version)
            assert engine.version == version
            sampled = harness.collect(engine, requests)
            assert {completion.versions for _, completion in sampled.values()} == {((version, 0),)}
            harness.assert_true(sampled, {version: model})
            assert worst_difference({version: before}, sampled.values()) > 0.1

    def test_memory_is_given_back_and_taken_again(self, harness: Harness, engine: Engine):
        """For a trainer's turn on the same device; new weights follow."""
        requests = prompt("p", 70, short(4))
        harness.collect(engine, requests)
        for version, model in enumerate((harness.other, harness.model), 1):
            engine.offload()
            engine.onload()
            harness.update(engine, model, version)
            harness.assert_true(harness.collect(engine, requests), {version: model})

    def test_an_update_in_flight_recomputes_kv_and_tags_versions(self, harness: Harness):
        """With little room, so that however long an update takes there is work left for the next. What is submitted
        during an update is sampled as well."""
        with closing(harness.open(room=8)) as engine:
            crossed = 0
            for first in (0, 2, 4, 6):
                requests = [*prompt(f"a{first}", 9, LONG), *prompt(f"b{first}", 40, LONG)]
                futures = engine.submit(requests)
                wait_for_one(futures)
                updates = threading.Thread(target=harness.update, args=(engine, harness.other, first + 1))
                updates.start()
                during = prompt(f"c{first}", 12, short(4, max_new_tokens=20))
                more = engine.submit(during)
                updates.join()
                _wait_for_version(futures, first + 1)
                harness.update(engine, harness.model, first + 2)
                sampled = harness.drain(engine, requests, futures) | harness.drain(engine, during, more)
                models = {first: harness.model, first + 1: harness.other, first + 2: harness.model}
                harness.assert_true(sampled, models, noise=2)  # an old key or value would put it off by more than 0.1
                seen = {version for _, completion in sampled.values() for version, _ in completion.versions}
                crossed += sum(len(completion.versions) > 1 for _, completion in sampled.values())
                if crossed >= 2 and len(seen) == 3:
                    return
        raise AssertionError("the updates met too little in flight")

    def test_tokens_after_an_update_are_drawn_from_the_new_weights(self, harness: Harness, engine: Engine):
        for version in (2, 4, 6):
            harness.update(engine, harness.model, version - 1)
            requests = prompt(f"p{version}", 9, replace(LONG, n=32))
            futures = engine.submit(requests)
            wait_for_one(futures)
            harness.update(engine, harness.other, version)
            sampled = harness.drain(engine, requests, futures)
            crossed = [(r, c) for r, c in sampled.values() if len(c.versions) == 2]
            starts = [completion.versions[1][1] for _, completion in crossed]
            if sum(completion.num_tokens for _, completion in crossed) - sum(starts) > 100:
                break
        else:
            raise AssertionError("the updates met too little in flight")
        parts = zip(response_logits(harness.other, crossed), starts, strict=True)
        rows = np.concatenate([logits[start:] for logits, start in parts])
        tokens = np.concatenate([c.tokens[start:] for (_, c), start in zip(crossed, starts, strict=True)])
        assert_uniform(uniforms_of(probabilities(rows, LONG), tokens))

    def test_wrong_weights_are_refused_and_the_old_ones_go_on(
        self, harness: Harness, engine: Engine, make_model: Callable[..., Decoder], tmp_path: Path
    ):
        for source in (make_model(**(SHAPE | {"intermediate_size": 64})), tmp_path / "absent"):
            with pytest.raises(UserError, match=r"expected .* got"):
                harness.update(engine, source, 1)
        assert engine.version == 0
        harness.assert_true(harness.collect(engine, prompt("p", 9, short())))

    # The user's mistakes

    def test_mistakes_are_refused_at_the_call(self, harness: Harness, engine: Engine):
        """Nothing of the call is sampled, good prompts beside the bad one included."""
        cases: list[tuple[list[int], dict[str, Any], str]] = [
            ([], {}, "expected at least one token, got none"),
            ([1, VOCAB], {}, rf"expected token ids in \[0, {VOCAB}\), got {VOCAB}"),
            ([1, -2], {}, rf"expected token ids in \[0, {VOCAB}\), got -2"),
            ([1] * 505, {}, r"expected at most \d+ tokens .*, got 505 \+ 9 new; .*: \d"),
            ([1], {"max_new_tokens": 10_000}, r"expected at most \d+ tokens .*, got 1 \+ 10000 new"),
            ([1], {"stop_token_ids": (3, VOCAB)}, rf"stop token: expected an id in \[0, {VOCAB}\), got {VOCAB}"),
            ([1], {"stop_token_ids": (-1,)}, r"stop token: expected .*, got -1"),
        ]
        before = engine.stats()
        for tokens, more, message in cases:
            bad = Request("bad", 0, 0, np.array(tokens, np.int64), short(1, **({"max_new_tokens": 9} | more)))
            with pytest.raises(UserError, match=message):
                engine.submit([*prompt("good", 1, short()), bad])
        if "refuse whole calls" not in harness.cannot:
            assert engine.stats() == before
        harness.collect(engine, prompt("good", 1, short()))  # and it is none the worse


def _first_tokens(sampled: dict[Any, tuple[Request, Completion]], uid: str) -> np.ndarray:
    """By sample index, [n]."""
    return np.array([completion.tokens[0] for key, (_, completion) in sorted(sampled.items()) if key[0] == uid])


def _wait_for_version(futures: Futures, version: int) -> None:
    """Until a response has a token of this version, or all have ended."""
    left = set(futures)
    while left:
        done, left = wait(left, LIMIT_S, "FIRST_COMPLETED")
        assert done
        if any(version in dict(future.result().versions) for future in done):
            return
