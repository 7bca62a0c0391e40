"""SmolLM2-135M-Instruct learns countdown: SFT on searches, then RL on verdicts, each measured on held-out problems.

    make example-smollm2                       # what it installs, too
    make example-smollm2 ARGS=--quick          # a smoke test of every stage, in minutes; it learns nothing

Every stage is a `pekoe` command (or a program beside this one) in a process of its own, printed before it runs. A
stage that has ended is not run again, and one that was stopped goes on: the same command does both. In the end
`summary.json` has the figures with their 95 % intervals over problems, the paired tests, the reward of each RL step,
seconds and peak memory of each stage, and samples of the same problems by each of the three models, unedited.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from pekoe.core.errors import UserError
from pekoe.core.journal import read_lines
from pekoe.run.evaluate import compare

HERE = Path(__file__).resolve().parent
STATE = "stages.json"
MEASURED = ("start", "sft", "rl")  # models, in the order in which they come to be
NUM_SHOWN = 4  # held-out problems whose samples go into the summary


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much of everything. The defaults are those of the recipes beside this file."""

    demonstrations: int = 1280
    epochs: int = 2
    batch: int = 16  # demonstrations of an SFT step
    problems: int = 320  # of RL, in turn
    steps: int = 16  # of RL
    prompts: int = 16  # problems of an RL step
    samples: int = 8  # responses to each
    rl_tokens: int = 192  # at which a response of RL is cut
    held_out: int = 128
    eval_samples: int = 8
    new_tokens: int = 192  # at which one of an evaluation is
    threads: int = 0  # of each stage; 0: as many as there are cores


QUICK = Sizes(
    demonstrations=16,
    epochs=1,
    batch=8,
    problems=4,
    steps=2,
    prompts=2,
    samples=4,
    rl_tokens=48,
    held_out=4,
    eval_samples=2,
    new_tokens=48,
)
HELP = {
    "demonstrations": "of SFT",
    "epochs": "of SFT",
    "batch": "demonstrations of an SFT step",
    "problems": "of RL, in turn",
    "steps": "of RL",
    "prompts": "problems of an RL step",
    "samples": "responses to a problem in RL",
    "rl_tokens": "at which a response is cut in RL",
    "held_out": "problems of the evaluations",
    "eval_samples": "responses to a problem in the evaluations",
    "new_tokens": "at which a response is cut in the evaluations",
    "threads": "of each stage; 0: as many as there are cores",
}


