"""What eval and curate keep: never of other problems, another judge or another process; faults stay an error."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pekoe.config import EvalConfig, load_config
from pekoe.config.recipes import CurateConfig
from pekoe.core import UserError
from pekoe.core.errors import RunError
from pekoe.core.progress import NoProgress
from pekoe.core.types import Verdict
from pekoe.engine.base import EngineLost
from pekoe.engine.embedded import EmbeddedEngine
from pekoe.engine.pool import EnginePool
from pekoe.model import Decoder, load_model, save_model
from pekoe.run import judging, sample_store
from pekoe.run.curate import run_curate
from pekoe.run.evaluate import run_eval


def tree_of(d: Path, out: Path) -> dict[str, Any]:
    return {
        "run": {"threads": 1},
        "model": {"path": str(d / "model"), "device": "cpu"},
        "out": str(out),
        "eval": {"data": str(d / "held_out.jsonl"), "samples": 2, "max_new_tokens": 6},
        "max_prompt_tokens": 8,
        "verify": {"workers": 1, "random": True},
    }


def test_empty_list(tiny_dir, tmp_path):
    t = tree_of(tiny_dir, tmp_path / "o")
    t["eval"]["data"] = []
    with pytest.raises(UserError):
        run_eval(load_config(t, kind=EvalConfig), NoProgress())


def test_out_is_file(tiny_dir, tmp_path):
    (tmp_path / "f").write_text("")
    with pytest.raises(UserError):
        run_eval(load_config(tree_of(tiny_dir, tmp_path / "f"), kind=EvalConfig), NoProgress())


def test_fault_gate_holds_on_rerun(tiny_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(judging.RandomJudge, "submit", lambda self, p, r: _done())
    c = load_config(tree_of(tiny_dir, tmp_path / "o"), kind=EvalConfig)
    for _ in range(2):
        with pytest.raises(RunError, match="FAULT"):
            run_eval(c, NoProgress())


def _done():
    from concurrent.futures import Future

    f = Future()
    f.set_result(Verdict("fault", None, "x"))
    return f


def test_changed_problem_is_sampled_again(tiny_dir, tmp_path):
    data = tmp_path / "d.jsonl"
    data.write_text((tiny_dir / "held_out.jsonl").read_text())
    t = tree_of(tiny_dir, tmp_path / "o")
    t["eval"]["data"] = str(data)
    t["verify"]["random"] = False
    run_eval(load_config(t, kind=EvalConfig), NoProgress())
    rows = [json.loads(x) for x in data.read_text().splitlines()]
    data.write_text("".join(json.dumps(r | {"answer": "77"}) + "\n" for r in rows))
    first = (tmp_path / "o/samples.jsonl").read_text().count("\n")
    run_eval(load_config(t, kind=EvalConfig), NoProgress())
    assert (tmp_path / "o/samples.jsonl").read_text().count("\n") == 2 * first - 1


def test_other_judge_is_refused(tiny_dir, tmp_path):
    t = tree_of(tiny_dir, tmp_path / "o")
    run_eval(load_config(t, kind=EvalConfig), NoProgress())
    t["verify"]["random"] = False
    with pytest.raises(UserError):
        run_eval(load_config(t, kind=EvalConfig), NoProgress())


@pytest.mark.parametrize("command", ["eval", "curate"])
def test_another_model_of_the_same_path_is_refused(tiny_dir, tmp_path, command):
    path = tmp_path / "model"
    shutil.copytree(tiny_dir / "model", path)
    t = tree_of(tiny_dir, tmp_path / "o")
    t["model"]["path"] = str(path)
    kind, run = EvalConfig, run_eval
    if command == "curate":
        kind, run = CurateConfig, run_curate
        t["data"] = {"train": t.pop("eval")["data"], "max_prompt_tokens": t.pop("max_prompt_tokens")}
        t["curate"] = {"samples": 2, "max_new_tokens": 6, "drop_all_right": False}
    run(load_config(t, kind=kind), NoProgress())
    run(load_config(t, kind=kind), NoProgress())
    model = load_model(path)
    assert isinstance(model, Decoder)
    model.init_weights(1)
    save_model(model, path)
    with pytest.raises(UserError, match=r"expected responses sampled with model.weights = '\w+', got '\w+'"):
        run(load_config(t, kind=kind), NoProgress())


def test_fewer_problems(tiny_dir, tmp_path):
    data = tmp_path / "d.jsonl"
    lines = (tiny_dir / "held_out.jsonl").read_text().splitlines(True)
    data.write_text("".join(lines))
    t = tree_of(tiny_dir, tmp_path / "o")
    t["eval"]["data"] = str(data)
    run_eval(load_config(t, kind=EvalConfig), NoProgress())
    data.write_text("".join(lines[:3]))
    r = run_eval(load_config(t, kind=EvalConfig), NoProgress())
    assert len(json.loads((tmp_path / "o/results.json").read_text())["problems"]) == r.num_problems


@pytest.mark.timeout(60)
def test_an_engine_that_is_lost_and_started_again_goes_on_with_the_evaluation(tiny_dir, tmp_path, monkeypatch):
    """The only server dies after its proof: the one in its place gets the weights, and the requests."""
    pools: list[EnginePool] = []
    config = load_config(tree_of(tiny_dir, tmp_path / "o"), kind=EvalConfig)

    class DiesOnce(EmbeddedEngine):
        def submit(self, requests: Any) -> Any:
            if requests[0].uid != "canary" and pools[0].num_lost == 0:
                raise EngineLost("it was killed")
            return super().submit(requests)

    def open_one(config: Any, model: Any, longest: int, *more: Any) -> EnginePool:
        starter = SimpleNamespace(name="server", kind="embedded", start=lambda: DiesOnce(model))
        pools.append(EnginePool([starter], start_limit_s=30, serving_at_once=True))
        more[-1].callback(pools[0].close)
        pools[0].wait_started()
        return pools[0]

    monkeypatch.setattr(sample_store, "open_pool", open_one)
    result = run_eval(config, NoProgress())
    assert result.num_problems == 7
    assert pools[0].num_lost == 1


def test_the_same_files_by_other_names_are_the_same(tiny_dir, tmp_path):
    t = tree_of(tiny_dir, tmp_path / "o")
    run_eval(load_config(t, kind=EvalConfig), NoProgress())
    before = (tmp_path / "o/samples.jsonl").read_text()
    t["model"]["path"] = f"{tiny_dir}/./model"
    t["eval"]["data"] = f"{tiny_dir}/./" + t["eval"]["data"].rpartition("/")[2]
    run_eval(load_config(t, kind=EvalConfig), NoProgress())
    assert (tmp_path / "o/samples.jsonl").read_text() == before
