"""Results of `bench_rollout.py`: as JSON, and as tables."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rollout_cases import Case

CONSOLE = Console(width=None if sys.stdout.isatty() else 132)
ROOT = Path(__file__).resolve().parent.parent

Result = dict[str, Any]


# Made


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def hardware(device: str) -> tuple[str, str]:
    """A name for people, and one for files."""
    if device == "cuda":
        import torch

        name = torch.cuda.get_device_name()
        return name, re.sub(r"\W+", "-", name.lower()).strip("-")
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.is_file() else ""
    found = re.search(r"model name\s*:\s*(.*)", text)
    name, cores = found[1].strip() if found else platform.processor() or platform.machine(), os.cpu_count()
    words = [
        word for word in re.findall(r"[A-Za-z]+", name) if word.lower() not in ("amd", "intel", "r", "cpu", "processor")
    ]
    return f"{cores} x {platform.machine()} cores ({name})", f"{cores}core-{(words or ['cpu'])[0].lower()}"


def default_out(args: argparse.Namespace, what: str = "rollout") -> Path:
    date = time.strftime("%Y-%m-%d")
    return ROOT / "benchmarks/results" / f"{what}_{hardware(args.device)[1]}_{date}.json"


def about(what: str, args: argparse.Namespace) -> Result:
    """What any benchmark's results begin with."""
    return {
        "what": what,
        "hardware": hardware(args.device)[0],
        "date": time.strftime("%Y-%m-%d"),
        "commit": _git("rev-parse", "--short", "HEAD"),
        "changed_since_commit": _git("status", "--porcelain", "--", "pekoe", "benchmarks/*.py").splitlines(),
        "versions": {"python": platform.python_version()},
        "args": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
        "parameters": {},
        "notes": [],
    }


def header(args: argparse.Namespace) -> Result:
    return about("bench-rollout", args) | {
        "vllm_mode": {},
        "cases": [],
        "memory": {},
        "sharing": {},
        "ceilings": {},
        "updates": {},
    }


def write(results: Result, out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=1) + "\n")


def case_result(case: Case, rounds: dict[str, list[Result]]) -> Result:
    """Medians of tokens/s, and the embedded engine's against each other system's."""
    systems = {
        system: {
            "tokens_per_s": statistics.median(r["tokens"] / r["seconds"] for r in done),
            "num_rounds": len(done),
            "seconds": [r["seconds"] for r in done],
        }
        for system, done in rounds.items()
        if done
    }
    ours = systems.get("embedded", {}).get("tokens_per_s")
    others = {name: s["tokens_per_s"] for name, s in systems.items() if name != "embedded"}
    return {
        "model": case.shape.name,
        "n": case.n,
        "prompt_tokens": case.prompt_tokens,
        "lengths": case.kind,
        "num_sequences": case.num_sequences,
        "num_tokens": case.num_tokens,
        "systems": systems,
        "ratios": {name: ours / theirs for name, theirs in others.items()} if ours else {},
    }


def sharing_result(case: Case, shared: list[Result], again: list[Result], apart: list[Result]) -> Result:
    def rate(done: list[Result]) -> float:
        return statistics.median(r["tokens"] / r["seconds"] for r in done)

    return {
        "num_sequences": case.num_sequences,
        "on_tokens_per_s": rate(shared),
        "off_tokens_per_s": rate(apart),
        "ratio": rate(shared) / rate(apart),
        "on_prefill_tokens": shared[0]["num_prefill_tokens"],
        "off_prefill_tokens": apart[0]["num_prefill_tokens"],
        "prefill_saved": shared[0]["prefill_saved"],
        "again_cache_hit_rate": again[0]["cache_hit_rate"],
        "again_prefill_tokens": again[0]["num_prefill_tokens"],
        "rounds": {"on": shared, "again": again, "off": apart},
    }


def shares(case: str, measured: Result, reached: Result, taken: Result) -> Result:
    """What decode reaches of the machine's ceilings, and where a whole run's time goes."""
    return {
        "case": case,
        "machine": measured,
        "decode": reached,
        "share_of_matmul": reached["gflop_s"] / measured["matmul_gflop_s"],
        "share_of_matmul_at_own_shapes": reached["gflop_s"] / measured["matmul_own_shapes_gflop_s"],
        "share_of_copy": reached["gb_s"] / measured["copy_gb_s"],
        "breakdown": taken,
    }


# Shown


