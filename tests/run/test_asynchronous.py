"""Sampling ahead of training: by which version each token is sampled, what is in flight, and bits that come again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from typer.testing import CliRunner

from pekoe.cli import app
from pekoe.config import RLConfig
from pekoe.core import Interrupted, RunError, UserError
from pekoe.core.journal import read_lines
from pekoe.core.progress import NoProgress
from pekoe.core.records import read_records, steps_recorded
from pekoe.core.types import Completion, Request
from pekoe.model import load_model, save_model
from pekoe.run import metrics, rl
from pekoe.run.build import RLParts
from pekoe.run.replay import replay_run
from tests.run.conftest import stop_after_responses

Build = Callable[..., RLConfig]
Train = Callable[..., None]

GO_ON = "rollout.during_update=go_on"


def weights_of(config: RLConfig) -> torch.Tensor:
    model = load_model(Path(config.run.dir) / "model")
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def events(config: RLConfig, kind: str) -> list[dict[str, Any]]:
    return [e for e in read_lines(Path(config.run.dir) / "journal.jsonl") if e["event"] == kind]


def versions_by_step(config: RLConfig) -> dict[int, set[int]]:
    run = Path(config.run.dir)
    return {
        step: {version for line in read_records(run, step) for version, _ in line["versions"]}
        for step in steps_recorded(run)
    }


def order_of_draws(config: RLConfig) -> list[tuple[str, int]]:
    return [(line["uid"], line["draw"]) for line in read_lines(Path(config.run.dir) / "ledger.jsonl")]


@pytest.mark.parametrize("lag", [1, 2])
def test_a_pinned_batch_is_sampled_by_one_version_and_comes_again_bit_by_bit(
    build: Build, train: Train, tmp_path: Path, lag: int
):
    runs = [build("num_steps=5", f"rollout.max_lag={lag}", f"run.dir={tmp_path / name}") for name in "ab"]
    for config in runs:
        train(config)
        assert versions_by_step(config) == {step: {max(0, step - 1 - lag)} for step in range(1, 6)}
        assert [step["lag_max"] for step in events(config, "step")] == [min(step, lag) for step in range(5)]
    assert torch.equal(*map(weights_of, runs))


def test_without_the_wait_a_batch_meets_a_later_version(build: Build, train: Train):
    """The test above can fail."""
    config = build("num_steps=5", "rollout.max_lag=1")

    def wait_for_nothing(parts: RLParts) -> None:
        rollouts: Any = parts.rollouts
        rollouts.drain = lambda: None
        hold_third_batch(rollouts._pool, parts)

    train(config, wait_for_nothing)
    assert versions_by_step(config)[3] == {2}, "and not {1}"


def hold_third_batch(pool: Any, parts: RLParts) -> None:
    """Have the engine get the second put, which version 1 should sample, when version 2 has come."""
    submit, publish, puts = pool.submit, parts.weights.publish, [0]
    held: list[tuple[Sequence[Request], list[Future[Completion]]]] = []

    def later(requests: Sequence[Request]) -> list[Future[Completion]]:
        puts[0] += 1
        if puts[0] != 2:
            return submit(requests)
        held.append((requests, [Future() for _ in requests]))
        return held[0][1]

    def published(version: int, wait: bool = True) -> Any:
        report = publish(version)
        if version == 2:
            for inner, outer in zip(submit(held[0][0]), held[0][1], strict=True):
                inner.add_done_callback(partial(lambda outer, done: outer.set_result(done.result()), outer))
        return report

    pool.submit, parts.weights.publish = later, published  # type: ignore[method-assign]


@pytest.mark.parametrize("lag", [1, 2, 4])
def test_in_flight_no_token_is_older_than_the_bound_and_the_order_is_that_of_draws(
    build: Build, train: Train, unbroken: Callable[..., RLConfig], lag: int
):
    synchronous = unbroken("num_steps=6")
    config = build("num_steps=6", f"rollout.max_lag={lag}", GO_ON)
    admitted: list[int] = []

    def count(parts: RLParts) -> None:
        rollouts: Any = parts.rollouts
        put, publish, num_put, latest = rollouts.put, parts.weights.publish, [0], [0]

        def counted(draws: Any, params: Any = None) -> None:
            put(draws, params)
            num_put[0] += len(draws)
            admitted.append(num_put[0] - (lag + latest[0] + 1) * config.rollout.prompts_per_step)

        def published(version: int, wait: bool = True) -> Any:
            latest[0] = version
            return publish(version, wait)

        rollouts.put, parts.weights.publish = counted, published  # type: ignore[method-assign]

    train(config, count)
    assert order_of_draws(config) == order_of_draws(synchronous)
    for step, versions in versions_by_step(config).items():
        assert step - 1 - max(versions) >= 0
        assert step - 1 - min(versions) <= lag
    assert max(step["lag_max"] for step in events(config, "step")) == lag
    assert max(admitted) <= 0, "accepted and running groups are at most (lag + version + 1) x prompts_per_step"


def test_one_group_too_many_breaks_the_bound(build: Build, train: Train, monkeypatch: pytest.MonkeyPatch):
    """The test above can fail."""
    config = build("num_steps=6", "rollout.max_lag=1", GO_ON)
    admit = rl.admit
    monkeypatch.setattr(rl, "admit", lambda parts, version: admit(parts, version + 1))
    train(config)
    assert max(step["lag_max"] for step in events(config, "step")) > 1


@pytest.mark.parametrize(
    ("lag", "words"),
    [(0, []), (2, []), (2, [GO_ON]), (2, [GO_ON, "rollout.window=6"]), (2, [GO_ON, "rollout.dynamic_rounds=2"])],
)
def test_training_again_from_the_records_gives_the_same_weights(build: Build, train: Train, lag: int, words: list[str]):
    config = build("num_steps=4", f"rollout.max_lag={lag}", *words)
    train(config)
    again = replay_run(Path(config.run.dir), NoProgress())
    assert again.same_weights is True
    assert again.differing == []
    assert 0 < max(again.logprob_diffs.values()) <= 1e-4, "I1, version by version"
    assert set(again.logprob_diffs) <= set(range(4))


def test_log_probs_are_compared_by_lag(build: Build, train: Train, tmp_path: Path):
    """I1 for the tokens of the step's own version; those of older versions differ by what was learned since."""
    config = build("num_steps=6", "rollout.max_lag=1", "optim.lr=0.01")
    train(config)
    first, *steps = events(config, "step")
    assert set(first["lag_logprob_diff_max"]) == {"0"}
    assert 0 < first["lag_logprob_diff"]["0"] < first["lag_logprob_diff_max"]["0"] <= 1e-4
    for step in steps:
        assert set(step["lag_logprob_diff_max"]) == set(step["lag_tokens"]) == {"1"}
        assert step["lag_logprob_diff_max"]["1"] > 1e-3
    synchronous = build("num_steps=2", f"run.dir={tmp_path / 'synchronous'}")
    train(synchronous)
    assert not any(name.startswith("lag_") for step in events(synchronous, "step") for name in step)


