"""What `pekoe plan` says of runs of this machine, beside what came out.

    python benchmarks/plan_here.py --all DIR [--demo runs/demo] [--steps 12] [--json OUT.json]
    python benchmarks/plan_here.py --hardware here.toml [--lengths RUN_DIR] [--json OUT.json] RUN_DIR ...

`--all` needs a finished demo and a machine that does nothing else. It measures the profile of the machine, and those of
a process of a cluster: what each of two has while both work (engines or ranks, which take turns at lag 0), and each of
four (both at once, at lag 1), as two cores are here for all of them. Then it runs the recipe laptop as it is and with
four settings changed, and on a cluster (2 engines, 2 ranks) at lag 0 and 1; the demo's own RL stage is compared, too.
Lengths are those of the demo's RL stage.

Otherwise a run's own config.toml is planned on the profile. Lengths are those of `--lengths`, an earlier run; without
it those of each run itself: then lengths are not predicted. Measured: the median step, without the first and last.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tomllib
from pathlib import Path
from statistics import median
from typing import Any

from pekoe.core.journal import read_lines
from pekoe.plan.forecast import forecast
from pekoe.plan.recipe import Asked

CLUSTER = ("cluster.generation.engines=2", "cluster.training.ranks=2")
RUNS = {
    "as-it-is": (),
    "64-prompts": ("rollout.prompts_per_step=64",),
    "16-samples": ("rollout.samples_per_prompt=16",),
    "small-budget": ("train.token_budget=2048",),
    "checkpointing": ("train.activation_checkpointing=true",),
    "cluster-lag-0": CLUSTER,
    "cluster-lag-1": (*CLUSTER, "rollout.max_lag=1"),
}


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


def run_all(folder: Path, demo: Path, steps: int) -> list[tuple[Path, str, str]]:
    """Measure the machine, and run. Returns each run, the profile that it is planned on, and the run whose lengths it
    is planned with."""
    seen = demo / "rl"
    if not (seen / "journal.jsonl").is_file():
        raise SystemExit(f"--demo: expected a finished demo, got {demo}; next: pekoe demo --out {demo}")
    folder.mkdir(parents=True, exist_ok=True)
    here = str(folder / "here.toml")
    if not Path(here).exists():
        _pekoe("doctor", "--measure", here)
    found = [(seen, here, str(seen))]
    for name, keys in RUNS.items():
        at_once = (4 if "rollout.max_lag=1" in keys else 2) if name.startswith("cluster") else 0
        place, profile = folder / name, _profile_of_one(folder, at_once) if at_once else here
        data = f"data.train={demo}/data/train.jsonl", f"eval.data={demo}/data/held_out.jsonl"
        own = f"run.dir={place}", f"num_steps={steps}", f"model.path={demo}/sft/model", f"eval.every={10 * steps}"
        _pekoe("rl", "laptop", *data, *own, *keys)
        found.append((place, profile, str(seen)))
    return found


def _profile_of_one(folder: Path, number: int) -> str:
    """The profile of one of `number` processes while all of them work."""
    file = folder / f"one-of-{number}.toml"
    if not file.exists():
        _pekoe("doctor", "--measure", str(file), "--processes", str(number))
    return str(file)


def _pekoe(*arguments: str) -> None:
    print("pekoe", *arguments, file=sys.stderr)
    subprocess.run([sys.executable, "-m", "pekoe.cli", *arguments], check=True, stdout=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path)
    parser.add_argument(
        "--all", type=Path, metavar="DIR", help="measure this machine, and run what is compared, in DIR"
    )
    parser.add_argument("--demo", type=Path, default=Path("runs/demo"), help="with --all: a finished demo")
    parser.add_argument("--steps", type=int, default=12, help="with --all: of each run; 4 at the least")
    parser.add_argument("--hardware", help="a profile, by pekoe doctor --measure")
    parser.add_argument("--lengths", help="a run from whose responses lengths are drawn")
    parser.add_argument("--json", help="where to write the figures")
    args = parser.parse_args()
    if bool(args.all) == bool(args.hardware and args.runs):
        parser.error("expected --all DIR, or --hardware FILE.toml with run directories")
    runs = [(run, args.hardware, args.lengths) for run in args.runs]
    rows = [compare(*one) for one in (run_all(args.all, args.demo, args.steps) if args.all else runs)]
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
