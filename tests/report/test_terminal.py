"""The live view: what it shows of a step, wide, narrow and piped."""

import io
import re
from typing import Any

import pytest
from rich.console import Console, ConsoleDimensions

from pekoe.core.progress import ProgressReporter, phase
from pekoe.report import LiveProgress, PlainProgress, make_progress
from pekoe.report.terminal import _Phase, cells

STEP: dict[str, Any] = {
    "event": "step",
    "step": 7,
    "reward": 1.25,
    "pass_rate": 0.625,
    "response_tokens": 41.5,
    "truncation_rate": 0.01,
    "entropy": 0.2,
    "clip_fraction": 0.03,
    "logprob_diff_max": 2e-5,
    "rollout_tokens_per_s": 14000.0,
    "train_tokens_per_s": 9000.0,
    "seconds": {"rollout": 0.8, "train": 1.2, "sync": 0.01},
}


def console(width: int, terminal: bool) -> Console:
    # An environment of its own: with TERM=dumb, as in CI, rich takes every terminal for 80 columns wide.
    environment = {"TERM": "xterm"}
    return Console(file=io.StringIO(), width=width, force_terminal=terminal, color_system=None, _environ=environment)


def printed(c: Console) -> str:
    assert isinstance(c.file, io.StringIO)
    return c.file.getvalue()


def test_cells_leave_out_what_was_not_measured():
    row = cells(STEP)
    assert row["pass"] == "62.5%"
    assert row["reward"] == "+1.25"
    assert row["rollout tok/s"] == "14.0k"
    assert row["seconds"] == "rollout 0.8 train 1.2"
    assert "loss" not in row


def test_a_pipe_gets_plain_lines():
    c = console(80, terminal=False)
    view = make_progress(c)
    assert isinstance(view, PlainProgress)
    with phase(view, "rollout", 4):
        view.advance()
    view.event(STEP)
    view.event({"event": "step", "step": 8, "skipped": "all advantages are 0"})
    view.event({"event": "resumed", "step": 6})
    measured = {"step": 9, "pass_at_1": 0.5, "ci95": [0.4, 0.6], "num_problems": 10, "samples_per_problem": 1}
    view.event({"event": "eval", **measured})
    view.event(STEP | {"step": 9})
    lines = printed(c).splitlines()
    assert "step 7" in lines[0]
    assert "pass 62.5%" in lines[0]
    assert "skipped: all advantages are 0" in lines[1]
    assert "resumed after step 6" in lines[2]
    assert lines[3] == "step 9: pass@1 50.0% [40.0%, 60.0%] on 10 held-out problems x 1 sample"
    assert "step 9" in lines[4]  # every step has its line, however short steps are
    assert "\x1b" not in printed(c)


def test_a_pipe_gets_lines_on_long_phases(monkeypatch: pytest.MonkeyPatch):
    now = [0.0]
    monkeypatch.setattr("pekoe.report.terminal.time.monotonic", lambda: now[0])
    c = console(80, terminal=False)
    view = make_progress(c)
    with phase(view, "steps", 100, done=40):
        for _ in range(2):
            with phase(view, "rollout", 300):
                for _ in range(50):
                    now[0] += 1
                    view.advance(2)
            now[0] += 10
            view.advance()
    with phase(view, "short", 10):
        view.advance(10)
    assert printed(c).splitlines() == [
        "rollout: 60 of 300, 2.0/s, about 0:02:00 left",
        "steps: 41 of 100, 60.0 s each, about 0:59:00 left",
        "rollout: 60 of 300, 2.0/s, about 0:02:00 left",
        "steps: 42 of 100, 60.0 s each, about 0:58:00 left",
    ]


