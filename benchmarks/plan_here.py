"""What `pekoe plan` says of runs of this machine, beside what came out.

    pekoe doctor --measure here.toml                       # before the runs, while nothing else works
    OMP_NUM_THREADS=1 pekoe doctor --measure core.toml     # for runs whose processes have a core each
    python benchmarks/plan_here.py --hardware here.toml [--lengths RUN_DIR] [--json OUT.json] RUN_DIR ...

A run's own config.toml is planned on the profile. Lengths are those of `--lengths`, an earlier run; without
it those of each run itself: then lengths are not predicted. Measured: the median step, without the first and last.
"""

from __future__ import annotations

import argparse
import json
import tomllib
from pathlib import Path
from statistics import median
from typing import Any

from pekoe.core.journal import read_lines
from pekoe.plan.forecast import forecast
from pekoe.plan.recipe import Asked


def measured(run_dir: Path) -> dict[str, float]:
    """Seconds of a step, and idle shares, of a run's journal."""
    steps = [event for event in read_lines(run_dir / "journal.jsonl") if event["event"] == "step"]
    steps = [step for step in steps if "train" in step["seconds"]][1:-1]
    if not steps:
        raise SystemExit(f"{run_dir}: expected a run of four steps or more")
    totals = [step["step_s"] for step in steps]
    result = {"step_s": median(totals)}
    for phase in ("rollout", "train", "recompute", "sync", "verify"):
        result[phase] = median(step["seconds"].get(phase, 0.0) for step in steps)
    if all("idle_engines" in step for step in steps):
        result["engines_idle"] = median(step["idle_engines"] for step in steps)
        result["trainer_idle"] = median(step["idle_ranks"] for step in steps)
    else:  # one process: what works at a time is the phase
        shares = [(step["seconds"], total) for step, total in zip(steps, totals, strict=True)]
        result["engines_idle"] = median(1 - seconds["rollout"] / total for seconds, total in shares)
        work = ("train", "recompute")
        result["trainer_idle"] = median(1 - sum(s.get(name, 0.0) for name in work) / t for s, t in shares)
    return result


def compare(run_dir: Path, hardware: str, lengths: str | None) -> dict[str, Any]:
    """What a plan of the run's recipe says, and what came out."""
    recipe = tomllib.loads((run_dir / "config.toml").read_text(encoding="utf-8"))
    found = forecast(Asked(recipe, hardware=hardware, lengths=lengths or str(run_dir)), alone=True)
    if not found.schedules:
        raise SystemExit(f"{run_dir}: the plan says that it does not fit")
    own, seen = found.schedules[0], measured(run_dir)
    planned = {"step_s": own.step_s, "engines_idle": own.engines_idle, "trainer_idle": own.trainer_idle}
    return {"run": str(run_dir), "planned": planned | {"stages": own.stages, "wait_s": own.wait_s}, "measured": seen}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--hardware", required=True, help="a profile, by pekoe doctor --measure")
    parser.add_argument("--lengths", help="a run from whose responses lengths are drawn")
    parser.add_argument("--json", help="where to write the figures")
    args = parser.parse_args()
    rows = [compare(run, args.hardware, args.lengths) for run in args.runs]
    print("| run | step planned (s) | measured (s) | error | engines idle: planned, measured | trainer idle |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        said, seen = row["planned"], row["measured"]
        idle = [f"{said[name]:.0%}, {seen[name]:.0%}" for name in ("engines_idle", "trainer_idle")]
        error = said["step_s"] / seen["step_s"] - 1
        print(f"| {row['run']} | {said['step_s']:.3g} | {seen['step_s']:.3g} | {error:+.0%} | {' | '.join(idle)} |")
    for row in rows:
        stages = ", ".join(f"{name} {seconds:.3g}" for name, seconds in row["planned"]["stages"].items())
        phases = ", ".join(f"{k} {v:.3g}" for k, v in row["measured"].items() if not k.endswith(("_idle", "_s")))
        print(f"{row['run']}: planned {stages}; measured {phases}")
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