class Example:
    """The stages in `out`, with the seconds and the peak memory of those that have begun, in stages.json."""

    def __init__(self, out: Path, model: Path | None, seed: int, sizes: Sizes, quick: bool) -> None:
        self.out, self.seed, self.sizes, self.quick = out, seed, sizes, quick
        self.own_model = model is not None
        self.model = model or Path("build/smollm2/model")
        settings = {"quick": quick, "seed": seed, "model": str(self.model), **asdict(sizes)}
        self.state: dict[str, Any] = {"settings": settings, "done": [], "seconds": {}, "peak_bytes": {}}
        file = out / STATE
        if file.exists():
            saved = json.loads(file.read_text(encoding="utf-8"))
            if saved["settings"] != settings:
                changed = {k: saved["settings"].get(k) for k, v in settings.items() if saved["settings"].get(k) != v}
                raise UserError(
                    f"{out}: expected the settings that it was begun with, {changed}, got "
                    f"{ {k: settings[k] for k in changed} }; add --fresh to remove it, or choose another --out"
                )
            self.state = saved
        elif out.exists() and any(out.iterdir()):
            raise UserError(f"{out}: expected a new directory or one of this example, got something else")
        else:
            out.mkdir(parents=True, exist_ok=True)
            self._write()

    def run(self) -> None:
        """All stages. SystemExit with a stage's status where it fails or is stopped."""
        data, sizes = self.out / "data", self.sizes
        if not self.own_model:
            self.stage("model", ["get_model.py", self.model], again=not (self.model / "config.json").exists())
        made = {"--demonstrations": sizes.demonstrations, "--problems": sizes.problems, "--held-out": sizes.held_out}
        words = [word for pair in made.items() for word in pair]
        self.stage("data", ["countdown.py", data, *words, "--seed", self.seed])
        self.measure("start", self.model)
        self.stage("sft", ["sft", HERE / "sft.toml", *self.sft_keys()])
        self.measure("sft", self.out / "sft" / "model")
        self.stage("rl", ["rl", HERE / "rl.toml", *self.rl_keys()])
        self.measure("rl", self.out / "rl" / "model")
        self.stage("report", ["report", self.out / "rl"])

    def sft_keys(self) -> list[str]:
        return [
            *self.common_keys("sft", self.model, self.out / "data" / "demonstrations.jsonl"),
            f"sft.epochs={self.sizes.epochs}",
            f"sft.batch_size={self.sizes.batch}",
        ]

    def rl_keys(self) -> list[str]:
        sizes = self.sizes
        return [
            *self.common_keys("rl", self.out / "sft" / "model", self.out / "data" / "train.jsonl"),
            f"num_steps={sizes.steps}",
            f"rollout.prompts_per_step={sizes.prompts}",
            f"rollout.samples_per_prompt={sizes.samples}",
            f"rollout.max_new_tokens={sizes.rl_tokens}",
            # After so little SFT no answer is right, and nothing would be trained on.
            *(["verify.random=true"] if self.quick else []),
        ]

    def common_keys(self, stage: str, model: Path, data: Path) -> list[str]:
        keys = [f"run.dir={self.out / stage}", f"model.path={model}", f"data.train={data}"]
        return [*keys, *self.process_keys()]

    def process_keys(self) -> list[str]:
        threads = [f"run.threads={self.sizes.threads}"] if self.sizes.threads else []
        return [f"run.seed={self.seed}", *threads]

    def measure(self, name: str, model: Path) -> None:
        keys = {
            "model.path": model,
            "eval.data": self.out / "data" / "held_out.jsonl",
            "eval.samples": self.sizes.eval_samples,
            "eval.max_new_tokens": self.sizes.new_tokens,
            "out": self.evaluation(name),
        }
        words = [f"{key}={value}" for key, value in keys.items()]
        self.stage(f"eval_{name}", ["eval", HERE / "eval.toml", *words, *self.process_keys()])

    def evaluation(self, name: str) -> Path:
        return self.out / f"eval_{name}"

    def stage(self, name: str, words: Sequence[Any], again: bool = False) -> None:
        """Run a program beside this one, or a command of pekoe, unless it has ended before. Its seconds add up over
        the times that it was begun."""
        if name in self.state["done"] and not again:
            print(f"{name}: done before, in {self.state['seconds'][name]:.0f} s", flush=True)
            return
        first, *rest = map(str, words)
        beside = first.endswith(".py")
        program = [str(HERE / first)] if beside else ["-m", "pekoe.cli", first]
        shown = ["python", os.path.relpath(HERE / first)] if beside else ["pekoe", first]
        print(f"\n{name}: {shlex.join([*shown, *map(_short, rest)])}", flush=True)
        start = time.monotonic()
        status, peak = run_process([sys.executable, *program, *rest])
        seconds, peaks = self.state["seconds"], self.state["peak_bytes"]
        seconds[name] = round(seconds.get(name, 0.0) + time.monotonic() - start, 1)
        peaks[name] = max(peaks.get(name, 0), peak)
        if status == 0 and name not in self.state["done"]:
            self.state["done"].append(name)
        self._write()
        if status:
            print(f"\n{name}: exit status {status}; the same command goes on from there", file=sys.stderr)
            raise SystemExit(status)

    def _write(self) -> None:
        partial = self.out / f".{STATE}"
        partial.write_text(json.dumps(self.state, indent=1), encoding="utf-8")
        partial.replace(self.out / STATE)

    def summary(self) -> dict[str, Any]:
        """The figures. Written as summary.json, too."""
        results = {name: self.evaluation(name) / "results.json" for name in MEASURED}
        found = {name: json.loads(file.read_text(encoding="utf-8"))["total"] for name, file in results.items()}
        steps = [event for event in read_lines(self.out / "rl" / "journal.jsonl") if event["event"] == "step"]
        losses = [event["loss"] for event in read_lines(self.out / "sft" / "journal.jsonl") if event["event"] == "step"]
        parts: Counter[str] = Counter()
        for step in steps:
            parts.update(step["seconds"])
        found |= {
            "comparisons": {
                f"{before} -> {after}": _without_moves(compare(self.evaluation(before), self.evaluation(after)))
                for before, after in (("start", "sft"), ("sft", "rl"))
            },
            "sft_loss": [round(losses[0], 4), round(losses[-1], 4)],
            "reward": [round(step["reward"], 3) for step in steps],
            "response_tokens": [round(step["response_tokens"], 1) for step in steps],
            "logprob_diff_max": max(step.get("logprob_diff_max", 0.0) for step in steps),
            "rl_seconds": {name: round(total, 1) for name, total in parts.items()},
            "num_problems": found["rl"]["num_problems"],
            "samples_per_problem": found["rl"]["samples_per_problem"],
            **{key: self.state[key] for key in ("seconds", "peak_bytes", "settings")},
            "examples": self.examples(),
        }
        (self.out / "summary.json").write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        return found

    def examples(self) -> list[dict[str, Any]]:
        """The first sample of each of the first held-out problems, by each model, as it is."""
        first: dict[str, dict[str, Any]] = {}
        for name in MEASURED:
            for line in read_lines(self.evaluation(name) / "responses.jsonl"):
                if line["sample"] == 0:
                    entry = first.setdefault(line["uid"], {"uid": line["uid"], "prompt": line["prompt"]})
                    entry[name] = {key: line[key] for key in ("response", "label", "tokens", "finish_reason")}
        return [first[uid] for uid in sorted(first)[:NUM_SHOWN]]


