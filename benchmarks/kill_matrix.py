"""Kill each kind of process of a cluster in each phase of a step, and see whether the run ends as one never killed.

    make kill-matrix ARGS="--kinds engine,judge --phases rollout"

The kind "terminated" is asked to stop, by SIGTERM to the controller, and must end with status 143, its last step saved.
Prints a table: how the run went on by itself, or stopped and was resumed by the same command; how far its losses are
from those of the run that nobody killed; and whether its ledger is the same. Exit status 1 if any differs.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

KINDS = ("controller", "engine", "first rank", "other rank", "judge", "store", "terminated")
PHASES = ("rollout", "verify", "train", "sync", "save", "evaluate")
STEPS, LIMIT_S, TOLERANCE = 4, 300, 1e-3


def parity(response: str, gold: Any) -> bool:
    """The reward of these runs: something that random weights get right half of the time."""
    return sum(map(ord, response)) % 2 == int(gold)


def make_inputs(folder: Path, reward: str = "kill_matrix:parity") -> dict[str, Any]:
    """A model of random weights, problems, and the recipe."""
    from pekoe.core.spec import ModelSpec
    from pekoe.core.types import Problem
    from pekoe.data.problems import write_problems
    from pekoe.data.tokenizer import Tokenizer
    from pekoe.demo.char_tokenizer import make_char_tokenizer
    from pekoe.model import Decoder, save_model

    files = make_char_tokenizer("0123456789+=")
    sizes = {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16}
    vocab = Tokenizer(files).vocab_size
    spec = ModelSpec(family="qwen3", vocab_size=vocab, intermediate_size=128, max_positions=128, qk_norm=True, **sizes)
    model = Decoder(spec)
    model.init_weights(0)
    model.assets = dict(files)
    save_model(model, folder / "model")
    problems = [
        Problem(f"{a}+{b}", ({"role": "user", "content": f"{a}+{b}="},), str(b % 2), f"function:{reward}")
        for a in range(6)
        for b in range(6)
    ]
    write_problems(folder / "problems.jsonl", problems)
    return {
        "num_steps": STEPS,
        "model": {"path": str(folder / "model"), "device": "cpu"},
        "data": {"train": str(folder / "problems.jsonl"), "max_prompt_tokens": 8},
        "rollout": {"prompts_per_step": 8, "samples_per_prompt": 8, "max_new_tokens": 48},
        "optim": {"lr": 1e-3},
        "algo": {"minibatches": 2},
        "train": {"token_budget": 512, "save_every": 1},
        "eval": {"data": str(folder / "problems.jsonl"), "every": 2, "samples": 1, "max_new_tokens": 48},
        "verify": {"workers": 2, "functions": [reward]},
        "cluster": {"generation": {"engines": 2}, "training": {"ranks": 2}, "silence_limit_s": 30, "sync_limit_s": 60},
    }


def life(recipe: dict[str, Any], kind: str, phase: str) -> None:
    """One run, in this process; `kind` dies in step 2's `phase`."""
    from contextlib import ExitStack

    import psutil
    import ray

    from pekoe.config.recipes import load_config
    from pekoe.core.errors import Interrupted
    from pekoe.core.progress import NoProgress
    from pekoe.ray.run import RayChannel, build_cluster, run_with_restarts
    from pekoe.ray.store import RayJudge
    from pekoe.ray.trainer import RaySnapshot, RayTrainer
    from pekoe.run import rl
    from pekoe.run.interrupt import Stop
    from pekoe.run.rollouts import Rollouts

    class Printed(NoProgress):
        def say(self, text: str) -> None:
            print(text, flush=True)

    def pid() -> int:
        store = ray.get(cluster.stores.actors[0].pid.remote())
        if kind == "judge":
            children = psutil.Process(store).children(recursive=True)
            return next(child.pid for child in children if "pekoe.verify.worker" in child.cmdline())
        ranks = cluster.trainer.pids
        return {
            "controller": os.getpid(),
            "terminated": os.getpid(),
            "engine": cluster.pool.members[0].engine.info.pid,
            "first rank": ranks[0],
            "other rank": ranks[1],
            "store": store,
        }[kind]

    def strike(after_s: float) -> None:
        target = pid()

        def work() -> None:
            time.sleep(after_s)
            print(f"killed {kind} in {phase} at {time.monotonic()}", flush=True)
            os.kill(target, signal.SIGTERM if kind == "terminated" else signal.SIGKILL)

        threading.Thread(target=work, daemon=True).start()

    def at(owner: Any, name: str, call: int, after_s: float, where: str, late: bool = False) -> None:
        """Strike at (`late`: when it returns from) the `call`-th call of owner.name."""
        function, calls = getattr(owner, name), [0]

        def wrapped(self: Any, *args: Any, **more: Any) -> Any:
            calls[0] += 1
            mine = where == phase and calls[0] == call
            if mine and not late:
                strike(after_s)
            result = function(self, *args, **more)
            if mine and late:
                strike(after_s)
            return result

        setattr(owner, name, wrapped)

    at(Rollouts, "put", 2, 0.0, "rollout", late=True)
    at(RayJudge, "submit", 64 + 4, 0.0, "verify", late=True)  # of step 2's 64 responses, the fourth
    at(RayTrainer, "step", 4, 0.02, "train")
    at(RayChannel, "publish", 3, 0.01, "sync")
    at(RaySnapshot, "write", 2, 0.01, "save")
    at(rl, "evaluate", 2, 0.01, "evaluate")
    stop = Stop()
    try:
        with stop.listening(), ExitStack() as stack:
            cluster = build_cluster(load_config(recipe), Printed(), stop, stack)
            run_with_restarts(cluster)
    except Interrupted as stopped:
        sys.exit(stopped.status)


