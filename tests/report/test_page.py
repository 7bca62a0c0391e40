"""The report's page: what models wrote stays data, figures come from the journal, sentences from measurement."""

from __future__ import annotations

import json
import re
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from pekoe.report.findings import findings, utilisation
from pekoe.report.history import questions_of, read_history
from pekoe.report.live import LiveReport
from pekoe.report.page import render
from tests.report.conftest import HOSTILE, response, step_event, write_run


def data_of(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    assert found is not None
    return json.loads(found[1])


def test_the_page_holds_the_runs_figures_and_nothing_from_elsewhere(run_dir: Path):
    page = render([read_history(run_dir)])
    data = data_of(page)
    titles = [figure["layout"]["title"]["text"] for figure in data["charts"]]
    assert titles[:2] == ["pass@1 on held-out problems, 95 % intervals", "reward"]
    (reward,) = data["charts"][1]["data"]
    assert list(zip(reward["x"], reward["y"], strict=True)) == [(1, -4.0), (2, -3.0)]
    loss = data["charts"][titles.index("loss")]["data"][0]
    assert loss["y"] == [0.5, None]  # NaN
    assert "20.0% [10.0%, 30.0%] at step 0" in page
    assert "60.0% [50.0%, 70.0%] at step 2" in page
    assert {bar["name"] for bar in data["timeline"]["data"]} == {"rollout", "train", "sync"}
    own = page.replace(page[page.index('id="data"') : page.rindex("<script>")], "")  # without Plotly itself
    assert not re.search(r'(src|href)="', own)
    assert "default-src 'none'" in page


def test_a_run_that_went_wrong_is_shown_with_the_numbers_that_it_had(tmp_path: Path):
    nan, infinite = float("nan"), float("inf")
    wrong = dict.fromkeys(("loss", "grad_norm", "entropy", "reward", "clip_fraction", "approx_kl"), nan)
    wrong |= {"logprob_diff_max": infinite, "train_tokens_per_s": -infinite}
    lines = [
        response(0, 0, logprobs=[-infinite, nan]),
        response(0, 1, reward=nan, advantage=-infinite, logprobs=[infinite, -1.5, -0.25, -1.5]),
    ]
    events = [step_event(number, **wrong) for number in (1, 2)]
    run = write_run(tmp_path / "run", events, {"000001": lines})
    page = render([read_history(run, lambda tokens: "a")])
    first, second = data_of(page)["responses"]
    assert first["logprobs"] == ["-inf", "NaN"]
    assert second["logprobs"] == ["inf", -1.5, -0.25, -1.5]
    assert (second["reward"], second["advantage"]) == ("NaN", "-inf")
    assert findings(read_history(run))


def test_the_timeline_shows_which_version_engines_sample_with(tmp_path: Path):
    first = {"event": "sync", "time": 990.0, "step": 0, "sync_version": 0}
    steps = [step_event(i, sync_version=i) for i in (1, 2, 3)]
    timeline = data_of(render([read_history(write_run(tmp_path / "run", [first, *steps], {}))]))["timeline"]
    assert [bar["name"] for bar in timeline["data"]] == ["rollout", "train", "sync", "version"]
    bands = timeline["data"][-1]
    assert (bands["text"], bands["base"], bands["x"]) == (["v0", "v1", "v2"], [0, 10, 20], [10, 10, 10])
    assert timeline["layout"]["uniformtext"]["mode"] == "hide"  # a label that does not fit
    assert [(band["x0"], band["x1"]) for band in timeline["layout"]["shapes"]] == [(10, 20)]


def test_what_a_model_wrote_never_becomes_markup(run_dir: Path):
    page = render([read_history(run_dir)])
    assert HOSTILE not in page
    assert "<img src=x" not in page
    assert data_of(page)["responses"][4]["text"] == HOSTILE
    assert "out of memory" in page  # the FAULT is told


def test_two_runs_are_drawn_over_one_another(run_dir: Path, tmp_path: Path):
    other = write_run(tmp_path / "other", [step_event(1, reward=3.0)], {"000001": [response(0, 0)]})
    data = data_of(render([read_history(run_dir), read_history(other)]))
    reward = next(f for f in data["charts"] if f["layout"]["title"]["text"] == "reward")
    assert [(line["name"], line["y"]) for line in reward["data"]] == [("run", [-4.0, -3.0]), ("other", [3.0])]


def test_a_run_of_sft_has_no_responses(tmp_path: Path):
    event = {"event": "step", "time": 5.0, "step": 1, "loss": 0.5, "seconds": {"train": 2.0}, "num_microbatches": 1}
    run = write_run(tmp_path / "run", [event | {"train_tokens_per_s": 7.0}], {})
    page = render([read_history(run)])
    assert 'id="filters"' not in page
    assert "train 100%" in page
    assert "The training loss went from 0.5000 to 0.5000 (means of 1 step)." in page


def test_a_run_without_a_step_says_so(tmp_path: Path):
    assert "No step is finished yet.</li>" in render([read_history(write_run(tmp_path / "run", [], {}))])


def test_a_run_that_its_reward_stopped_says_why(run_dir: Path):
    (run_dir / "journal.jsonl").write_text("")
    page = render([read_history(run_dir)])
    assert "No step is finished yet. Rewards failed: " in page


def test_the_sentences_say_where_time_goes_and_what_would_help(run_dir: Path):
    learned, phases, numerics = findings(read_history(run_dir))
    assert learned.startswith("The run learned: pass@1 on held-out problems rose from 20.0% [10.0%, 30.0%] to 60.0%")
    assert phases == (
        "A step takes 10 s (median of 2): rollout 60%, train 30%, sync 10%. Most of it is rollout, at 100 tokens a "
        "second."
    )
    assert numerics == "Sampling and training log-probs differ by at most 1.0e-06."


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"truncation_rate": 0.5}, "50% of the last responses were cut"),
        ({"pass_rate": 1.0}, "little left to teach"),
        ({"skipped": "all advantages are 0"}, "Nothing was learned in the last step: all advantages are 0"),
        ({"fault_rate": 0.25}, "4 responses could not be judged (FAULT) and have no reward"),
        (
            {"idle_engines": 0.6, "idle_ranks": 0.4, "num_lost_engines": 2},
            "idle for 60% and a training process for 40% (medians); 2 engines were lost",
        ),
    ],
)
def test_problems_of_a_run_are_reported(tmp_path: Path, change: dict[str, Any], said: str):
    run = write_run(tmp_path / "run", [step_event(1, **change), step_event(2, **change)], {})
    assert any(said in sentence for sentence in findings(read_history(run)))


