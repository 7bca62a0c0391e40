"""`pekoe rl` on families of transformers through real servers: two steps on a tiny model, each proven (I1, I4)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
import torch

from pekoe.config.engine import EngineSection
from pekoe.core.journal import read_lines
from pekoe.core.records import read_records
from pekoe.core.types import Problem
from pekoe.data.problems import write_problems
from pekoe.demo.char_tokenizer import make_char_tokenizer
from pekoe.model import load_model, save_model
from tests.families.configs import make
from tests.families.served import SIZES
from tests.families.test_routing import as_sets, of_forward
from tests.servers.test_rl_step import assert_nothing_left, pekoe
from tests.servers.vllm_fixture import START_LIMIT_S, vllm_python

pytestmark = [pytest.mark.server, pytest.mark.timeout(600)]
# A mixture at either server, by broadcast, is in CI; the others are slow, too:
#   make test-servers ARGS="-m server tests/servers/test_families.py"
SLOW = pytest.mark.slow


@pytest.fixture
def lay_out(tmp_path: Path) -> Callable[..., Path]:
    """Writes a family's model, problems and a recipe whose [engine] is the given one; returns the recipe. Keywords
    change [rollout]."""

    def write(family: str, engine: EngineSection, **rollout: Any) -> Path:
        make(family, **SIZES[family]).save_pretrained(tmp_path / "bare")
        model = load_model(tmp_path / "bare")
        model.assets = dict(make_char_tokenizer("0123456789+=\\{}boxed"))
        save_model(model, tmp_path / "model")
        problems = [Problem(f"{a}", ({"role": "user", "content": f"{a}+1="},), str(a + 1)) for a in range(8)]
        write_problems(tmp_path / "train.jsonl", problems)
        recipe: dict[str, Any] = {
            "num_steps": 2,
            "run": {"dir": str(tmp_path / "run"), "threads": 1},
            "model": {"path": str(tmp_path / "model"), "device": "cpu"},
            "data": {"train": str(tmp_path / "train.jsonl"), "max_prompt_tokens": 8},
            "rollout": {"prompts_per_step": 4, "samples_per_prompt": 4, "max_new_tokens": 24} | rollout,
            "optim": {"lr": 1e-2},
            "train": {"token_budget": 64},
            "verify": {"workers": 1, "random": True},
            "engine": engine.model_dump(exclude_none=True),
        }
        (tmp_path / "rl.toml").write_text(tomli_w.dumps(recipe))
        return tmp_path / "rl.toml"

    return write


def assert_recorded(recipe: Path) -> None:
    """The experts of the first step's tokens are those that the forward of the first weights chooses."""
    model = load_model(recipe.parent / "model", implementation="transformers")
    lines = read_records(recipe.parent / "run", 1)
    places = differing = 0
    for line in lines:
        tokens = np.concatenate([line["prompt_tokens"], line["tokens"]])
        chosen = as_sets(of_forward(model, tokens)[:-1])
        assert line["routing"].dtype == np.uint8
        assert line["routing"].shape == (len(tokens), *chosen.shape[1:])
        assert (line["routing"][-1] == 255).all()
        differing += int((as_sets(line["routing"][:-1]) != chosen).any(-1).sum())
        places += chosen[..., 0].size
    assert len(lines) == 16
    assert differing <= places * 1e-3, "by rounding, where two experts are near"


def assert_published(recipe: Path, route: str) -> None:
    run = recipe.parent / "run"
    steps = [event for event in read_lines(run / "journal.jsonl") if event["event"] == "step"]
    assert [step["step"] for step in steps] == [1, 2]
    for step in steps:
        assert step["logprob_diff_max"] <= 5e-4  # I1
        assert step["sync_canary_diff"] <= 5e-4  # I4
        assert step["sync_route"] == route
        assert step["sync_bytes"] > 100_000
    before, after = (load_model(place / "model").get_parameter("model.norm.weight") for place in (recipe.parent, run))
    assert not torch.equal(before, after)


@pytest.mark.parametrize(
    ("sync", "family"),
    [
        ("broadcast", "qwen3_moe"),
        pytest.param("broadcast", "gemma3_text", marks=SLOW),
        pytest.param("shm", "qwen3_moe", marks=SLOW),
        pytest.param("shm", "gemma3_text", marks=SLOW),
    ],
)
def test_vllm(family: str, sync: str, lay_out: Callable[..., Path]):
    server = {"python": vllm_python(), "start_limit_s": START_LIMIT_S, "sync": sync}
    recipe = lay_out(family, EngineSection.model_validate({"backend": "vllm", "server": server, "kv_tokens": 4096}))
    pekoe("rl", str(recipe))
    assert_published(recipe, sync)
    assert_nothing_left()


def test_experts_of_sglang_are_replayed(lay_out: Callable[..., Path], sglang_section: Callable[..., EngineSection]):
    recipe = lay_out("qwen3_moe", sglang_section(sync="broadcast"), replay_routing=True)
    pekoe("rl", str(recipe))
    assert_published(recipe, "broadcast")
    assert_recorded(recipe)
    assert_nothing_left()


@pytest.mark.parametrize(
    ("sync", "family"),
    [
        pytest.param("broadcast", "qwen3_moe", marks=SLOW),
        pytest.param("broadcast", "gemma3_text", marks=SLOW),
        pytest.param("disk", "qwen3_moe", marks=SLOW),
        pytest.param("disk", "gemma3_text", marks=SLOW),
    ],
)
def test_sglang(
    family: str,
    sync: str,
    lay_out: Callable[..., Path],
    sglang_section: Callable[..., EngineSection],
):
    recipe = lay_out(family, sglang_section(sync=sync))
    pekoe("rl", str(recipe))
    assert_published(recipe, sync)
    assert_nothing_left()