def attempt(folder: Path, name: str, kind: str, phase: str) -> tuple[int, str, float]:
    """A run in a process of its own: its exit status, what it said, and how long it lived after the kill (s)."""
    command = [sys.executable, __file__, "--life", str(folder), name, kind, phase]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path[1:]])}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, env=environment)
    except subprocess.TimeoutExpired as error:
        return 124, f"HANGS: {str(error.stdout)[-500:]}", float("nan")
    at = re.search(r"^killed .* at ([\d.]+)$", done.stdout, re.MULTILINE)
    lived_s = time.monotonic() - float(at[1]) if at else float("nan")
    return done.returncode, done.stdout + done.stderr, lived_s


def outcome(run: Path) -> tuple[list[float], list[tuple[str, int, str]]]:
    """Losses of the steps, and the ledger."""
    events = [json.loads(line) for line in (run / "journal.jsonl").read_text().splitlines()]
    ledger = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
    losses = [event["loss"] for event in events if event["event"] == "step"]
    return losses, [(line["uid"], line["draw"], line["outcome"]) for line in ledger]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--phases", default=",".join(PHASES))
    parser.add_argument("--folder", type=Path, default=Path("runs/kill-matrix"))
    parser.add_argument("--out", type=Path, help="also write the table as JSON")
    parser.add_argument("--life", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.life:
        folder, name, kind, phase = options.life
        recipe = json.loads((Path(folder) / "recipe.json").read_text())
        life(recipe | {"run": {"dir": f"{folder}/{name}", "threads": 1}}, kind, phase)
        return
    folder: Path = options.folder.resolve()
    if folder.exists():
        parser.error(f"--folder: expected a new directory, got {folder}")
    folder.mkdir(parents=True)
    (folder / "recipe.json").write_text(json.dumps(make_inputs(folder)))
    status, said, _ = attempt(folder, "unbroken", "nobody", "never")
    if status:
        raise SystemExit(f"the run that nobody kills failed:\n{said}")
    losses, ledger = outcome(folder / "unbroken")
    rows: list[dict[str, Any]] = []
    print(f"{'killed':<12} {'phase':<8} {'s':>4}  {'went on':<36} {'loss differs by':<16} ledger", flush=True)
    for kind in options.kinds.split(","):
        for phase in options.phases.split(","):
            start, name = time.perf_counter(), f"{kind}-{phase}".replace(" ", "-")
            status, said, lived_s = attempt(folder, name, kind, phase)
            asked = kind != "terminated" or status == 128 + signal.SIGTERM
            killed, way = "killed" in said or status == -signal.SIGKILL, "by itself"
            if status and status != 124:
                way = f"stopped ({status}) in {lived_s:.1f} s, then resumed"
                status, _, _ = attempt(folder, name, "nobody", "never")
            if status:
                way = f"FAILED: {said.strip().splitlines()[-1][:120]}"
                differs, same = float("nan"), False
            else:
                found, kept = outcome(folder / name)
                differs = max(abs(a - b) for a, b in zip(found, losses, strict=True))
                same = sorted(kept) == sorted(ledger)
            good = killed and asked and same and differs <= TOLERANCE
            seconds = time.perf_counter() - start
            rows.append(
                {
                    "killed": kind,
                    "phase": phase,
                    "went_on": way,
                    "lived_s": round(lived_s, 1),
                    "loss_diff": differs,
                    "ledger_same": same,
                    "good": good,
                }
            )
            ledger_said = "the same" if same else "DIFFERS"
            print(
                f"{kind:<12} {phase:<8} {seconds:4.0f}  {way:<36} {differs:<16.1e} {ledger_said}"
                f"{'' if killed else '  NOBODY WAS KILLED'}",
                flush=True,
            )
    bad = sum(not row["good"] for row in rows)
    print(f"{len(rows) - bad} of {len(rows)} ended as the run that nobody killed", flush=True)
    if options.out:
        about = {"date": time.strftime("%Y-%m-%d"), "cores": os.cpu_count(), "steps": STEPS, "tolerance": TOLERANCE}
        about |= {name: version(name) for name in ("torch", "ray")}
        options.out.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
    raise SystemExit(bad > 0)


if __name__ == "__main__":
    main()
