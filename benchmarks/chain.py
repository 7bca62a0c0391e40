"""The whole recipe on a laptop: curate, sft, rl, eval, each killed once in the middle and gone on with.

    make chain ARGS="--task knights --out runs/chain"

For the demo's sums and for knights and knaves (two or three people, made here, each puzzle with one solution), from a
small model whose SFT has shown it both to work answers out and to guess (as the demo's does):

    curate   8 answers to each problem; those always right or always wrong are left out
    sft      on worked answers to the problems that were kept
    rl       on the same problems, by their verdicts
    eval     on held-out problems, beside the model that it began with

Every stage is a `pekoe` command in a process of its own, on recipes that are left in the folder. The chain runs twice:
once each stage gets a SIGKILL when it has done something, and the same command goes on; once nobody is killed. Both
must come to the same files, bit for bit. Exit status 1 where they do not.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tomli_w

from pekoe.core.errors import UserError
from pekoe.core.types import Problem
from pekoe.data.problems import Demonstration, read_problems, write_demonstrations, write_problems
from pekoe.data.tokenizer import Tokenizer
from pekoe.demo.char_tokenizer import make_char_tokenizer
from pekoe.demo.problems import ARITHMETIC_ALPHABET, make_arithmetic
from pekoe.demo.run import model_spec
from pekoe.model import Decoder, save_model

Made = list[tuple[Problem, str]]
LIMIT_S = 900
PROMPT_TOKENS, NEW_TOKENS = 32, 96  # the model has 128 positions
KNIGHTS_ALPHABET = "ABC:+-=#&|?,\\{}boxedknightav\n "


def make_knights(num: int, seed: int, exclude: set[str]) -> Made:
    r"""Puzzles `A:B- B:A=C C:A+&B-?` with one solution: what a knight says is true, what a knave says is false. `B-`: B
    is a knave; `B+`: a knight; `A=C`: both alike; `A#C`: they differ; `&`: and; `|`: or.

    The worked answer tries the kinds of A, B, C in order until one fits. A line has the kinds, then for each speaker
    whether what they say is as it should be (`=`), up to the first who is not (`#`).
    """
    rng, seen, made = random.Random(seed), set(exclude), Made()
    for _ in range(10 * num + 1000):
        if len(made) == num:
            return made
        people = rng.choice(("AB", "ABC", "ABC"))
        said = {speaker: _claim(speaker, people, rng) for speaker in people}
        prompt = " ".join(f"{speaker}:{claim}" for speaker, claim in said.items()) + "?"
        tried = [dict(zip(people, kinds, strict=True)) for kinds in itertools.product("+-", repeat=len(people))]
        fits = [kinds for kinds in tried if "#" not in _checked(kinds, said)]
        if prompt in seen or len(fits) != 1:
            continue
        seen.add(prompt)
        lines = ["".join(kinds.values()) + _checked(kinds, said) for kinds in tried[: tried.index(fits[0]) + 1]]
        roles = {person: "knight" if kind == "+" else "knave" for person, kind in fits[0].items()}
        message = ({"role": "user", "content": prompt},)
        made.append((Problem(f"knights/{prompt}", message, roles, "logic"), "\n".join([*lines, boxed(roles)])))
    raise UserError(f"knights: expected {num} different puzzles, got {len(made)}: there are not many more")


def _claim(speaker: str, people: str, rng: random.Random) -> str:
    (a, b), form = sorted(rng.sample(people, 2)), rng.choice("+-=#&|")
    if form in "+-":
        return rng.choice(people.replace(speaker, "")) + form
    return f"{a}{form}{b}" if form in "=#" else f"{a}{rng.choice('+-')}{form}{b}{rng.choice('+-')}"


def _checked(kinds: dict[str, str], said: dict[str, str]) -> str:
    """For each speaker `=`, up to the first whose words do not fit the kinds: `#`."""
    marks = "".join("=" if _true(claim, kinds) == (kinds[speaker] == "+") else "#" for speaker, claim in said.items())
    return marks[: marks.find("#") + 1] or marks


def _true(claim: str, kinds: dict[str, str]) -> bool:
    if len(claim) == 3:
        return (kinds[claim[0]] == kinds[claim[2]]) == (claim[1] == "=")
    parts = [kinds[claim[at]] == claim[at + 1] for at in range(0, len(claim), 3)]
    return any(parts) if "|" in claim else all(parts)


def make_sums(num: int, seed: int, exclude: set[str]) -> Made:
    limits: dict[str, Any] = {"num_terms": (4, 5), "num_digits": (1, 1), "negative_totals": False}
    return make_arithmetic(num, seed, exclude=exclude, **limits)


LEFT = {  # what stages leave behind, and decides what comes next
    "curate": ("problems.jsonl", "dropped.jsonl"),
    "sft": ("model/model.safetensors",),
    "rl": ("model/model.safetensors", "ledger.jsonl", "rollouts/*"),
}
TASKS: dict[str, tuple[str, Callable[[int, int, set[str]], Made]]] = {
    "sums": (ARITHMETIC_ALPHABET, make_sums),
    "knights": (KNIGHTS_ALPHABET, make_knights),
}


def guess(problem: Problem, rng: random.Random) -> str:
    """A box at once, mostly wrong."""
    if problem.kind == "logic":
        return boxed({person: rng.choice(("knight", "knave")) for person in problem.gold})
    return f"\\boxed{{{max(0, int(problem.gold) + rng.randint(-5, 5))}}}"


def boxed(roles: dict[str, str]) -> str:
    return f"\\boxed{{{','.join(f'{person}:{role}' for person, role in roles.items())}}}"


def prepare(task: str, folder: Path, size: int, num_first: int) -> dict[str, str]:
    """Data, the model to begin with, and the recipes of both chains. Returns the worked answers of the problems."""
    alphabet, make = TASKS[task]
    held_out = make(max(32, size // 4), 0, set())
    taken = {problem.messages[0]["content"] for problem, _ in held_out}
    problems = make(size, 1, taken)
    taken |= {problem.messages[0]["content"] for problem, _ in problems}
    first = make(num_first, 2, taken)
    folder.mkdir(parents=True)
    write_problems(folder / "held_out.jsonl", [problem for problem, _ in held_out])
    write_problems(folder / "problems.jsonl", [problem for problem, _ in problems])
    rng = random.Random(3)
    shown = [Demonstration(p.messages, worked if rng.random() < 0.5 else guess(p, rng)) for p, worked in first]
    write_demonstrations(folder / "first.jsonl", shown)
    files = make_char_tokenizer(alphabet)
    model = Decoder(model_spec(Tokenizer(files).vocab_size))
    model.init_weights(0)
    model.assets = dict(files)
    save_model(model, folder / "random")
    recipe = sft_recipe(folder / "random", folder / "first.jsonl", folder / "first", epochs=6, lr=4e-3)
    write(folder / "first.toml", recipe)
    done, said = finish("sft", folder / "first.toml")
    if done:
        raise SystemExit(f"the model to begin with could not be made:\n{said}")
    return {problem.uid: worked for problem, worked in problems}


def sft_recipe(
    model: Path, data: Path, out: Path, epochs: int, lr: float, batch: int = 32, save_every: int = 128
) -> dict[str, Any]:
    return {
        "run": {"dir": str(out), "threads": 2},
        "model": {"path": str(model), "device": "cpu"},
        "data": {"train": str(data)},
        "sft": {"epochs": epochs, "batch_size": batch},
        "optim": {"lr": lr, "warmup_fraction": 0.1, "schedule": "cosine"},
        "train": {"token_budget": 8192, "save_every": save_every},
    }


def recipes(folder: Path, chain: Path, size: int) -> dict[str, dict[str, Any]]:
    """Of each stage; its model is what the stage before has made."""
    both: dict[str, Any] = {"engine": {"max_running": 128}, "verify": {"workers": 1}}
    start = folder / "first" / "model"
    steps = max(4, 3 * size // 32)  # enough to be killed between checkpoints
    return {
        "curate": {
            "out": str(chain / "curate"),
            "run": {"threads": 2},
            "model": {"path": str(start), "device": "cpu"},
            "data": {"train": str(folder / "problems.jsonl"), "max_prompt_tokens": PROMPT_TOKENS},
            "curate": {"samples": 8, "max_new_tokens": NEW_TOKENS, "drop_all_wrong": True},
            **both,
        },
        "sft": sft_recipe(start, chain / "worked.jsonl", chain / "sft", epochs=2, lr=2.5e-5, batch=8, save_every=4),
        "rl": {
            "num_steps": steps,
            "run": {"dir": str(chain / "rl"), "threads": 2},
            "model": {"path": str(chain / "sft" / "model"), "device": "cpu"},
            "data": {"train": str(chain / "curate" / "problems.jsonl"), "max_prompt_tokens": PROMPT_TOKENS},
            "rollout": {"prompts_per_step": 16, "samples_per_prompt": 8, "max_new_tokens": NEW_TOKENS},
            "optim": {"lr": 2e-4},
            "train": {"token_budget": 8192, "save_every": steps // 4},
            **both,
        },
        "eval": eval_recipe(folder, chain / "rl" / "model", chain / "eval"),
    }


def eval_recipe(folder: Path, model: Path, out: Path) -> dict[str, Any]:
    return {
        "out": str(out),
        "max_prompt_tokens": PROMPT_TOKENS,
        "run": {"threads": 2},
        "model": {"path": str(model), "device": "cpu"},
        "eval": {"data": str(folder / "held_out.jsonl"), "samples": 8, "max_new_tokens": NEW_TOKENS},
        "engine": {"max_running": 128},
        "verify": {"workers": 1},
    }


def progress(stage: str, chain: Path) -> int:
    """How far a stage has got: problems that are judged, or the step of the last checkpoint."""
    if stage in ("curate", "eval"):
        file = chain / stage / "samples.jsonl"
        return max(0, file.read_bytes().count(b"\n") - 1) if file.exists() else 0  # the first line says what it is
    found = (chain / stage / "checkpoints").glob("step-*")
    return max((int(path.name[5:]) for path in found), default=0)


def finish(stage: str, recipe: Path) -> tuple[int, str]:
    command = [sys.executable, "-m", "pekoe.cli", stage, str(recipe)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
    return done.returncode, done.stderr + done.stdout


def kill_in_the_middle(stage: str, recipe: Path, chain: Path, enough: int) -> int:
    """Start a stage, and kill it when it has got so far; returns how far."""
    command = [sys.executable, "-m", "pekoe.cli", stage, str(recipe)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + LIMIT_S
    try:
        while progress(stage, chain) < enough:
            if process.poll() is not None or time.monotonic() > end:
                raise SystemExit(f"{stage}: expected it to get to {enough}; status {process.poll()}, see {recipe}")
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
    return progress(stage, chain)


def write(file: Path, recipe: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(tomli_w.dumps(recipe))


def run_chain(folder: Path, chain: Path, worked: dict[str, str], killed: bool) -> list[dict[str, Any]]:
    """All stages, one after another. What is said of each."""
    rows, size = list[dict[str, Any]](), len(worked)
    for stage, recipe in recipes(folder, chain, size).items():
        file = chain / f"{stage}.toml"
        write(file, recipe)
        if stage == "sft":
            kept = read_problems(chain / "curate" / "problems.jsonl").problems
            write_demonstrations(chain / "worked.jsonl", [Demonstration(p.messages, worked[p.uid]) for p in kept])
        enough = size // 16 if stage in ("curate", "eval") else 1  # problems; the first checkpoint
        at = kill_in_the_middle(stage, file, chain, enough) if killed else 0
        samples = chain / stage / "samples.jsonl"
        before = samples.read_bytes() if killed and samples.exists() else b""
        status, said = finish(stage, file)
        if status:
            raise SystemExit(f"{stage} in {chain} failed ({status}):\n{said[-2000:]}")
        taken_up = resumed(stage, chain, before) if killed else 0
        rows.append({"stage": stage, "killed_at": at, "went_on_from": taken_up, "end": progress(stage, chain)})
    return rows


def resumed(stage: str, chain: Path, before: bytes) -> int:
    """From where the second command went on: it must not have begun anew. `before`: the samples at the kill."""
    if stage in ("curate", "eval"):
        whole_lines = before[: before.rfind(b"\n") + 1]
        kept = (chain / stage / "samples.jsonl").read_bytes().startswith(whole_lines)
        return whole_lines.count(b"\n") - 1 if kept else 0
    journal = (chain / stage / "journal.jsonl").read_text().splitlines()
    return max((e["step"] for e in map(json.loads, journal) if e["event"] == "resumed"), default=0)


def same(stage: str, a: Path, b: Path) -> bool:
    """Whether a stage has left the same in both chains."""
    if stage == "eval":
        return all(results(a / stage)[key] == results(b / stage)[key] for key in ("total", "problems"))
    found = [{p.name: p.read_bytes() for name in LEFT[stage] for p in (c / stage).glob(name)} for c in (a, b)]
    assert len(found[0]) >= len(LEFT[stage]), f"{stage} left only {sorted(found[0])}"
    return found[0] == found[1]


def run_task(task: str, out: Path, size: int, num_first: int, fresh: bool) -> dict[str, Any]:
    """Both chains of a task; prints what became of them."""
    folder = out / task
    killed, whole = folder / "killed", folder / "whole"
    if fresh and (folder / "first.jsonl").exists():  # it is one of ours
        shutil.rmtree(folder)
    if folder.exists():
        raise UserError(f"{folder}: expected no such directory; remove it (--fresh, a chain's), or name another --out")
    start = time.monotonic()
    worked = prepare(task, folder, size, num_first)
    rows = run_chain(folder, killed, worked, killed=True)
    ends = [row["end"] for row in run_chain(folder, whole, worked, killed=False)]
    equal = {row["stage"]: same(row["stage"], killed, whole) for row in rows}
    equal |= {row["stage"]: False for row, end in zip(rows, ends, strict=True) if row["end"] != end}  # work done twice
    models = {"before": folder / "first" / "model", "sft": whole / "sft" / "model"}
    for name, model in models.items():
        write(folder / f"measure_{name}.toml", eval_recipe(folder, model, folder / f"measure_{name}"))
        status, said = finish("eval", folder / f"measure_{name}.toml")
        if status:
            raise SystemExit(f"eval of {model} failed ({status}):\n{said[-2000:]}")
    measured = {name: results(folder / f"measure_{name}")["total"] for name in models}
    measured["rl"] = results(killed / "eval")["total"]
    kept = len(read_problems(whole / "curate/problems.jsonl").problems)
    print(f"\n{task}: {size} problems, {kept} kept; {time.monotonic() - start:.0f} s")
    print(f"  {'stage':<8} {'killed at':>9} {'went on from':>13} {'ended at':>9}   as if never killed")
    for row in rows:
        numbers = f"{row['killed_at']:>9} {row['went_on_from']:>13} {row['end']:>9}"
        print(f"  {row['stage']:<8} {numbers}   {'yes' if equal[row['stage']] else 'NO'}")
    print(f"  pass@1 on {measured['rl']['num_problems']} held-out problems x 8 samples, 95 % intervals over problems:")
    for name, one in measured.items():
        low, high = one["ci95"]
        print(f"    {name:<8} {one['pass_at_1']:6.1%}  [{low:.1%}, {high:.1%}]", flush=True)
    good = all(equal.values()) and all(0 < row["went_on_from"] < row["end"] for row in rows)
    rates = {name: {key: one[key] for key in ("pass_at_1", "ci95")} for name, one in measured.items()}
    return {"task": task, "stages": rows, "same": equal, "kept": kept, "measured": rates, "good": good}


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=[*TASKS, "both"], default="both")
    parser.add_argument("--out", type=Path, default=Path("runs/chain"))
    parser.add_argument("--size", type=int, default=256, help="problems to curate; the other sizes follow from it")
    parser.add_argument("--first", type=int, default=4096, help="demonstrations for the model to begin with")
    parser.add_argument("--fresh", action="store_true", help="remove what an earlier chain of the task has left there")
    parser.add_argument("--json", type=Path, help="also write the figures")
    options = parser.parse_args()
    out: Path = options.out.resolve()
    tasks = TASKS if options.task == "both" else [options.task]
    try:
        found = [run_task(task, out, options.size, options.first, options.fresh) for task in tasks]
    except UserError as error:
        parser.error(str(error))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    raise SystemExit(not all(task["good"] for task in found))


if __name__ == "__main__":
    main()