def _short(word: str) -> str:
    return os.path.relpath(word) if word.startswith(str(HERE)) else word


def _without_moves(comparison: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in comparison.items() if key != "moved_most"}


def run_process(command: Sequence[str]) -> tuple[int, int]:
    """Exit status, as a shell has it, and peak resident bytes of a process, which is passed the stop signals."""
    with subprocess.Popen(command) as process:
        with passing_signals(process.pid):
            _, waited, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(waited)
    status = process.returncode
    unit = 1 if sys.platform == "darwin" else 1024
    return (status if status >= 0 else 128 - status), usage.ru_maxrss * unit


@contextmanager
def passing_signals(pid: int) -> Iterator[None]:
    """SIGTERM goes on to the process; SIGINT, too, where no terminal has sent it to both."""

    def pass_on(number: int, frame: object) -> None:
        if number != signal.SIGINT or not os.isatty(0):
            os.kill(pid, number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def describe(found: dict[str, Any], out: Path) -> str:
    """The text that is printed at the end."""
    names = {"start": "as it came", "sft": "after SFT ", "rl": "after RL  "}
    samples = found["samples_per_problem"]
    lines = [
        "",
        f"SmolLM2-135M-Instruct on {found['num_problems']} held-out countdown problems x {samples} samples "
        "(temperature 1.0), 95 % intervals over problems:",
    ]
    for name, title in names.items():
        one = found[name]
        low, high = one["ci95"]
        lines.append(
            f"  {title}  pass@1 {one['pass_at_1']:6.1%} [{low:.1%}, {high:.1%}]   pass@{samples} "
            f"{one['pass_at_k'][str(samples)]:6.1%}   {one['response_tokens']:.0f} tokens a response, "
            f"{one['truncation_rate']:.0%} cut"
        )
    for pair, one in found["comparisons"].items():
        (low, high), p = one["ci95"], one["p_value"]
        chance = "p < 0.001" if p < 0.001 else f"p = {p:.2g}"
        lines.append(
            f"  {pair}: {100 * one['difference']:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}], {chance}; "
            f"{one['num_better']} problems better, {one['num_worse']} worse"
        )
    total = sum(found["seconds"].values())
    lines += [
        f"  reward of the first and the last five RL steps: {_mean(found['reward'][:5]):+.2f}, "
        f"{_mean(found['reward'][-5:]):+.2f}",
        f"  largest difference between sampling and training log-probs: {found['logprob_diff_max']:.0e}",
        "  seconds: " + ", ".join(f"{name} {value:.0f}" for name, value in found["seconds"].items()) + f"; {total:.0f}",
        f"  peak memory: {max(found['peak_bytes'].values()) / 2**30:.1f} GiB",
    ]
    for example in found["examples"][:2]:
        lines += ["", f"  {example['prompt']}"]
        for name, title in names.items():
            said = example[name]["response"].replace("\n", " / ")
            lines.append(f"    {title}: {said[:160]}{'...' * (len(said) > 160)}  ({example[name]['label']})")
    lines += ["", f"{out}/summary.json has all of it, {out}/rl/report.html the run as a page."]
    return "\n".join(lines)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="by default runs/smollm2, with --quick runs/smollm2-quick")
    parser.add_argument("--model", type=Path, help="a model directory in place of SmolLM2's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fresh", action="store_true", help="remove what an earlier run left in the directory")
    parser.add_argument("--quick", action="store_true", help="minutes; learns nothing")
    for field in fields(Sizes):
        flag = f"--{field.name.replace('_', '-')}"
        parser.add_argument(flag, type=whole, metavar="N", help=f"{HELP[field.name]} ({field.default})")
    given = vars(parser.parse_args())
    out = given["out"] or Path("runs/smollm2-quick" if given["quick"] else "runs/smollm2")
    changed = {f.name: given[f.name] for f in fields(Sizes) if given[f.name] is not None}
    try:
        if given["fresh"] and out.exists():
            if any(out.iterdir()) and not (out / STATE).exists():
                raise UserError(f"{out}: --fresh removes an earlier run of this example; this holds something else")
            shutil.rmtree(out)
        sizes = replace(QUICK if given["quick"] else Sizes(), **changed)
        example = Example(out, given["model"], given["seed"], sizes, given["quick"])
        example.run()
        print(describe(example.summary(), out))
    except (UserError, OSError) as error:
        print(f"run.py: {error}", file=sys.stderr)
        raise SystemExit(2 if isinstance(error, UserError) else 1) from None


def whole(text: str) -> int:
    """A whole number from 0, of a command line."""
    number = int(text)
    if number < 0:
        raise ValueError(text)
    return number


if __name__ == "__main__":
    main()