UP, DOWN = [0.3, 0.7] * 20, [0.2, 0.6] * 20


@pytest.mark.parametrize(
    ("after", "rates", "said"),
    [
        (
            0.6,
            None,
            "It is not shown that the run learned: pass@1 on 40 held-out problems went from 50.0% [40.0%, 60.0%] to "
            "60.0% [50.0%, 70.0%] at step 1; the difference, +10.0 points [-4.1, +24.1], may be chance (by the two "
            "intervals).",
        ),
        (0.8, None, "The run learned: pass@1 on 40 held-out problems rose from 50.0% [40.0%, 60.0%] to 80.0% [70.0%,"),
        (
            0.4,
            DOWN,
            "The run got worse: pass@1 on 40 held-out problems fell from 50.0% [40.0%, 60.0%] to 40.0% [30.0%,",
        ),
        (
            0.5,
            UP,
            "It is not shown that the run learned: pass@1 on 40 held-out problems went from 50.0% [40.0%, 60.0%]",
        ),
    ],
)
def test_the_first_sentence_says_whether_the_run_learned(
    tmp_path: Path, after: float, rates: list[float] | None, said: str
):
    first, last = (
        {"event": "eval", "time": 1.0, "step": i, "pass_at_1": rate, "ci95": [rate - 0.1, rate + 0.1]}
        | {"num_problems": 40, "data": "held_out.jsonl"}
        for i, rate in enumerate((0.5, after))
    )
    if rates is not None:
        first, last = first | {"rates": UP}, last | {"rates": rates}
    other = {"event": "eval", "time": 0.5, "step": 0, "pass_at_1": 0.0, "ci95": [0, 0.1], "data": "other.jsonl"}
    history = read_history(write_run(tmp_path / "run", [other, first, step_event(1), last], {}))
    assert findings(history)[0].startswith(said)
    if rates is not None:  # the same problems: each with itself
        assert "chance (paired over problems, p " in findings(history)[0]


