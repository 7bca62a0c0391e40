"""Invariant I9: whose fault a limit is. With real bombs, and with workers that misbehave."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from pekoe.core.errors import RunError
from pekoe.verify import JudgePool
from pekoe.verify import pool as pool_module

from .conftest import READY, BadWorker, wait_until, worker_pids

SLOW = "9^{9^{9^9}}"  # never comes back


def boxed(answer: str) -> str:
    return rf"\boxed{{{answer}}}"


@pytest.mark.parametrize(
    ("answer", "limit"),
    [
        (SLOW, "time"),
        pytest.param("1+" * 4000 + "1", "recursion", marks=pytest.mark.slow),
        pytest.param("(" * 1000 + "7" + ")" * 1000, "time", marks=pytest.mark.slow),
    ],
    ids=["power", "recursion", "nesting"],
)
def test_a_bomb_is_the_response_s_fault_and_the_pool_goes_on(answer: str, limit: str):
    with JudgePool(num_workers=1, time_limit_s=1.0 if limit == "time" else 20.0) as pool:
        verdict = pool.submit(boxed(answer), "7").result()
        assert verdict.label == "unparsed"
        assert verdict.why.startswith(f"limit: {limit}")
        assert verdict.extracted == answer
        stats = pool.stats()
        assert (stats.num_limits, stats.num_restarts, stats.num_faults) == (2, 2, 0)
        assert pool.submit(boxed("0.5"), "1/2").result().label == "correct"


def test_an_answer_that_takes_all_memory_is_its_response_s_fault():
    """By a function: no answer in mathematics that needs this much is left to math-verify."""
    with JudgePool(num_workers=1, functions=["operator:mul"]) as pool:
        verdict = pool.submit("x", 1 << 31, "function:operator:mul").result()
        assert (verdict.label, verdict.why[:13]) == ("unparsed", "limit: memory")
        assert (pool.stats().num_limits, pool.stats().num_restarts, pool.stats().num_faults) == (2, 2, 0)
        assert pool.submit(boxed("0.5"), "1/2").result().label == "correct"


@pytest.mark.slow
@pytest.mark.parametrize(
    "answer",
    [
        "((30!)!)!",
        r"\operatorname{zeros}(100000,100000)",
        r"\binom{1000000000}{500000000}",
        r"\prod_{k=1}^{10^{9}} k",
        "10^{10^{10}}",
        "9**9**9**9",
        "(x+y+z)^{500}",
        r"\gcd(10^{10^9},3)",
        r"\int_0^1 \sin(\sin(\sin(x^{x}))) dx",
        "{" * 4000 + "7" + "}" * 4000,
        r"\sqrt{" * 1000 + "7" + "}" * 1000,
        "x" * 9999,
        "-" * 9000 + "1",
        "9" * 9999,
        "$" * 9990,
        "\\frac" * 1500,
        "7 " * 500_000,
        "{}" * 500_000,
    ],
    ids=lambda answer: answer[:20],
)
def test_more_bombs(answer: str):
    with JudgePool(num_workers=1, time_limit_s=2.0) as pool:
        for gold in ("7", r"\pi + 1"):
            verdict = pool.submit(boxed(answer), gold).result(timeout=60)
            assert verdict.label in ("unparsed", "wrong")
        assert pool.submit(boxed("0.5"), "1/2").result().label == "correct"


def test_a_reference_that_is_a_bomb_is_a_fault():
    with JudgePool(num_workers=1, time_limit_s=0.8) as pool:
        assert pool.submit(boxed(SLOW), SLOW).result().label == "correct"  # by its text
        verdict = pool.submit(boxed("7"), SLOW).result()
        assert verdict.label == "fault"
        assert "reference" in verdict.why
        assert (pool.stats().num_limits, pool.stats().num_faults) == (3, 1)


@pytest.mark.slow
def test_one_bomb_among_the_references():
    with JudgePool(num_workers=1, time_limit_s=1.5) as pool:
        assert pool.submit(boxed("0.5"), ["1/2", SLOW]).result().label == "correct"
        assert pool.submit(boxed("x + 1"), ["y", SLOW]).result().label == "fault"


def test_a_worker_killed_in_mid_item_is_replaced_and_the_verdict_is_right():
    """The item is slow, then its worker is killed from outside, then a second worker finishes it."""
    slow = r"\int \sin^{10}(x)\cos^{3}(x) dx"  # about a second, in math-verify
    with JudgePool(num_workers=1, time_limit_s=60.0) as pool:
        wait_until(lambda: worker_pids(pool))
        [pid] = worker_pids(pool)
        verdict = pool.submit(boxed(slow), "x^2 + 1")
        later = [pool.submit(boxed(f"{number}.50"), f"{number} + 1/2") for number in range(5)]
        wait_until(lambda: pool._groups["math"].workers[0].task)
        os.kill(pid, signal.SIGKILL)
        assert verdict.result().label == "wrong"
        assert [each.result().label for each in later] == ["correct"] * 5
        assert (pool.stats().num_limits, pool.stats().num_restarts) == (0, 1)
        assert pid not in worker_pids(pool)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
def test_kills_from_outside_are_no_limit(bad_worker: BadWorker, tmp_path: Path, number: int):
    """As many as two limits, and more: the item is tried again until a worker lives to answer."""
    source = (
        "seen = pathlib.Path(sys.argv[0]).with_name('seen'); n = len(seen.read_text()) if seen.exists() else 0\n"
        f"{READY}one = ask(); seen.write_text('x' * (n + 1))\n"
        "import signal; signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"  # nohup ignores it
        f"if n < 6: os.kill(os.getpid(), {int(number)})\n"
        "say({'id': one['id'], 'label': 'correct' if one['check'] == 'answer' else 'fault', 'why': ''}); time.sleep(60)"
    )
    with JudgePool(num_workers=1, memo_size=0, _command=bad_worker(source)) as pool:
        assert pool.submit(boxed("0.5"), "1/2").result(timeout=60).label == "correct"
        assert (pool.stats().num_limits, pool.stats().num_restarts) == (0, 6)


def test_kills_without_end_are_a_fault(bad_worker: BadWorker):
    source = READY + "ask(); os.kill(os.getpid(), 9)"
    with JudgePool(num_workers=1, _command=bad_worker(source)) as pool:
        verdict = pool.submit(boxed("0.5"), "1/2").result(timeout=60)
        assert (verdict.label, verdict.why) == ("fault", "21 workers were killed from outside")


def test_an_idle_worker_killed_is_replaced_and_harms_no_item(bad_worker: BadWorker):
    source = READY + "while True: say({'id': ask()['id'], 'label': 'wrong', 'why': ''})"
    with JudgePool(num_workers=1, memo_size=0, _command=bad_worker(source)) as pool:
        for _ in range(5):
            assert pool.submit(boxed("0.5"), "1/2").result().label == "wrong"
            [pid] = worker_pids(pool)
            os.kill(pid, signal.SIGKILL)
            wait_until(lambda pid=pid: worker_pids(pool) not in ([pid], []))
        assert pool.stats().num_limits == 0
        assert pool.stats().num_restarts == 5


@pytest.mark.parametrize(
    "source",
    [
        READY + "ask(); os.abort()",
        READY + "ask(); print('{', flush=True); time.sleep(60)",
        READY + "ask(); print('[]', flush=True); time.sleep(60)",
        READY + "say({'id': ask()['id'] + 1, 'label': 'correct'}); time.sleep(60)",
        READY + "say({'id': 0, 'label': 'correct'}); time.sleep(60)",
        READY + "say({'id': ask()['id'], 'label': 'right'}); time.sleep(60)",
        READY + "say({'id': ask()['id'], 'error': 'ZeroDivisionError: ours'}); time.sleep(60)",
        READY + "time.sleep(60)",
    ],
    ids=["crash", "half a line", "not an object", "other id", "unasked", "no such label", "exception", "asleep"],
)
def test_a_worker_that_always_fails_never_makes_a_label(bad_worker: BadWorker, source: str):
    with JudgePool(num_workers=1, time_limit_s=0.5, _command=bad_worker(source)) as pool:
        futures = [pool.submit(boxed("0.5"), "1/2"), pool.submit(boxed("0.25"), "1/4")]
        for future in futures:
            try:
                verdict = future.result(timeout=20)
            except RunError:
                continue
            assert verdict.label == "fault"
            assert verdict.why


@pytest.mark.parametrize(
    ("first", "second", "third", "label", "why"),
    [
        ("die", "correct", "", "correct", ""),
        ("die", "wrong", "", "wrong", ""),
        ("memory", "wrong", "", "wrong", ""),
        ("die", "error", "", "fault", "the judge failed"),
        ("die", "memory", "correct", "unparsed", "limit: memory"),
        ("die", "memory", "fault", "fault", "limit: memory; and"),
        ("die", "memory", "error", "fault", "the judge failed"),
        ("die", "memory", "die", "fault", "limit on the reference"),
        ("sleep", "sleep", "correct", "unparsed", "limit: time"),
        ("sleep", "sleep", "sleep", "fault", "limit on the reference"),
        ("error", "", "", "fault", "the judge failed: KeyError: 1"),
    ],
)
def test_each_way_through_the_three_tries(
    bad_worker: BadWorker,
    tmp_path: Path,
    first: str,
    second: str,
    third: str,
    label: str,
    why: str,
):
    """Each worker does one try and leaves a file: that shows a fresh worker for each, and the right check."""
    source = READY + (
        f"tries = {[first, second, third]!r}\n"
        f"folder = pathlib.Path({str(tmp_path)!r})\n"
        "request = ask()\n"
        "number = len(list(folder.glob('try-*')))\n"
        "(folder / f'try-{number}').write_text(request['check'])\n"
        "what, head = tries[number], {'id': request['id']}\n"
        "if what == 'die': os.abort()\n"
        "if what == 'sleep': time.sleep(60)\n"
        "if what == 'memory': say(head | {'limit': 'memory'})\n"
        "elif what == 'error': say(head | {'error': 'KeyError: 1'})\n"
        "else: say(head | {'label': what, 'why': ''})\n"
        "time.sleep(60)\n"
    )
    with JudgePool(num_workers=1, time_limit_s=0.4, _command=bad_worker(source)) as pool:
        verdict = pool.submit(boxed("0.5"), "1/2").result(timeout=30)
        limits = pool.stats().num_limits
    assert verdict.label == label
    assert verdict.why.startswith(why)
    assert verdict.extracted == "0.5"
    checks = [path.read_text() for path in sorted(tmp_path.glob("try-*"))]
    tries = [each for each in (first, second, third) if each]
    assert checks == ["answer", "answer", "reference"][: len(tries)]
    assert limits == sum(each in ("die", "memory", "sleep") for each in tries)


def test_an_item_is_tried_again_on_a_fresh_worker_while_a_used_one_is_idle(bad_worker: BadWorker):
    """A worker that has judged before dies of the answer x: a used one would die of it too, and blame the response."""
    source = READY + (
        "used = False\n"
        "while True:\n"
        "    request = ask()\n"
        "    if used and request['answer'] == 'x': os.abort()\n"
        "    used = True\n"
        "    say({'id': request['id'], 'label': 'correct', 'why': ''})\n"
    )
    with JudgePool(num_workers=3, memo_size=0, _command=bad_worker(source)) as pool:
        wait_until(lambda: len(worker_pids(pool)) == 3)
        while not all(worker.num_judged for worker in pool._groups["math"].workers):
            pool.judge_many([(boxed("y"), str(number), "math") for number in range(30)])
        assert pool.submit(boxed("x"), "1/2").result(timeout=20).label == "correct"
        assert pool.stats().num_limits == 1


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("sys.exit('no such thing as a teapot')", "do not start.*died.*teapot"),
        ("time.sleep(60)", "do not start.*waiting for one to import.*time"),
        (READY, "do not start"),
        ("say({'failed': 'ModuleNotFoundError: math_verify'})", "cannot start: ModuleNotFoundError: math_verify"),
    ],
    ids=["dies", "hangs", "dies when ready", "says why"],
)
def test_workers_that_do_not_start_end_the_pool(bad_worker: BadWorker, source: str, message: str):
    with JudgePool(num_workers=1, start_limit_s=0.5, _command=bad_worker(source)) as pool:
        wait_until(lambda: not pool.usable)
        with pytest.raises(RunError, match=message):
            pool.submit(boxed("0.5"), "1/2").result(timeout=20)
        with pytest.raises(RunError, match=message):
            pool.submit(boxed("7"), "7")


def test_no_math_verify(bad_worker: BadWorker):
    source = "sys.modules['math_verify'] = None\nimport pekoe.verify.worker as worker\nsys.exit(worker.main())"
    with JudgePool(num_workers=1, _command=bad_worker(source)) as pool:
        waiting = [pool.submit(boxed("0.5"), "1/2"), pool.submit(boxed("0.5"), "1/2"), pool.submit(boxed("x"), "y")]
        for future in waiting:
            with pytest.raises(RunError, match="math_verify"):
                future.result(timeout=30)


def test_no_python_to_start():
    with JudgePool(_command=("/nonexistent/python",)) as pool:
        wait_until(lambda: not pool.usable)
        with pytest.raises(RunError, match="nonexistent"):
            pool.submit(boxed("7"), "7")


def test_heavy_answers_have_a_budget_a_batch(bad_worker: BadWorker, monkeypatch: pytest.MonkeyPatch):
    """Two heavy answers cost the whole time twice each; the others a fifth of it, twice (I9). The next batch begins
    anew, and short limits leave the budget as it is."""
    monkeypatch.setattr(pool_module, "LIMITS_A_BATCH", 4)
    source = READY + (
        "for line in sys.stdin:\n"
        "    request = json.loads(line)\n"
        "    if request['check'] == 'answer' and request['answer'].startswith('h'): time.sleep(60)\n"
        "    say({'id': request['id'], 'label': 'correct'})\n"
    )
    with JudgePool(num_workers=1, time_limit_s=0.5, _command=bad_worker(source)) as pool:
        for _ in range(2):
            start = pool.stats().num_limits
            answers = [*(f"h{number}" for number in range(6)), "light"]
            whys = [verdict.why for verdict in pool.judge_many((boxed(answer), "7", "math") for answer in answers)]
            twice = "limit: time (0.5 s), twice; the reference can be judged against itself"
            short = (
                "limit: time (0.1 s, after 4 limits of this batch), twice; the reference can be judged against itself"
            )
            assert sorted(whys) == ["", *[short] * 4, *[twice] * 2]
            assert pool.stats().num_limits - start == 12
            assert pool._groups["math"].limits_left >= 0


def test_a_function_of_the_user_s_always_has_the_whole_time(bad_worker: BadWorker, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pool_module, "LIMITS_A_BATCH", 0)
    source = READY + "ask()\ntime.sleep(60)"
    with JudgePool(num_workers=1, time_limit_s=0.2, functions=["a:b"], _command=bad_worker(source)) as pool:
        assert "of this batch" not in pool.submit("x", "7", "function:a:b").result().why
        assert pool.stats().num_limits == 3
