"""The command line: parses arguments, calls one package, turns errors into messages and exit codes.

Commands import what they need when they run: `pekoe --help` and a misspelt key must not wait for torch.
"""

from __future__ import annotations

import sys

if __name__ == "__main__" and not sys.flags.safe_path:
    del sys.path[0]  # the current directory, where `-m` (torchrun) puts it: a file in it must not pass for a library

import contextlib
import json
import os
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console
from typer.core import TyperCommand

from pekoe import __version__
from pekoe.config.base import copy_recipe, heads_of_recipes, refuse_recipe, start_of_recipe
from pekoe.config.keys import describe, keys_of, show_config
from pekoe.config.recipes import (
    COMMANDS,
    Config,
    CurateConfig,
    EvalConfig,
    RLConfig,
    SFTConfig,
    TrainingConfig,
    load_config,
)
from pekoe.core.errors import Interrupted, RunError, UserError
from pekoe.core.progress import NoProgress, ProgressReporter
from pekoe.core.words import counted
from pekoe.report import LiveProgress, PlainProgress, make_progress
from pekoe.report.trackers import tracking

app = typer.Typer(
    name="pekoe",
    help="Train language models to reason, by reinforcement learning on rewards that can be checked.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
C = TypeVar("C", bound=Config)
_OVERRIDE = re.compile(r"[a-z_]+(\.[a-z_]+)+=")  # section.key=value

# How OpenMP's threads wait at barriers, set before torch is loaded: they spin a little and then sleep (decision 0002).
# Spinning alone makes a step several times slower as soon as a judge wants a core; sleeping alone slows small models.
WAITING = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000"}


class RecipeCommand(TyperCommand):
    """A command whose help ends with the keys of its recipes."""

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Keys (what each means: pekoe keys [SECTION])"):
            formatter.write_dl([(key.name, key.form) for key in keys_of(COMMANDS[str(self.name)])])


_RECIPE = typer.Argument(
    metavar="RECIPE", help="a TOML file, or a recipe that comes with Pekoe: pekoe recipe lists them"
)
Recipe = Annotated[str, _RECIPE]
_OVERRIDES = typer.Argument(
    metavar="[section.key=value]...", help="change keys, such as optim.lr=1e-4; another recipe sets those in it"
)
Overrides = Annotated[list[str] | None, _OVERRIDES]
_FROM = typer.Option("--from", metavar="STEP", min=0, help="go back to the checkpoint of this step; 0: begin anew")
FromStep = Annotated[int | None, _FROM]
DryRun = Annotated[bool, typer.Option("--dry-run", help="print the resolved recipe and stop")]


@contextlib.contextmanager
def viewing(config: TrainingConfig | None = None, results: bool = False) -> Iterator[ProgressReporter]:
    """The progress display, and the trackers of a run's recipe; both are closed at the end.

    `results`: stdout is for the command's results, so the display goes to stderr.
    """
    if not _is_first_process():
        yield NoProgress()
        return
    view: LiveProgress | PlainProgress = make_progress(Console(stderr=results))
    with view if isinstance(view, LiveProgress) else contextlib.nullcontext():
        if config is None:
            yield view
            return
        with tracking(config.track, Path(config.run.dir), config.model_dump(), view) as tracked:
            yield tracked


def read_recipe(recipe: str | dict[str, Any], overrides: list[str] | None, kind: type[C], dry_run: bool) -> C:
    """The config of a command; with --dry-run, print it and end the command."""
    config = load_config(recipe, overrides or (), kind)
    if dry_run:
        typer.echo(show_config(config), nl=False)
        raise typer.Exit()
    return config


@app.command(cls=RecipeCommand)
def rl(
    recipe: Recipe,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    from_step: FromStep = None,
    replay: Annotated[
        bool, typer.Option("--replay", help="train again from saved rollouts: pekoe rl --replay RUN_DIR [STEP]")
    ] = False,
) -> None:
    """Reinforcement learning on verified rewards.

    A run found in run.dir goes on from its last checkpoint. Ctrl-C keeps the last complete step.

    --replay RUN_DIR STEP trains again on the rollouts of one step, from the checkpoint before it, and prints its loss
    beside the run's. --replay RUN_DIR trains the whole run again, from the model that it began with, and says whether
    the weights are the same (exit status 1 where they are not). Nothing is written.
    """
    if replay:
        words = overrides or []
        if from_step is not None or len(words) > 1 or not all(word.isdecimal() for word in words):
            raise UserError(f"rl --replay: expected RUN_DIR, or RUN_DIR STEP, got {' '.join([recipe, *words])}")
        from pekoe.run.replay import replay as replay_step
        from pekoe.run.replay import replay_run

        with viewing() as view:
            if words:
                typer.echo(str(replay_step(Path(recipe), int(words[0]), view)))
                return
            again = replay_run(Path(recipe), view)
        typer.echo(str(again))
        if not again.same:
            raise typer.Exit(1)
        return
    config = read_recipe(recipe, overrides, RLConfig, dry_run)
    from pekoe.run.build import build_rl
    from pekoe.run.interrupt import Stop
    from pekoe.run.rl import run_rl

    stop = Stop()
    with stop.listening(), viewing(config) as view, contextlib.ExitStack() as stack:
        if config.cluster is not None:
            _ray_package().run_cluster(config, view, stop, from_step)
        else:
            run_rl(build_rl(config, view, stop, stack, from_step))
    from pekoe.report.findings import findings_of
    from pekoe.run.run_dir import where_model_is

    done = f"done: {counted(config.num_steps, 'step')}; {where_model_is(Path(config.run.dir))}"
    typer.echo("\n".join([*findings_of(Path(config.run.dir)), done]))


@app.command(cls=RecipeCommand)
def sft(recipe: Recipe, overrides: Overrides = None, dry_run: DryRun = False, from_step: FromStep = None) -> None:
    """Supervised fine-tuning on worked solutions. A run found in run.dir goes on from its last checkpoint.

    On N processes, shared as the recipe's section `parallel` says: torchrun --nproc-per-node N -m pekoe.cli sft RECIPE
    """
    config = read_recipe(recipe, overrides, SFTConfig, dry_run)
    from pekoe.run.run_dir import where_model_is
    from pekoe.run.sft import run_sft

    with viewing(config) as view:
        run_sft(config, view, from_step)
    if _is_first_process():
        typer.echo(f"done: {where_model_is(Path(config.run.dir))}")


@app.command("eval", cls=RecipeCommand)
def evaluate(
    recipe: Annotated[str | None, typer.Argument(metavar="[RECIPE.toml]", help="the recipe")] = None,
    overrides: Overrides = None,
    model: Annotated[str | None, typer.Option(help="model directory, in place of a recipe")] = None,
    data: Annotated[str | None, typer.Option(help="problem file, in place of a recipe")] = None,
    dry_run: DryRun = False,
    compare: Annotated[
        bool, typer.Option("--compare", help="two results problem by problem: pekoe eval --compare BEFORE AFTER")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="of --compare: print JSON in place of tables")] = False,
) -> None:
    """Measure pass@1 with its 95 % interval, pass@k and majority@k: 32 samples a problem, judged.

    Takes a recipe, or --model DIR --data FILE.jsonl. Prints the result as JSON, and a table beside it. With out=DIR
    every response is kept with its verdict (responses.jsonl), and the same command goes on from there.

    --compare BEFORE AFTER compares two such directories (or their results.json) with a paired test.
    """
    words = [*([recipe] if recipe else []), *(overrides or [])]
    if compare:
        if len(words) != 2:
            raise UserError(f"eval --compare: expected two results, got {' '.join(words)}")
        from pekoe.run.evaluate import compare as compare_results
        from pekoe.run.evaluate import comparison_tables

        found = compare_results(Path(words[0]), Path(words[1]))
        if as_json:
            typer.echo(json.dumps(found, indent=2))
        else:
            Console().print(*comparison_tables(found), sep="\n\n")
        return
    if recipe and "=" not in recipe:
        if model or data:
            raise UserError("eval: expected a recipe or --model and --data, got both; model.path=... changes a recipe")
        config = read_recipe(recipe, overrides, EvalConfig, dry_run)
    elif model and data:
        config = read_recipe({"model": {"path": model}, "eval": {"data": data}}, words, EvalConfig, dry_run)
    else:
        raise UserError("eval: expected a recipe, or both --model DIR and --data FILE.jsonl")
    from pekoe.run.evaluate import run_eval, table_of

    with viewing(results=True) as view:
        result = run_eval(config, view)
    Console(stderr=True).print(table_of(result))
    typer.echo(json.dumps(result.as_dict(), indent=2))


