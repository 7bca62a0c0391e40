"""How a recipe scales, by simulation: `python benchmarks/plan_scaling.py [RECIPE] [--hardware h800] [--gpus 16,...]`.

A row for each number of GPUs: the recipe's layout scaled (half of the devices sample), in turns (lag 0), at lag 1 with
responses that go on, and the best layout that `pekoe plan --best` finds. docs/scaling.md has its tables.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from pekoe.plan.forecast import WAYS, forecast
from pekoe.plan.recipe import Asked
from pekoe.plan.search import best_layouts

GPUS = "16,32,64,128,256,512,1024"


def scaling(asked: Asked, gpus: Sequence[int], best: bool) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for number in gpus:
        here = asked.changed([f"gpus={number}"])
        ways = {"lag 0": here, "lag 1, go on": here.changed(WAYS[1, True])}
        found = {name: forecast(way, alone=True) for name, way in ways.items()}
        row: dict[str, object] = {"gpus": number}
        for name, each in found.items():
            row[name] = asdict(each.schedules[0]) if each.fits else {"changes": each.changes}
        if best:
            options = best_layouts(found["lag 0"], times=(1.0,))
            row["best"] = asdict(options[0].schedule) if options else None
        rows.append(row)
    return rows


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
    print(
        "| GPUs | schedule | step (s) | tokens/s | tokens/s/GPU | engines idle | trainer idle | publish (s) | hours |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        for name in ("lag 0", "lag 1, go on", "best"):
            one = row.get(name)
            if not isinstance(one, dict) or "step_s" not in one:
                continue
            print(
                f"| {row['gpus']} | {name} | {one['step_s']:,.0f} | {one['tokens_s']:,.0f} | "
                f"{one['tokens_s_gpu']:,.0f} | "
                f"{one['engines_idle']:.0%} | {one['trainer_idle']:.0%} | {one['stages']['publishing']:.2f} | "
                f"{one['hours']:,.1f} |"
            )
            if name == "best":
                print(f"<!-- {row['gpus']}: {' '.join(one['changes'])} -->")
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
