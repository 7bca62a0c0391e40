"""Environments of the `verifiers` library (0.4) as episodes: `rollout.episode = "verifiers:NAME"`.

NAME is the package of a taskset, as the library finds it. What plays its tasks, of one turn or many, with tools or a
user, talks with the model through the session's endpoint as it is; the reward of its trace is the score. The tasks are
problems of a data file, which `python -m pekoe.agents.verifiers_env NAME FILE.jsonl` writes.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import argparse
import asyncio
import os
import secrets
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from pekoe.agents.session import Session
from pekoe.core.errors import UserError
from pekoe.core.functions import importing_from_here
from pekoe.core.types import Problem
from pekoe.data.rows import write_rows

_NO_REFERENCE = "0"  # nobody reads it: the environment decides


def episode_of(env: str | Mapping[str, Any]) -> Callable[[Problem, Session], Awaitable[float]]:
    """An episode for `rollout.episode`, of problems that `write_tasks` wrote.

    An agent runs as a process of this machine where its `runtime` is not given, and as the library's `null` (a chat
    with the task's tools) where neither it nor the taskset has a harness. Each episode has the environment's servers
    for itself. What fails in the environment raises RuntimeError, which is FAULT.

    Args:
        env: the taskset's package, or the table `env` of the library's own configuration, such as {"taskset": {"id":
            "wordle", "max_guesses": 4}, "agent": {"max_turns": 6}}.

    Raises UserError without the library, and for an environment that there is not or that trains several agents.
    """
    config = _config(env)
    tasks = _Tasks(config)

    async def episode(problem: Problem, client: Session) -> float:
        import verifiers.v1 as vf
        from verifiers.v1.utils.loaders import load_environment

        url, key, name = client.base_url, client.api_key, f"PEKOE_SESSION_API_KEY_{secrets.token_hex(8)}"
        task = await asyncio.to_thread(tasks.of, problem)
        environment: Any = load_environment(config)
        os.environ[name] = key  # by which the library knows a key; it hands none with this name to programs
        try:
            endpoint = vf.EvalClientConfig(base_url=url, api_key_var=name)
            async with environment.serving():
                played = await environment.run_episode(task, vf.ModelContext(model="policy", client=endpoint))
        finally:
            del os.environ[name]
        return _score(played)

    return episode


def _config(env: str | Mapping[str, Any]) -> Any:
    """The library's EnvConfig."""
    data: dict[str, Any] = {"taskset": {"id": env}} if isinstance(env, str) else dict(env)
    try:
        from verifiers.v1.configs.agent import agent_config_fields
        from verifiers.v1.runtimes import SubprocessConfig
        from verifiers.v1.utils.loaders import default_harness_id, harness_config_type, resolve_env_config
    except ImportError as error:
        raise UserError(
            f"rollout.episode: expected the extra `verifiers` ({error}): pip install 'pekoe[verifiers]'"
        ) from None
    try:
        with importing_from_here():
            config = resolve_env_config(data)
            own = default_harness_id(config.taskset.id)
    except Exception as error:  # what a user's package raises, too
        raise UserError(
            f"rollout.episode: expected an environment of verifiers, got {env!r}: {type(error).__name__}: {error}"
        ) from None
    agents = agent_config_fields(config)
    if len(agents) != 1:
        raise UserError(
            f"rollout.episode: expected an environment of one agent, got {len(agents)} in {env!r}: {', '.join(agents)}"
        )
    ((seat, agent),) = agents.items()
    if "runtime" not in agent.model_fields_set:
        agent = agent.model_copy(update={"runtime": SubprocessConfig()})
    if agent.harness is None and own == "bash":
        agent = agent.model_copy(update={"harness": harness_config_type("null")(id="null")})
    return config.model_copy(update={seat: agent})


class _Tasks:
    """A taskset's tasks, read as far as they are asked for."""

    def __init__(self, config: Any) -> None:
        self._config = config
        self._read: list[Any] = []
        self._rest: Iterator[Any] | None = None
        self._lock = threading.Lock()

    def of(self, problem: Problem) -> Any:
        """UserError where the taskset has another one by now."""
        row: Any = problem.row
        number, key = (row.get("task"), row.get("task_key")) if isinstance(row, dict) else (None, None)
        if type(number) is not int or number < 0:
            raise UserError(
                f"problem {problem.uid}: expected a row of `python -m pekoe.agents.verifiers_env`, got one without task"
            )
        with self._lock:
            if self._rest is None:
                self._rest = iter(_taskset(self._config))
            self._read += islice(self._rest, max(0, number + 1 - len(self._read)))
        task = self._read[number] if number < len(self._read) else None
        if task is None or task.key != key:
            got = "none" if task is None else "another"
            raise UserError(
                f"problem {problem.uid}: expected task {number} of {self._config.env_id} as it was written, got {got}; "
                f"write the tasks again"
            )
        return task


def _taskset(config: Any) -> Any:
    from verifiers.v1.utils.loaders import load_taskset

    return load_taskset(config.taskset)


def _score(played: Any) -> float:
    """The reward of an episode's one trace."""
    errors = [*played.errors, *(error for trace in played.traces for error in trace.errors)]
    if not played.ok:
        why = f"{errors[-1].type}: {errors[-1].message}" if errors else "no reason given"
        raise RuntimeError(f"verifiers: {why}")
    if len(played.traces) != 1 or not played.traces[0].agent.trainable:
        raise RuntimeError(f"verifiers: expected one attempt of one agent that is trained, got {len(played.traces)}")
    return float(played.traces[0].reward)


def write_tasks(env: str | Mapping[str, Any], path: str, limit: int | None = None) -> int:
    """Write an environment's tasks as problems, at most `limit`; returns how many. Prompts are for lengths and reports:
    what the model is asked is the environment's to say."""
    config = _config(env)
    taskset = _taskset(config)
    if limit is None and not taskset.bounded:
        raise UserError(f"--limit: expected how many of the endless tasks of {config.env_id}, got none")
    rows = [_row(config.env_id, task) for task in islice(iter(taskset), limit)]
    if not rows:
        raise UserError(f"{config.env_id}: expected at least one task, got none")
    write_rows(path, rows)
    return len(rows)


def _row(name: str, task: Any) -> dict[str, Any]:
    data = task.data
    asked = data.prompt_text or data.name or f"task {data.idx}"
    messages = [{"role": "system", "content": data.system_prompt}] if data.system_prompt else []
    about = {"uid": f"{name}/{data.idx}", "messages": [*messages, {"role": "user", "content": asked}]}
    return about | {"answer": _NO_REFERENCE, "task": data.idx, "task_key": task.key}


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the file, and say how many tasks it has."""
    parser = argparse.ArgumentParser(prog="python -m pekoe.agents.verifiers_env", description=__doc__)
    parser.add_argument("name", help="the taskset's package")
    parser.add_argument("path", help="of the problems, FILE.jsonl")
    parser.add_argument("--limit", type=int, help="how many tasks at most")
    given = parser.parse_args(arguments)
    try:
        print(f"{given.path}: {write_tasks(given.name, given.path, given.limit):,} tasks")
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
