"""On a cluster, episodes run in the loop's process, and their tokens go to a store, from which the ranks fetch them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pekoe.config import RLConfig
from pekoe.core.functions import load_function
from pekoe.core.progress import NoProgress
from pekoe.core.records import read_records
from pekoe.run.replay import replay_run
from tests.ray.conftest import events

pytestmark = pytest.mark.cluster

PROGRAM = """
async def episode(problem, client):
    reply = await client.complete(problem.messages, max_tokens=3)
    question = {"role": "user", "content": "1"}
    await client.complete([*problem.messages, reply.message, question], max_tokens=3)
    await client.complete([*problem.messages, question], max_tokens=3)
"""


def test_agents_are_trained_on_a_cluster(
    cluster: Callable[..., RLConfig],
    run: Callable[[RLConfig], list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    (tmp_path / "on_ray.py").write_text(PROGRAM)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "on_ray", raising=False)
    load_function.cache_clear()
    config = cluster("rollout.episode=on_ray:episode", "rollout.max_new_tokens=24")
    run(config)
    steps = events(config, "step")
    assert [(step["turns"], step["branches"]) for step in steps] == [(3, 2)] * 3
    assert max(step["logprob_diff_max"] for step in steps) < 1e-3
    lines = read_records(Path(config.run.dir), 1)
    assert {line["branch"] for line in lines} == {0, 1}
    assert max(replay_run(Path(config.run.dir), NoProgress()).logprob_diffs.values()) < 1e-3
