"""How a recipe scales, by simulation: `python benchmarks/plan_scaling.py [RECIPE] [--hardware h800] [--gpus 16,...]`.

For each number of GPUs: the recipe's layout scaled (half of the devices sample), in turns (lag 0), at lag 1 with
responses that go on, and with `--best` the best layout that `pekoe plan --best` finds. For the last number: more lag,
and changes of one thing. docs/scaling.md has its tables.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pekoe.plan.forecast import WAYS, Schedule, forecast
from pekoe.plan.recipe import Asked
from pekoe.plan.search import best_layouts

GPUS = "16,32,64,128,256,512,1024"
LAGS: Mapping[str, Sequence[str]] = {"lag 0": (), "lag 1, go on": WAYS[1, True]}
MORE: Mapping[str, Sequence[str]] = {
    "lag 2, go on": WAYS[2, True],
    "lag 4, go on": ("rollout.max_lag=4", "rollout.during_update=go_on"),
    "4,096 problems": ("rollout.prompts_per_step=4096",),
    "by a directory": ("cluster.sync=disk",),
    "failures 0.02": (),
}
COLUMNS = (
    "GPUs", "way", "step (s)", "tokens/s", "a GPU", "engines idle", "trainer idle", "sampling (s)", "last tenth (s)",
    "sequences", "training (s)", "publishing (s)", "overhead (s)", "lost", "hours",
)  # fmt: skip


def scaling(asked: Asked, gpus: Sequence[int], best: bool) -> list[dict[str, Any]]:
    rows = list[dict[str, Any]]()
    for number in gpus:
        here = asked.changed([f"gpus={number}"])
        found = {}
        for name, changes in (LAGS | MORE if number == gpus[-1] else LAGS).items():
            way = replace(here.changed(changes), failures=0.02 if name.startswith("failures") else 0.0)
            found[name] = forecast(way, alone=True)
            rows += [_row(number, name, one, found[name].bounds["sampling"]) for one in found[name].schedules[:1]]
        if best:
            rows += [_row(number, "best", one.schedule) for one in best_layouts(found["lag 0"], times=(1.0,))]
    return rows


def _row(gpus: int, way: str, schedule: Schedule, bound: str = "") -> dict[str, Any]:
    return {"gpus": gpus, "way": way, "sampling_bound_by": bound} | asdict(schedule)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="boba-7b-cluster")
    parser.add_argument("--hardware", default="h800")
    parser.add_argument("--gpus", default=GPUS)
    parser.add_argument("--mean-response", type=float, default=8000)
    parser.add_argument("--best", action="store_true", help="search layouts, too")
    parser.add_argument("--json", help="where to write the figures")
    args = parser.parse_args()
    asked = Asked(args.recipe, hardware=args.hardware, mean_response=args.mean_response)
    rows = scaling(asked, [int(number) for number in args.gpus.split(",")], args.best)
    print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
    for row in rows:
        stages = row["stages"]
        cells = [row["way"], f"{row['step_s']:,.1f}", f"{row['tokens_s']:,.0f}", f"{row['tokens_s_gpu']:,.0f}"]
        cells += [f"{row['engines_idle']:.0%}", f"{row['trainer_idle']:.0%}", f"{stages['sampling']:,.1f}"]
        cells += [f"{row['last_tenth_s']:,.1f}", f"{row['running']:,.1f}", f"{stages['training']:,.1f}"]
        cells += [f"{stages['publishing']:.2f}", f"{stages['overhead']:.1f}", f"{row['lost']:.2%}"]
        print(f"| {row['gpus']:,} | {' | '.join(cells)} | {row['hours']:,.1f} |")
    for row in rows:
        print(f"{row['gpus']}, {row['way']}: {' '.join(row['changes']) or row['sampling_bound_by']}")
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
