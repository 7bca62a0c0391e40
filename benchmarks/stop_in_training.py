"""Seconds from a SIGTERM in the midst of a training step to the end of the run, and the bits of the run that goes on.

    python examples/smollm2/get_model.py build/smollm2/model
    python benchmarks/stop_in_training.py build/smollm2/model [--threads 2] [--json OUT.json]

A model whose step takes a minute or more here shows what a small one hides. SFT of 96 demonstrations in two steps, and
RL of two steps of 4 problems x 8 responses in two mini-batches (verdicts by coin: it is to train, not to learn), each
run once to its end. Then each is sent a SIGTERM in its second step: SFT in its middle, RL in the first mini-batch and
in the second, with the checkpoint of the first step still to be written, and once where it stands. The same command
goes on from there; its model must be the file that the unbroken run wrote. Half an hour on two cores.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from pekoe.core.journal import read_lines

ROOT = Path(__file__).resolve().parents[1]
COUNTDOWN = ROOT / "examples" / "smollm2" / "countdown.py"
TRAIN = ["train.token_budget=2048", "model.device=cpu"]
SFT = ["sft.epochs=1", "sft.batch_size=48", *TRAIN]
RL = ["num_steps=2", "rollout.prompts_per_step=4", "rollout.samples_per_prompt=8", "rollout.max_new_tokens=96", *TRAIN]
RL += ["data.max_prompt_tokens=96", "algo.minibatches=2", "optim.lr=2e-5", "verify.random=true", "verify.workers=1"]
LIMIT_S = 1800


def steps(run: Path) -> list[dict[str, Any]]:
    journal = run / "journal.jsonl"
    return [line for line in read_lines(journal) if line["event"] == "step"] if journal.exists() else []


def digest(run: Path) -> str:
    return hashlib.sha256((run / "model" / "model.safetensors").read_bytes()).hexdigest()


def pekoe(run: Path, words: list[str], after_s: float | None = None) -> tuple[float, str]:
    """Run a command to its end; or send it a SIGTERM so long after its first step. Seconds of that end, and the last
    line that it printed."""
    printed = run.with_suffix(".txt")
    with printed.open("w") as sink:
        command = [sys.executable, "-m", "pekoe.cli", *words, f"run.dir={run}"]
        process = subprocess.Popen(command, stdout=sink, stderr=sink, cwd=run.parent)
        end = start = time.monotonic()
        if after_s is not None:
            while not steps(run) and process.poll() is None and time.monotonic() < end + LIMIT_S:
                time.sleep(0.1)
            time.sleep(after_s)
            if process.poll() is not None:
                raise SystemExit(f"the run ended before its signal:\n{printed.read_text()[-2000:]}")
            start = time.monotonic()
            process.send_signal(signal.SIGTERM)
        status = process.wait(LIMIT_S)
        took = time.monotonic() - start
    if status != (0 if after_s is None else 128 + signal.SIGTERM):
        raise SystemExit(f"exit status {status}:\n{printed.read_text()[-2000:]}")
    return took, printed.read_text().strip().splitlines()[-1]


def measure(folder: Path, name: str, words: list[str], whole: Path, after_s: float) -> dict[str, Any]:
    """Stop a run in its second step, and go on with it."""
    run = folder / name.replace(" ", "-").replace(",", "")
    took, said = pekoe(run, words, after_s)
    pekoe(run, words)
    found = {"case": name, "exit_s": round(took, 1), "same_model": digest(run) == digest(whole), "said": said}
    print(f"{name}: ended {took:.1f} s after the signal; the same model: {found['same_model']}", flush=True)
    return found


def measure_all(model: Path, threads: int, folder: Path) -> list[dict[str, Any]]:
    made = ["--demonstrations", "96", "--problems", "32", "--held-out", "8", "--seed", "0"]
    subprocess.run([sys.executable, str(COUNTDOWN), str(folder / "data"), *made], check=True, stdout=subprocess.DEVNULL)
    common = [f"model.path={model.resolve()}", f"run.threads={threads}"]
    (folder / "empty.toml").write_text("")
    sft = ["sft", str(folder / "empty.toml"), f"data.train={folder / 'data' / 'demonstrations.jsonl'}", *SFT, *common]
    rl = ["rl", str(folder / "empty.toml"), f"data.train={folder / 'data' / 'train.jsonl'}", *RL, *common]
    late, stands = ["train.save_every=100"], ["train.save_every=1"]
    for name, words in ("sft", sft), ("rl", rl):
        print(f"{name}, unbroken: {pekoe(folder / name, words + late)[0]:.0f} s", flush=True)
    half = 0.5 * steps(folder / "sft")[1]["seconds"]["train"]
    seconds = steps(folder / "rl")[1]["seconds"]
    sampled, trained = seconds["rollout"] + seconds.get("verify", 0.0), seconds["train"]
    return [
        measure(folder, "SFT", sft + late, folder / "sft", half),
        measure(folder, "RL, first mini-batch", rl + late, folder / "rl", sampled + 0.3 * trained),
        measure(folder, "RL, second mini-batch", rl + late, folder / "rl", sampled + 0.75 * trained),
        measure(folder, "RL, checkpoint stands", rl + stands, folder / "rl", sampled + 0.75 * trained),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a model directory")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        cases = measure_all(args.model, args.threads, Path(place))
    if args.json:
        found = {"model": str(args.model), "threads": args.threads, "cases": cases}
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if not all(case["same_model"] for case in cases):
        raise SystemExit("a run that went on wrote another model")


if __name__ == "__main__":
    main()
