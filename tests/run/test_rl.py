"""The loop: what it writes, how it stops and goes on, and that its parts change what they should."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pekoe.config import RLConfig
from pekoe.core import Interrupted, RunError, UserError
from pekoe.core.journal import read_lines
from pekoe.core.records import read_records
from pekoe.core.types import Draw, SamplingParams, Verdict
from pekoe.engine import EmbeddedEngine
from pekoe.model import load_model
from pekoe.run.build import RLParts
from tests.run.conftest import Messages, stop_after_responses

Build = Callable[..., RLConfig]
Train = Callable[..., None]


def steps_of(config: RLConfig) -> list[dict[str, Any]]:
    return [e for e in read_lines(Path(config.run.dir) / "journal.jsonl") if e["event"] == "step"]


def engine_of(parts: RLParts) -> Any:
    rollouts: Any = parts.rollouts
    return rollouts._pool.members[0].engine


def weights_of(config: RLConfig) -> torch.Tensor:
    model = load_model(Path(config.run.dir) / "model")
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_a_run_leaves_what_the_design_says(build: Build, train: Train):
    config = build()
    train(config)
    run = Path(config.run.dir)
    steps = steps_of(config)
    assert [step["step"] for step in steps] == [1, 2, 3]
    for step in steps:
        assert step["num_rollouts"] == 16
        assert step["logprob_diff_max"] <= 1e-4  # I1, on the very run
        assert step["sync_canary_diff"] <= 1e-4
        assert {"rollout", "verify", "train", "sync"} <= set(step["seconds"])
    assert [p.name for p in sorted((run / "checkpoints").iterdir())] == ["step-000002", "step-000003"]
    lines = read_records(run, 2)
    assert len(lines) == 16
    for line in lines:
        assert len(line["tokens"]) == len(line["logprobs"])
        assert line["versions"] == [[1, 0]]
        assert line["reward"] == (5.0 if line["label"] == "correct" else -5.0)
        assert line["advantage"] is not None
        assert (line["advantage"] > 0) == (line["label"] == "correct")


OWN_METRICS = """
def answers(groups):
    return {"answers": len(groups), "longest": max(t.num_tokens for g in groups for t in g.trajectories)}

def taken(groups):
    return {"reward": 1}

def broken(groups):
    return {"x": 1 / 0}
