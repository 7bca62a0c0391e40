"""A change of a run, and when its journal is asked what was predicted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pekoe.config.recipes import RLConfig, load_config
from pekoe.plan.own import AFTER
from pekoe.run.outlook import Outlook
from tests.plan.test_own import CLUSTER, MACHINE, RECIPES, journal_of, truth


def test_what_came_of_a_lost_engine_stands_beside_what_was_predicted(tmp_path: Path):
    asked, outlook, found = truth(*CLUSTER), Outlook(), list[tuple[int, dict[str, object]]]()
    steps = journal_of(asked, 8) + journal_of(asked.changed(["cluster.generation.engines=2"]), 2 * AFTER, 9)
    with (tmp_path / "journal.jsonl").open("w") as journal:
        journal.write(json.dumps(MACHINE) + "\n")
        for step in steps:
            journal.write(json.dumps(step) + "\n")
            journal.flush()
            config = load_config(str(RECIPES / "boba-7b-cluster.toml"), CLUSTER, RLConfig)
            if event := outlook.after_step(config, tmp_path, step["num_engines"]):
                found.append((step["step"], event))
    assert [step for step, _ in found] == [9 + AFTER], "once, when enough steps are measured"
    event = found[0][1]
    assert event["changed"] == {"engines": [4, 2]}
    assert event["predicted_s"] == pytest.approx(event["measured_s"], rel=0.03)


def test_a_run_that_changes_nothing_has_no_forecast(tmp_path: Path):
    (tmp_path / "journal.jsonl").write_text(
        "".join(json.dumps(e) + "\n" for e in [MACHINE, *journal_of(truth(*CLUSTER))])
    )
    outlook, config = Outlook(), load_config(str(RECIPES / "boba-7b-cluster.toml"), CLUSTER, RLConfig)
    assert [outlook.after_step(config, tmp_path, 4) for _ in range(2 * AFTER)] == [None] * (2 * AFTER)
