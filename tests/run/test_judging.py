"""What reaches the judges of a run: only functions that the recipe lists, and the memory that it gives them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from pekoe.config import EvalConfig, load_config
from pekoe.core import UserError
from pekoe.core.progress import NoProgress
from pekoe.data import Tokenizer
from pekoe.run.evaluate import run_eval
from pekoe.run.judging import PoolJudge


@pytest.mark.parametrize("command", ["rl", "eval"])
def test_a_row_that_names_a_function_is_refused_before_anything_is_sampled(
    tiny_dir: Path, tmp_path: Path, recipe: dict[str, Any], build: Any, train: Any, command: str
):
    rows = [json.loads(line) for line in (tiny_dir / "train.jsonl").read_text().splitlines()]
    rows[-1]["kind"] = "function:builtins:exec"
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe["verify"]["functions"] = ["builtins:exit"]
    place = f"{data}:{len(rows)}: problem {rows[-1]['uid']!r}"
    message = rf"{re.escape(place)}: .*verify\.functions.*Did you mean 'builtins:exit'"
    tree = {key: recipe[key] for key in ("model", "verify")}
    tree |= {"eval": {"data": str(data), "max_new_tokens": 8}, "out": str(tmp_path / "out")}

    def run() -> None:
        if command == "rl":
            train(build(f"data.train={data}"))
        else:
            run_eval(load_config(tree, kind=EvalConfig), NoProgress())

    with pytest.raises(UserError, match=message):
        run()
    assert not list(tmp_path.glob("run/rollouts/*"))
    assert not (tmp_path / "out/samples.jsonl").exists()


def test_the_recipe_sets_the_judges_memory(tiny_dir: Path, build: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A judge's function sees the limit of its own process."""
    (tmp_path / "limits.py").write_text(
        "import resource\n"
        "def is_address_space(response, gold): return resource.getrlimit(resource.RLIMIT_AS)[0] == gold\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    function = "limits:is_address_space"
    config = build("verify.memory_gib=1.5", f'verify.functions=["{function}"]')
    judge = PoolJudge(config.verify, Tokenizer.load(tiny_dir / "model"))
    try:
        verdict = judge._pool.submit("", 3 << 29, f"function:{function}").result()
    finally:
        judge.close()
    assert verdict.label == "correct"


@pytest.mark.parametrize("command", ["rl", "eval"])
@pytest.mark.parametrize(
    ("module", "message"),
    [
        (
            "import no_such_library",
            r"kind function:broken:score cannot start: broken.py:1: ModuleNotFoundError: .*no_such_lib",
        ),
        ("def other(): ...", r"cannot start: AttributeError: expected a function of .*, got 'score'"),
        ("raise SystemExit(0)", r"cannot start: broken.py:1: SystemExit: 0"),
        (
            "def score(response, gold, limit, level=1): ...",
            r"cannot start: TypeError: broken:score: expected a column of the row or an argument in verify.arguments "
            r"for its parameter 'limit', got none\. Valid: .*uid",
        ),
        (
            None,
            r"cannot start: ModuleNotFoundError: expected a module that Python finds, or a file in .*, got 'broken'",
        ),
    ],
)
def test_a_reward_that_cannot_be_imported_is_found_before_the_first_response(
    tiny_dir: Path,
    tmp_path: Path,
    recipe: dict[str, Any],
    build: Any,
    train: Any,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    module: str | None,
    message: str,
):
    monkeypatch.chdir(tmp_path)
    if module:
        Path("broken.py").write_text(module)
    rows = [json.loads(line) for line in (tiny_dir / "train.jsonl").read_text().splitlines()]
    rows[-1]["kind"] = "function:broken:score"  # one of 18: drawn late, if at all
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe["verify"] = {"workers": 1, "functions": ["broken:score"]}
    monkeypatch.setattr("pekoe.run.rollouts.Rollouts.put", lambda *_: pytest.fail("something is sampled"))
    tree = {key: recipe[key] for key in ("model", "verify")} | {"eval": {"data": "rows.jsonl", "max_new_tokens": 8}}
    with pytest.raises(UserError, match="expected judges that start, got: the judge of " + ".*" + message):
        train(build("data.train=rows.jsonl")) if command == "rl" else run_eval(
            load_config(tree, kind=EvalConfig), NoProgress()
        )
