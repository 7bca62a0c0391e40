"""Whether RL learns with lag: the demo's RL stage at several lags, with and without a correction.

    make learn-async ARGS="--demo runs/demo"

Each run is a process of its own, one at a time; `--demo` names the directory of a finished `pekoe demo`, whose model
after SFT all start from. Every run is trained again from its records, and its weights compared.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import tomli_w
import torch

from pekoe import __version__
from pekoe.core.journal import read_lines
from pekoe.demo.run import eval_recipe, rl_recipe

CORRECTIONS = {"truncate": ["algo.correction=truncate"], "off": ["algo.proximal=engine", "algo.correction=off"]}


def pekoe(*words: str) -> str:
    command = [sys.executable, "-m", "pekoe.cli", *words]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def learn(demo: Path, folder: Path, lag: int, seed: int, correction: str, words: list[str]) -> dict[str, Any]:
    """One run: its figures, and whether its records give its weights."""
    folder.mkdir()
    recipe = rl_recipe(demo.resolve(), seed)
    del recipe["eval"]
    recipe["run"]["dir"] = str(folder / "rl")
    (folder / "rl.toml").write_text(tomli_w.dumps(recipe))
    schedule = [f"rollout.max_lag={lag}", "rollout.during_update=go_on", *CORRECTIONS[correction]] if lag else []
    pekoe("rl", str(folder / "rl.toml"), *schedule, *words)
    evaluation = eval_recipe(demo.resolve(), "sft", seed)
    evaluation["model"]["path"] = str(folder / "rl" / "model")
    (folder / "eval.toml").write_text(tomli_w.dumps(evaluation))
    printed = pekoe("eval", str(folder / "eval.toml"))
    result = json.loads(printed[printed.index("{") :])
    steps = [event for event in read_lines(folder / "rl" / "journal.jsonl") if event["event"] == "step"]
    replayed = pekoe("rl", "--replay", str(folder / "rl")).strip().splitlines()
    return {
        "lag": lag,
        "seed": seed,
        "correction": correction if lag else "none needed",
        "pass_at_1": result["pass_at_1"],
        "ci95": result["ci95"],
        "num_steps": len(steps),
        "lag_mean": sum(step.get("lag_mean", 0.0) for step in steps) / len(steps),
        "lag_max": max(step.get("lag_max", 0) for step in steps),
        "replay": [line for line in replayed if "trained again" in line or "log-probs" in line],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=Path("runs/demo"), help="directory of a finished pekoe demo")
    parser.add_argument("--lags", type=int, nargs="+", default=[0, 1, 2, 4])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--corrections", nargs="+", choices=CORRECTIONS, default=list(CORRECTIONS))
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("words", nargs="*", help="further overrides, such as num_steps=10")
    args = parser.parse_args()
    if not (args.demo / "sft" / "model").is_dir():
        parser.error(f"--demo: expected the directory of a finished pekoe demo, got {args.demo}")
    runs: list[dict[str, Any]] = []
    print(f"{'lag':>3} {'seed':>4} {'correction':>12} {'pass@1':>7} {'95 %':>16} {'mean lag':>8}  training again")
    with tempfile.TemporaryDirectory(prefix="pekoe-learn-async-") as folder:
        for lag in args.lags:
            for seed in args.seeds:
                for correction in args.corrections if lag else ["off"]:
                    place = Path(folder) / f"{lag}-{seed}-{correction}"
                    run = learn(args.demo, place, lag, seed, correction, args.words)
                    runs.append(run)
                    low, high = run["ci95"]
                    print(
                        f"{lag:>3} {seed:>4} {run['correction']:>12} {run['pass_at_1']:>7.1%} {low:>7.1%} to "
                        f"{high:>5.1%} {run['lag_mean']:>8.2f}  {run['replay'][0].split('; ')[-1]}",
                        flush=True,
                    )
                    if args.json:
                        about = {"pekoe": __version__, "torch": torch.__version__, "machine": platform.machine()}
                        args.json.write_text(json.dumps({**about, "words": args.words, "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