"""


def test_metrics_of_the_users_own_are_journalled(
    build: Build, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "own_metrics.py").write_text(OWN_METRICS)
    monkeypatch.chdir(tmp_path)
    names = ", ".join(f'"own_metrics:{name}"' for name in ("answers", "taken", "broken"))
    config, view = build("num_steps=1", f"track.metrics=[{names}]"), Messages()
    train(config, view=view)
    (step,) = steps_of(config)
    assert (step["answers"], step["longest"]) == (4.0, step["response_tokens_max"])
    assert "x" not in step
    warnings = [line for line in view.said if "track.metrics" in line]
    assert warnings == [
        """warning: track.metrics: own_metrics:taken: ValueError('expected names of its own, got reward')""",
        """warning: track.metrics: own_metrics:broken: ZeroDivisionError('division by zero')""",
    ]


@pytest.mark.parametrize("word", ["algo.advantage=own_absent:f", 'track.metrics=["own_absent:f"]'])
def test_a_function_that_is_absent_is_found_before_the_run(build: Build, train: Train, word: str):
    config = build(word)
    with pytest.raises(UserError, match=r"expected a module that Python can import, got own_absent"):
        train(config)
    assert not Path(config.run.dir).exists()


def test_a_collapse_is_said_at_once_and_once(build: Build, train: Train, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        "pekoe.run.rl.collapse_of",
        lambda metrics, _, was_well: f"was well: {was_well}" if metrics["step"] > 1 else None,
    )
    well = iter([True, False, False])
    monkeypatch.setattr("pekoe.run.rl.looks_well", lambda _: next(well, False))
    for steps in (3, 4):  # the second goes on
        config = build(f"num_steps={steps}")
        train(config)
        events = list(read_lines(Path(config.run.dir) / "journal.jsonl"))
        assert [(e["step"], e["why"]) for e in events if e["event"] == "collapse"] == [(2, "was well: True")]


def test_the_ledger_accounts_for_every_prompt_drawn(build: Build, train: Train):
    config = build("num_steps=9")  # 36 draws of 18 problems: two epochs
    train(config)
    lines = list(read_lines(Path(config.run.dir) / "ledger.jsonl"))
    drawn = [(line["uid"], line["draw"]) for line in lines]
    assert len(drawn) == len(set(drawn)) == 36
    assert {draw for _, draw in drawn} == {0, 1}
    assert all(line["outcome"] == "trained" for line in lines)


@pytest.mark.parametrize("stop_after", [0, 3, 20, 40])
def test_ctrl_c_keeps_the_last_step_and_the_resumed_run_has_the_same_bits(
    build: Build, train: Train, tmp_path: Path, stop_after: int
):
    unbroken = build("num_steps=4", f"run.dir={tmp_path / 'unbroken'}")
    train(unbroken)
    broken = build("num_steps=4", f"run.dir={tmp_path / 'broken'}")
    with pytest.raises(Interrupted, match="run the same command again"):
        train(broken, stop_after_responses(stop_after))
    train(broken)
    assert torch.equal(weights_of(broken), weights_of(unbroken))
    for name in ("journal.jsonl", "ledger.jsonl"):
        a, b = (
            [
                {k: v for k, v in event.items() if not k.endswith(("_s", "time", "seconds", "peak_bytes"))}
                for event in read_lines(Path(config.run.dir) / name)
                if event.get("event") not in ("machine", "resumed", "sync", "checkpoint")  # each start has its own
            ]
            for config in (unbroken, broken)
        )
        assert a == b


def test_a_crash_goes_back_to_the_checkpoint_and_sets_later_lines_aside(build: Build, train: Train, tmp_path: Path):
    unbroken = build("num_steps=4", f"run.dir={tmp_path / 'unbroken'}")
    train(unbroken)
    broken = build("num_steps=4", f"run.dir={tmp_path / 'broken'}")

    def crash(parts: RLParts) -> None:
        step, calls = parts.trainer.step, []

        def counted(*args: Any, **more: Any):
            calls.append(1)
            if len(calls) > 13:  # step 4, second minibatch: step 3 is journalled, the checkpoint is of step 2
                raise RuntimeError("crash")
            return step(*args, **more)

        parts.trainer.step = counted  # type: ignore[method-assign]

    with pytest.raises(RuntimeError, match="crash"):
        train(broken, crash)
    assert len(steps_of(broken)) == 3
    train(broken)
    assert torch.equal(weights_of(broken), weights_of(unbroken))
    discarded = Path(broken.run.dir) / "discarded"
    assert [e["step"] for e in read_lines(discarded / "journal.jsonl") if e["event"] == "step"] == [3]
    assert {"step-000003.jsonl.zst", "step-000003.npz.zst"} <= {path.name for path in discarded.iterdir()}
    assert [s["step"] for s in steps_of(broken)] == [1, 2, 3, 4]


@pytest.mark.parametrize("lag", ["rollout.max_lag=0", "rollout.max_lag=1"])
def test_a_run_that_ends_by_an_error_keeps_the_last_step(build: Build, train: Train, tmp_path: Path, lag: str):
    unbroken = build("num_steps=4", lag, f"run.dir={tmp_path / 'unbroken'}")
    train(unbroken)
    broken = build("num_steps=4", lag, "train.save_every=9", f"run.dir={tmp_path / 'broken'}")

    def fail(parts: RLParts) -> None:
        """The judge breaks as step 4 is taken."""
        rollouts: Any = parts.rollouts
        take, taken = rollouts.take, count(1)

        def counted(n: int) -> Any:
            if next(taken) == 4:
                raise RunError("the judge is gone")
            return take(n)

        rollouts.take = counted

    view = Messages()
    with pytest.raises(RunError, match="the judge is gone"):
        train(broken, fail, view)
    assert any("step 3 is saved; the same command goes on from there" in text for text in view.said)
    assert [path.name for path in (Path(broken.run.dir) / "checkpoints").iterdir()] == ["step-000003"]
    train(broken)
    assert torch.equal(weights_of(broken), weights_of(unbroken))
    assert [step["step"] for step in steps_of(broken)] == [1, 2, 3, 4]


@pytest.mark.parametrize("saves", [True, False])
def test_the_last_step_is_saved_before_the_responses_of_faults_are_written(
    build: Build, train: Train, monkeypatch: pytest.MonkeyPatch, saves: bool
):
    """A cluster's stores drop what they write, and with a lag the step in hand was in flight at the last."""
    config, checked, written = build("num_steps=4", "rollout.max_lag=1", "train.save_every=9"), count(1), set[int]()

    def faulty(*_: object) -> float:
        if next(checked) == 4:
            raise RunError("verifier: all are FAULT")
        return 0.0

    def drop(parts: RLParts) -> None:
        records: Any = parts.records
        write, fetch = records.write, records.fetch

        def drops(step: int, lines: Any) -> None:
            written.add(step)
            write(step, lines)

        def fetches(groups: Any) -> Any:
            if not saves or 4 in written:
                raise RunError("tokens from their store: KeyError")
            return fetch(groups)

        records.write, records.fetch = drops, fetches

    monkeypatch.setattr("pekoe.run.rl.check_faults", faulty)
    view, run = Messages(), Path(config.run.dir)
    with pytest.raises(RunError, match="all are FAULT"):
        train(config, drop, view)
    assert len(read_records(run, 4)) == 16
    if saves:
        assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000003"]
    else:
        assert "step 3 could not be saved: tokens from their store: KeyError" in view.said


