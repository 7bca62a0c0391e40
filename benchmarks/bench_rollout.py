"""Rollout throughput: the embedded engine, vLLM and transformers' generate on the same weights, prompts and lengths.

    make bench-rollout                                      (about 50 minutes on two cores; ARGS="--quick": some 12)
    python benchmarks/bench_rollout.py --models tiny --n 16 --prompts 64
    python benchmarks/bench_rollout.py --device cuda        (Qwen2.5-1.5B's shape in bf16, 128 prompts x 16 x 2,048)

Every system is a process of its own that loads once. They take turns (embedded, vLLM, transformers, embedded, ...),
each with all cores, the others stopped; every round has new prompts, so that no cache answers. "vllm" is the fastest
way to run it of those tried (eager or compiled, three layouts of its threads and processes), "vllm-default" what it
does unless told otherwise, eager. Medians are of the rounds. The cases that claims are made of (n 16, prompts of 64)
always have all their rounds; of the others a case begins no further round after --case-s, and a system that took
longer than --patience-s is measured once. The results say how many rounds each median is of.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import rollout_report as report
from rollout_cases import SHAPES, Case, Room, Shape, cases_of, room_for, seeds, unrelated
from rollout_hosts import Failed, Worker, closing, environment, vllm_layouts, vllm_python
from rollout_updates import server_python, server_update_times

SYSTEMS = ("embedded", "vllm", "vllm-default", "transformers")
SECTIONS = ("throughput", "sharing", "ceilings", "updates")
ASK_LIMIT_S, START_LIMIT_S, COMPILE_LIMIT_S = 900.0, 120.0, 240.0
PROBE_TOKENS = 16  # a response's, where a system is only warmed or tried
UPDATE_SHAPES = ("nano", "tiny", "small")  # through real servers; larger ones take minutes to start


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(SHAPES), help="default: tiny small q0.5b; on cuda q1.5b")
    parser.add_argument("--n", nargs="+", type=int, help="responses a prompt (default: 1 16; on cuda 16)")
    parser.add_argument("--prompts", nargs="+", type=int, choices=(64, 512), help="prompt lengths")
    parser.add_argument("--lengths", nargs="+", choices=("equal", "ragged"), help="response lengths")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, help="default: all; on cuda without vllm")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--servers", nargs="*", choices=("vllm", "sglang"), default=["vllm"], help="weight updates")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--case-s", type=float, default=30.0, help="see above")
    parser.add_argument("--patience-s", type=float, help="see above (default: 45, with --quick 15)")
    parser.add_argument("--quick", action="store_true", help="tiny and small, n 16, prompts of 64, throughput alone")
    parser.add_argument("--vllm-mode", choices=("auto", "eager", "compiled"), default="auto")
    parser.add_argument("--vllm-layout", choices=("auto", *vllm_layouts(1)), default="auto", help="its use of cores")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, help="results (default: benchmarks/results/rollout_<hardware>_<date>.json)")
    args = parser.parse_args(argv)
    cuda = args.device == "cuda"
    if args.quick:
        args.sections = ["throughput"]
    args.models = args.models or (
        ["q1.5b"] if cuda else ["tiny", "small"] if args.quick else ["tiny", "small", "q0.5b"]
    )
    args.n = args.n or ([16] if cuda or args.quick else [1, 16])
    args.prompts = args.prompts or ([64] if cuda or args.quick else [64, 512])
    args.lengths = args.lengths or (["equal"] if cuda else ["equal", "ragged"])
    args.systems = args.systems or [name for name in SYSTEMS if not (cuda and name.startswith("vllm"))]
    args.patience_s = args.patience_s or (15.0 if args.quick else 45.0)
    return args


class Bench:
    """One run: its results so far are written after each model."""

    def __init__(self, args: argparse.Namespace, place: Path) -> None:
        self.args, self.place = args, place
        self.results = report.header(args)
        self.seeds = seeds()
        self.vllm_taken: tuple[str, str] | None = None  # mode and layout that were fastest on the model before

    def run(self) -> None:
        for name in self.args.models:
            shape = SHAPES[name]
            directory = self.make_model(shape)
            cases = cases_of(shape, self.args.n, self.args.prompts, self.args.lengths)
            with closing({}) as workers:
                self.start(workers, shape, directory, room_for(cases), cases[0])
                if "throughput" in self.args.sections:
                    for case in cases:
                        self.measure(workers, case)
                self.remember_memory(workers, shape)
                if "embedded" in workers:
                    self.extras(workers["embedded"], shape, cases)
            if "updates" in self.args.sections and name in UPDATE_SHAPES and self.args.device == "cpu":
                self.server_updates(shape, directory)
            report.write(self.results, self.args.out)

    def say(self, text: str) -> None:
        report.CONSOLE.print(f"[dim]{time.strftime('%H:%M:%S')}[/] {text}", highlight=False)

    def note(self, text: str) -> None:
        """What was not measured, and why."""
        self.results["notes"].append(text)
        self.say(f"[yellow]{text}")

    def make_model(self, shape: Shape) -> Path:
        import torch

        from pekoe.core.spec import ModelSpec
        from pekoe.model import Decoder, save_model

        model = Decoder(ModelSpec(**shape.spec(16384 if self.args.device == "cuda" else 1024)))
        model.init_weights(0)
        self.results["parameters"][shape.name] = model.spec.num_parameters
        self.say(f"[bold]{shape.name}[/]: {model.spec.num_parameters / 1e6:.2f}M parameters")
        directory = self.place / shape.name
        save_model(model.to(torch.bfloat16) if self.args.device == "cuda" else model, directory)
        return directory

    # Starting

    def options(self, shape: Shape, room: Room) -> dict[str, Any]:
        cuda = self.args.device == "cuda"
        options = room.options(shape, 2 if cuda else 4)
        options |= {"threads": self.args.threads, "device": self.args.device}
        options["dtype"] = "bfloat16" if cuda else "float32"
        if cuda:  # both systems lie in memory together: 40 % for our KV, 30 % for a batch of transformers'
            import torch

            memory, per_token = torch.cuda.mem_get_info()[1], shape.kv_values_per_token * 2
            options["kv_tokens"] = min(room.kv_tokens, int(0.4 * memory / per_token))
            options["batch"] = min(room.sequences, int(0.3 * memory / per_token / room.longest))
        return options

    def start(self, workers: dict[str, Worker], shape: Shape, directory: Path, room: Room, first: Case) -> None:
        """Start and warm every system that there is; of vLLM the fastest way to run it, and its default."""
        options = self.options(shape, room)
        for system in self.args.systems:
            if system == "vllm":
                worker = self.faster_vllm(shape, directory, options, first)
            elif system == "vllm-default":
                worker = self.default_vllm(shape, directory, options, first)
            else:
                worker = self.start_one(system, sys.executable, directory, options, START_LIMIT_S, first)
            if worker is not None:
                workers[system] = worker
                self.results["versions"] |= {k: v for k, v in worker.about.items() if isinstance(v, str)}

    def start_one(
        self, system: str, python: str, directory: Path, options: dict[str, Any], limit_s: float, first: Case
    ) -> Worker | None:
        name = "-".join([directory.name, system, *(options[k] for k in ("mode", "layout") if k in options)])
        env = environment(system, options, python)
        start = time.perf_counter()
        try:
            worker = Worker(system, python, directory, options, env, self.place / f"{name}.log", limit_s)
        except Failed as failed:
            self.note(f"{name}: does not start: {failed}")
            return None
        try:
            self.probe(worker, first)
        except Failed as failed:
            worker.close()
            self.note(f"{name}: {failed}")
            return None
        self.say(f"{name} is ready after {time.perf_counter() - start:.0f} s")
        return worker

    def probe(self, worker: Worker, case: Case) -> float:
        """Seconds of short responses to new prompts."""
        request = case.request(next(self.seeds))
        request["lengths"] = [[min(length, PROBE_TOKENS) for length in each] for each in request["lengths"]]
        return worker.ask(request, ASK_LIMIT_S)["seconds"]

    def faster_vllm(self, shape: Shape, directory: Path, options: dict[str, Any], first: Case) -> Worker | None:
        python, why = vllm_python()
        if python is None:
            if why not in self.results["notes"]:
                self.note(why)
            return None
        tried: dict[tuple[str, str], tuple[float, Worker]] = {}

        def attempt(mode: str, layout: str) -> None:
            limit = COMPILE_LIMIT_S if mode == "compiled" else START_LIMIT_S
            more = {"mode": mode, "layout": layout}
            worker = self.start_one("vllm", python, directory, options | more, limit, first)
            if worker is not None:
                tried[mode, layout] = min(self.probe(worker, first) for _ in range(2)), worker

        for mode, layout in self.vllm_candidates(shape):
            attempt(mode, layout)
        if tried and self.args.vllm_mode == "auto" and self.is_first_try(shape):
            attempt("compiled", self.fastest(tried)[1])
        if not tried:
            return None
        self.vllm_taken = self.fastest(tried)
        probes = {" ".join(candidate): seconds for candidate, (seconds, _) in tried.items()}
        self.results["vllm_mode"][shape.name] = {"taken": " ".join(self.vllm_taken), "probe_s": probes}
        self.say(f"vLLM runs {' '.join(self.vllm_taken)}; tried, seconds: {probes}")
        for candidate, (_, worker) in tried.items():
            if candidate != self.vllm_taken:
                worker.close()
        return tried[self.vllm_taken][1]

    def default_vllm(self, shape: Shape, directory: Path, options: dict[str, Any], first: Case) -> Worker | None:
        """Not for the largest model, whose start and turns take minutes."""
        python, _ = vllm_python()
        if python is None or shape.name not in UPDATE_SHAPES:
            return None
        return self.start_one(
            "vllm", python, directory, options | {"mode": "eager", "layout": "default"}, START_LIMIT_S, first
        )

    @staticmethod
    def fastest(tried: dict[tuple[str, str], tuple[float, Worker]]) -> tuple[str, str]:
        return min(tried, key=lambda candidate: tried[candidate][0])

    def is_first_try(self, shape: Shape) -> bool:
        """Whether eager and compiled are compared; the largest model takes its predecessor's, as a start is minutes."""
        return self.vllm_taken is None or shape.name in UPDATE_SHAPES

    def vllm_candidates(self, shape: Shape) -> list[tuple[str, str]]:
        """Modes and layouts to start with. Layouts are compared once a run, in eager mode, which starts faster."""
        mode, layout = self.args.vllm_mode, self.args.vllm_layout
        if self.vllm_taken is not None and not self.is_first_try(shape):
            return [self.vllm_taken]
        layouts = list(vllm_layouts(1)) if layout == "auto" else [layout]
        if self.args.device == "cuda":
            layouts = ["default"]
        elif self.vllm_taken is not None:
            layouts = [self.vllm_taken[1]]
        return [("eager" if mode == "auto" else mode, each) for each in layouts]

    # Measuring

    def measure(self, workers: dict[str, Worker], case: Case) -> None:
        args, rounds = self.args, {system: list[dict[str, Any]]() for system in workers}
        start = time.perf_counter()
        for i in range(args.rounds):
            if i and not case.is_headline and time.perf_counter() - start > args.case_s:
                break
            request = case.request(next(self.seeds))
            for system, done in rounds.items():
                if system == "vllm-default" and not case.is_headline:
                    continue
                if system not in workers or (done and done[-1]["seconds"] > args.patience_s):
                    continue
                try:
                    answer = workers[system].ask(request, ASK_LIMIT_S)
                    if answer["tokens"] != case.num_tokens:
                        raise Failed(f"{system}: expected {case.num_tokens} tokens, got {answer['tokens']}")
                except Failed as failed:
                    self.note(f"{case.name}: {failed}")
                    workers.pop(system).close()
                    continue
                done.append(answer)
        self.results["cases"].append(report.case_result(case, rounds))
        self.say(report.case_line(self.results["cases"][-1]))

    def remember_memory(self, workers: dict[str, Worker], shape: Shape) -> None:
        memory = {f"{system}_peak_bytes": worker.peak_bytes() for system, worker in workers.items()}
        if "embedded" in workers:
            memory["embedded_kv_bytes"] = workers["embedded"].about["kv_bytes"]
        self.results["memory"][shape.name] = memory

    def extras(self, worker: Worker, shape: Shape, cases: list[Case]) -> None:
        """What is measured of the embedded engine alone."""

        def extra(name: str, request: dict[str, Any] | None = None, **more: Any) -> Any:
            given = {k: v for k, v in (request or {}).items() if k != "do"}
            return worker.ask({"do": "extra", "name": name} | given | more, ASK_LIMIT_S)

        results, model = self.results, shape.name
        try:
            if "sharing" in self.args.sections:
                results["sharing"][model] = {
                    str(length): self.sharing(extra, Case(shape, 16, length, "equal")) for length in self.args.prompts
                }
            if "ceilings" in self.args.sections:
                request = cases[0].request(next(self.seeds))
                if self.args.device == "cuda":
                    request["lengths"] = [[min(length, 256) for length in each] for each in request["lengths"]]
                measured = extra("ceilings", num_rows=cases[0].num_sequences)
                reached = extra("decode", request)
                taken = extra("breakdown", request | {"prompts": cases[0].prompts(next(self.seeds))})
                results["ceilings"][model] = report.shares(cases[0].name, measured, reached, taken)
            if "updates" in self.args.sections:
                results["updates"][model] = {"embedded": extra("update_times")}
        except Failed as failed:
            self.note(f"{model}: {failed}")

    def sharing(self, extra: Any, case: Case) -> dict[str, Any]:
        """A group's shared prompt against the same sequences unrelated, in turns; then the same prompts once more."""
        shared: list[Any] = []
        apart: list[Any] = []
        again: list[Any] = []
        for _ in range(self.args.rounds):
            request = case.request(next(self.seeds))
            shared.append(extra("counted", request))
            again.append(extra("counted", request))
            apart.append(extra("counted", unrelated(case.request(next(self.seeds)), case.shape.vocab)))
        return report.sharing_result(case, shared, again, apart)

    def server_updates(self, shape: Shape, directory: Path) -> None:
        from pekoe.core.errors import RunError

        for name in self.args.servers:
            if server_python(name) is None:
                self.note(f"updates through {name}: no environment (make .venv-{name}/.stamp)")
                continue
            self.say(f"weight updates through {name}")
            try:
                times = server_update_times(name, directory, self.place / f"{shape.name}-{name}", self.args.threads)
            except RunError as error:
                self.note(f"updates through {name}, {shape.name}: {error}")
                continue
            self.results["updates"].setdefault(shape.name, {})[name] = times


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    args.out = args.out or report.default_out(args)
    start = time.perf_counter()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # workers are closed on the way out
    with tempfile.TemporaryDirectory(prefix="pekoe-bench-") as place:
        bench = Bench(args, Path(place))
        bench.run()
    bench.results["total_s"] = time.perf_counter() - start
    report.write(bench.results, args.out)
    report.show(bench.results)
    report.CONSOLE.print(f"{args.out}  ({bench.results['total_s'] / 60:.1f} minutes)", highlight=False)


if __name__ == "__main__":
    main()
