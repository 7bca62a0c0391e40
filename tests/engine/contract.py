"""What every Generator must do. An engine's own test module subclasses `Contract` and gives it a `Harness`.

Nothing here looks inside an engine: the protocol (`pekoe.engine.base`) and the model itself are all there is.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pekoe.core.errors import RunError, UserError
from pekoe.core.types import Prompt, SamplingParams
from pekoe.engine import Generator
from pekoe.model import Decoder, save_model
from tests.engine.harness import (
    LONG,
    SHAPE,
    STOPS,
    VOCAB,
    Harness,
    Rollouts,
    assert_ended_rightly,
    first_tokens,
    prompt,
    tokens_of,
    total,
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


class Contract:
    """The tests. A subclass has a fixture `harness`."""

    @pytest.fixture
    def harness(self) -> Harness:
        raise NotImplementedError

    @pytest.fixture
    def engine(self, harness: Harness) -> Iterator[Generator]:
        with closing(harness.open()) as engine:
            yield engine

    # What comes out

    def test_a_prompts_samples_are_complete_and_their_tokens_counted(self, harness: Harness, engine: Generator):
        before = engine.stats().num_decode_tokens
        prompts = [prompt("a", 9), prompt("b", 20), prompt("a", 9, draw=1)]
        rollouts = harness.collect(engine, prompts, SamplingParams(n=5, max_new_tokens=7))
        assert engine.stats().num_decode_tokens - before == total(rollouts) == 3 * 5 * 7
        assert {rollout.versions for rollout in rollouts.values()} == {((0, 0),)}
        assert engine.version == 0
        assert engine.health()

    def test_no_prompts_give_no_responses(self, harness: Harness, engine: Generator):
        assert list(engine.generate([], SamplingParams())) == []

    @pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0, 1.7])
    def test_logprobs_are_the_models_at_the_sampling_temperature(
        self, harness: Harness, engine: Generator, temperature: float
    ):
        params = SamplingParams(n=4, max_new_tokens=24, temperature=temperature)
        rollouts = harness.collect(engine, [prompt("a", 5), prompt("b", 37)], params)
        harness.assert_true(rollouts, temperature=temperature)

    @pytest.mark.parametrize("name", ["top_p", "top_k", "min_new_tokens"])
    def test_logprobs_are_those_before_truncation(self, harness: Harness, engine: Generator, name: str):
        cuts = {"top_p": {"top_p": 0.6}, "top_k": {"top_k": 3}, "min_new_tokens": {"min_new_tokens": 16}}
        params = SamplingParams(n=4, max_new_tokens=16, stop_token_ids=STOPS, **cuts[name])
        if harness.accepts(name, engine, [prompt("p", 11)], params):
            harness.assert_true(harness.collect(engine, [prompt("p", 11)], params))

    def test_greedy_is_the_models_own_loop(self, harness: Harness, engine: Generator):
        prompts = [prompt("a", 1), prompt("b", 7), prompt("c", 33)]
        rollouts = harness.collect(engine, prompts, SamplingParams(temperature=0, max_new_tokens=24))
        num_compared = 0
        for each in prompts:
            tokens, got = each.tokens, rollouts[each.uid, 0, 0].payload.resolve().tokens
            for place in range(24):
                (logits,) = logits_of(harness.model, [tokens])
                second, first = np.sort(logits[-1])[-2:]
                if first - second < 1e-3:
                    break  # a tie but for rounding: from here on another answer is right too
                tokens = np.append(tokens, logits[-1].argmax())
                assert got[place] == tokens[-1]
                num_compared += 1
        assert num_compared > 48

    # How it ends

    def test_stop_tokens_end_responses_and_come_last(self, harness: Harness, engine: Generator):
        params = SamplingParams(n=32, max_new_tokens=16, stop_token_ids=STOPS)
        rollouts = harness.collect(engine, [prompt("p", 6)], params)
        last = {r.payload.resolve().tokens[-1] for r in rollouts.values() if r.finish_reason == "stop"}
        assert last == set(STOPS)
        assert {r.finish_reason for r in rollouts.values()} == {"stop", "length"}
        assert len({r.num_tokens for r in rollouts.values()}) > 3
        harness.assert_true(rollouts)

    def test_a_stop_token_in_the_prompt_does_nothing(self, harness: Harness, engine: Generator):
        base = prompt("p", 9).tokens
        prompts = [Prompt(str(place), 0, np.insert(base, place, STOPS)) for place in (0, 5, 9)]
        params = SamplingParams(n=8, max_new_tokens=6, stop_token_ids=STOPS)
        rollouts = harness.collect(engine, prompts, params)
        assert all(max(rollouts[p.uid, 0, i].num_tokens for i in range(8)) > 2 for p in prompts)
        harness.assert_true(rollouts)

    def test_no_stop_comes_before_min_new_tokens(self, harness: Harness, engine: Generator):
        params = SamplingParams(n=32, max_new_tokens=9, min_new_tokens=6, stop_token_ids=STOPS, stream="eval")
        if not harness.accepts("min_new_tokens, eval", engine, [prompt("p", 6)], params):
            return
        rollouts = harness.collect(engine, [prompt("p", 6)], params)
        assert min(r.num_tokens for r in rollouts.values()) >= 6
        assert {r.finish_reason for r in rollouts.values()} == {"stop", "length"}

    def test_ragged_work_is_finished_whole(self, harness: Harness, engine: Generator):
        """Prompts around every boundary of blocks and chunks, responses of every length."""
        prompts = [prompt(f"p{length}", length) for length in (1, 2, 3, 4, 5, 15, 16, 17, 31, 32, 33, 63, 64, 65, 130)]
        params = SamplingParams(n=2, max_new_tokens=40, stop_token_ids=STOPS)
        harness.assert_true(harness.collect(engine, prompts, params))

    def test_the_longest_sequence_fits(self, harness: Harness, engine: Generator):
        size = engine.max_sequence_tokens
        rollouts = harness.collect(engine, [prompt("p", size - 4)], SamplingParams(n=2, max_new_tokens=4))
        rollouts |= harness.collect(engine, [prompt("q", size - 1)], SamplingParams(n=2, max_new_tokens=1))
        assert {r.finish_reason for r in rollouts.values()} == {"length"}
        harness.assert_true(rollouts)

    # What is shared

    def test_a_groups_prompt_is_computed_once(self, harness: Harness, engine: Generator):
        """Counted, not timed: the prefill work of 16 samples is that of one, and what is left beyond full blocks."""
        length, n = 70, 16
        before = engine.stats()
        harness.collect(engine, [prompt("p", length)], SamplingParams(n=n, max_new_tokens=4))
        after = engine.stats()
        computed = after.num_prefill_tokens - before.num_prefill_tokens
        assert length <= computed <= length + n * harness.prompt_tokens_again(length)
        saved = after.num_cached_tokens + after.num_shared_tokens - before.num_cached_tokens - before.num_shared_tokens
        assert computed + saved >= n * length

    def test_prefixes_are_found_again_until_the_weights_change(self, harness: Harness, engine: Generator):
        params, length = SamplingParams(max_new_tokens=4), 70

        def cached() -> int:
            before = engine.stats()
            harness.collect(engine, [prompt("p", length)], params)
            after = engine.stats()
            num_cached = after.num_cached_tokens - before.num_cached_tokens
            assert after.num_prefill_tokens - before.num_prefill_tokens == length - num_cached
            return num_cached

        assert harness.reusable(length) >= 64
        assert cached() == 0
        assert cached() == harness.reusable(length)
        engine.update_weights(harness.other, 1)
        assert cached() == 0
        assert cached() == harness.reusable(length)

    # What is drawn

    @pytest.mark.parametrize("name", SAMPLINGS)
    def test_tokens_are_drawn_from_the_models_distribution(self, harness: Harness, engine: Generator, name: str):
        params = replace(SAMPLINGS[name], stream="eval")
        asked = [prompt(f"{name} {i}", 3 + 5 * i) for i in range(4)]
        if not harness.accepts(f"{name}, eval", engine, asked, params):
            return
        n = harness.num_draws // len(asked)
        first = harness.collect(engine, asked, replace(params, n=n, max_new_tokens=1))
        counts = [
            np.bincount([r.payload.resolve().tokens[0] for r in first.values() if r.uid == p.uid], minlength=VOCAB)
            for p in asked
        ]
        logits = np.stack([logits[-1] for logits in logits_of(harness.model, [p.tokens for p in asked])])
        assert_drawn_from(np.concatenate(counts), probabilities(logits, params).ravel() * n)

        later = harness.collect(engine, asked[:1], replace(params, n=32, max_new_tokens=24, seed=1))
        rollouts = [later[key] for key in sorted(later)]
        rows = np.concatenate(response_logits(harness.model, rollouts))
        tokens = np.concatenate([rollout.payload.resolve().tokens for rollout in rollouts])
        numbers = uniforms_of(probabilities(rows, params), tokens).reshape(32, 24)
        assert_uniform(numbers.ravel())
        assert_uniform(numbers[:, 12:].ravel())
        assert_independent(numbers[:, :-1].ravel(), numbers[:, 1:].ravel())
        assert_independent(numbers[:-1].ravel(), numbers[1:].ravel())

    def test_the_ban_on_early_stops_leaves_the_rest_as_it_was(self, harness: Harness, engine: Generator):
        stops = (0, 12, *STOPS, 42)  # a quarter of all tokens
        n = harness.num_draws // 5
        params = SamplingParams(n=n, max_new_tokens=8, min_new_tokens=8, stop_token_ids=stops, stream="eval")
        if not harness.accepts("min_new_tokens, eval", engine, [prompt("p", 6)], params):
            return
        rollouts = list(harness.collect(engine, [prompt("p", 6)], params).values())
        rows = np.concatenate(response_logits(harness.model, rollouts))
        tokens = np.concatenate([rollout.payload.resolve().tokens for rollout in rollouts])
        assert_uniform(uniforms_of(probabilities(rows, params, np.tile(np.arange(8), n)), tokens))

    @pytest.mark.parametrize("across", ["sample", "uid", "draw", "seed", "stream"])
    def test_random_numbers_are_independent(self, harness: Harness, engine: Generator, across: str):
        """Of the samples of a group; and of two groups that differ in one thing that keys them."""
        n = harness.num_draws // 3
        params, asked = SamplingParams(n=n, max_new_tokens=1, seed=2), prompt("p", 12)

        def numbers(asked: Prompt, params: SamplingParams, seed: int) -> np.ndarray:
            tokens = first_tokens(harness.collect(engine, [asked], params))
            (logits,) = logits_of(harness.model, [asked.tokens])
            return uniforms_of(probabilities(logits[-1:].repeat(len(tokens), 0), params), tokens, seed)

        if across == "sample":
            found = numbers(asked, replace(params, n=2 * n), 0)
            assert_independent(found[::2], found[1::2])
            assert_independent(found[:n], found[n:])
            return
        other = {
            "uid": (replace(asked, uid="q"), params),
            "draw": (replace(asked, draw=1), params),
            "seed": (asked, replace(params, seed=3)),
            "stream": (asked, replace(params, stream="eval")),
        }
        assert_independent(numbers(asked, params, 0), numbers(*other[across], 1))

    def test_i8_a_seed_gives_the_same_tokens_whatever_else_is_asked(self, harness: Harness, engine: Generator):
        """Another batch moves logits in their last bits, so a token in a hundred thousand may differ: none here."""
        harness.need("seeds")
        params = SamplingParams(n=4, max_new_tokens=24, seed=3)
        prompts = [prompt(f"p{i}", 4 + i) for i in range(6)]
        together = tokens_of(harness.collect(engine, prompts, params))
        again = tokens_of(harness.collect(engine, prompts[::-1], params))
        alone = tokens_of(harness.collect(engine, [prompts[2]], params))
        assert again == together
        assert alone == {key: together[key] for key in alone}
        assert len({tuple(tokens) for tokens in together.values()}) == len(together)
        for other in (replace(params, seed=4), replace(params, stream="eval")):
            assert not set(map(tuple, tokens_of(harness.collect(engine, prompts[:1], other)).values())) & {
                tuple(tokens) for tokens in together.values()
            }

    # Abort, close, room

    def test_abort_of_one_problem_keeps_what_was_sampled(self, harness: Harness, engine: Generator):
        """Tried again where the machine was so busy that the responses had ended before the abort arrived."""
        kept = 0
        for attempt in range(5):
            mine, others = f"a{attempt}", f"b{attempt}"
            stream = engine.generate([prompt(mine, 9), prompt(others, 9)], LONG)
            rollouts: Rollouts = {}
            while harness.take(engine, next(stream), rollouts).num_tokens < 5:
                pass  # until the others have come about as far
            engine.abort([others, "unknown"])
            harness.check(engine)
            harness.drain(engine, stream, rollouts)
            assert len(rollouts) == 2 * LONG.n
            aborted = [r for r in rollouts.values() if r.finish_reason == "abort"]
            assert {r.uid for r in aborted} <= {others}
            for rollout in rollouts.values():
                assert_ended_rightly(rollout, LONG)
            harness.assert_true(rollouts)
            kept += sum(r.num_tokens > 0 for r in aborted)
            if kept >= 4:
                break
        assert kept >= 4

    def test_abort_of_all_ends_what_runs_and_what_waits(self, harness: Harness):
        with closing(harness.open(room=8)) as engine:
            engine.abort()  # nothing to abort: nothing happens
            stream = engine.generate([prompt(f"p{i}", 9) for i in range(4)], LONG)
            rollouts: Rollouts = {}
            harness.take(engine, next(stream), rollouts)
            engine.abort()
            harness.drain(engine, stream, rollouts)
            assert len(rollouts) == 4 * LONG.n
            assert sum(r.finish_reason == "abort" for r in rollouts.values()) >= 3 * LONG.n
            harness.assert_true(rollouts)
            harness.collect(engine, [prompt("p0", 9)], SamplingParams(n=2, max_new_tokens=4))  # it was for once

    def test_closing_the_iterator_early_leaves_a_sound_engine(self, harness: Harness, engine: Generator):
        for attempt in range(3):
            stream = engine.generate([prompt(f"p{attempt}", 9)], LONG)
            next(stream)
            with pytest.raises(RunError, match="generating already"):
                next(engine.generate([prompt("q", 6)], SamplingParams(max_new_tokens=4)))
            stream.close()
            harness.check(engine)
        harness.assert_true(harness.collect(engine, [prompt("p0", 9)], LONG))

    def test_little_room_loses_and_doubles_nothing(self, harness: Harness):
        with closing(harness.open(room=3)) as engine:
            prompts = [prompt(f"p{i}", 3 + 2 * i) for i in range(8)]
            params = SamplingParams(n=2, max_new_tokens=30, stop_token_ids=STOPS)
            harness.assert_true(harness.collect(engine, prompts, params))
            harness.assert_true(harness.collect(engine, prompts[:1], replace(params, n=7)))  # a group above the room

    def test_nothing_piles_up_when_nobody_takes(self, harness: Harness):
        with closing(harness.open(room=4)) as engine:
            stream = engine.generate([prompt(f"p{i}", 5) for i in range(6)], SamplingParams(n=4, max_new_tokens=4))
            rollouts: Rollouts = {}
            harness.take(engine, next(stream), rollouts)
            sampled = engine.stats().num_decode_tokens
            time.sleep(1)
            assert engine.stats().num_decode_tokens == sampled
            if harness.num_held is not None:
                assert harness.num_held(engine) <= 4
            assert len(harness.drain(engine, stream, rollouts)) == 24

    # Weights

    def test_i4_after_an_update_the_new_weights_answer(self, harness: Harness, engine: Generator):
        """Drained. The same prompt before and after: its old KV would put log-probs off by more than 0.1."""
        params = SamplingParams(n=4, max_new_tokens=12)
        harness.collect(engine, [prompt("p", 70)], params)
        engine.update_weights(harness.other, 1)
        assert engine.version == 1
        rollouts = harness.collect(engine, [prompt("p", 70)], params)
        assert {r.versions for r in rollouts.values()} == {((1, 0),)}
        harness.assert_true(rollouts, {1: harness.other})
        assert worst_difference({1: harness.model}, rollouts.values()) > 0.1
        engine.update_weights(harness.model, 7)  # back, by a version that is not the next
        rollouts = harness.collect(engine, [prompt("p", 70)], params)
        harness.assert_true(rollouts, {7: harness.model})
        assert {r.versions for r in rollouts.values()} == {((7, 0),)}

    def test_memory_is_given_back_and_taken_again(self, harness: Harness, engine: Generator):
        """For a trainer's turn on the same device; new weights follow."""
        params = SamplingParams(n=4, max_new_tokens=12)
        harness.collect(engine, [prompt("p", 70)], params)
        for version, model in enumerate((harness.other, harness.model), 1):
            engine.release()
            engine.restore()
            engine.update_weights(model, version)
            harness.assert_true(harness.collect(engine, [prompt("p", 70)], params), {version: model})

    def test_an_update_in_flight_recomputes_kv_and_tags_versions(self, harness: Harness):
        """With little room, so that however long an update takes there is work left for the next; and again where the
        machine was so busy that the updates met too little in flight."""
        with closing(harness.open(room=8)) as engine:
            crossed = 0
            for first in (0, 2, 4, 6):
                stream = engine.generate([prompt(f"a{first}", 9), prompt(f"b{first}", 40)], LONG)
                rollouts: Rollouts = {}
                harness.take(engine, next(stream), rollouts)
                engine.update_weights(harness.other, first + 1)
                harness.check(engine)
                while len(rollouts) < 2 * LONG.n:
                    if first + 1 in dict(harness.take(engine, next(stream), rollouts).versions):
                        break  # what came before it had ended before the update
                engine.update_weights(harness.model, first + 2)
                harness.drain(engine, stream, rollouts)
                assert len(rollouts) == 2 * LONG.n
                for rollout in rollouts.values():
                    assert_ended_rightly(rollout, LONG)
                weights = {first: harness.model, first + 1: harness.other, first + 2: harness.model}
                harness.assert_true(rollouts, weights)
                seen = {version for r in rollouts.values() for version, _ in r.versions}
                assert seen <= set(weights)
                crossed += sum(len(r.versions) > 1 for r in rollouts.values())
                if crossed >= 2 and seen == set(weights):
                    return
        raise AssertionError("the updates met too little in flight")

    def test_tokens_after_an_update_are_drawn_from_the_new_weights(self, harness: Harness, engine: Generator):
        params = replace(LONG, n=32)
        for version in (2, 4, 6):  # again where too little was met in flight
            engine.update_weights(harness.model, version - 1)
            stream = engine.generate([prompt(f"p{version}", 9)], params)
            rollouts: Rollouts = {}
            harness.take(engine, next(stream), rollouts)
            engine.update_weights(harness.other, version)
            harness.drain(engine, stream, rollouts)
            crossed = [r for r in rollouts.values() if len(r.versions) == 2]
            starts = [r.versions[1][1] for r in crossed]
            if sum(r.num_tokens for r in crossed) - sum(starts) > 100:
                break
        else:
            raise AssertionError("the updates met too little in flight")
        parts = zip(response_logits(harness.other, crossed), starts, strict=True)
        rows = np.concatenate([logits[start:] for logits, start in parts])
        tokens = np.concatenate([r.payload.resolve().tokens[s:] for r, s in zip(crossed, starts, strict=True)])
        assert_uniform(uniforms_of(probabilities(rows, params), tokens))

    def test_weights_come_from_a_directory_too(self, harness: Harness, engine: Generator, tmp_path: Path):
        save_model(harness.other, tmp_path / "model")
        engine.update_weights(tmp_path / "model", 1)
        assert engine.version == 1
        harness.assert_true(
            harness.collect(engine, [prompt("p", 9)], SamplingParams(n=2, max_new_tokens=8)), {1: harness.other}
        )

    def test_wrong_weights_are_refused_and_the_old_ones_go_on(
        self, harness: Harness, engine: Generator, make_model: Callable[..., Decoder], tmp_path: Path
    ):
        for source in (make_model(**(SHAPE | {"intermediate_size": 64})), tmp_path / "absent"):
            with pytest.raises(UserError, match=r"expected .* got"):
                engine.update_weights(source, 1)
        assert engine.version == 0
        harness.assert_true(harness.collect(engine, [prompt("p", 9)], SamplingParams(n=2, max_new_tokens=8)))

    # The user's mistakes

    def test_mistakes_are_refused_at_the_call(self, harness: Harness, engine: Generator):
        """Before anything is sampled, good prompts beside the bad one included."""
        cases: list[tuple[list[int], dict[str, Any], str]] = [
            ([], {}, "expected at least one token, got none"),
            ([1, VOCAB], {}, rf"expected token ids in \[0, {VOCAB}\), got {VOCAB}"),
            ([1, -2], {}, rf"expected token ids in \[0, {VOCAB}\), got -2"),
            ([1] * 505, {}, r"expected at most \d+ tokens .*, got 505 \+ 9 new; .*: \d"),
            ([1] * 1000, {}, r"expected at most \d+ tokens .*, got 1000 \+ 9 new"),
            ([1], {"max_new_tokens": 10_000}, r"expected at most \d+ tokens .*, got 1 \+ 10000 new"),
            ([1], {"stop_token_ids": (3, VOCAB)}, rf"stop token: expected an id in \[0, {VOCAB}\), got {VOCAB}"),
            ([1], {"stop_token_ids": (-1,)}, r"stop token: expected .*, got -1"),
        ]
        before = engine.stats()
        for tokens, more, message in cases:
            params = SamplingParams(**({"max_new_tokens": 9} | more))
            with pytest.raises(UserError, match=message):
                engine.generate([prompt("good", 1), Prompt("bad", 0, np.array(tokens, np.int64))], params)
            assert engine.stats() == before
        harness.collect(engine, [prompt("good", 1)], SamplingParams(max_new_tokens=2))  # and it is none the worse

    # Pause, the end

    def test_pause_and_resume_lose_nothing(self, harness: Harness, engine: Generator):
        """Again where nothing was met in flight: on a loaded machine a fast server may end all before the pause."""
        weights = {version: (harness.model, harness.other)[version % 2] for version in range(7)}
        for version in range(1, 7):
            stream = engine.generate([prompt(f"p{version}", 9)], LONG)
            rollouts: Rollouts = {}
            harness.take(engine, next(stream), rollouts)
            engine.pause()
            engine.pause()
            engine.update_weights(weights[version], version)  # what is paused stays so
            sampled = engine.stats().num_decode_tokens
            time.sleep(0.3)
            assert engine.stats().num_decode_tokens == sampled
            engine.resume()
            harness.drain(engine, stream, rollouts)
            assert len(rollouts) == LONG.n
            harness.assert_true(rollouts, weights)
            if any(len(r.versions) == 2 for r in rollouts.values()):
                return
        raise AssertionError("no response was in flight when the engine was paused")

    def test_a_paused_engine_gives_no_new_responses(self, harness: Harness, engine: Generator):
        """An engine in this thread could never be resumed while it waits, so it says so; servers wait."""
        engine.pause()
        asked, params = [prompt("p", 9)], SamplingParams(n=2, max_new_tokens=4)
        if harness.num_held is None:
            with pytest.raises(RunError, match="paused"):
                next(engine.generate(asked, params))
            engine.resume()
        else:
            timer = threading.Timer(1.0, engine.resume)
            start = time.monotonic()
            timer.start()
            next(stream := engine.generate(asked, params))
            assert time.monotonic() - start >= 1.0
            timer.join()
            stream.close()
        harness.assert_true(harness.collect(engine, asked, params))

    def test_after_close_nothing_is_left(self, harness: Harness):
        left = Leftovers()
        with closing(harness.launch()) as engine:
            stream = engine.generate([prompt("p", 9)], LONG)
            next(stream)
            left.look()
            assert bool(left.processes) == bool(left.ports) == (harness.num_held is not None)
            stream.close()
            engine.close()
            engine.close()
            left.assert_none()
            assert not engine.health()
            with pytest.raises(RunError, match="closed"):
                engine.generate([prompt("p", 9)], LONG)

    def test_an_iterator_left_open_at_close_says_so(self, harness: Harness):
        """It must not look as if all had been sampled."""
        engine = harness.open()
        stream = engine.generate([prompt("p", 9)], LONG)
        next(stream)
        engine.close()
        with pytest.raises(RunError, match="closed"):
            list(stream)