def test_another_recipe_in_the_same_directory_is_refused(build: Build, train: Train):
    train(build("num_steps=1"))
    with pytest.raises(UserError, match=r"holds a run with algo.clip_high = 0.2, got 0.5"):
        train(build("num_steps=1", "algo.clip_high=0.5"))
    train(build("num_steps=2"))  # longer is the same run
    assert [s["step"] for s in steps_of(build())] == [1, 2]


def test_i4_a_stale_engine_stops_the_run(build: Build, train: Train):
    def make_stale(parts: RLParts) -> None:
        engine = engine_of(parts)
        copy = load_model(parts.config.model.path)
        update = engine.update_weights
        engine.update_weights = lambda source, version: update(copy, version)  # keeps the first version's weights

    with pytest.raises(RunError, match="weight sync: expected the embedded engine at version 1"):
        train(build("optim.lr=0.3"), make_stale)


def test_i4_a_cache_that_outlives_its_weights_stops_the_run(build: Build, train: Train):
    def keep_caches(parts: RLParts) -> None:
        engine_of(parts)._scheduler.cache.flush = lambda: None

    # prompts are 5 tokens, blocks of 2: the canary's first blocks are found in the stale cache
    with pytest.raises(RunError, match="weight sync"):
        train(build("optim.lr=0.02", "engine.block_tokens=2"), keep_caches)


def test_faults_above_the_bound_stop_the_run(build: Build, train: Train, monkeypatch: pytest.MonkeyPatch):
    def all_faults(parts: RLParts) -> None:
        def submit(*_: object) -> Future[Verdict]:
            future: Future[Verdict] = Future()
            future.set_result(Verdict("fault", None, "the judge is broken"))
            return future

        rollouts: Any = parts.rollouts
        monkeypatch.setattr(rollouts._judge, "submit", submit)

    with pytest.raises(RunError, match=r"16 of 16 verdicts are FAULT .* the judge is broken"):
        train(build(), all_faults)


def test_no_gain_no_step(build: Build, train: Train):
    """All rewards equal: no optimizer step is made, and the journal says so."""
    config = build("verify.random=false", "num_steps=1")
    before = load_model(config.model.path)
    train(config)
    (step,) = steps_of(config)
    assert step["skipped"] == "all rewards are equal"
    assert step["pass_rate"] == 0
    assert torch.equal(weights_of(config), torch.cat([p.detach().flatten() for p in before.parameters()]))
    assert {line["outcome"] for line in read_lines(Path(config.run.dir) / "ledger.jsonl")} == {"dropped"}


@pytest.mark.parametrize(
    "option",
    [
        "algo.advantage=grpo",
        "algo.advantage=dr_grpo",
        "algo.advantage=rloo",
        "algo.proximal=recompute",
        "algo.kl=0.1",
        "algo.mask_truncated=true",
        "algo.normalise=max_length",
        "algo.clip_high=0.28",
        "rollout.temperature=0.8",
        "algo.reward=1.0",
        "algo.reward_wrong=0.0",
        "algo.overlong_tokens=6",
    ],
)
def test_options_run(build: Build, train: Train, option: str):
    config = build("num_steps=2", option)
    train(config)
    steps = steps_of(config)
    assert np.isfinite([step["loss"] for step in steps if "loss" in step]).all()
    assert ("reference_kl" in steps[0]) == (option == "algo.kl=0.1")
    assert ("recompute" in steps[0]["seconds"]) == (option == "algo.proximal=recompute")
    assert steps[0]["logprob_diff_max"] <= 1e-4
    if option == "algo.kl=0.1":
        assert steps[0]["reference_kl"] < steps[1]["reference_kl"]


def test_dynamic_sampling_draws_again_for_groups_that_teach_nothing(build: Build, train: Train):
    config = build("num_steps=2", "rollout.samples_per_prompt=2", "rollout.dynamic_rounds=3")
    train(config)
    steps = steps_of(config)
    assert any(step["num_prompts"] > 4 for step in steps)
    lines = list(read_lines(Path(config.run.dir) / "ledger.jsonl"))
    reasons = {line["reason"] for line in lines if line["outcome"] == "dropped"}
    assert reasons <= {"dynamic sampling: all right", "dynamic sampling: none right"}
    assert sum(line["outcome"] == "trained" for line in lines) <= 8