@pytest.mark.parametrize("words", [[], ["algo.proximal=engine"], ["rollout.window=6"]])
def test_in_flight_the_tokens_of_the_newest_version_have_the_trainers_log_probs(
    build: Build, train: Train, words: list[str]
):
    config = build("num_steps=6", "rollout.max_lag=2", "optim.lr=0.01", GO_ON, *words)
    train(config)
    steps = [step for step in events(config, "step") if "loss" in step]
    newest = [step["lag_logprob_diff_max"]["0"] for step in steps if "0" in step["lag_logprob_diff_max"]]
    assert newest
    assert 0 < max(newest) <= 1e-4
    if not words:  # every token trained on
        assert all(set(step["lag_logprob_diff_max"]) <= set(step["lag_tokens"]) for step in steps)


def test_an_engine_with_other_log_probs_is_warned_of_with_lag(build: Build, train: Train, monkeypatch: Any):
    monkeypatch.setattr(metrics, "MAX_LOGPROB_DIFF", {"float32": 1e-9})
    said: list[str] = []
    view = NoProgress()
    monkeypatch.setattr(view, "say", said.append, raising=False)
    train(build("num_steps=1", "rollout.max_lag=1"), lambda _: None, view)
    assert any("log-probs of sampling and training differ by up to" in line for line in said)


def test_the_command_trains_the_whole_run_again(build: Build, train: Train):
    config = build("num_steps=2", "rollout.max_lag=1")
    train(config)
    done = CliRunner().invoke(app, ["rl", "--replay", config.run.dir])
    assert done.exit_code == 0, done.output
    assert "2 steps trained again from saved rollouts: all with the loss of the run; the same weights" in done.output
    model = load_model(Path(config.run.dir) / "model")
    next(model.parameters()).data[0] += 1e-3
    save_model(model, Path(config.run.dir) / "model")
    done = CliRunner().invoke(app, ["rl", "--replay", config.run.dir])
    assert done.exit_code == 1
    assert "other weights" in done.output


