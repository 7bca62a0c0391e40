"""Results of `bench_train.py`: from what the systems answered, and as tables."""

from __future__ import annotations

import statistics

from rich.table import Table
from rollout_report import CONSOLE, Result, new_table
from train_cases import Case


def beside(case: Case, rounds: dict[str, list[Result]]) -> Result:
    """Medians over rounds of each system's seconds per optimizer step; others' against the packed trainer's, round by
    round; and how far apart losses and gradient norms are, which are of the same minibatches in the same order."""

    def mean_s(answer: Result) -> float:
        return statistics.mean(step["seconds"] for step in answer["steps"])

    systems: Result = {}
    ours = rounds["packed"]
    for name, answers in rounds.items():
        steps = [step for answer in answers for step in answer["steps"]]
        reference = [step for answer in ours for step in answer["steps"]]
        each = [mean_s(answer) for answer in answers]
        real, computed = (sum(step[key] for step in steps) for key in ("tokens", "computed"))
        systems[name] = {
            "step_s": statistics.median(each),
            "rounds_step_s": each,
            "tokens_per_s": statistics.median(
                sum(step["tokens"] for step in answer["steps"]) / sum(step["seconds"] for step in answer["steps"])
                for answer in answers
            ),
            "padding": 1 - real / computed,
            "computed_tokens_per_s": computed / sum(step["seconds"] for step in steps),
            "times_packed": statistics.median(s / mean_s(answer) for s, answer in zip(each, ours, strict=True)),
            "loss_difference": max(abs(a["loss"] - b["loss"]) for a, b in zip(steps, reference, strict=True)),
            "grad_norm_difference": max(
                abs(a["grad_norm"] / b["grad_norm"] - 1) for a, b in zip(steps, reference, strict=True)
            ),
            "microbatches": steps[0].get("microbatches"),
            "base_bytes": answers[-1]["base_bytes"],
            "peak_bytes": answers[-1]["peak_bytes"],
        }
    about = case.options() | {"tokens_per_step": sum(s["tokens"] for s in ours[0]["steps"]) / len(ours[0]["steps"])}
    seconds = {name: one["step_s"] for name, one in systems.items()}
    pairs = {
        "float32": (("trl", "trl-spin"), ("packed",)),
        "float32, each at its fastest": (("trl", "trl-spin"), ("packed", "packed-spin")),
        "bf16": (("trl-defaults-spin",), ("packed-bf16",)),
    }
    faster = {
        name: min(seconds[s] for s in theirs) / min(seconds[s] for s in mine)
        for name, (theirs, mine) in pairs.items()
        if seconds.keys() >= {*theirs, *mine}
    }
    return ({"faster_than_trl": faster} if faster else {}) | {
        "case": about,
        "num_rounds": len(ours),
        "steps_a_round": len(ours[0]["steps"]),
        "systems": systems,
    }


def show(results: Result) -> None:
    for model, found in results["packed"].items():
        CONSOLE.print(_beside(f"Packed beside padded, {model}", found))
    for model, found in results["trl"].items():
        CONSOLE.print(_beside(f"Beside trl's GRPOTrainer, {model}", found))
        for name, ratio in found.get("faster_than_trl", {}).items():
            CONSOLE.print(f"{name}: {ratio:.2f} times as fast as trl", highlight=False)
    if results["flops"]:
        CONSOLE.print(_flops(results["flops"]))
    if results["memory"]:
        CONSOLE.print(_memory(results["memory"]))
    if results["large"]:
        CONSOLE.print(_large(results["large"]))
    for note in results["notes"]:
        CONSOLE.print(f"[yellow]{note}", highlight=False)


def _beside(title: str, found: Result) -> Table:
    case = found["case"]
    title += f": {case['samples']} sequences, {case['tokens_per_step']:,.0f} tokens a step"
    columns = ("s/step", "x packed", "tokens/s", "padding", "peak MB", "of it working", "loss differs", "gradient norm")
    table = new_table(f"{title} (medians of {found['num_rounds']} rounds)", "system", *columns)
    for name, one in found["systems"].items():
        peak, working = one["peak_bytes"] / 1e6, (one["peak_bytes"] - one["base_bytes"]) / 1e6
        speed = (f"{one['step_s']:.3f}", f"{one['times_packed']:.2f}", f"{one['tokens_per_s']:,.0f}")
        same = (f"{one['loss_difference']:.1e}", f"{one['grad_norm_difference']:.1e}")
        table.add_row(name, *speed, f"{one['padding']:.0%}", f"{peak:,.0f}", f"{working:,.0f}", *same)
    return table


def _flops(flops: Result) -> Table:
    columns = ("tokens", "forward s", "backward s", "GFLOP/s", "torch.matmul's", "share", "of the best", "attention")
    table = new_table("Forward and backward beside torch.matmul on the same shapes", "model and system", *columns)
    for model, systems in flops.items():
        for name, one in systems.items():
            seconds = (f"{one['forward_s']:.3f}", f"{one['backward_s']:.3f}")
            rates = (f"{one['flop_s'] / 1e9:,.1f}", f"{one['matmul_flop_s'] / 1e9:,.1f}")
            attention = one["flops"]["attention"] / sum(one["flops"].values())
            shares = (f"{one['share']:.0%}", f"{one['share_of_best']:.0%}", f"{attention:.1%}")
            table.add_row(f"{model}, {name}", f"{one['num_tokens']:,}", *seconds, *rates, *shares)
    return table


def _memory(memory: Result) -> Table:
    title = f"Log-probs, entropies, backward: {memory['tokens']:,} x {memory['vocab']:,}, float32"
    table = new_table(title, "way", "peak MB", "above start", "of unchunked", "seconds")
    for name in ("chunked", "unchunked"):
        one = memory[name]
        peak, above = one["peak_bytes"], one["peak_bytes"] - one["base_bytes"]
        share = f"{peak / memory['unchunked']['peak_bytes']:.3f}"
        table.add_row(name, f"{peak / 1e6:,.0f}", f"{above / 1e6:,.0f}", share, f"{one['seconds']:.1f}")
    return table


def _large(large: Result) -> Table:
    columns = ("layers", "sequences", "longest", "tokens", "tokens/s", "TFLOP/s", "matmul's", "MFU", "peak GB")
    table = new_table("Whole optimizer steps, bf16 over float32 weights", "model", *columns)
    for name, one in large.items():
        sizes = (f"{one[key]:,}" for key in ("layers", "num_sequences", "longest", "num_tokens"))
        rates = (f"{one['tokens_per_s']:,.0f}", f"{one['flop_s'] / 1e12:,.2f}", f"{one['matmul_flop_s'] / 1e12:,.2f}")
        name = f"{name} ({one['parameters'] / 1e9:.2f}B)"
        table.add_row(name, *sizes, *rates, f"{one['share']:.0%}", f"{one['peak_bytes'] / 1e9:.1f}")
    return table
