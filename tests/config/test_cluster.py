"""What a section `cluster` cannot be."""

from __future__ import annotations

from typing import Any

import pytest

from pekoe.config.recipes import load_config
from pekoe.core.errors import UserError

RECIPE: dict[str, Any] = {
    "num_steps": 1,
    "run": {"dir": "run"},
    "model": {"path": "model"},
    "data": {"train": "train.jsonl"},
    "cluster": {},
}

VLLM = "engine.backend=vllm engine.server.python=python"
URL = 'engine.backend=vllm engine.server.urls=["http://a:1"]'


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("cluster.training.tp=2", r"expected a multiple of tp x cp x replicas = 2, got 1; nearest: 2"),
        ("cluster.generation.engine=2", r"unknown key 'cluster.generation.engine'.* 'engines'"),
        ("cluster.sync=rdma", r"cluster.sync: expected 'broadcast' or 'disk', got 'rdma'"),
        ("cluster.generation.servers=1", r"expected 0 with engine.backend = 'embedded', got 1; nearest: 0, or"),
        ("cluster.colocate=true cluster.generation.engines=2 cluster.training.ranks=3", r"multiple.*got 3; nearest: 4"),
        ("cluster.colocate=true cluster.training.gpus_per_rank=1", r"the 1 GPUs of the 1 ranks .* got 0; nearest: 1"),
        (f"{VLLM} cluster.generation.servers=2", r"expected at most cluster.generation.engines = 1, got 2; nearest: 1"),
        (f"{VLLM} engine.server.count=2", r"expected no count and no gpus with a section cluster"),
        ('engine.backend=vllm engine.server.urls=["http://a:1","http://b:1"]', r"for each of the cluster's 1 servers"),
    ],
)
def test_what_it_cannot_be(override: str, message: str):
    with pytest.raises(UserError, match=message):
        load_config(RECIPE, override.split())


def test_each_engine_sees_its_own_server():
    more = ["engine.backend=sglang", 'engine.server.urls=["http://a:1","http://b:1"]']
    config = load_config(RECIPE, [*more, "cluster.generation.engines=3", "cluster.generation.servers=2"])
    seen = [config.engine_config(number).engine for number in range(3)]
    assert [engine.backend for engine in seen] == ["embedded", "sglang", "sglang"]
    assert [engine.server.urls for engine in seen[1:]] == [("http://a:1",), ("http://b:1",)]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (f"{VLLM} engine.prefill_tokens=64", r"engine\.prefill_tokens: expected the default, 8192, with .*'vllm'"),
        (f"{VLLM} engine.block_tokens=8", r"engine\.block_tokens: expected the default, 16"),
        (f"{URL} engine.max_running=8", r"engine\.max_running: expected the default, 512, with .*'vllm'"),
        (f'{URL} engine.server.args=["--x"]', r"engine\.server\.args: expected none with urls"),
        (f"{VLLM} engine.server.key_env=A", r"engine\.server\.key_env: expected none without urls"),
    ],
)
def test_what_servers_do_not_read_is_refused(override: str, message: str):
    with pytest.raises(UserError, match=message):
        load_config(RECIPE, override.split())
    load_config(RECIPE, f"{VLLM} engine.max_running=8".split())
    load_config(RECIPE, f"{URL} engine.server.key_env=A".split())


def test_what_servers_do_not_read_may_be_for_other_engines():
    more = ["engine.backend=sglang", "engine.server.python=python", "engine.prefill_tokens=64"]
    generation = ["cluster.generation.engines=3", "cluster.generation.servers=2"]
    assert load_config(RECIPE, [*more, *generation]).engine.prefill_tokens == 64
    with pytest.raises(UserError, match=r"engine\.prefill_tokens: expected the default, 8192"):
        load_config(RECIPE, [*more, *generation[:1]])


def test_its_defaults_are_one_of_each():
    cluster = load_config(RECIPE).cluster
    assert cluster is not None
    assert (cluster.generation.engines, cluster.training.ranks, cluster.sync) == (1, 1, "broadcast")


def test_context_parallelism_lengthens_what_a_token_budget_holds():
    words = ["cluster.training.ranks=4", "cluster.training.cp=4"]  # the longest sequence has 2048 tokens
    assert load_config(RECIPE, [*words, "train.token_budget=512"]).train.token_budget == 512
    with pytest.raises(UserError, match=r"= 2048 over cluster\.training\.cp = 4, got 511; nearest: 512"):
        load_config(RECIPE, [*words, "train.token_budget=511"])
