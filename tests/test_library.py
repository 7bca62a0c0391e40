"""Pekoe as a library: the public names, and the loop that the docs show."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

import pekoe
from pekoe.core.types import Problem
from pekoe.data.problems import write_problems
from pekoe.data.tokenizer import Tokenizer
from pekoe.demo.char_tokenizer import make_char_tokenizer
from pekoe.model import Decoder, save_model


@pytest.fixture
def demo(tmp_path: Path, make_model: Callable[..., Decoder], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model and problems where the demo leaves them; the current directory."""
    files = make_char_tokenizer("0123456789+=\\{}boxed")
    model = make_model(vocab_size=Tokenizer(files).vocab_size, scale=1.0)
    model.assets = dict(files)
    save_model(model, tmp_path / "runs/demo/sft/model")
    (tmp_path / "runs/demo/data").mkdir()
    problems = [Problem(str(a), ({"role": "user", "content": f"{a}+1="},), str(a + 1)) for a in range(20)]
    write_problems(tmp_path / "runs/demo/data/train.jsonl", problems)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_loop_of_the_docs_runs(demo: Path, repository: Path, capsys: pytest.CaptureFixture[str]):
    page = (repository / "docs/how-to/library.md").read_text()
    (loop,) = re.findall(r'```python title="loop.py"\n(.*?)```', page, re.DOTALL)
    assert len([line for line in loop.splitlines() if line]) <= 35
    # The model knows nothing: judged by chance, some answers are right, and there is something to learn.
    judged = loop.replace(", 20\n", ", 2\n").replace("verdicts = judges.judge_many(", "verdicts = judge(")
    names = {"judge": lambda cases: [pekoe.Verdict("wrong" if i % 3 else "correct") for i, _ in enumerate(cases)]}
    before = {name: p.clone() for name, p in pekoe.load_model("runs/demo/sft/model").named_parameters()}
    exec(judged, names)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["step 1", "step 2"]
    assert all(float(line.rpartition(" ")[2]) < 1e-4 for line in lines)
    trained = dict(pekoe.load_model("runs/library/model").named_parameters())
    assert any(not before[name].equal(trained[name]) for name in before)
    exec(loop.replace(", 20\n", ", 1\n"), {})  # with the real judges


def test_every_public_name_is_there():
    public = set(pekoe._modules())
    assert {"load_model", "Trainer", "read_problems", "SamplingParams", "judge", "score"} <= public
    for name in public:
        assert getattr(pekoe, name) is not None
    assert public <= set(dir(pekoe))
    with pytest.raises(AttributeError, match="load_modle"):
        _ = pekoe.load_modle


def test_sampling_stops_at_the_models_own_end_tokens(demo: Path):
    model, tokenizer = pekoe.load_model("runs/demo/sft/model"), pekoe.Tokenizer.load("runs/demo/sft/model")
    (end,) = tokenizer.stop_token_ids
    engine = pekoe.EmbeddedEngine(model)
    try:
        prompts = [tokenizer.encode(f"{a}+1=") for a in range(8)]
        own = pekoe.SamplingParams(n=4, max_new_tokens=40)
        completions = [c for group in engine.generate(prompts, own) for c in group]
        endless = pekoe.SamplingParams(n=4, max_new_tokens=40, stop_token_ids=())
        unstopped = [c for group in engine.generate(prompts, endless) for c in group]
    finally:
        engine.close()
    stopped = [c for c in completions if c.finish == "stop"]
    assert len(stopped) > 4
    assert all(c.tokens[-1] == end and end not in c.tokens[:-1] for c in stopped)
    assert {c.finish for c in unstopped} == {"length"}
    assert any(end in c.tokens for c in unstopped)