def test_without_an_evaluation_it_says_what_is_not_known(tmp_path: Path):
    run = write_run(tmp_path / "run", [step_event(1), step_event(2)], {})
    assert findings(read_history(run))[0] == (
        "Whether the run learned is not measured on held-out problems: it needs eval.data and eval.every. Of the "
        "responses that it trains on, 25.0% were right in its first step and 50.0% in its last."
    )


def test_a_collapse_is_said_once_with_its_cause(tmp_path: Path):
    collapse = {"event": "collapse", "time": 1.0, "step": 2, "why": "no response is right and all are cut"}
    broken = step_event(2, truncation_rate=1.0)
    said = findings(read_history(write_run(tmp_path / "run", [step_event(1), broken, collapse], {})))
    assert said[1] == "Step 2: no response is right and all are cut."
    assert sum("cut" in sentence for sentence in said) == 1


def test_the_page_needs_no_source_to_be_read(run_dir: Path):
    page = render([read_history(run_dir)])
    data = data_of(page)
    for chart in data["charts"]:
        assert chart["layout"]["xaxis"]["title"]["text"] == "step"
        assert chart["layout"]["yaxis"]["title"]["text"]
    own = page.replace(page[page.index("<script>") : page.rindex("</script>")], "")  # without Plotly
    for word in ("Ledger", "(I1)", "ceiling", "draw 0", "utilisation", "canary"):
        assert word not in own
        assert word not in json.dumps(data)
    assert page.index("The run learned") < page.index("A step takes")


def test_groups_are_named_by_their_questions():
    chat = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n{}\nBox it.<|im_end|>\n<|im_start|>assistant\n"
    prompts = [chat.format("What is 1+6?"), chat.format("What is 2+6?\nThink.")]
    assert list(questions_of(prompts).values()) == ["What is 1+6?", "What is 2+6? Think."]
    assert questions_of([chat.format("What is 1+6?")])  # one prompt: nothing is known to be the same in all
    assert questions_of(["1+6=", "1+7="]) == {"1+6=": "1+6=", "1+7=": "1+7="}
    assert questions_of([]) == {}


def test_where_two_recipes_differ(tmp_path: Path):
    runs = [write_run(tmp_path / name / "rl", [step_event(1)], {}) for name in ("a", "b")]
    (runs[1] / "config.toml").write_text('num_steps = 2\n[model]\npath = "m"\n[optim]\nlr = 0.1\n', "utf-8")
    page = render([read_history(run) for run in runs])
    table = page[page.index("Where the recipes differ") : page.index("<h2>Curves")]
    assert re.findall(r"<td>(.*?)</td>", table) == ["train.token_budget", "20", "", "optim.lr", "", "0.1"]
    assert f"<th>{runs[0]}</th><th>{runs[1]}</th>" in table  # both are named "rl"
    assert "Where the recipes differ" not in render([read_history(runs[0])])


def test_a_forecast_of_the_journal_is_told(tmp_path: Path):
    forecast = {"event": "forecast", "time": 1021.0, "step": 2, "since": 1, "changed": {"engines": [2, 1]}}
    seconds = {"predicted_s": 12.0, "measured_s": 10.0, "before_s": 8.0}
    run = write_run(tmp_path / "run", [step_event(1), step_event(2), forecast | seconds], {})
    assert (
        "Since step 1 (engines 2 → 1) a step takes 10 s; predicted from the steps before, of 8 s: 12 s (+20%)."
        in findings(read_history(run))
    )


MACHINE = {"event": "machine", "time": 999.0, "flop_s": 1e9, "byte_s": 1e8, "versions": {"torch": "2.11.0"}}


