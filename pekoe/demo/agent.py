"""The demo of agents: a small decoder from random weights learns to use a calculator, over two turns.

SFT shows two ways to answer `37*84=`: some demonstrations ask the calculator (`?37*84`) and box what it says, others
guess at once and are mostly wrong. RL on verified answers then teaches which is better. A control has verdicts drawn at
random. `make demo-agent`.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pekoe.agents.answers import Message
from pekoe.agents.session import Session
from pekoe.config.recipes import RLConfig, SFTConfig, load_config
from pekoe.core.errors import UserError
from pekoe.core.journal import read_lines
from pekoe.core.progress import NoProgress
from pekoe.core.records import read_records
from pekoe.core.types import Problem
from pekoe.data.problems import Demonstration, write_demonstrations, write_problems
from pekoe.data.tokenizer import Tokenizer
from pekoe.demo.char_tokenizer import CHAT_TEMPLATE, make_char_tokenizer
from pekoe.demo.run import model_spec
from pekoe.model import Decoder, save_model
from pekoe.run.build import build_rl
from pekoe.run.interrupt import Stop
from pekoe.run.rl import run_rl
from pekoe.run.sft import run_sft

ALPHABET = "0123456789*=?\\{}boxed"
NUM_HELD_OUT, NUM_ASKED, NUM_GUESSED = 128, 1536, 2048
STEPS = 30
MARK = "demo-agent"  # a file by which a directory is known as this demo's


async def episode(problem: Problem, client: Session) -> None:
    """Answer with a calculator. The problem's judge reads the last answer."""
    messages: list[Message] = list(problem.messages)
    reply = await client.complete(messages)
    for _ in range(3):
        call = re.fullmatch(r"\?(\d+)\*(\d+)", reply.content)
        if call is None:
            return
        result = {"role": "tool", "content": str(int(call[1]) * int(call[2]))}
        messages += [reply.message, result]
        reply = await client.complete(messages)


def make_data(out: Path, seed: int) -> None:
    """Products of four digits of two numbers of two; held-out ones, those shown and those for RL are disjoint."""
    rng = np.random.default_rng(seed)
    pairs = [(a, b) for a in range(32, 100) for b in range(32, 100)]
    order = [pairs[i] for i in rng.permutation(len(pairs))]
    held_out, shown = order[:NUM_HELD_OUT], order[NUM_HELD_OUT : NUM_HELD_OUT + NUM_ASKED + NUM_GUESSED]

    def problem(a: int, b: int) -> Problem:
        return Problem(f"{a}*{b}", ({"role": "user", "content": f"{a}*{b}="},), str(a * b))

    demonstrations: list[Demonstration] = []
    for number, (a, b) in enumerate(shown):
        first = problem(a, b).messages
        if number < NUM_ASKED:
            call = f"?{a}*{b}"
            said = ({"role": "assistant", "content": call}, {"role": "tool", "content": str(a * b)})
            demonstrations += [Demonstration(first, call), Demonstration((*first, *said), f"\\boxed{{{a * b}}}")]
        else:
            demonstrations.append(Demonstration(first, f"\\boxed{{{int(rng.integers(1024, 9802))}}}"))
    folder = out / "data"
    folder.mkdir(parents=True)
    write_problems(folder / "held_out.jsonl", [problem(*pair) for pair in held_out])
    write_problems(folder / "train.jsonl", [problem(*pair) for pair in order[NUM_HELD_OUT + len(shown) :]])
    write_demonstrations(folder / "demonstrations.jsonl", demonstrations)
    files = make_char_tokenizer(ALPHABET)
    template = CHAT_TEMPLATE.replace("message['role'] == 'user'", "message['role'] in ('user', 'tool')")
    files["chat_template.jinja"] = template.encode()
    shape = {"hidden_size": 96, "num_layers": 2, "num_heads": 3, "intermediate_size": 288, "max_positions": 64}
    spec = replace(model_spec(Tokenizer(files).vocab_size), **shape)
    model = Decoder(spec)
    model.init_weights(seed)
    model.assets = dict(files)
    save_model(model, out / "start")


