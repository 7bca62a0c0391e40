"""The pool as its users see it: order, memo, threads, and nothing left behind."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import pytest

from pekoe.core.errors import RunError, UserError
from pekoe.core.types import Verdict
from pekoe.verify import JudgePool, judge

from .conftest import READY, BadWorker, alive, wait_until, worker_pids

Run = Callable[..., subprocess.CompletedProcess[str]]


def test_order_is_kept_and_counts_are_right():
    """Correct, wrong, none, slow, fault in turn; the slow ones do not hold up or reorder the rest."""
    kinds = [
        (r"\boxed{%d.5}", "{} + 1/2", "correct"),
        (r"\boxed{%d.25}", "{} + 1/2", "wrong"),
        ("no box %d", "7", "unparsed"),
        (r"\boxed{(x+%d)^{30}}", "x + {}", "wrong"),
        (r"\boxed{%d.5}", "{} + }}{{", "fault"),
    ]
    items = [(response % number, gold.format(number), "math") for number in range(12) for response, gold, _ in kinds]
    with JudgePool(num_workers=2, time_limit_s=60.0) as pool:
        verdicts = pool.judge_many(iter(items))
        stats = pool.stats()
    assert [verdict.label for verdict in verdicts] == [label for _ in range(12) for *_, label in kinds]
    assert [verdict.extracted for verdict in verdicts[:2]] == ["0.5", "0.25"]
    assert (stats.num_judged, stats.num_faults, stats.num_limits, stats.num_restarts) == (60, 12, 0, 0)


def test_memo_and_sharing():
    with JudgePool(num_workers=1, memo_size=2) as pool:
        futures = [pool.submit(f"{text} \\boxed{{0.5}}", "1/2") for text in "abcdef"]  # in flight together: judged once
        assert {future.result().label for future in futures} == {"correct"}
        assert pool.stats().num_memo_hits == 5
        assert pool.submit(r"\boxed{0.5}", "1/2").result() == Verdict("correct", "0.5")
        assert pool.stats().num_memo_hits == 6
        assert pool.submit(r"\boxed{0.5}", "1/3").result().label == "wrong"  # another gold
        assert pool.submit(r"\boxed{0.5}", ["1/3", "1/2"]).result().label == "correct"
        assert pool.stats().num_memo_hits == 6
        pool.submit(r"\boxed{0.5}", "1/2").result()  # forgotten: two have come since
        assert pool.stats().num_memo_hits == 6
        for _ in range(2):
            assert pool.submit(r"\boxed{0.5}", "}{").result().label == "fault"
        assert pool.stats().num_memo_hits == 6  # faults are not remembered
        assert pool.stats().num_judged == 12
        assert len(pool._memo) == 2


def test_limits_are_not_remembered(bad_worker: BadWorker):
    source = (
        READY
        + "message = ask()\nsay({'id': 1} | ({'limit': 'm'} if message['check'] == 'answer' else {'label': 'correct'}))"
    )
    with JudgePool(num_workers=1, _command=bad_worker(source)) as pool:
        for limits in (2, 4):
            assert pool.submit(r"\boxed{0.5}", "7").result().why.startswith("limit: m")
            assert pool.stats().num_limits == limits


def test_submissions_from_several_threads(pool: JudgePool):
    found: dict[int, list[Verdict]] = {}

    def work(thread: int) -> None:
        items = [(rf"\boxed{{{thread}.{number}}}", f"{thread} + {number}/10", "math") for number in range(1, 10)]
        found[thread] = pool.judge_many(items)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {number: {verdict.label for verdict in verdicts} for number, verdicts in found.items()} == {
        number: {"correct"} for number in range(6)
    }
    assert [verdict.extracted for verdict in found[3]] == [f"3.{number}" for number in range(1, 10)]


def test_messages_larger_than_a_pipe(pool: JudgePool):
    gold = ["\U0001d7d9" * 9_000 + str(number) for number in range(8)] + ["0.5"]  # about 900 KB on the wire
    assert pool.submit(r"\boxed{1/2}", gold).result().label == "correct"
    assert pool.submit("\\boxed{\ud800}", "7").result().label == "unparsed"  # half a character


def test_close_leaves_no_process_and_fails_what_waits(bad_worker: BadWorker):
    with JudgePool(num_workers=2, time_limit_s=60.0, _command=bad_worker(READY + "time.sleep(60)")) as pool:
        waiting = [pool.submit(r"\boxed{0.5}", f"{number}") for number in range(4)]
        wait_until(lambda: len(worker_pids(pool)) == 2 and all(worker.task for worker in pool._groups["math"].workers))
        pids = worker_pids(pool)
    assert not any(alive(pid) for pid in pids)
    for future in waiting:
        with pytest.raises(RunError, match="closed"):
            future.result(timeout=5)
    with pytest.raises(RunError, match="closed"):
        pool.submit(r"\boxed{7}", "7")
    pool.close()
    assert pool._thread.is_alive() is False


def test_closing_twice_writes_to_no_file_that_was_opened_since(tmp_path: Path):
    pool = JudgePool(num_workers=1)
    pool.close()
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(open(tmp_path / str(number), "w+b")) for number in range(8)]
        pool.close()
        assert [file.seek(0, os.SEEK_END) for file in files] == [0] * 8


def test_closing_at_once_and_from_a_callback(bad_worker: BadWorker):
    JudgePool(num_workers=2).close()
    pool = JudgePool(_command=bad_worker(READY + "say({'id': ask()['id'], 'label': 'wrong'}); time.sleep(60)"))
    future: Future[Verdict] = pool.submit(r"\boxed{0.5}", "1/2")
    future.add_done_callback(lambda _: pool.close())
    assert future.result().label == "wrong"
    pool._thread.join(20)
    assert not pool.usable


def test_what_is_wrong_with_the_call(pool: JudgePool):
    with pytest.raises(UserError, match=r"unknown kind 'mat'\. Did you mean 'math'"):
        pool.submit(r"\boxed{7}", "7", "mat")
    with pytest.raises(UserError, match="num_workers"):
        JudgePool(num_workers=0)
    with pytest.raises(UserError, match="above 0"):
        JudgePool(time_limit_s=0.0)


def test_futures_cannot_be_cancelled(pool: JudgePool):
    future = pool.submit(r"\boxed{0.50}", "1/2")
    assert not future.cancel()
    assert future.result().label == "correct"


def test_judge(run_script: Run):
    """From a script without a guard; it ends by itself, with its worker."""
    done = run_script(
        "import pekoe.verify, sys\n"
        "assert not {'sympy', 'math_verify', 'torch'} & set(sys.modules)\n"
        "from pekoe.verify import judge\n"
        "print('here')\n"
        "print(judge(r'\\boxed{0.5}', '1/2').label, judge(r'\\boxed{0.5}', ['1', '2'], kind='math').label)\n"
        "assert not {'sympy', 'math_verify', 'torch'} & set(sys.modules)\n"
        "print(pekoe.verify._pool._groups['math'].workers[0].pid)\n"
    )
    assert done.stderr == ""
    here, labels, pid = done.stdout.splitlines()
    assert (here, labels) == ("here", "correct wrong")
    assert not alive(int(pid))


def test_judge_in_a_folder_that_shadows_modules(run_script: Run, tmp_path: Path):
    """Started from any folder: the worker does not import what lies about in the current one."""
    other = tmp_path / "other"
    other.mkdir()
    (other / "sympy.py").write_text("raise SystemExit('shadowed')")
    done = run_script(
        "import os, sys\n"
        "os.chdir(sys.argv[1])\n"
        "from pekoe.verify import judge\n"
        "print(judge(r'\\boxed{0.5}', '1/2').label)\n",
        str(other),
    )
    assert done.stdout == "correct\n", done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_after_a_fork(run_script: Run):
    """A forked child has a pool of its own in `judge`, is refused by its parent's, and leaves its parent's alone."""
    done = run_script(
        "import os, sys\n"
        "import pekoe.verify\n"
        "from pekoe.core.errors import RunError\n"
        "from pekoe.verify import judge\n"
        "assert judge(r'\\boxed{0.5}', '1/2').label == 'correct'\n"
        "pool = pekoe.verify._pool\n"
        "if not os.fork():\n"
        "    try: pool.submit(r'\\boxed{0.5}', '1/2')\n"
        "    except RunError as error: print(error, flush=True)\n"
        "    pool.close()\n"
        "    print(judge(r'\\boxed{0.5}', '1/2').label, flush=True)\n"
        "    sys.exit()\n"
        "os.wait()\n"
        "print(judge(r'\\boxed{0.50}', '1/2').label, pool is pekoe.verify._pool)\n"
        "assert pool.stats().num_restarts == 0\n"
    )
    lines = done.stdout.splitlines()
    assert "forked" in lines[0], done.stderr
    assert lines[1:] == ["correct", "correct True"], done.stderr


def test_judge_comes_back_after_its_pool_broke(monkeypatch: pytest.MonkeyPatch):
    broken = JudgePool(_command=(sys.executable, "-c", "import time; time.sleep(60)"))
    broken.close()
    monkeypatch.setattr("pekoe.verify._pool", broken)
    assert judge(r"\boxed{0.5}", "1/2").label == "correct"
    import pekoe.verify

    assert pekoe.verify._pool is not None
    pekoe.verify._pool.close()