def case_line(result: Result) -> str:
    rates = ", ".join(f"{name} {s['tokens_per_s']:,.0f} ({s['num_rounds']})" for name, s in result["systems"].items())
    place = f"{result['model']}, n {result['n']}, prompt {result['prompt_tokens']}, {result['lengths']}"
    return f"{place}: {rates} tokens/s (rounds)"


def new_table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    return table


def show(results: Result) -> None:
    if results["cases"]:
        CONSOLE.print(_throughput(results))
    if results["memory"]:
        CONSOLE.print(_memory(results))
    if results["sharing"]:
        CONSOLE.print(_sharing(results))
    for model, found in results["ceilings"].items():
        CONSOLE.print(_ceilings(model, found))
    if results["updates"]:
        CONSOLE.print(_updates(results))
    for note in results["notes"]:
        CONSOLE.print(f"[yellow]{note}", highlight=False)


def _throughput(results: Result) -> Table:
    systems = results["args"]["systems"]
    others = [system for system in systems if system != "embedded"]
    columns = [f"{system}\ntokens/s" for system in systems] + [f"x {system}" for system in others]
    table = new_table("Throughput: medians of response tokens a second", "case", "sequences", *columns, "rounds")
    for case in results["cases"]:
        name = f"{case['model']}, n {case['n']}, prompt {case['prompt_tokens']}, {case['lengths']}"
        rates = [f"{case['systems'][s]['tokens_per_s']:,.0f}" if s in case["systems"] else "-" for s in systems]
        ratios = [f"{case['ratios'][s]:.2f}" if s in case["ratios"] else "-" for s in others]
        counts = "/".join(str(case["systems"].get(s, {}).get("num_rounds", 0)) for s in systems)
        table.add_row(name, str(case["num_sequences"]), *rates, *ratios, counts)
    return table


def _memory(results: Result) -> Table:
    keys = list(dict.fromkeys(key for memory in results["memory"].values() for key in memory))
    table = new_table("Memory, GB", "model", *(key.removesuffix("_bytes").replace("_", " ") for key in keys))
    for model, memory in results["memory"].items():
        table.add_row(model, *(f"{memory[key] / 1e9:.2f}" if key in memory else "-" for key in keys))
    return table


def _sharing(results: Result) -> Table:
    columns = ("on, tokens/s", "off, tokens/s", "on / off", "prefill on", "prefill off", "again: hits")
    table = new_table("Prefix sharing of the embedded engine, n 16, equal lengths", "case", *columns)
    for model, lengths in results["sharing"].items():
        for length, s in lengths.items():
            rates = [f"{s['on_tokens_per_s']:,.0f}", f"{s['off_tokens_per_s']:,.0f}", f"{s['ratio']:.2f}"]
            counts = [f"{s['on_prefill_tokens']:,}", f"{s['off_prefill_tokens']:,}", f"{s['again_cache_hit_rate']:.0%}"]
            table.add_row(f"{model}, prompt {length}", *rates, *counts)
    return table


def _ceilings(model: str, found: Result) -> Table:
    machine, decode, taken = found["machine"], found["decode"], found["breakdown"]
    table = new_table(
        f"Ceilings: {found['case']}, decode at {decode['tokens_per_s']:,.0f} tokens/s", "what", "", "reached"
    )
    for name, unit, top, share in (
        ("matmul 2048 x 2048", "GFLOP/s", machine["matmul_gflop_s"], found["share_of_matmul"]),
        (
            "matmul at its own shapes",
            "GFLOP/s",
            machine["matmul_own_shapes_gflop_s"],
            found["share_of_matmul_at_own_shapes"],
        ),
        ("memory copy, read + written", "GB/s", machine["copy_gb_s"], found["share_of_copy"]),
    ):
        table.add_row(name, f"{top:,.1f} {unit}", f"{share:.0%}")
    table.add_section()
    for name, seconds in taken["seconds"].items():
        largest = " (largest but matmul)" if name == taken["largest_but_matmul"] else ""
        table.add_row(name + largest, f"{seconds:.3f} s", f"{seconds / taken['total']:.0%}")
    return table


def _updates(results: Result) -> Table:
    table = new_table("Weight updates, seconds", "model and route", "save", "update", "whole", "first")
    for model, engines in results["updates"].items():
        for engine, routes in engines.items():
            for route, times in routes.items():
                name = f"{model}, {engine}, {route}"
                if engine == "embedded":
                    save, update = times.get("save", 0.0), times["update"]
                    table.add_row(name, f"{save:.4f}" if save else "", f"{update:.4f}", f"{save + update:.4f}", "")
                elif route != "start":
                    table.add_row(name, "", "", f"{times['median']:.4f}", f"{times['first']:.4f}")
    return table
