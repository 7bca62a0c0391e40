"""What a section `cluster` cannot be."""

from __future__ import annotations

from typing import Any

import pytest

from pekoe.core.config import load_config
from pekoe.core.errors import UserError

RECIPE: dict[str, Any] = {
    "num_steps": 1,
    "run": {"dir": "run"},
    "model": {"path": "model"},
    "data": {"train": "train.jsonl"},
    "cluster": {},
}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("cluster.training.tp=2", r"expected a multiple of tp x cp x replicas = 2, got 1; nearest: 2"),
        ("cluster.generation.engine=2", r"unknown key 'cluster.generation.engine'.* 'engines'"),
        ("cluster.sync=rdma", r"cluster.sync: expected 'broadcast' or 'disk', got 'rdma'"),
        ("engine.backend=vllm", r"expected 'embedded' with a section cluster"),
    ],
)
def test_what_it_cannot_be(override: str, message: str):
    more = ["engine.server.python=python"] if "vllm" in override else []
    with pytest.raises(UserError, match=message):
        load_config(RECIPE, [override, *more])


def test_its_defaults_are_one_of_each():
    cluster = load_config(RECIPE).cluster
    assert cluster is not None
    assert (cluster.generation.engines, cluster.training.ranks, cluster.sync) == (1, 1, "broadcast")