def test_a_phase_is_measured_against_the_machine_that_ran_it(tmp_path: Path):
    work = {"rollout_flops": 3e8, "rollout_bytes": 4.8e8, "train_flops": 6e8, "train_bytes": 1e7}
    sharing = {"prefill_tokens": 10, "shared_tokens": 70, "cached_tokens": 20}
    run = write_run(tmp_path / "run", [MACHINE, *(step_event(i, **work, **sharing) for i in (1, 2))], {})
    history = read_history(run)
    said = findings(history)
    assert said[2] == (  # 6 s of rollout: 0.3 s of arithmetic, 4.8 s of memory
        "Sampling computes 0.1 GFLOP/s; at memory's 0 GB/s, measured here, it would take 80% of its time: memory "
        "bounds it; larger batches would help, little else."
    )
    assert said[3] == (  # 3 s of training: 0.6 s of arithmetic
        "Training computes 0.2 GFLOP/s; at a matrix product's 1 GFLOP/s, measured here, it would take 20% of its time: "
        "the rest goes to Python and small operations between the products, which more tokens a "
        "micro-batch would share."
    )
    assert said[4].startswith("Prefix sharing saved 90% of prefill: 180 of 200 tokens of context, 140 by a group's")
    page = render([history])
    found = {chart["layout"]["title"]["text"]: chart for chart in data_of(page)["charts"]}
    assert found["sampling, of the speed possible here"]["data"][0]["y"] == pytest.approx([0.8, 0.8])
    assert found["training, of the speed possible here"]["data"][0]["text"] == ["arithmetic"] * 2
    assert "<td>versions.torch</td><td>2.11.0</td>" in page


def test_a_run_that_goes_on_elsewhere_is_measured_there(tmp_path: Path):
    work = {"train_flops": 6e8, "train_bytes": 0.0}
    events = [MACHINE, step_event(1, **work), MACHINE | {"flop_s": 2e9}, step_event(2, **work)]
    used = utilisation(read_history(write_run(tmp_path / "run", events, {})), "train")
    assert [share for _, _, share, _ in used] == pytest.approx([0.2, 0.1])


def test_without_a_measured_machine_no_bound_is_reported(tmp_path: Path):
    cluster = {key: value for key, value in MACHINE.items() if key not in ("flop_s", "byte_s")}
    run = write_run(tmp_path / "run", [cluster, step_event(1, train_flops=6e8, train_bytes=1e7)], {})
    history = read_history(run)
    assert not any("GFLOP" in sentence for sentence in findings(history))
    assert not any(
        "speed possible here" in chart["layout"]["title"]["text"] for chart in data_of(render([history]))["charts"]
    )


def test_a_live_page_is_made_anew_when_the_run_grows(run_dir: Path):
    made: list[int] = []

    def page() -> str:
        made.append(1)
        return render([read_history(run_dir)], live=True)

    journal = run_dir / "journal.jsonl"
    server = LiveReport(page, [journal])
    threading.Thread(target=server.serve, daemon=True).start()
    try:
        assert server.url.startswith("http://127.0.0.1:")
        first = get(server.url)
        assert "connect-src 'self'" in first
        state = get(f"{server.url}state")
        get(server.url)
        assert len(made) == 1
        text = journal.read_text().removesuffix('{"torn')
        journal.write_text(f"{text}{json.dumps(step_event(3))}\n")
        assert get(f"{server.url}state") != state
        assert len(data_of(get(server.url))["charts"][1]["data"][0]["x"]) == 3
        assert len(made) == 2
        with pytest.raises(urllib.error.HTTPError, match="403"):  # another name that leads here
            get(server.url, {"Host": "evil.example:80"})
        with pytest.raises(urllib.error.HTTPError, match="404"):
            get(f"{server.url}../journal.jsonl")
    finally:
        server.close()


def get(url: str, headers: dict[str, str] | None = None) -> str:
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers or {}), timeout=10) as answer:
        return answer.read().decode()


def test_secrets_reach_no_report(run_dir: Path):
    with (run_dir / "config.toml").open("a") as file:
        file.write('[engine.server]\nurls = ["http://me:s3cret@host:1"]\nenv = { HF_TOKEN = "s3cret", A = "seen" }\n')
    page = render([read_history(run_dir)])
    assert "seen" in page
    assert "s3cret" not in page