@app.command()
def sample(
    words: Annotated[
        list[str] | None, typer.Argument(metavar='["PROMPT"] [section.key=value]...', help="- reads prompts from stdin")
    ] = None,
    model: Annotated[str | None, typer.Option(help="model directory")] = None,
    data: Annotated[str | None, typer.Option(help="rows with a prompt; those with an answer are judged")] = None,
    n: Annotated[int, typer.Option("-n", min=1, help="responses to each prompt")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="a line of JSON for each response")] = False,
) -> None:
    """What a model says: to a prompt, to the rows of a file, or, with neither in a terminal, in a chat.

    Keys are those of `pekoe eval`, such as eval.temperature=0.6 and eval.max_new_tokens=200 (at most 1,024 by default).
    """
    overrides = [word for word in words or [] if _OVERRIDE.match(word)]
    prompts = [word for word in words or [] if not _OVERRIDE.match(word)]
    if not model or len(prompts) + (data is not None) > 1:
        usage = 'expected --model DIR, and "PROMPT" or --data FILE or neither, and keys such as eval.temperature=0.6'
        raise UserError(f"sample: {usage}, got {words or []}")
    tree = {"model": {"path": model}, "eval": {"data": data or "-", "samples": n}}
    config = load_config(tree, overrides, EvalConfig)
    from pekoe.run.sample import chat, prompt_problem, read_prompts, show_responses, typed

    view = PlainProgress(Console(stderr=True))  # a live view would take stdout
    if not prompts and data is None and sys.stdin.isatty():
        chat(config, typed(), view, typer.echo)
        return
    problems = [prompt_problem(prompts[0])] if prompts not in ([], ["-"]) else read_prompts(data or "-")
    show_responses(config, problems, view, typer.echo, as_json)


