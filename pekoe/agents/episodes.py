"""Runs episodes: a program of the user's that talks with the model through a session, and says what came of it."""

from __future__ import annotations

import asyncio
import inspect
import json
import secrets
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

from pekoe.agents.answers import Parser
from pekoe.agents.session import Dispatcher, EpisodeLimit, Limits, Session
from pekoe.agents.verifiers_env import episode_of
from pekoe.config.recipes import RolloutSection, VerifySection
from pekoe.core.errors import RunError, UserError
from pekoe.core.functions import load_function
from pekoe.core.types import Draw, FinishReason, Problem, SamplingParams, Trajectory, Verdict
from pekoe.data.tokenizer import Tokenizer
from pekoe.engine.async_thread import AsyncThread
from pekoe.engine.base import Sampler
from pekoe.verify.kinds.function import Options, describe, verdict_of

_END_S = 5.0  # that an episode beyond its limit may take to end
_SILENCE_S = 60.0  # that episodes may keep the event loop for themselves, beyond their limit


@dataclass(frozen=True, slots=True)
class Attempt:
    """An episode that is over. `verdict` None: the problem's judge decides on `answer`, the last turn alone."""

    problem: Problem  # its messages are the conversation before the last turn
    trajectory: Trajectory
    answer: Trajectory
    verdict: Verdict | None


class _TooSlow(Exception):
    pass


def check_episode(name: str) -> Any:
    """The function "MODULE:NAME", or the environment "verifiers:NAME". UserError where there is none to be awaited."""
    if name.startswith("verifiers:"):
        return episode_of(name.removeprefix("verifiers:"))
    function = load_function(name, "rollout.episode")
    if not inspect.iscoroutinefunction(function):
        raise UserError(
            f"rollout.episode: expected {name} to be `async def episode(problem, client)`, got no async def"
        )
    parameters = [p for p in inspect.signature(function).parameters.values() if p.default is p.empty]
    if len(parameters) != 2 and all(p.kind is not p.VAR_POSITIONAL for p in parameters):
        got = ", ".join(p.name for p in parameters) or "none"
        raise UserError(f"rollout.episode: expected {name} to take (problem, client), got the parameters {got}")
    return function


