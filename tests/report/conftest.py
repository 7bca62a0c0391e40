"""A small run directory, written by hand: two steps, a group of hostile text, a FAULT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pekoe.core.records import write_records
from pekoe.core.types import Record

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"


def step_event(number: int, **more: Any) -> dict[str, Any]:
    return {
        "event": "step",
        "time": 1000.0 + 10 * number,
        "step": number,
        "num_rollouts": 8,
        "reward": -5.0 + number,
        "pass_rate": 0.25 * number,
        "fault_rate": 0.0,
        "response_tokens": 10.0,
        "truncation_rate": 0.0,
        "rollout_tokens_per_s": 100.0,
        "train_tokens_per_s": 50.0,
        "seconds": {"rollout": 6.0, "train": 3.0, "sync": 1.0},
        "step_s": 10.0,
        "loss": float("nan") if number == 2 else 0.5,
        "num_microbatches": 4,
        "num_prompt_tokens": 40,
        "logprob_diff_max": 1e-6,
        **more,
    }


def response(group: int, sample: int, label: str = "wrong", text: str = "ab", **more: Any) -> dict[str, Any]:
    return {
        "uid": f"p{group}",
        "draw": 0,
        "group": group,
        "sample": sample,
        "finish_reason": "stop",
        "versions": [[0, 0]],
        "label": label,
        "extracted": "7",
        "why": "out of memory" if label == "fault" else "",
        "gold": "7",
        "reward": 5.0 if label == "correct" else -5.0,
        "advantage": 0.5,
        "prompt": "1+6=",
        "text": text,
        "prompt_tokens": [1],
        "tokens": [2, 3] * (sample + 1),
        "logprobs": [-0.25, -1.5] * (sample + 1),
    } | more


def write_run(path: Path, events: list[dict[str, Any]], rollouts: dict[str, list[dict[str, Any]]]) -> Path:
    (path / "rollouts").mkdir(parents=True)
    (path / "config.toml").write_text('num_steps = 2\n[model]\npath = "m"\n[train]\ntoken_budget = 20\n', "utf-8")
    (path / "journal.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events) + '{"torn')
    ledger = [{"step": 1, "uid": "p0", "draw": 0, "outcome": "trained"}]
    ledger += [{"step": 1, "uid": "p1", "draw": 0, "outcome": "dropped", "reason": "all right"}] * 2
    (path / "ledger.jsonl").write_text("".join(json.dumps(line) + "\n" for line in ledger))
    for name, lines in rollouts.items():
        records = [
            Record.of(np.array(line["prompt_tokens"]), np.array(line["tokens"]), np.array(line["logprobs"], np.float32))
            for line in lines
        ]
        arrays = ("prompt_tokens", "tokens", "logprobs")
        fields = [{key: value for key, value in line.items() if key not in arrays} for line in lines]
        write_records(path / "rollouts" / f"step-{name}", fields, records)
    return path


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    first = [response(0, i, "correct" if i else "wrong") for i in range(4)]
    second = [response(1, 0, text=HOSTILE, uid=HOSTILE, gold={"target": 24}), response(1, 1, "fault", draw=1)]
    evals = [
        {"event": "eval", "time": 1001.0, "step": 0, "pass_at_1": 0.2, "ci95": [0.1, 0.3]},
        {"event": "eval", "time": 1030.0, "step": 2, "pass_at_1": 0.6, "ci95": [0.5, 0.7]},
    ]
    events = [evals[0], step_event(1), step_event(2), evals[1]]
    return write_run(tmp_path / "run", events, {"000001": first, "000002.0": second[:1], "000002.1": second[1:]})
