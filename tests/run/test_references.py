"""`data.check`: references that are refused stop a run, leave it, or are named, before anything is sampled."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pekoe.cli import app
from pekoe.config import EvalConfig, load_config
from pekoe.config.recipes import CurateConfig
from pekoe.core import UserError
from pekoe.core.progress import NoProgress
from pekoe.data import Tokenizer
from pekoe.model.hf import read_spec
from pekoe.run import references
from pekoe.run.build import Task, open_task
from pekoe.run.curate import run_curate
from pekoe.run.evaluate import run_eval
from tests.run.conftest import Messages

BAD = ["3 + * 4", "(1, 2"]  # in these, a worker must find the fault


@pytest.fixture
def data(tiny_dir: Path, tmp_path: Path) -> Path:
    """18 problems; the references of rows 3 and 5 are refused."""
    rows = [json.loads(line) for line in (tiny_dir / "train.jsonl").read_text().splitlines()]
    rows[2]["answer"], rows[4]["answer"] = BAD
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(autouse=True)
def judged(recipe: dict[str, Any]) -> None:
    recipe["verify"] = {"workers": 1, "time_limit_s": 20.0}


def tree_of(recipe: dict[str, Any], **sections: Any) -> dict[str, Any]:
    return {key: recipe[key] for key in ("model", "verify")} | sections


def named(data: Path) -> str:
    found = [f"{data}:3: the reference '3 + * 4' cannot be parsed"]
    return "\n  ".join([*found, f"{data}:5: the reference '(1, 2' cannot be parsed"])


def open_rl(build: Any, data: Path, *overrides: str, view: NoProgress | None = None) -> Task:
    config = build(f"data.train={data}", *overrides)
    tokenizer = Tokenizer.load(Path(config.model.path))
    return open_task(config, read_spec(Path(config.model.path))[0], tokenizer, view or NoProgress())


def test_by_default_training_stops_and_names_them_before_a_response_is_sampled(
    recipe: dict[str, Any], build: Any, train: Any, data: Path, tmp_path: Path
):
    message = re.escape(f"of 18 it refuses 2:\n  {named(data)}\nMend them, or set data.check = 'drop'")
    with pytest.raises(UserError, match=message) as caught:
        train(build(f"data.train={data}"))
    assert str(caught.value).endswith(f"pekoe verify --references {data}")
    assert not (tmp_path / "run/journal.jsonl").exists()
    curation = tree_of(recipe, data={"train": str(data)}, out=str(tmp_path / "out"))
    with pytest.raises(UserError, match=message):
        run_curate(load_config(curation, kind=CurateConfig), NoProgress())
    assert not (tmp_path / "out/samples.jsonl").exists()


def test_they_can_be_dropped_or_kept_and_named(build: Any, data: Path):
    task = open_rl(build, data, "data.check=drop")
    assert len(task.problems) == 16
    assert [(drop.row, drop.reason, drop.detail) for drop in task.report.dropped] == [
        (3, "with a reference that is refused", "the reference '3 + * 4' cannot be parsed"),
        (5, "with a reference that is refused", "the reference '(1, 2' cannot be parsed"),
    ]
    view = Messages()
    task = open_rl(build, data, "data.check=warn", view=view)
    assert len(task.problems) == 18
    assert len(view.said) == 1
    assert f"would not accept as answers: 2:\n  {named(data)}\n" in view.said[0]


def test_held_out_problems_are_checked_too(build: Any, data: Path, tiny_dir: Path):
    train = tiny_dir / "train.jsonl"
    keys = [f"eval.data={data}", "eval.every=1", "eval.samples=1"]
    with pytest.raises(UserError, match=re.escape(named(data))):
        open_rl(build, train, *keys)
    assert len(open_rl(build, train, *keys, "data.check=drop").held_out) == 16
    assert len(open_rl(build, train, *keys, "verify.random=true").held_out) == 18  # nobody reads them


def test_an_evaluation_warns_unless_told_otherwise(recipe: dict[str, Any], data: Path):
    tree = tree_of(recipe, eval={"data": str(data), "samples": 1, "max_new_tokens": 2})
    view = Messages()
    assert run_eval(load_config(tree, kind=EvalConfig), view).num_problems == 18
    assert any(named(data) in text for text in view.said)
    with pytest.raises(UserError, match=re.escape(named(data))):
        run_eval(load_config(tree, ["eval.check=error"], EvalConfig), NoProgress())


def test_at_most_ten_are_named(build: Any, data: Path):
    rows = [json.loads(line) | {"answer": rf"\frac{{{i}}}{{2"} for i, line in enumerate(data.read_text().splitlines())]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=r"of 18 it refuses 18:\n") as caught:
        open_rl(build, data)
    assert str(caught.value).count(f"{data}:") == 10
    assert "\n  and 8 more\n" in str(caught.value)


def test_a_resumed_run_does_not_judge_them_again(
    build: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    before = open_rl(build, data, "data.check=drop")

    def no_pool(*_: Any, **__: Any) -> None:
        raise AssertionError("judges were started")

    monkeypatch.setattr(references, "open_judges", no_pool)
    assert open_rl(build, data, "data.check=drop").problems == before.problems
    for change in ("verify.time_limit_s=19.0", f"run.dir={tmp_path}/other"):
        with pytest.raises(AssertionError, match="judges were started"):
            open_rl(build, data, "data.check=drop", change)
    data.write_text(data.read_text().replace("(1, 2", "(1, 3"))
    with pytest.raises(AssertionError, match="judges were started"):
        open_rl(build, data, "data.check=drop")


def test_plain_references_start_no_judge_and_leave_no_file(
    build: Any, tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delattr(references, "open_judges")
    assert len(open_rl(build, tiny_dir / "train.jsonl").problems) == 18
    assert not (tmp_path / "run").exists()


def test_the_command_lists_all_without_a_model(data: Path, tiny_dir: Path):
    result = CliRunner().invoke(app, ["verify", "--references", str(data), str(tiny_dir / "held_out.jsonl")])
    assert result.exit_code == 1
    assert result.stdout == named(data).replace("\n  ", "\n") + "\n"
    assert "references refused: 2 of 25" in result.stderr
    result = CliRunner().invoke(app, ["verify", "--references", str(tiny_dir / "held_out.jsonl")])
    assert (result.exit_code, result.stdout) == (0, "")
    result = CliRunner().invoke(app, ["verify", "--references", "--summary", str(data)])
    assert "expected without --summary" in str(result.exception)
