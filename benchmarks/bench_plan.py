"""Scores the planner against published figures: `make bench-plan ARGS="--figures FILE.json --json OUT.json"`.

    python benchmarks/bench_plan.py --figures FILE.json [--json OUT.json] [--fit] [--leave-out] [--worst 3]

Every row of the file (fields: source, model, params, gpu, num_gpus, layout, prompt_len, response_len, batch, metric,
value, unit, note) is asked as `plan_rows.question` reads it. An error is |predicted / published - 1|.
A group is a source.
`--fit` fits the constants to the file and writes `pekoe/plan/fitted.json`, `--errors` only the errors in it;
`--leave-out` (`make bench-plan` has it) fits them again without each group in turn, and scores that group with what the
others gave: these errors stand beside the fitted ones.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import plan_loops
from plan_rows import Question, fits, question

from pekoe.plan.calibrate import descend
from pekoe.plan.costs import Constants, fitted

Row = dict[str, Any]
Item = tuple[Row, Question]
FITTED = Path(__file__).resolve().parents[1] / "pekoe" / "plan" / "fitted.json"
# Constants are fitted one family after the other, to the rows of that family alone.
FAMILIES: tuple[tuple[frozenset[str], tuple[str, ...]], ...] = (
    (
        frozenset({"tpot", "throughput"}),
        (
            "weight_share", "expert_share", "kv_share", "decode_flops", "prefill_flops", "expert_flops", "link_share",
            "message_s", "layer_s", "expert_layer_s", "step_s", "sequence_s", "prefill_s", "mixed", "served",
            "request_s",
        ),
    ),
    (
        frozenset({"train"}),
        (
            "train_flops", "train_attention", "train_experts", "train_passes", "train_layer_s", "train_link", "overlap",
            "batch_s", "train_ring", "train_fp8", "train_eager", "train_foreign", "train_adapter", "disk_byte_s",
        ),
    ),
    (frozenset({"sync"}), ("sync_share", "sync_tensors", "sync_peers", "sync_tensor_s", "sync_s")),
    (frozenset({"rl"}), ("step_overhead", "reload_s", "rollout_share")),
)  # fmt: skip
AT_MOST_ONE = (
    "flops",
    "_share",
    "overlap",
    "train_attention",
    "train_link",
    "train_ring",
    "train_fp8",
    "train_eager",
    "served",
)


def possible(constants: Constants) -> bool:
    """Whether no share is above one: nothing is faster than the hardware."""
    for name, value in asdict(constants).items():
        if value > 1 and not name.startswith("sync") and any(part in name for part in AT_MOST_ONE):
            return False
    return True


def log_error(item: Item, constants: Constants) -> float:
    row, asked = item
    return math.log(max(asked.answer(constants), 1e-9) / row["value"])


def loss(items: Sequence[Item], constants: Constants) -> float:
    """Absolute log errors, each at most 1; a group weighs as the root of its rows, that none may drown the others."""
    if not possible(constants):
        return math.inf
    sizes = Counter(row["source"] for row, _ in items)
    return sum(min(abs(log_error(item, constants)), 1.0) / sizes[item[0]["source"]] ** 0.5 for item in items)


def fit(items: Sequence[Item], start: Constants, rounds: int = 14) -> Constants:
    for families, names in FAMILIES:
        own = [item for item in items if item[1].family in families]
        start = descend(partial(loss, own), start, names, rounds if own else 0, 0.3)
    return start


def quantile(values: Iterable[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def is_mixture(row: Row) -> bool:
    from pekoe.plan.shapes import recognise_model

    shape = recognise_model(str(row["model"] or ""), row["params"])
    return shape is None or bool(shape.num_experts)


def scores(rows: Sequence[Row], errors: dict[int, float], key: Callable[[int, Row], str]) -> dict[str, Any]:
    """{name: {"rows", "expressed", "median_abs_error", "p90"}} by `key` of a row."""
    total, expressed = Counter[str](), defaultdict[str, list[float]](list)
    for number, row in enumerate(rows):
        total[key(number, row)] += 1
        if number in errors:
            expressed[key(number, row)].append(errors[number])
    return {
        name: {
            "rows": count,
            "expressed": len(expressed[name]),
            "median_abs_error": round(median(expressed[name]), 4) if expressed[name] else None,
            "p90": round(quantile(expressed[name], 0.9), 4) if expressed[name] else None,
        }
        for name, count in sorted(total.items())
    }


def left_out(items: Mapping[int, Item]) -> dict[int, float]:
    """Errors of all rows, each with constants fitted to the other groups; of none whose family has no other group."""
    found = dict[int, float]()
    for source in sorted({row["source"] for row, _ in items.values()}):
        families = {asked.family for row, asked in items.values() if row["source"] == source} - {"memory"}
        known = [item for item in items.values() if item[0]["source"] != source and item[1].family in families]
        if known:
            refitted = fit(known, Constants(), 10)  # from the start: the group is not to be seen in any constant
            others = {asked.family for _, asked in known}
            found |= {
                number: abs(math.expm1(log_error(item, refitted)))
                for number, item in items.items()
                if item[0]["source"] == source and item[1].family in others
            }
    return found


def release(rows: Sequence[Row], constants: Constants) -> list[dict[str, Any]]:
    """The release's six configurations (v0.2), as tokens a second, with v0.1's beside them."""
    chart = [row for row in rows if row["source"] == "AReaL v0.2 chart"]
    before = {(row["model"], row["num_gpus"]): row["value"] for row in chart if "v0.1" in row["system"]}
    found: list[dict[str, Any]] = []
    for row in chart:
        asked = question(row)
        if isinstance(asked, Question):
            value = asked.answer(constants)
            place = {"model": row["model"], "num_gpus": row["num_gpus"]}
            old = before.get((row["model"], row["num_gpus"]))
            found.append(
                place
                | {"v0.1": old, "published": row["value"], "predicted": round(value), "ratio": value / row["value"]}
            )
    return found


def simulated(items: Sequence[Item], constants: Constants) -> dict[str, float]:
    """Errors of the steps of RL loops, simulated as `pekoe plan` does."""
    asked = [(row, question(row, plan_loops.simulated)) for row, one in items if one.family == "rl"]
    loops = [(row, one) for row, one in asked if isinstance(one, Question)]
    errors = [abs(math.expm1(log_error(item, constants))) for item in loops]
    steps = [e for e, (row, _) in zip(errors, loops, strict=True) if row["metric"] == "step_time"]
    return {
        name: round(value, 4)
        for name, values in (("all", errors), ("step_time", steps))
        for name, value in ((f"{name}_median", median(values)), (f"{name}_p90", quantile(values, 0.9)))
    } | {"rows": len(errors), "step_time_rows": len(steps)}


def fitting(rows: Sequence[Row], constants: Constants) -> dict[str, dict[str, int]]:
    """Of rows about what ran, and so fitted: those that fit by our formulas. No row of these says what does not fit."""
    known = [found for row in rows if (found := fits(row, constants)) is not None]
    return {
        name: {"rows": sum(one == name for one, _ in known), "fit": sum(fit for one, fit in known if one == name)}
        for name in ("engines", "training")
    }


def table(title: str, result: dict[str, Any], left_out: dict[str, Any] | None) -> None:
    """A line a name; beside its errors those with constants of the other groups alone."""
    beside = f"  {'left out':>8} {'p90':>7}" if left_out else ""
    print(f"\n{title:<48} {'rows':>5} {'expr.':>6} {'median':>7} {'p90':>7}{beside}")
    for name, line in result.items():
        lines = [line, left_out[name]] if left_out else [line]
        shown = [
            f"{one[key]:.1%}" if one[key] is not None else "–" for one in lines for key in ("median_abs_error", "p90")
        ]
        print(f"{name[:48]:<48} {line['rows']:>5} {line['expressed']:>6} {' '.join(f'{cell:>7}' for cell in shown)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figures", required=True, help="a file of published figures")
    parser.add_argument("--json", help="where to write the scores")
    parser.add_argument("--fit", action="store_true", help="fit the constants, and keep them")
    parser.add_argument("--errors", action="store_true", help="keep the errors of the constants that there are")
    parser.add_argument("--leave-out", action="store_true", help="score each group with constants of the others")
    parser.add_argument("--simulate", action="store_true", help="score steps of RL loops by simulation, too")
    parser.add_argument("--worst", type=int, default=3, help="worst rows to name, of each family")
    args = parser.parse_args()
    rows: list[Row] = json.loads(Path(args.figures).read_text(encoding="utf-8"))
    asked = [question(row) if row.get("value") else "no value" for row in rows]
    items = [(row, q) for row, q in zip(rows, asked, strict=True) if isinstance(q, Question)]
    constants = Constants() if args.fit and not FITTED.exists() else fitted()
    if args.fit:
        constants = Constants(**{name: float(f"{value:.4g}") for name, value in asdict(fit(items, constants)).items()})
    errors = {
        number: abs(math.expm1(log_error((row, q), constants)))
        for number, (row, q) in enumerate(zip(rows, asked, strict=True))
        if isinstance(q, Question)
    }
    family = {number: q.family for number, q in enumerate(asked) if isinstance(q, Question)}
    kind = ("dense", "mixture")
    keys: dict[str, Callable[[int, Row], str]] = {
        "groups": lambda _, row: row["source"],
        "by_metric": lambda _, row: row["metric"],
        "by_family": lambda i, row: f"{family[i]}, {kind[is_mixture(row)]}" if i in family else "not expressed",
    }
    result: dict[str, Any] = {name: scores(rows, errors, key) for name, key in keys.items()} | {
        "release": release(rows, constants),
        "fits": fitting(rows, constants),
        "constants": asdict(constants),
        "not_expressed": dict(Counter(q for q in asked if isinstance(q, str)).most_common()),
    }
    if args.simulate or args.fit or args.errors:
        result["simulated"] = simulated(items, constants)
        print("steps of RL loops, simulated:", result["simulated"])
    print("of what ran, and so fitted, what fits by our formulas:", result["fits"])
    if args.leave_out:
        numbered = {i: (rows[i], q) for i, q in enumerate(asked) if isinstance(q, Question)}
        others = left_out(numbered)
        result["left_out"] = {name: scores(rows, others, key) for name, key in keys.items()}
    for name in keys:
        table(name.removeprefix("by_"), result[name], result.get("left_out", {}).get(name))
    print("\nthe release (tokens/s on H800)")
    for line in result["release"]:
        print(f"  {line['model']:<26} {line['num_gpus']:>4}: v0.1 {line['v0.1']:>7,.0f}, "
              f"v0.2 {line['published']:>7,.0f}, "
              f"predicted {line['predicted']:>7,} ({line['ratio'] - 1:+.0%})")  # fmt: skip
    print("\nthe worst of each family")
    for name in sorted(set(family.values())):
        worst = sorted((i for i in family if family[i] == name), key=lambda i: -errors[i])[: args.worst]
        for i in worst:
            row, q = rows[i], asked[i]
            assert isinstance(q, Question)
            print(f"  {name}: {row['source']}, {row['model']}, {row['gpu']} x {row['num_gpus']}, {row['metric']}: "
                  f"published {row['value']:g}, predicted {q.answer(constants):.4g}")  # fmt: skip
    print("\nnot expressed")
    for why, count in result["not_expressed"].items():
        print(f"  {count:>4}  {why}")
    if args.fit or args.errors:
        # What a plan's intervals are made of: the share of rows that half and nine tenths of the errors stay below.
        spread = {
            name: {
                "median": round(median(errors[i] for i in family if family[i] == name), 3),
                "p90": round(quantile((errors[i] for i in family if family[i] == name), 0.9), 3),
                "rows": sum(value == name for value in family.values()),
            }
            for name in sorted(set(family.values()) - {"memory"})  # a plan's is of Pekoe's own trainer, of no row
        }
        loops = result["simulated"]  # as a plan does
        for name, kind in (("rl", "all"), ("step", "step_time")):
            spread[name] = {part: round(loops[f"{kind}_{part}"], 3) for part in ("median", "p90")}
            spread[name]["rows"] = loops["rows" if name == "rl" else "step_time_rows"]
        FITTED.write_text(json.dumps({"constants": asdict(constants), "errors": spread}, indent=1) + "\n")
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