@pytest.mark.parametrize("after", [0, 2])
def test_stopped_during_an_evaluation_the_resumed_run_measures_and_has_the_same_bits(
    build: Build, train: Train, tiny_dir: Path, tmp_path: Path, after: int
):
    words = ["num_steps=3", f"eval.data={tiny_dir / 'held_out.jsonl'}", "eval.every=2", "eval.samples=2"]
    unbroken = build(*words, f"run.dir={tmp_path / 'unbroken'}")
    train(unbroken)
    broken = build(*words, f"run.dir={tmp_path / 'broken'}")

    def stop_in_evaluation(parts: RLParts) -> None:
        rollouts: Any = parts.eval_rollouts
        put = rollouts.put

        def watched(draws: Sequence[Draw], params: SamplingParams | None = None) -> None:
            rollouts._stop.requested = params is not None and engine_of(parts).version == after
            put(draws, params)

        rollouts.put = watched

    with pytest.raises(Interrupted, match=f"stopped after step {after} of 3"):
        train(broken, stop_in_evaluation)
    train(broken)
    assert torch.equal(weights_of(broken), weights_of(unbroken))
    measured = [
        [
            (e["step"], e["response_tokens"])
            for e in read_lines(Path(c.run.dir) / "journal.jsonl")
            if e["event"] == "eval"
        ]
        for c in (unbroken, broken)
    ]
    assert measured[0] == measured[1]
    assert [step for step, _ in measured[0]] == [0, 2]


def test_killed_between_the_rollouts_file_and_the_ledger(build: Build, train: Train):
    """Nothing was journalled after the checkpoint, but a rollouts file stands: twice over, and nothing is lost."""
    config = build("num_steps=1")
    train(config)
    rollouts = Path(config.run.dir) / "rollouts"
    for _ in range(2):
        (rollouts / "step-000002.jsonl.zst").write_bytes(b"half")
        train(config)
    aside = sorted(p.name for p in (Path(config.run.dir) / "discarded").iterdir() if p.name.startswith("step"))
    assert aside == ["step-000002.jsonl.zst", "step-000002.jsonl.zst.1"]


def test_two_processes_cannot_share_a_run_directory(build: Build, train: Train):
    config = build("num_steps=1")
    with pytest.raises(UserError, match="another process is running here"):
        train(config, lambda _: train(config))


def test_a_group_all_truncated_and_masked_is_dropped_in_the_ledger(build: Build, train: Train):
    config = build("num_steps=1", "algo.mask_truncated=true", "rollout.max_new_tokens=2")
    train(config)
    lines = list(read_lines(Path(config.run.dir) / "ledger.jsonl"))
    assert all("mask_truncated" in line["reason"] for line in lines if line["outcome"] == "dropped")
    assert any(line["outcome"] == "dropped" for line in lines)


def test_evaluation_before_and_in_the_middle(build: Build, train: Train, tiny_dir: Path):
    config = build("num_steps=2", f"eval.data={tiny_dir / 'held_out.jsonl'}", "eval.every=2", "eval.samples=2")
    train(config)
    events = list(read_lines(Path(config.run.dir) / "journal.jsonl"))
    before, measured = (event for event in events if event["event"] == "eval")
    assert [before["step"], measured["step"]] == [0, 2]
    assert measured["num_problems"] == 7


def test_a_run_directory_may_be_moved(build: Build, train: Train, tmp_path: Path):
    train(build("num_steps=1", f"run.dir={tmp_path / 'here'}"))
    (tmp_path / "here").rename(tmp_path / "there")
    moved = build("num_steps=2", f"run.dir={tmp_path / 'there'}")
    train(moved)
    assert [s["step"] for s in steps_of(moved)] == [1, 2]


def test_taking_turns_on_a_device_changes_no_bit(build: Build, train: Train, monkeypatch: pytest.MonkeyPatch):
    """As on a GPU: before each step of training the engine gives KV and copies of weights back."""
    train(build("num_steps=3", "run.dir='{}'".format(build().run.dir + "-plain")))
    given_back: list[int] = []

    def offload(engine: EmbeddedEngine) -> None:
        before = engine.kv_bytes
        plain(engine)
        given_back.append(before - engine.kv_bytes)

    plain = EmbeddedEngine.offload
    monkeypatch.setattr(EmbeddedEngine, "offload", offload)
    monkeypatch.setattr("pekoe.run.build.takes_turns", lambda *_: True)
    config = build("num_steps=3")
    train(config)
    assert len(given_back) == 3
    assert min(given_back) > 0
    ours, theirs = (Path(path) / "model" / "model.safetensors" for path in (config.run.dir, f"{config.run.dir}-plain"))
    assert ours.read_bytes() == theirs.read_bytes()