@pytest.mark.parametrize(
    ("at_once", "lengths", "at", "expected"),
    [
        # All at once, each 50 to 100 s long: one by one it would be 12 s for each that is done, 1,080 s.
        (100, [50 + i / 2 for i in range(100)], 10, "0:00:45"),  # the longest possible takes 100 s
        # Four at a time, 10 s each: of 88 left, 84 wait; then four, which may not end together.
        (4, [10.0 * (1 + i // 4) for i in range(100)], 12, "0:03:51"),
        (1, [10.0 * (1 + i) for i in range(100)], 10, "0:15:00"),
    ],
)
def test_the_time_left_knows_how_engines_finish(
    monkeypatch: pytest.MonkeyPatch, at_once: int, lengths: list[float], at: int, expected: str
):
    now = [0.0]
    monkeypatch.setattr("pekoe.report.terminal.time.monotonic", lambda: now[0])
    state = _Phase("rollout", len(lengths), 0, at_once)
    assert state.left() is None
    for end in lengths[:at]:
        now[0] = end
        state.advance(1, min(end, 100) / 100 if at_once > 4 else 0.1)
    assert str(state.left()) == expected
    for end in lengths[at:]:
        now[0] = end
        state.advance(1, min(end, 100) / 100 if at_once > 4 else 0.1)
    assert str(state.left()) == "0:00:00"


def test_the_time_left_of_work_that_slowed_down_is_not_none(monkeypatch: pytest.MonkeyPatch):
    now = [0.0]
    monkeypatch.setattr("pekoe.report.terminal.time.monotonic", lambda: now[0])
    state = _Phase("rollout", 100, 0, 100)
    for end in range(50, 60):  # the longest would take 100 s, if the speed stayed
        now[0] = float(end)
        state.advance(1, end / 100)
    now[0] = 300.0  # and none has ended since
    left = state.left()
    assert left is not None
    assert left.total_seconds() > 300


def test_a_terminal_shows_the_time_left_of_the_whole_run(monkeypatch: pytest.MonkeyPatch):
    now = [0.0]
    monkeypatch.setattr("pekoe.report.terminal.time.monotonic", lambda: now[0])
    c = Console(file=io.StringIO(), width=100, force_terminal=True, get_time=lambda: now[0], _environ={"TERM": "xterm"})
    view = LiveProgress(c)
    with view, phase(view, "steps", 100, done=40):
        for _ in range(3):
            now[0] += 1000  # a step takes longer than bars look back by default
            view.advance()
        with phase(view, "servers"):
            now[0] += 7
            view.say("drawn")
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", printed(c))
    assert re.search(r"steps .* 43/100 .* 15:49:53", text)  # 57 steps of 1,000 s each, 7 s ago
    assert "0:00:07" in text


def test_a_terminal_gets_a_table_however_narrow():
    for width in (200, 60, 20):
        c = console(width, terminal=True)
        view = make_progress(c)
        assert isinstance(view, LiveProgress)
        with view:
            follow(view)
        text = printed(c)
        assert "step" in text
        assert "reward" in text
        assert ("train tok/s" in text) == (width == 200)
        assert "…" not in text or width == 20


def test_a_terminal_that_cannot_be_drawn_on_gets_plain_lines():
    c = Console(file=io.StringIO(), force_terminal=True, _environ={"TERM": "dumb"})
    assert isinstance(make_progress(c), PlainProgress)


@pytest.mark.parametrize("environment", [{"NO_COLOR": "1"}, {}])
def test_no_colour_where_none_is_wanted(environment: dict[str, str]):
    c = Console(file=io.StringIO(), width=100, force_terminal=True, _environ={"TERM": "xterm-256color", **environment})
    view = make_progress(c)
    assert isinstance(view, LiveProgress)
    with view, phase(view, "rollout", 4):
        view.advance(3)
        view.say("drawn again below this")
    coloured = re.search(r"\x1b\[[0-9;]*(3[0-7]|38;5|9[0-7])[0-9;]*m", printed(c))
    assert bool(coloured) == (not environment)


def test_a_terminal_that_is_resized_while_a_phase_goes_on():
    environment = {"TERM": "xterm", "COLUMNS": "160"}
    c = Console(file=io.StringIO(), force_terminal=True, color_system=None, _environ=environment)
    view = LiveProgress(c)
    with view:
        for width in (160, 40, 9, 120):
            c.size = ConsoleDimensions(width, 24)
            follow(view)
    header, *_, last = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", printed(c)).splitlines()[-5:]  # four steps were told
    assert "62.5%" in last
    assert "reward" in header
    assert max(len(header), len(last)) <= 120


def follow(view: ProgressReporter) -> None:
    view.event(STEP)
    with phase(view, "rollout", 4):
        view.advance(3)
        with phase(view, "inner"):
            view.advance()
    view.say("[not markup]")
    view.end()  # one too many does no harm