@pytest.fixture(scope="module")
def known() -> dict[str, RLConfig]:
    return {}


@pytest.fixture
def unbroken(
    build: Build, train: Train, known: dict[str, RLConfig], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., RLConfig]:
    """unbroken(*words): the config of a run with these that ended, of which there is one for all tests."""

    def make(*words: str) -> RLConfig:
        key = " ".join(words)
        if key not in known:
            known[key] = build(*words, f"run.dir={tmp_path_factory.mktemp('unbroken') / 'run'}")
            train(known[key])
        return known[key]

    return make


@pytest.mark.parametrize("stop_after", [0, 10, 30, 50, 70])
@pytest.mark.parametrize("lag", [1, 2])
def test_a_pinned_run_that_was_stopped_goes_on_to_the_same_bits(
    build: Build, train: Train, tmp_path: Path, stop_after: int, lag: int
):
    words = "num_steps=6", f"rollout.max_lag={lag}", "train.save_every=2"
    whole = build(*words, f"run.dir={tmp_path / 'whole'}")
    train(whole)
    broken = build(*words, f"run.dir={tmp_path / 'broken'}")
    with pytest.raises(Interrupted, match="run the same command again"):
        train(broken, stop_after_responses(stop_after))
    train(broken)
    assert torch.equal(weights_of(broken), weights_of(whole))
    assert order_of_draws(broken) == order_of_draws(whole)
    assert versions_by_step(broken) == versions_by_step(whole)


@pytest.mark.parametrize("words", [[], [GO_ON]])
def test_a_stale_engine_stops_a_run_that_does_not_wait_for_it(build: Build, train: Train, words: list[str]):
    """I4 where training goes on while weights are loaded."""

    def make_stale(parts: RLParts) -> None:
        engine = cast(Any, parts.rollouts)._pool.members[0].engine
        first, update = load_model(parts.config.model.path), engine.update_weights
        engine.update_weights = lambda source, version: update(first, version)  # pyright: ignore[reportUnknownLambdaType]

    with pytest.raises(RunError, match="weight sync: expected the embedded engine at version 1"):
        train(build("num_steps=4", "rollout.max_lag=1", "optim.lr=0.3", *words), make_stale)


def test_the_last_publish_is_in_the_journal_too(build: Build, train: Train):
    config = build("num_steps=3", "rollout.max_lag=1")
    train(config)
    proven = [event["sync_version"] for kind in ("sync", "step") for event in events(config, kind)]
    assert sorted(proven) == [0, 0, 1, 2, 3]
    syncs, steps = events(config, "sync"), events(config, "step")
    proven_at = [event["sync_time"] for event in [*steps[1:], syncs[-1]]]  # the first report is of a publish waited for
    assert all(
        step["time"] - 1 < at <= after["time"]
        for step, at, after in zip(steps, proven_at, [*steps[1:], syncs[-1]], strict=True)
    )
    assert not any("sync_time" in event for event in (syncs[0], steps[0]))


SERVERS = ["engine.server.urls=['http://127.0.0.1:1']"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([GO_ON], "rollout.during_update: expected 'wait' with rollout.max_lag = 0"),
        (["rollout.max_lag=1", "rollout.window=2"], "rollout.window: expected 1 with rollout.during_update = 'wait'"),
        (["rollout.max_lag=1", "rollout.dynamic_rounds=1"], "rollout.dynamic_rounds: expected 0 with rollout.max_lag"),
        (["rollout.max_lag=1", "cluster.colocate=true"], "rollout.max_lag: expected 0 with cluster.colocate"),
        (
            ["rollout.max_lag=1", GO_ON, "engine.backend=vllm", *SERVERS, "engine.server.during_update=abort"],
            "engine.server.during_update: expected 'keep' with rollout.during_update = 'go_on'",
        ),
    ],
)
def test_schedules_that_make_no_sense_are_refused(build: Build, words: list[str], message: str):
    with pytest.raises(UserError, match=message):
        build(*words)


def test_with_lag_a_correction_is_the_default(build: Build):
    assert build().algo.proximal == "engine"
    lagging = build("rollout.max_lag=1").algo
    assert (lagging.proximal, lagging.correction) == ("recompute", "truncate")
    own = build("rollout.max_lag=1", "algo.correction=mask_token").algo
    assert (own.proximal, own.correction) == ("recompute", "mask_token")
    without = build("rollout.max_lag=1", "algo.proximal=engine").algo
    assert (without.proximal, without.correction) == ("engine", "off")
