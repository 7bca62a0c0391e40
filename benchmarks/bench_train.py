"""Training: packed beside padded, Pekoe's trainer beside trl's, both beside what the machine's matrix product can do.

    make bench-train                                        (some 20 minutes on two cores; ARGS="--quick": two)
    python benchmarks/bench_train.py --models small --sections trl --rounds 3
    python benchmarks/bench_train.py --device cuda          (Qwen2.5-1.5B's and 7B's shapes, up to 27,648 tokens)
    python benchmarks/bench_train.py --smoke                (that same code on a CPU with a tiny model: seconds)

packed: the trainer as it is, beside padded rectangles of the same token budget, in the order of sampling or sorted by
length (`train_worker.py`). trl: optimizer steps on one prompt's 16 responses, beside GRPOTrainer on the same ones
(`train_trl.py`); equal losses and gradient norms show that it is the same work. flops: the FLOP/s of forward and
backward, beside torch.matmul's on the same shapes. memory: log-probs over a large vocabulary, chunked or not.
large: the GPU form, whole optimizer steps. It has NOT been run on a GPU.

Every system is a process of its own that loads once and is warmed; they take turns, each with all cores, the others
stopped. Medians are of the rounds, ratios taken round by round. Threads wait at OpenMP's barriers as Pekoe's command
line has it (decision 0002), but for "-spin", which leaves OpenMP's default: slower as soon as anybody else wants a
core. "trl" is in float32, without gradient checkpointing, all 16 rows in one micro-batch (8 are no faster);
"trl-defaults" is as trl comes: bf16, checkpointing, 8 rows. "packed-bf16" multiplies in bf16 too. Results become a file
with --out.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import rollout_report as report
import train_report
from rollout_cases import SHAPES
from rollout_hosts import Failed, Worker, closing
from train_cases import Case, packed_case, trl_case

from pekoe.cli import WAITING

HERE = Path(__file__).resolve().parent
SECTIONS = ("packed", "trl", "flops", "memory")
ASK_LIMIT_S, START_LIMIT_S = 900.0, 120.0
VOCAB, TOKENS, LOGITS_COPIES = 151_936, 8192, 3.5  # of section memory; copies that unchunked needs, with room to spare
PADDED = {"packed": {}, "padded": {}, "padded-sorted": {}}
TUNED = {"rows": 16, "bf16": False, "checkpointing": False}
BESIDE_TRL: dict[str, dict[str, Any]] = {
    "packed": {},
    "packed-spin": {},
    "packed-bf16": {"bf16": True},
    "trl": TUNED,
    "trl-spin": TUNED,
    "trl-defaults-spin": {"rows": 8, "bf16": True, "checkpointing": True},
}


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", help="default: tiny small; on cuda q1.5b q7b")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, help="default: all, of the CPU's")
    parser.add_argument("--rounds", type=int, help="default: 5, with --quick 2")
    parser.add_argument("--quick", action="store_true", help="everything, small, for trying the benchmark itself")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--smoke", action="store_true", help="what --device cuda does, on a CPU with a tiny model")
    parser.add_argument("--trainer", type=json.loads, default={}, help="JSON: more arguments of Pekoe's Trainer")
    parser.add_argument(
        "--out", nargs="?", const="", help="results as JSON (benchmarks/results/train_<hardware>_<date>)"
    )
    args = parser.parse_args(argv)
    args.large = args.smoke or args.device == "cuda"
    if args.smoke and args.device == "cuda":
        parser.error("--smoke is for a CPU")
    if args.large and args.sections:
        parser.error("--sections are the CPU's")
    known = ("nano", "q1.5b", "q7b") if args.large else ("nano", "tiny", "small")
    default = ["nano"] if args.smoke or args.quick else ["q1.5b", "q7b"] if args.large else ["tiny", "small"]
    args.models = args.models or default
    if not set(args.models) <= set(known):
        parser.error(f"--models: expected some of {', '.join(known)}, got {' '.join(args.models)}")
    args.sections = [] if args.large else args.sections or list(SECTIONS)
    args.rounds = args.rounds or (2 if args.quick or args.smoke else 5)
    return args


class Bench:
    """One run. `results` grows by each section."""

    def __init__(self, args: argparse.Namespace, place: Path) -> None:
        self.args, self.place = args, place
        self.results = report.about("bench-train", args) | {name: {} for name in (*SECTIONS, "large")}
        self.trl = os.environ.get("PEKOE_TRL_PYTHON") or str(HERE.parent / ".venv-trl/bin/python")

    def run(self) -> None:
        args = self.args
        if args.large:
            self.large()
        if "trl" in args.sections and not os.access(self.trl, os.X_OK):
            self.note(f"without trl: {self.trl} is not there (make .venv-trl/.stamp)")
        for name in args.models if set(args.sections) - {"memory"} else []:
            directory = self.make_model(name)
            if "packed" in args.sections:
                self.results["packed"][name] = self.in_turns(directory, packed_case(name, args.quick), PADDED, 1)
            if "trl" in args.sections and os.access(self.trl, os.X_OK):
                case = trl_case(name, args.quick)
                self.results["trl"][name] = self.in_turns(directory, case, BESIDE_TRL, case.minibatches)
            if "flops" in args.sections:
                self.results["flops"][name] = self.flops(directory, packed_case(name, args.quick))
        if "memory" in args.sections:
            self.memory()

    def say(self, text: str) -> None:
        report.CONSOLE.print(f"[dim]{time.strftime('%H:%M:%S')}[/] {text}", highlight=False)

    def note(self, text: str) -> None:
        self.results["notes"].append(text)
        self.say(f"[yellow]{text}")

    def make_model(self, name: str) -> Path:
        from pekoe.core.spec import ModelSpec
        from pekoe.model import Decoder, save_model

        model = Decoder(ModelSpec(**SHAPES[name].spec(1024)))
        model.init_weights(0)
        self.results["parameters"][name] = model.spec.num_parameters
        self.say(f"[bold]{name}[/]: {model.spec.num_parameters / 1e6:.2f}M parameters")
        save_model(model, self.place / name)
        return self.place / name

    def start(self, name: str, directory: Path, case: Case, more: dict[str, Any]) -> Worker:
        is_trl = name.startswith("trl")
        options = {"case": case.options(), "threads": self.args.threads, "trainer": self.args.trainer} | more
        env = {"OMP_NUM_THREADS": str(self.args.threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        if not name.endswith("-spin"):
            env |= WAITING
        python, script = (self.trl, "train_trl.py") if is_trl else (sys.executable, "train_worker.py")
        system, log = name.removesuffix("-spin").removesuffix("-bf16"), self.place / f"{directory.name}-{name}.log"
        worker = Worker(system, python, directory, options, env, log, START_LIMIT_S, HERE / script)
        self.results["versions"] |= {k: v for k, v in worker.about.items() if isinstance(v, str)}
        return worker

    def in_turns(self, directory: Path, case: Case, systems: dict[str, dict[str, Any]], steps: int) -> dict[str, Any]:
        """Rounds of optimizer steps by each system, after some to warm it. A system that fails is left out."""
        rounds: dict[str, list[Any]] = {}
        with closing({}) as workers:
            for name, more in systems.items():
                try:
                    workers[name] = self.start(name, directory, case, more)
                    workers[name].ask({"do": "steps", "number": min(2, case.minibatches)}, ASK_LIMIT_S)
                except Failed as failed:
                    self.note(f"{directory.name}, {name}: {failed}")
                    if name in workers:
                        workers.pop(name).close()
            for _ in range(self.args.rounds):
                for name, worker in workers.items():
                    rounds.setdefault(name, []).append(worker.ask({"do": "steps", "number": steps}, ASK_LIMIT_S))
        found = train_report.beside(case, rounds)
        rates = ", ".join(f"{name} {one['step_s']:.3f}" for name, one in found["systems"].items())
        self.say(f"{directory.name}: {rates} s/step")
        return found

    def flops(self, directory: Path, case: Case) -> dict[str, Any]:
        found: dict[str, Any] = {}
        with closing({}) as workers:
            for name in ("packed", "packed-spin"):
                workers[name] = self.start(name, directory, case, {})
                found[name] = workers[name].ask({"do": "reached", "rounds": self.args.rounds}, ASK_LIMIT_S)
        best = max(one["matmul_flop_s"] for one in found.values())
        for one in found.values():
            one["share_of_best"] = one["flop_s"] / best
        shares = ", ".join(f"{name} {one['share_of_best']:.0%}" for name, one in found.items())
        self.say(f"{directory.name}: {shares} of torch.matmul's FLOP/s")
        return found

    def memory(self) -> None:
        """Both ways at as many tokens as the unchunked one has memory for, each in a fresh process."""
        vocab, tokens = (16_384, 2048) if self.args.quick else (VOCAB, TOKENS)
        while tokens > 1 and tokens * vocab * 4 * LOGITS_COPIES > available_bytes():
            tokens //= 2
            self.note(f"memory: no room for {2 * tokens:,} x {vocab:,} logits, {tokens:,} tokens instead")
        shape: dict[str, Any] = {"vocab": vocab, "tokens": tokens, "hidden": 64}
        found: dict[str, Any] = {}
        for name in ("chunked", "unchunked"):
            options = shape | {"chunked": name == "chunked", "threads": self.args.threads}
            command = [sys.executable, str(HERE / "train_memory.py"), json.dumps(options)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                self.note(f"memory, {name}: ended with {done.returncode}: {done.stderr[-300:]}")
                return
            found[name] = json.loads(done.stdout)
        peaks = [found[name]["peak_bytes"] for name in ("chunked", "unchunked")]
        self.results["memory"] = shape | found | {"ratio": peaks[0] / peaks[1]}

    def large(self) -> None:
        import torch
        import train_gpu

        for name in self.args.models:
            device, options = torch.device(self.args.device), self.args.trainer
            found = train_gpu.run(name, device, self.args.rounds, options, self.note)
            if found is not None:
                self.results["large"][name] = found
                self.results["parameters"][name] = found["parameters"]
        self.results["versions"]["torch"] = torch.__version__


def available_bytes() -> int:
    info = Path("/proc/meminfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), 1 << 62)


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    start = time.perf_counter()
    for variable in WAITING:
        os.environ.pop(variable, None)  # each system has its own
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # workers are closed on the way out
    with tempfile.TemporaryDirectory(prefix="pekoe-bench-") as place:
        bench = Bench(args, Path(place))
        bench.run()
    bench.results["total_s"] = time.perf_counter() - start
    train_report.show(bench.results)
    if args.out is not None:
        out = Path(args.out) if args.out else report.default_out(args, "train")
        report.write(bench.results, out)
        report.CONSOLE.print(str(out), highlight=False)
    report.CONSOLE.print(f"{bench.results['total_s'] / 60:.1f} minutes", highlight=False)


if __name__ == "__main__":
    main()