class Episodes:
    """Runs the episodes of `rollout.episode` in an event loop of their own.

    What the program raises, or returns that is no verdict, is FAULT, as is the time limit; a limit on turns or tokens
    that it does not catch is the model's: UNPARSED. What engines raise ends the run.
    """

    def __init__(
        self,
        rollout: RolloutSection,
        verify: VerifySection,
        sampler: Sampler,
        tokenizer: Tokenizer,
        parser: Parser | None = None,
    ) -> None:
        assert rollout.episode is not None
        self._name, self._function = rollout.episode, check_episode(rollout.episode)
        self._rollout, self._tokenizer, self._parser = rollout, tokenizer, parser
        self._random = verify.random  # a control: the judge tosses a coin, whatever the episode says
        self._options = Options({}, *verify.score_range, verify.correct_from)
        self._dispatcher, self._thread = Dispatcher(sampler, rollout.lockstep), AsyncThread("episodes")
        self._endpoint: Any = None  # opened when the first program wants its address
        self._keys: dict[str, Session] = {}  # of episodes that have its address
        self._tasks: set[asyncio.Task[None]] = set()
        self._asked: float | None = None  # when the loop was asked whether it runs

    def begin(self, draws: Sequence[Draw], params: SamplingParams) -> list[list[Future[Attempt]]]:
        """Begin the `params.n` episodes of each draw."""
        futures: list[list[Future[Attempt]]] = [[Future() for _ in range(params.n)] for _ in draws]
        self._thread.soon(self._begin, draws, params, futures)
        return futures

    def _begin(self, draws: Sequence[Draw], params: SamplingParams, futures: list[list[Future[Attempt]]]) -> None:
        self._dispatcher.num_active += len(draws) * params.n
        for draw, its_futures in zip(draws, futures, strict=True):
            for sample, future in enumerate(its_futures):
                task = asyncio.ensure_future(self._end(draw, params, sample, future))
                self._tasks.add(task)
                task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._dispatcher.leave()

    async def _end(self, draw: Draw, params: SamplingParams, sample: int, future: Future[Attempt]) -> None:
        try:
            attempt = await self._run(draw, params, sample)
        except asyncio.CancelledError:
            future.set_exception(RunError("the episode was cancelled"))
            raise
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(attempt)

    async def _run(self, draw: Draw, params: SamplingParams, sample: int) -> Attempt:
        rollout, problem = self._rollout, draw.problem
        limits = Limits(rollout.max_turns, params.max_new_tokens, rollout.turn_tokens)
        session = Session(
            *(self._dispatcher, self._tokenizer, params, problem.uid, draw.number, sample),
            limits=limits,
            prompt=problem.messages,
            parser=self._parser,
        )
        session.open_endpoint = self._open_endpoint
        asked: Any = replace(problem, messages=tuple(self._tokenizer.with_directive(problem.messages)))
        verdict: Verdict | None = None
        finish: FinishReason | None = None
        try:
            result = await self._bounded(asked, session)
            verdict = None if result is None else verdict_of(result, None, self._options, self._name)
        except EpisodeLimit as error:
            verdict, finish = Verdict("unparsed", None, f"limit: {error}"), "length"
        except _TooSlow:
            why = f"rollout.episode_limit_s = {rollout.episode_limit_s:g}: the episode took longer outside of engines"
            verdict = Verdict("fault", None, why)
        except (Exception, SystemExit) as error:
            verdict = Verdict("fault", None, f"the episode failed: {describe(error)}")
            if session.refused is not None:  # as its client's error, or its program's exit status
                verdict, finish = Verdict("unparsed", None, f"limit: {session.refused}"), "length"
        finally:
            self._keys = {key: one for key, one in self._keys.items() if one is not session}
        await session.close()
        if session.error is not None:
            raise session.error
        if verdict is None and not session.turns:
            verdict = Verdict("fault", None, "the episode returned None and asked the model for nothing")
        if self._random and verdict is not None and verdict.label != "fault":
            verdict = None
        messages: Any = json.loads(json.dumps(session.last_messages, default=str))
        judged = replace(problem, messages=tuple(messages) or problem.messages)
        return Attempt(judged, session.trajectory(finish), session.answer(), verdict)

    async def _bounded(self, problem: Problem, session: Session) -> Any:
        """What the program returns; _TooSlow where it takes longer than its limit outside of engines."""
        task = asyncio.ensure_future(self._function(problem, session))
        try:
            while not task.done():
                left = self._rollout.episode_limit_s - session.tool_s
                if left <= 0:
                    raise _TooSlow
                await asyncio.wait([task], timeout=max(left, 0.01))
            if task.cancelled():
                raise RuntimeError("the episode cancelled itself")
            return task.result()
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait([task], timeout=_END_S)

    def _open_endpoint(self, session: Session) -> tuple[str, str]:
        """Its address, and a key for the session; in the loop of the episodes."""
        if self._endpoint is None:
            try:
                from pekoe.agents.endpoint import Bounds, Endpoint
            except ModuleNotFoundError as error:
                raise UserError(
                    f"client.base_url: expected the extra `serve` ({error}): pip install 'pekoe[serve]'"
                ) from None
            bounds = Bounds(at_once=1 << 20)  # of episodes that run: the recipe says how many do
            endpoint = Endpoint(self._tokenizer, lambda key: self._keys.get(key), "policy", bounds)
            endpoint.listen()
            endpoint.serve()
            self._endpoint = endpoint
        key = secrets.token_urlsafe(24)
        self._keys[key] = session
        return f"http://127.0.0.1:{self._endpoint.port}/v1", key

    def check(self) -> None:
        """RunError where an episode has kept the event loop for itself longer than its limit."""
        now = time.monotonic()
        if self._asked is None:
            self._asked = now
            self._thread.soon(self._answer)
        elif now - self._asked > self._rollout.episode_limit_s + _SILENCE_S:
            raise RunError(
                f"rollout.episode: {self._name} has blocked all episodes for {now - self._asked:.0f} s: expected it to "
                f"await what takes long; nearest: await asyncio.to_thread(FUNCTION, ...)"
            )

    def _answer(self) -> None:
        self._asked = None

    def cancel(self) -> None:
        """Drop all episodes."""
        self._thread.soon(lambda: [task.cancel() for task in list(self._tasks)])

    def close(self) -> None:
        if self._endpoint is not None:
            self._endpoint.stop(self._thread)
        self._thread.stop()
