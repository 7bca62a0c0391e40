"""Allocation beside AReaL's and verl's: how many micro-batches, how even, in what time.

    python benchmarks/bench_allocation.py                   (under two minutes)

Lengths are log-normal (median 1,024, sigma 0.9, clipped to 32 and 8,192), the budget 8,192 or 16,384 tokens. Every way
gets the same draws, in turns. `bound`: the volume's. `over budget`: draws in which a micro-batch holds more than the
budget allows; Karmarkar-Karp knows none, and is given the bound as its number of bins, as verl does. Times are medians
over draws.
"""

from __future__ import annotations

import argparse
import heapq
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rollout_report import CONSOLE, hardware, write

from pekoe.algo.packing import allocate

Bins = list[list[int]]


def first_fit_decreasing(lengths: Sequence[int], budget: int) -> Bins:
    """As AReaL v0.2's `ffd_allocate`: in descending order; a new group where even the lightest has no room, else into
    the group of fewest sequences among those that have."""
    groups: Bins = []
    loads: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not groups or lengths[i] + min(loads) > budget:
            groups.append([i])
            loads.append(lengths[i])
            continue
        fitting = [g for g, load in enumerate(loads) if load + lengths[i] <= budget]
        group = min(fitting, key=lambda g: len(groups[g]))
        groups[group].append(i)
        loads[group] += lengths[i]
    return groups


def karmarkar_karp(lengths: Sequence[int], budget: int) -> Bins:
    """As verl's: the largest differencing method (Karmarkar and Karp 1982) for as many bins as the volume asks for."""
    count = -(-sum(lengths) // budget)
    heap: list[tuple[int, int, list[tuple[int, list[int]]]]] = []
    for i, length in enumerate(lengths):
        parts = [(length, [i])] + [(0, list[int]()) for _ in range(count - 1)]
        heapq.heappush(heap, (-length, i, parts))
    tie = len(lengths)
    while len(heap) > 1:
        (_, _, a), (_, _, b) = heapq.heappop(heap), heapq.heappop(heap)
        parts = [(x + y, p + q) for (x, p), (y, q) in zip(a, reversed(b), strict=True)]
        parts.sort(key=lambda part: -part[0])
        tie += 1
        heapq.heappush(heap, (parts[-1][0] - parts[0][0], tie, parts))
    return [members for _, members in heap[0][2] if members]


WAYS: dict[str, Callable[[Sequence[int], int], Bins]] = {
    "pekoe": allocate,
    "first-fit-decreasing (AReaL)": first_fit_decreasing,
    "Karmarkar-Karp (verl)": karmarkar_karp,
}


def measure(number: int, budget: int, draws: int) -> dict[str, dict[str, Any]]:
    """What each way makes of `draws` lists of `number` lengths."""
    rng = random.Random(number)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in WAYS}
    for _ in range(draws):
        lengths = [round(min(8192, max(32, rng.lognormvariate(math.log(1024), 0.9)))) for _ in range(number)]
        bound = -(-sum(lengths) // budget)
        for name, way in WAYS.items():
            if way is karmarkar_karp and number * bound > 200_000:  # n merges of k parts each
                continue
            start = time.process_time()
            bins = way(lengths, budget)
            seconds = time.process_time() - start
            largest = max(sum(lengths[i] for i in members) for members in bins)
            found[name].append(
                {
                    "bins_above_bound": len(bins) - bound,
                    "largest_over_mean": largest * len(bins) / sum(lengths),
                    "over_budget": largest > budget,
                    "seconds": seconds,
                }
            )
    return {
        name: {
            "bins_above_bound_mean": statistics.mean(one["bins_above_bound"] for one in each),
            "within_one_of_bound": statistics.mean(one["bins_above_bound"] <= 1 for one in each),
            "largest_over_mean_median": statistics.median(one["largest_over_mean"] for one in each),
            "largest_over_mean_max": max(one["largest_over_mean"] for one in each),
            "over_budget": statistics.mean(one["over_budget"] for one in each),
            "seconds_median": statistics.median(one["seconds"] for one in each),
        }
        for name, each in found.items()
        if each
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=200, help="of 64 sequences; fewer of more")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/allocation_<hardware>_<date>.json")
    args = parser.parse_args()
    date = time.strftime("%Y-%m-%d")
    machine, slug = hardware("cpu")
    out = args.out or Path(__file__).parent / "results" / f"allocation_{slug}_{date}.json"
    table = Table("sequences", "budget", "way", "bins above bound", "largest / mean", "worst", "over budget", "ms")
    results: list[dict[str, Any]] = []
    for number, share in ((64, 1.0), (512, 0.25), (8192, 0.03)):
        for budget in (8192, 16384):
            draws = max(3, round(args.draws * share))
            measured = measure(number, budget, draws)
            results.append({"num_sequences": number, "token_budget": budget, "draws": draws, "ways": measured})
            for name, one in measured.items():
                table.add_row(
                    f"{number:,}",
                    f"{budget:,}",
                    name,
                    f"{one['bins_above_bound_mean']:.2f}",
                    f"{one['largest_over_mean_median']:.4f}",
                    f"{one['largest_over_mean_max']:.4f}",
                    f"{one['over_budget']:.0%}",
                    f"{1000 * one['seconds_median']:.1f}",
                )
    CONSOLE.print(table)
    write({"what": "bench-allocation", "hardware": machine, "date": date, "results": results}, out)
    CONSOLE.print(str(out), highlight=False)


if __name__ == "__main__":
    main()