def recipe(out: Path, name: str, model: str, seed: int) -> dict[str, Any]:
    return {
        "num_steps": STEPS,
        "run": {"dir": str(out / name), "seed": seed, "threads": 1},
        "model": {"path": str(out / model), "device": "cpu"},
        "data": {"train": str(out / "data" / "train.jsonl"), "max_prompt_tokens": 12},
        "rollout": {
            "prompts_per_step": 16,
            "samples_per_prompt": 8,
            "max_new_tokens": 48,
            "episode": "pekoe.demo.agent:episode",
            "max_turns": 4,
            "turn_tokens": 16,
        },
        "algo": {"minibatches": 2},
        "optim": {"lr": 2e-4, "warmup_fraction": 0.02},
        "train": {"token_budget": 4096, "save_every": STEPS, "keep_checkpoints": 1},
        "verify": {"workers": 1},
    }


def _rl(config: RLConfig) -> list[dict[str, Any]]:
    """Train; returns the journal."""
    stop = Stop()
    with stop.listening(), ExitStack() as stack:
        run_rl(build_rl(config, NoProgress(), stop, stack))
    return list(read_lines(Path(config.run.dir) / "journal.jsonl"))


def measure(out: Path, model: str, seed: int) -> dict[str, Any]:
    """pass@1 on held-out problems, with episodes: the evaluation before a run's first step, which is not used."""
    tree = recipe(out, f"measure_{model.partition('/')[0]}", model, seed + 1)
    tree |= {"eval": {"data": str(out / "data" / "held_out.jsonl"), "every": 2, "samples": 16}}
    tree["rollout"] |= {"prompts_per_step": 2, "samples_per_prompt": 2}
    events = _rl(load_config(tree | {"num_steps": 1}, kind=RLConfig))
    found = next(event for event in events if event["event"] == "eval")
    return {name: found[name] for name in ("pass_at_1", "ci95", "num_problems", "samples_per_problem")}


def examples(run: Path, step: int) -> list[list[list[str]]]:
    """The turns of two trajectories of a step, each (context, answer)."""
    lines = read_records(run, step)[:2]
    return [line.get("turns") or [[line["prompt"], line["text"]]] for line in lines]


def main(out: Path, seed: int = 0) -> None:
    """Train, measure, and write summary.json. An earlier demo in `out` is removed; UserError for anything else."""
    if out.exists():
        if not out.is_dir() or (any(out.iterdir()) and not (out / MARK).exists()):
            raise UserError(f"{out}: expected a new directory or one of an earlier demo of agents, got something else")
        shutil.rmtree(out)
    out.mkdir(parents=True)
    (out / MARK).touch()
    start = time.perf_counter()
    make_data(out, seed)
    print("SFT ...", flush=True)
    sft = {
        "run": {"dir": str(out / "sft"), "seed": seed, "threads": 1},
        "model": {"path": str(out / "start"), "device": "cpu"},
        "data": {"train": str(out / "data" / "demonstrations.jsonl")},
        "sft": {"epochs": 10, "batch_size": 64},
        "optim": {"lr": 6e-3, "warmup_fraction": 0.1, "schedule": "cosine"},
        "train": {"token_budget": 4096, "save_every": 100_000, "keep_checkpoints": 1},
    }
    run_sft(load_config(sft, kind=SFTConfig), NoProgress())
    summary: dict[str, Any] = {"sft": measure(out, "sft/model", seed)}
    curves: dict[str, Any] = {}
    for name, overrides in (("rl", ()), ("control", ("verify.random=true",))):
        print(f"{name} ...", flush=True)
        events = _rl(load_config(recipe(out, name, "sft/model", seed), overrides, RLConfig))
        steps = [event for event in events if event["event"] == "step"]
        summary[name] = measure(out, f"{name}/model", seed)
        curves[name] = {key: [round(step[key], 3) for step in steps] for key in ("reward", "turns", "tool_calls")}
        curves[name]["logprob_diff_max"] = max(step.get("logprob_diff_max", 0.0) for step in steps)
    summary |= {"curves": curves, "seed": seed, "seconds": round(time.perf_counter() - start, 1)}
    summary["examples"] = {"before": examples(out / "rl", 1), "after": examples(out / "rl", STEPS)}
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    for name in ("sft", "rl", "control"):
        low, high = summary[name]["ci95"]
        print(f"{name:8} pass@1 {summary[name]['pass_at_1']:6.1%}  [{low:.1%}, {high:.1%}]")
    calls = curves["rl"]["tool_calls"]
    print(f"tool calls a trajectory: {calls[0]:.2f} in the first step, {calls[-1]:.2f} in the last")
    print(f"{summary['seconds']:.0f} s; {out / 'summary.json'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/demo-agent"))
    parser.add_argument("--seed", type=int, default=0)
    try:
        main(**vars(parser.parse_args()))
    except UserError as error:
        parser.error(str(error))
