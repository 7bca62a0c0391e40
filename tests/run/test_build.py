"""A mix of sources, from the recipe to the ledger."""

from __future__ import annotations

import json
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from pekoe.config import EvalConfig, load_config
from pekoe.config.data import ProblemSection
from pekoe.core.errors import UserError
from pekoe.core.journal import read_lines
from pekoe.core.progress import NoProgress
from pekoe.core.types import SamplingParams
from pekoe.data import Tokenizer
from pekoe.model import Decoder, read_spec
from pekoe.run.build import open_pool, open_problems, open_task
from pekoe.run.interrupt import Stop
from tests.run.conftest import Messages


def test_a_mix_is_drawn_by_weight_and_goes_on_after_a_stop(tiny_dir: Path, tmp_path: Path, recipe: Any, build, train):
    lines = (tiny_dir / "train.jsonl").read_text().splitlines()
    (tmp_path / "a.jsonl").write_text("\n".join(lines[:8]))
    (tmp_path / "b.jsonl").write_text("\n".join([*lines[7:10], '{"promt": 1}']))  # the first is in a.jsonl too
    sources = [
        {"name": "a", "path": str(tmp_path / "a.jsonl"), "weight": 0.5},
        {"name": "b", "path": str(tmp_path / "b.jsonl"), "weight": 2.0},
    ]
    recipe["data"] = {"sources": sources, "dedup": "exact", "skip_malformed": True, "max_prompt_tokens": 8}
    view = Messages()
    train(build("num_steps=2"), view=view)
    assert view.said[:2] == [
        "a: kept 4 of 8 problems; skipped 4 not drawn",
        "b: kept 2 of 4 problems; skipped 1 malformed, 1 duplicate; an epoch draws 4",
    ]
    train(build("num_steps=4"))  # 16 prompts: two epochs of eight
    drawn = [(line["uid"], line["draw"]) for line in read_lines(tmp_path / "run" / "ledger.jsonl")]
    assert len(set(drawn)) == len(drawn) == 16
    assert Counter(epoch for _, epoch in drawn) == {0: 8, 1: 8}
    assert Counter(uid.partition("/")[0] for uid, _ in drawn) == {"a": 8, "b": 8}
    assert {uid for uid, epoch in drawn if epoch == 0} == {uid for uid, epoch in drawn if epoch == 1}
    dropped = [json.loads(line) for line in (tmp_path / "run" / "data.jsonl").read_text().splitlines()]
    assert Counter(line["reason"] for line in dropped) == {"not drawn": 4, "malformed": 1, "duplicate": 1}


def test_an_evaluation_set_is_read_in_order_and_its_losses_are_reported(tiny_dir: Path, tmp_path: Path):
    path = tmp_path / "eval.jsonl"
    prompts = ["1+1=", "1+1=", "1+1+1+1+1=", "2+2="]  # an evaluation set keeps its repeats
    rows = [{"uid": str(i), "prompt": prompt, "answer": "2"} for i, prompt in enumerate(prompts)]
    path.write_text("\n".join(json.dumps(row) for row in [*rows, {"promt": 1}]))
    view, tokenizer = Messages(), Tokenizer.load(tiny_dir / "model")
    problems = open_problems(ProblemSection(train=str(path), max_prompt_tokens=8, skip_malformed=True), tokenizer, view)
    assert [problem.uid for problem in problems] == ["0", "1", "3"]
    assert view.said == [f"{path}: skipped 1 malformed, 1 too long"]


def test_servers_that_would_share_a_gpu_are_refused_before_any_starts(
    tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    server: dict[str, Any] = {"python": "python3", "count": 2}
    tree: dict[str, Any] = {
        "model": {"path": str(tiny_dir / "model")},
        "eval": {"data": str(tiny_dir / "held_out.jsonl")},
        "engine": {"backend": "vllm", "server": server},
    }

    class Started(Exception):
        pass

    def start(*_: object, **__: object) -> None:
        raise Started

    monkeypatch.setattr("pekoe.run.build.EnginePool", start)

    def open_on(device: str) -> None:
        weight = SimpleNamespace(device=SimpleNamespace(type=device))
        model = cast(Decoder, SimpleNamespace(parameters=lambda: iter([weight]), spec=None))
        config = load_config(tree, kind=EvalConfig)
        with ExitStack() as stack:
            open_pool(config, model, 32, [SamplingParams(stream="eval")], tmp_path, NoProgress(), Stop(), stack)

    with pytest.raises(UserError, match=r'engine.server.gpus: expected the GPUs of each of 2 servers.*\["0", "1"\]'):
        open_on("cuda")
    with pytest.raises(Started):
        open_on("cpu")
    server["gpus"] = ("0", "1")
    with pytest.raises(Started):
        open_on("cuda")


def test_held_out_problems_have_columns_of_their_own(build, tmp_path: Path):
    file = tmp_path / "own.csv"
    file.write_text("task,gold\n1+1=,2\n2+2=,4\n")
    columns = ["eval.columns.prompt=task", "eval.columns.answer=gold"]
    config = build(f"eval.data={file}", "eval.every=1", *columns)
    tokenizer = Tokenizer.load(Path(config.model.path))
    task = open_task(config, read_spec(Path(config.model.path))[0], tokenizer, NoProgress())
    assert [problem.gold for problem in task.held_out] == ["2", "4"]
    with pytest.raises(
        UserError, match=r"own\.csv:2: expected the column 'taks' \(columns\.prompt\).*Did you mean 'task'"
    ):
        open_task(
            build(f"eval.data={file}", "eval.every=1", "eval.columns.prompt=taks"),
            read_spec(Path(config.model.path))[0],
            tokenizer,
            NoProgress(),
        )
