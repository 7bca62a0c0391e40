"""`pekoe doctor --gpu` on a CPU: parts pass, each fails when what it proves is broken, and none ends the rest."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from pekoe.core.errors import UserError
from pekoe.engine.embedded import EmbeddedEngine
from pekoe.engine.embedded.attention_cpu import CPUCache
from pekoe.model import PackedAttention
from pekoe.run.first_hour import command, proofs, publish, speeds
from pekoe.run.first_hour.command import PARTS, prove, run_parts
from pekoe.run.first_hour.site import Figure, Site
from tests.fuzz_settings import call

QUICK = "kernels,varlen,i1,training,graphs,lora,publish,colocate,decode,prefix"


def doctor(out: Path, *words: str) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    words = (sys.executable, "-m", "pekoe.cli", "doctor", "--gpu", "--device", "cpu", "--json", str(out), *words)
    done = subprocess.run(words, capture_output=True, text=True)
    return done, json.loads(out.read_text())


def test_parts_pass_on_a_cpu_but_those_that_need_a_gpu(tmp_path: Path):
    done, found = doctor(tmp_path / "gpu.json", "--parts", QUICK)
    assert done.returncode == 0, done.stdout + done.stderr
    status = {part["part"]: part["status"] for part in found["parts"]}
    assert status == {name: "SKIP" if name == "graphs" else "PASS" for name in QUICK.split(",")}
    assert all(part["figures"] for part in found["parts"] if part["status"] == "PASS")
    assert {"pekoe", "python", "torch"} <= found["versions"].keys()
    table = done.stdout.splitlines()
    assert [line.split()[1] for line in table if line[:4] in ("PASS", "SKIP")] == QUICK.split(",")
    assert table[-1].startswith("10 parts in ")
    assert table[-1].endswith("9 PASS, 1 SKIP")


@pytest.mark.long
@pytest.mark.timeout(900)
def test_all_parts_pass_on_a_cpu(tmp_path: Path):
    done, found = doctor(tmp_path / "gpu.json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [part["part"] for part in found["parts"]] == list(PARTS)
    assert {part["part"] for part in found["parts"] if part["status"] != "PASS"} == {"graphs"}


def wrong_attention(self: PackedAttention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, enable_gqa: bool):
    return (v + 0 * k).repeat_interleave(q.shape[1] // k.shape[1], 1) + 0 * q


BROKEN: list[tuple[Callable[[Site], Iterator[Figure]], Any, str, Any]] = [
    (proofs.kernels, CPUCache, "copy_block", lambda *_: None),
    (proofs.varlen, PackedAttention, "_sdpa", wrong_attention),
    (proofs.i1, EmbeddedEngine, "update_weights", lambda *_: None),
    (proofs.training, proofs, "relative", lambda *_: 1e-3),
    (proofs.lora, proofs, "adapters_off", lambda _: nullcontext()),
    (publish.publish, publish, "_Deaf", EmbeddedEngine),
    (publish.colocate, EmbeddedEngine, "offload", lambda _: None),
    (speeds.memory, speeds, "_step_bytes", lambda *_: 10**9),
    (speeds.prefix, speeds, "tokens_of", lambda n, length, *_: [list(range(1, length + 1))] * n),
]


@pytest.mark.parametrize(("part", "owner", "name", "replacement"), BROKEN, ids=[case[0].__name__ for case in BROKEN])
def test_a_part_fails_where_what_it_proves_is_broken(
    part: Any, owner: Any, name: str, replacement: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr(owner, name, replacement)
    assert not all(figure.ok for figure in part(Site.of("cpu", tmp_path)))


def hangs(site: Site) -> Iterator[Figure]:
    yield Figure("before", 1)
    subprocess.Popen(["sleep", "300"])
    (site.folder.parent / "hanging").write_text(str(os.getpgid(0)))
    time.sleep(300)


def dies(site: Site) -> Iterator[Figure]:
    yield Figure("before", 1)
    os.kill(os.getpid(), signal.SIGSEGV)


def raises(site: Site) -> Iterator[Figure]:
    print("a library's last words", flush=True)
    yield Figure("before", 1)
    raise RuntimeError("CUDA error: an illegal memory access")


def falls_short(site: Site) -> Iterator[Figure]:
    yield Figure("figure", 2.0, "<= 1", False)


def holds(site: Site) -> Iterator[Figure]:
    yield Figure("device", site.device.type)


def test_one_part_after_another_whatever_becomes_of_them(monkeypatch: pytest.MonkeyPatch):
    names = ["hangs", "dies", "raises", "falls_short", "holds"]
    monkeypatch.setattr(command, "PARTS", dict.fromkeys(names, (__name__, 60.0, "")))
    start = time.monotonic()
    outcomes = {outcome.part: outcome for outcome in run_parts("cpu", names, {"hangs": 1.0})}
    assert time.monotonic() - start < 60
    assert {name: outcome.status for name, outcome in outcomes.items()} == dict.fromkeys(names[:-1], "FAIL") | {
        "holds": "PASS"
    }
    assert outcomes["hangs"].why == "expected to end within 1 s, did not"
    assert outcomes["dies"].why == "its process died"
    assert outcomes["raises"].why == "RuntimeError: CUDA error: an illegal memory access"
    assert "a library's last words" in outcomes["raises"].output
    assert all(outcomes[name].figures[0]["name"] == "before" for name in names[:3])
    assert outcomes["falls_short"].why == "a figure is not as expected"
    text = "\n".join(command.lines_of(outcomes["falls_short"]))
    assert "2  (<= 1)  <-- not so" in text


def test_what_a_part_started_ends_with_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(command, "PARTS", {"hangs": (__name__, 60.0, "")})
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    list(run_parts("cpu", ["hangs"], {"hangs": 1.0}))
    group = int((tmp_path / "hanging").read_text())
    end = time.monotonic() + 10
    while time.monotonic() < end:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    pytest.fail("a process of the part lives on")


def test_exit_status_and_file_of_a_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(command, "PARTS", {"falls_short": (__name__, 60.0, ""), "holds": (__name__, 60.0, "")})
    lines: list[str] = []
    assert not prove("cpu", None, tmp_path / "out.json", lines.append)
    assert [part["status"] for part in json.loads((tmp_path / "out.json").read_text())["parts"]] == ["FAIL", "PASS"]
    assert prove("cpu", "holds", None, lines.append)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--device", "cpu", "--parts", "kernel"], r"expected names of parts, got 'kernel'. Did you mean 'kernels'?"),
        (["--device", "cpu", "--parts", ","], "got none. Valid: machine, kernels"),
        (["--device", "gpu"], "expected 'cuda' or 'cpu', got 'gpu'"),
        (["--device", "cpu", "--json", "/no/such/out.json"], "a file in a directory that is there"),
        *([] if torch.cuda.is_available() else [([], "found none on this machine; nearest: --device cpu")]),
    ],
)
def test_what_cannot_be(words: list[str], message: str):
    status, output = call(["doctor", "--gpu", *words])
    assert status == 2
    assert message in " ".join(output.split())


def test_nothing_is_proved_without_a_name():
    with pytest.raises(UserError, match="expected names of parts"):
        prove("cpu", "", None, print)
