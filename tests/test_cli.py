"""The command line as a user meets it: each mistake is one clear message, exit 2, no traceback, nothing lost."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pytest

from pekoe.cli import main
from pekoe.config import load_config
from pekoe.config.keys import keys_of
from pekoe.config.recipes import COMMANDS
from pekoe.core.types import Problem
from pekoe.data.problems import write_problems
from pekoe.data.tokenizer import Tokenizer
from pekoe.demo.char_tokenizer import make_char_tokenizer
from pekoe.model import Decoder, save_model

from .forked import command

RECIPE = """
num_steps = 2
[run]
dir = "{run}"
threads = 1
[model]
path = "{folder}/model"
device = "cpu"
[data]
train = "{folder}/train.jsonl"
max_prompt_tokens = 8
[rollout]
prompts_per_step = 4
samples_per_prompt = 2
max_new_tokens = 12
[train]
token_budget = 64
[verify]
workers = 1
random = true
"""


def pekoe(*words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The command in this process: torch is imported once for all tests."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.chdir(cwd or "."))
        stack.enter_context(patch.object(sys, "argv", ["pekoe", *words]))
        stack.enter_context(patch.object(sys, "path", [*sys.path]))
        stack.enter_context(patch.dict(os.environ))
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        try:
            main()
        except SystemExit as stopped:
            status = int(stopped.code or 0)
    return subprocess.CompletedProcess(words, status, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, make_model: Callable[..., Decoder]) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    files = make_char_tokenizer("0123456789+=\\{}boxed")
    model = make_model(vocab_size=Tokenizer(files).vocab_size, max_positions=64, scale=1.0)
    model.assets = dict(files)
    save_model(model, folder / "model")
    problems = [Problem(str(a), ({"role": "user", "content": f"{a}+1="},), str(a + 1)) for a in range(8)]
    write_problems(folder / "train.jsonl", problems)
    (folder / "rl.toml").write_text(RECIPE.format(folder=folder, run=folder / "run"))
    return folder


def refused(folder: Path, *words: str) -> str:
    """The message of a command that must exit with 2, on stderr alone, without a traceback."""
    done = pekoe("rl", str(folder / "rl.toml"), *words)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("pekoe: ")
    return done.stderr


def test_help_is_enough():
    for words in ([], ["rl"], ["sft"], ["eval"], ["demo"], ["verify"], ["curate"]):
        done = pekoe(*words, "--help")
        assert done.returncode == 0
        assert "Usage: pekoe" in done.stdout
    assert pekoe("--version").stdout.strip()
    assert pekoe("rll").returncode == 2


def test_dry_run_prints_the_resolved_recipe(folder: Path):
    done = pekoe("rl", str(folder / "rl.toml"), "optim.lr=0.5", "--dry-run")
    assert done.returncode == 0
    assert "lr = 0.5" in done.stdout
    assert "eps = 1e-05" in done.stdout
    assert "# kv_tokens is absent" in done.stdout


@pytest.mark.parametrize("command", ["rl", "sft", "eval", "curate"])
def test_help_and_docs_hold_every_key(command: str, repository: Path):
    text = " ".join(pekoe(command, "--help").stdout.split())
    page = (repository / "docs/recipe.md").read_text()
    for key in keys_of(COMMANDS[command]):
        assert f" {key.name} {key.type}" in text
        assert f"| `{key.name.rpartition('.')[2]}` |" in page


def test_keys_are_listed():
    assert "optim.lr: number, above 0; default 2e-05" in pekoe("keys").stdout
    assert pekoe("keys", "optim.lr").stdout.startswith("optim.lr: number")
    done = pekoe("keys", "learning_rate")
    assert (done.returncode, done.stdout) == (2, "")
    assert "Did you mean 'optim.lr'?" in done.stderr


def test_a_recipe_is_written_once(tmp_path: Path):
    assert pekoe("recipe").stdout.startswith("boba-1.5b  ")
    assert "\ndr-grpo          Dr. GRPO (arXiv:2503.20783" in pekoe("recipe").stdout
    assert (pekoe("recipe", "laptop", cwd=tmp_path)).returncode == 0
    assert load_config(tmp_path / "laptop.toml") == load_config("laptop")
    again = pekoe("recipe", "laptop", cwd=tmp_path)
    assert again.returncode == 2
    assert "expected a new file that can be written, got laptop.toml" in again.stderr
    assert pekoe("recipe", "laptop", "--out", "mine.toml", cwd=tmp_path).stdout.startswith("mine.toml: ")
    assert "unknown name 'latop'. Did you mean 'laptop'?" in pekoe("recipe", "latop").stderr
    assert "lr = 0.0002" in pekoe("rl", "laptop", "--dry-run", cwd=tmp_path).stdout  # without a file


def test_an_unknown_key(folder: Path):
    assert "unknown key 'optim.lrr'. Did you mean 'lr'?" in refused(folder, "optim.lrr=1")


def test_a_missing_recipe(folder: Path):
    done = pekoe("rl", str(folder / "rk.toml"))
    assert done.returncode == 2
    assert "Did you mean 'rl.toml'?" in done.stderr


def test_a_missing_model(folder: Path):
    message = refused(folder, f"model.path={folder / 'modle'}")
    assert "modle" in message
    assert "Did you mean 'model'?" in message


def test_a_malformed_problem_line(folder: Path):
    lines = (folder / "train.jsonl").read_text().splitlines()
    bad = folder / "bad.jsonl"
    bad.write_text("\n".join([*lines, '{"promt": "1+1=", "answer": "2"}']) + "\n")
    message = refused(folder, f"data.train={bad}")
    assert f"bad.jsonl:{len(lines) + 1}" in message
    assert "prompt" in message
    done = pekoe(
        "rl", str(folder / "rl.toml"), f"data.train={bad}", "data.skip_malformed=true", f"run.dir={folder / 'skip'}"
    )
    assert done.returncode == 0, done.stderr
    assert "skipped 1 malformed" in done.stdout
    (dropped,) = map(json.loads, (folder / "skip" / "data.jsonl").read_text().splitlines())
    assert (dropped["row"], dropped["reason"]) == (len(lines) + 1, "malformed")


def test_a_prompt_longer_than_allowed_and_than_the_context(folder: Path):
    assert "expected a prompt of at most 3 tokens" in refused(folder, "data.max_prompt_tokens=3")
    message = refused(folder, "rollout.max_new_tokens=60", "train.token_budget=100")
    assert "expected prompt and response to fit the model's 64 positions" in message
    assert "most new tokens that fit: 56 (max_new_tokens)" in message
    message = refused(folder, "data.max_prompt_tokens=90", "train.token_budget=200")
    assert re.search(r"most prompt tokens that fit: \d\d \(max_prompt_tokens\)", message)


def test_a_budget_below_a_sequence(folder: Path):
    assert "train.token_budget: expected at least the longest sequence" in refused(folder, "train.token_budget=19")


def test_a_run_directory_that_cannot_be_written(folder: Path):
    (folder / "file").write_text("")
    message = refused(folder, f"run.dir={folder / 'file' / 'run'}")
    assert "run.dir: expected a directory that can be written" in message


def test_a_kv_cache_below_a_sequence(folder: Path):
    assert "engine.kv_tokens" in refused(folder, "engine.kv_tokens=16", f"run.dir={folder / 'kv'}")


def test_servers_that_cannot_be_used(folder: Path):
    python = f"engine.server.python={sys.executable}"
    for words, message in [
        (["engine.backend=sgl"], "engine.backend: expected 'embedded', 'sglang' or 'vllm', got 'sgl'"),
        (["engine.backend=sglang"], "engine.server: expected either python (start servers) or urls"),
        (["engine.server.pyton=x"], "unknown key 'engine.server.pyton'. Did you mean 'python'?"),
        (
            ["engine.backend=vllm", 'engine.server.urls=["localhost:80"]'],
            "expected http://host:port, got 'localhost:80'",
        ),
        (["engine.backend=sglang", "engine.server.python=/no/python"], "with SGLang in it, got '/no/python'"),
        (["engine.backend=sglang", python, "rollout.min_new_tokens=1"], "min_new_tokens: expected 0 with SGLang"),
        (["engine.backend=vllm", python, "rollout.top_p=0.9"], "rollout.top_p: expected 1.0 with"),
    ]:
        assert message in refused(folder, f"run.dir={folder / 'servers'}", *words)


def test_a_server_that_does_not_start_ends_the_run_with_its_last_words(folder: Path):
    words = ["engine.backend=vllm", f"engine.server.python={sys.executable}", f"run.dir={folder / 'unstarted'}"]
    done = pekoe("rl", str(folder / "rl.toml"), *words)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "vLLM server 0 ended while starting" in done.stderr
    assert "No module named" in done.stderr
    nobody = ["engine.backend=sglang", 'engine.server.urls=["http://127.0.0.1:9"]', "engine.server.start_limit_s=1"]
    done = pekoe("rl", str(folder / "rl.toml"), *nobody, f"run.dir={folder / 'nobody'}")
    assert done.returncode == 1
    assert "SGLang at http://127.0.0.1:9: expected its health check to pass within 1 s" in done.stderr


def test_a_run_by_the_command_line_ends_with_a_model(folder: Path):
    done = pekoe("rl", str(folder / "rl.toml"), f"run.dir={folder / 'whole'}", "track.tensorboard=true")
    assert done.returncode == 0, done.stderr
    assert "A step takes" in done.stdout  # what the report says of it
    assert list((folder / "whole" / "tensorboard").iterdir())
    assert "step 1 " in done.stdout
    assert "done: 2 steps" in done.stdout
    assert (folder / "whole" / "model" / "model.safetensors").exists()


def test_ctrl_c_saves_and_says_how_to_go_on(folder: Path, tmp_path: Path):
    words = [str(folder / "rl.toml"), f"run.dir={folder / 'stopped'}", "num_steps=100000"]
    process = command(tmp_path, "rl", *words)
    journal = folder / "stopped" / "journal.jsonl"
    deadline = time.monotonic() + 60
    while not (journal.exists() and journal.read_text().count('"step"') >= 3):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "no step within 60 s"
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "which is saved; run the same command again to go on from there" in stderr
    events = [json.loads(line) for line in journal.read_text().splitlines()]
    steps = [event["step"] for event in events if "step" in event]
    assert f"stopped after step {steps[-1]} of 100000" in stderr
    done = pekoe("rl", *words[:2], f"num_steps={steps[-1] + 1}")
    assert done.returncode == 0, done.stderr
    assert f"resumed after step {steps[-1]}" in done.stdout


def test_eval_without_a_recipe(folder: Path):
    words = ["--model", str(folder / "model"), "--data", str(folder / "train.jsonl")]
    small = ["eval.samples=2", "eval.max_new_tokens=12", "max_prompt_tokens=8", "run.threads=1"]
    done = pekoe("eval", *small, *words)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout[done.stdout.index("{") :])
    assert result["num_problems"] == 8
    assert pekoe("eval", "--model", "x").returncode == 2


def test_curate(folder: Path):
    words = [f"model.path='{folder}/model'", f"data.train='{folder}/train.jsonl'", "data.max_prompt_tokens=8"]
    words += ["curate.max_new_tokens=8", "curate.samples=2", "run.threads=1", f"out='{folder}/curated'"]
    (folder / "curate.toml").write_text("")
    recipe = str(folder / "curate.toml")
    done = pekoe("curate", recipe, *words)
    assert done.returncode == 0, done.stderr
    assert "done: 8 problems in" in done.stdout
    assert "0/2" in done.stdout
    assert pekoe("curate", recipe, *words).returncode == 0
    done = pekoe("curate", recipe, *words, "run.seed=1")
    assert done.returncode == 2
    assert "expected responses sampled with run.seed = 1, got 0" in done.stderr
    done = pekoe("curate", recipe, *words, "curate.sample=1")
    assert (done.returncode, "Did you mean 'samples'" in done.stderr) == (2, True)


def test_comparing_needs_two_results(folder: Path):
    done = pekoe("eval", "--compare", str(folder))
    assert (done.returncode, "expected two results" in done.stderr) == (2, True)
    done = pekoe("eval", "--compare", str(folder), str(folder))
    assert (done.returncode, "expected results of pekoe eval, found none" in done.stderr) == (2, True)


def test_verify(folder: Path):
    cases = folder / "cases.jsonl"
    rows = [
        {"id": "a", "response": "so \\boxed{1/2}", "gold": "0.5"},
        {"response": "\\boxed{3}", "gold": "4", "kind": "math"},
        {"id": "c", "response": "three", "gold": "3"},
    ]
    cases.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = pekoe("verify", str(cases))
    assert done.returncode == 0, done.stderr
    verdicts = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(v["id"], v["label"]) for v in verdicts] == [("a", "correct"), (2, "wrong"), ("c", "unparsed")]
    cases.write_text(
        "".join(json.dumps(row | {"label": label}) + "\n" for row, label in zip(rows, (True, False, True), strict=True))
    )
    table = pekoe("verify", str(cases), str(cases), "--summary").stdout
    assert re.findall(r"cases\W+2\W+1\W+1 \(50.0%\)\W+0 \(0.0%\)\W+1\W+0\W+0", table) != []
    assert table.count("50.0%") == 2
    assert pekoe("verify", str(cases), "--summary", "--kind", "math-unboxed").stdout.count("0 (0.0%)") == 1
    (folder / "own.py").write_text("def short(response, gold):\n    return len(response) < gold\n")
    cases.write_text('{"response": "x", "gold": 2, "kind": "function:own:short"}\n')
    done = pekoe("verify", str(cases))
    assert (done.returncode, "case 1: judge: expected a function listed in verify.functions" in done.stderr) == (
        2,
        True,
    )
    cases.write_text('{"response": "x"}\n')
    assert "cases.jsonl:1: expected the key 'gold'" in pekoe("verify", str(cases)).stderr


def test_no_file_of_the_current_directory_runs(tmp_path: Path):
    """Files with the names of libraries, beside which the command is started, as torchrun starts it (`-m`)."""
    for name in ("gmpy2", "typer", "pydantic", "json", "sympy", "pekoe_rewards", "sitecustomize"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'a').write({name + ' '!r})\n")
    (tmp_path / "cases.jsonl").write_text('{"response": "\\\\boxed{x+1}", "gold": "1+x"}\n')
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    words = [sys.executable, "-m", "pekoe.cli", "verify", "cases.jsonl"]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    ran = (tmp_path / "ran").read_text() if (tmp_path / "ran").exists() else ""
    assert (done.returncode, ran) == (0, ""), done.stderr
    assert json.loads(done.stdout)["label"] == "correct"


def test_a_function_that_is_named_is_found_in_the_current_directory(tmp_path: Path):
    (tmp_path / "own.py").write_text(
        "from helper import LIMIT\ndef short(response, gold):\n    return len(response) < LIMIT\n"
    )
    (tmp_path / "helper.py").write_text("LIMIT = 2\n")
    (tmp_path / "cases.jsonl").write_text('{"response": "x", "gold": 2, "kind": "function:own:short"}\n')
    done = pekoe("verify", "cases.jsonl", "--function", "own:short", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["label"] == "correct"
    (tmp_path / "plain.jsonl").write_text('{"response": "x", "gold": 2}\n')  # no kind: that of the one function
    done = pekoe("verify", "plain.jsonl", "--function", "own:short", cwd=tmp_path)
    assert json.loads(done.stdout)["label"] == "correct", done.stderr