@app.command()
def serve(
    model: Annotated[str, typer.Argument(metavar="MODEL_DIR", help="model directory")],
    overrides: Overrides = None,
    host: Annotated[str, typer.Option(help="0.0.0.0: whoever reaches this machine and has the key")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free")] = 8000,
) -> None:
    """An OpenAI-compatible endpoint, until Ctrl-C. Its key: the variable PEKOE_SERVE_KEY, or a new one, printed."""
    config = load_config({"model": {"path": model}, "eval": {"data": "-"}}, overrides or (), EvalConfig)
    from pekoe.run.serve import run_serve

    run_serve(config, host, port, PlainProgress(Console(stderr=True)), typer.echo)


@app.command(cls=RecipeCommand)
def curate(recipe: Recipe, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Keep the problems worth training on: sample each (8 times), judge, drop those that are all right.

    Writes problems.jsonl with pass rates, and dropped.jsonl with reasons, into the recipe's `out`. Stopped in the
    middle, the same command goes on. curate.samples=0 only reads, thins out and mixes.
    """
    config = read_recipe(recipe, overrides, CurateConfig, dry_run)
    from pekoe.run.curate import run_curate, table_of

    with viewing() as view:
        curated = run_curate(config, view)
    Console().print(table_of(curated))
    typer.echo(f"done: {counted(len(curated.problems), 'problem')} in {config.out}/problems.jsonl")


@app.command()
def keys(
    section: Annotated[str, typer.Argument(metavar="[SECTION]", help="such as optim, or a key such as optim.lr")] = "",
) -> None:
    """What a recipe may say: each key with its type, default and meaning. Without a section: all keys of `pekoe rl`.

    Keys that are others for another command stand under a line that names it.
    Of a key that TRL or verl have by another name it says ours.
    """
    typer.echo(describe(COMMANDS, section))


@app.command()
def recipe(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="of the recipe; without it: a list")] = None,
    out: Annotated[str | None, typer.Option(help="the file to write; by default NAME.toml")] = None,
) -> None:
    """Write a recipe that comes with Pekoe to a file of yours. A name will do, too: pekoe rl laptop optim.lr=1e-3."""
    if name is None:
        for known, head in heads_of_recipes().items():
            typer.echo(f"{known:<16} {textwrap.shorten(head, 100, placeholder=' …')}")
        return
    typer.echo(f"{(file := copy_recipe(name, out))}: change it, and start it with: {start_of_recipe(name, file)}")


@app.command()
def data(
    file: Annotated[str, typer.Argument(metavar="FILE", help="problems: a file, a directory, or hf:OWNER/NAME")],
    overrides: Overrides = None,
    model: Annotated[str | None, typer.Option(help="model directory: shows prompts as it sees them")] = None,
    sft: Annotated[bool, typer.Option("--sft", help="the file holds worked solutions for pekoe sft")] = False,
) -> None:
    """Show how a file is read: its layout, three examples, lengths, and what is wrong with which rows.

    Keys are those of recipes, such as data.columns.prompt=question or verify.functions='["reward:score"]'. Exit status
    1 where there are rows that cannot be used.
    """
    from pekoe.config.recipes import DataConfig, DemonstrationsConfig
    from pekoe.run.look import look_at_demonstrations, look_at_problems

    refuse_recipe(file)
    tree = {"data": {"train": file}} | ({"model": {"path": model}} if model else {})
    with viewing(results=True) as view:
        if sft:
            look = look_at_demonstrations(load_config(tree, overrides or (), DemonstrationsConfig))
        else:
            look = look_at_problems(load_config(tree, overrides or (), DataConfig), view)
    typer.echo(str(look))
    if look.num_bad:
        raise typer.Exit(1)


@app.command()
def demo(
    out: Annotated[str, typer.Option(help="directory of the demo's files")] = "runs/demo",
    seed: Annotated[int, typer.Option(min=0, help="seed of everything that is drawn")] = 0,
    control: Annotated[
        bool, typer.Option("--control", help="draw verdicts at random: the pass rate must then not rise")
    ] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="remove what an earlier demo left in the directory")] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="a smoke test of every stage in minutes; learns nothing")
    ] = False,
    cluster: Annotated[
        bool, typer.Option("--cluster", help="then RL again, on Ray: 2 engines and 2 training ranks")
    ] = False,
    lora: Annotated[bool, typer.Option("--lora", help="then RL again, with an adapter of low rank")] = False,
    device: Annotated[str, typer.Option(help="cpu, or cuda: there in bfloat16")] = "cpu",
) -> None:
    """SFT and RL of a small model on a laptop, from random weights, on verified answers."""
    from pekoe.demo.run import run_demo

    with viewing() as view:
        text = run_demo(Path(out), seed, control, fresh, quick, view, cluster, lora, device)
    Console().print(text, markup=False, highlight=False, soft_wrap=True)


@app.command()
def merge(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="a run's model directory, or one of PEFT's")],
    out: Annotated[str, typer.Argument(metavar="OUT", help="the model directory to write")],
    float32: Annotated[bool, typer.Option("--float32", help="rounds nothing; by default the base's dtype")] = False,
) -> None:
    """Add an adapter (LoRA) to its base: a whole model directory, which loads without either."""
    from pekoe.model.hf import merge_adapter

    typer.echo(f"{out}: {merge_adapter(Path(adapter), Path(out), float32)}")


def _ray_package() -> ModuleType:
    """`pekoe.ray`; UserError where Ray is not installed."""
    try:
        import pekoe.ray as package
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise UserError("cluster: expected Ray, which is not installed: pip install 'pekoe[cluster]'") from None
    return package


@app.command()
def doctor(
    recipe: Annotated[str | None, typer.Argument(metavar="[RECIPE.toml]", help="of rl or sft")] = None,
    overrides: Overrides = None,
    memory_gib: Annotated[float | None, typer.Option(min=0.1, max=1e6, help="memory of another machine or GPU")] = None,
    processes: Annotated[int, typer.Option(min=1, max=1e6, help="how many train, or are measured, together")] = 1,
    measure: Annotated[str | None, typer.Option(metavar="FILE.toml", help="a profile for plan --hardware")] = None,
    gpu: Annotated[bool, typer.Option("--gpu", help="prove and measure what runs on a GPU: minutes, offline")] = False,
    device: Annotated[str | None, typer.Option(help="a GPU that need not be here: h100; of --gpu: cpu")] = None,
    parts: Annotated[str | None, typer.Option(metavar="A,B", help="of --gpu: some of its parts")] = None,
    json_file: Annotated[str | None, typer.Option("--json", metavar="FILE", help="of --gpu: what was found")] = None,
) -> None:
    """This machine's hardware and optional packages; with a recipe, whether its training fits in memory.

    Describes a step: responses, tokens, micro-batches, and seconds if the run has begun. Predicts the peak memory of
    one training process from a step of the recipe's shapes on meta tensors, and prints the largest
    train.token_budget that fits; --device h100: there. Exit status 2 if the recipe does not fit.

    --gpu goes through numbers, weights, memory and speeds in parts of their own limits; exit status 1 if one failed.
    """
    if gpu:
        from pekoe.run.first_hour.command import prove

        raise typer.Exit(0 if prove(device or "cuda", parts, Path(json_file) if json_file else None, typer.echo) else 1)
    from pekoe.run.doctor import available_bytes, environment, examine

    if measure is not None:
        from pekoe.plan.calibrate import write_profile
        from pekoe.run.profile import measure_machine
        from pekoe.run.profile_processes import measure_together

        found = measure_together(processes) if processes > 1 else measure_machine()
        return typer.echo(write_profile(Path(measure), *found))
    fault: str | None = None
    memory_bytes = int(memory_gib * 2**30) if memory_gib else None
    if recipe is None:
        if device is not None:
            raise UserError(
                "doctor --device: expected a recipe, whose memory is predicted there, or --gpu, got neither"
            )
        rows = [*environment(), ("memory", f"{available_bytes('cpu') / 2**30:.1f} GiB available")]
        lines = [f"{name:<14} {value}" for name, value in rows]
    else:
        lines, fault = examine(
            recipe, overrides or [], processes, memory_bytes, lambda s, view: _ray_package().plan(s, view), device
        )
    for line in lines:
        Console().print(line, markup=False, highlight=False, soft_wrap=True)
    if fault:
        raise UserError(fault)


@app.command()
def plan(
    recipe: Recipe,
    overrides: Overrides = None,
    hardware: Annotated[str, typer.Option(help="a device such as h100 or mi300x, or a TOML file of your own")] = "h100",
    gpus: Annotated[int | None, typer.Option(min=1, help="in all; by default as many as the recipe has")] = None,
    price: Annotated[float | None, typer.Option(min=0, help="of a GPU and hour")] = None,
    mean_response: Annotated[float | None, typer.Option(min=1, help="tokens; by default 0.3 x the limit")] = None,
    mean_prompt: Annotated[float | None, typer.Option(min=1, help="tokens; by default 128")] = None,
    lengths: Annotated[str | None, typer.Option(metavar="RUN_DIR", help="draw lengths from a run's responses")] = None,
    failures: Annotated[float, typer.Option(min=0, help="of a GPU in 1,000 hours")] = 0.0,
    kernels: Annotated[str | None, typer.Option(help="vllm or sglang: times of AIConfigurator; pekoe[plan]")] = None,
    what_if: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="compare changes; repeatable")] = None,
    best: Annotated[bool, typer.Option("--best", help="search layouts: time against price")] = False,
    page: Annotated[str | None, typer.Option(metavar="FILE.html", help="write a page with plots, too")] = None,
    explain: Annotated[bool, typer.Option("--explain", help="formulas and constants too")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """What a recipe of rl takes on devices that are not here: memory, seconds of a step, hours, price.

    With how wrong such predictions of published figures were. Exit status 2 if the recipe does not fit.
    """
    from pekoe.plan.command import Asked, run_plan

    given = hardware, gpus, mean_response, mean_prompt, lengths, price, failures
    asked = Asked(recipe, tuple(overrides or ()), *given, kernels=kernels)
    run_plan(Console(), asked, what_if or (), best, explain, as_json, page)


@app.command()
def verify(
    files: Annotated[
        list[str],
        typer.Argument(
            metavar="CASES.jsonl...", help='lines {"id"?, "response", "gold", "kind"?, "label"?}; - is stdin'
        ),
    ],
    summary: Annotated[
        bool, typer.Option("--summary", help="a table of error rates, for lines that carry labels (true, false)")
    ] = False,
    kind: Annotated[str, typer.Option(help="of lines without one; by default of one --function, or math")] = "",
    function: Annotated[
        list[str] | None,
        typer.Option(metavar="MODULE:NAME", help="a reward of your own that lines may name; repeatable"),
    ] = None,
    references: Annotated[
        bool, typer.Option("--references", help="the files hold problems: name every reference that is refused")
    ] = False,
) -> None:
    """Judge responses: prints one JSON verdict a line, in input order.

    With --summary, where lines carry labels: how many right answers were rejected (FN) and wrong ones accepted (FP),
    and how many responses could not be judged (FAULT; exit status 1 where there are any).
    With --references, of files of problems: which references cannot be read, or are not accepted as answers (exit
    status 1 where there are any).
    """
    if references and summary:
        raise UserError("--references: expected without --summary, which judges responses, got both")
    from pekoe.run.verify import check_references, judge_files, read_files

    functions = function or []
    kind = kind or (f"function:{functions[0]}" if len(functions) == 1 else "math")
    by_file = [] if references else read_files(files, kind, functions)
    with viewing(results=True) as view:
        if references:
            shown = check_references(files, functions, view)
        else:
            shown = judge_files(by_file, kind, functions, summary, view)
    if shown.table is not None:
        Console().print(shown.table)
    typer.echo("".join(f"{line}\n" for line in shown.lines), nl=False)
    if shown.note:
        typer.echo(shown.note, err=True)
    if shown.failed:
        raise typer.Exit(1)


@app.command()
def report(
    runs: Annotated[list[str], typer.Argument(metavar="RUN_DIR...", help="of pekoe rl; several are compared")],
    out: Annotated[str | None, typer.Option(help="the file to write; by default report.html in the first run")] = None,
    live: Annotated[bool, typer.Option("--live", help="serve it on this machine, and follow the run")] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="of --live; 0: any that is free")] = 0,
) -> None:
    """What a run did, as one HTML file: curves, where the time went, and the responses themselves.

    It needs no network, and opens from disk.
    """
    try:
        from pekoe.report.page import render
    except ModuleNotFoundError as error:
        raise UserError(f"pekoe report: expected the extra `report` ({error}): pip install 'pekoe[report]'") from None
    from pekoe.data.tokenizer import decoder_of
    from pekoe.report.history import read_history
    from pekoe.report.live import LiveReport

    paths = [Path(run) for run in runs]

    def page() -> str:
        return render([read_history(path, decoder_of(path)) for path in paths], live)

    if not live:
        file = Path(out) if out else paths[0] / "report.html"
        text = page()
        try:
            file.write_text(text, encoding="utf-8")
        except OSError as error:
            raise UserError(f"--out: expected a file that can be written, got {file}: {error.strerror}") from None
        typer.echo(f"{file}: {file.stat().st_size / 1e6:.1f} MB")
        return
    read_history(paths[0])  # raises for a wrong path
    try:
        server = LiveReport(page, [path / "journal.jsonl" for path in paths], port)
    except OSError as error:
        raise UserError(f"--port: expected one that is free, got {port}: {error.strerror}; nearest: 0") from None
    typer.echo(f"{server.url} (Ctrl-C ends)")
    with contextlib.suppress(KeyboardInterrupt):
        server.serve()


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit()


@app.callback()
def _main(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="print it")] = False,
) -> None: ...


def main() -> None:
    """Entry point. Exit status: 0 done, 1 the run failed, 2 the user's input is wrong, 130, 143 and 129 stopped by
    Ctrl-C, SIGTERM and SIGHUP."""
    if not WAITING.keys() & os.environ:
        os.environ |= WAITING
    try:
        app(prog_name="pekoe")
    except (UserError, RunError, Interrupted) as error:
        _fail(str(error), 2 if isinstance(error, UserError) else 1 if isinstance(error, RunError) else error.status)
    except SystemExit as stopped:
        if stopped.code == 130:  # typer's status after Ctrl-C: before a loop listens, or a second one
            _fail("interrupted; what was saved is kept. Run the same command again (without --from) to go on", 130)
        raise
    except (OSError, MemoryError) as error:  # such as a full disk, or a file that cannot be read
        _fail(f"{type(error).__name__}: {error}; what was saved before is kept", 1)


def _is_first_process() -> bool:
    """Whether this process prints: the first of those that torchrun started, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def _fail(message: str, status: int) -> None:
    if _is_first_process() or status == 1:  # all processes make the user's mistake; a failure may be of one process
        print(f"pekoe: {message}", file=sys.stderr)
    raise SystemExit(status)


if __name__ == "__main__":
    main()
