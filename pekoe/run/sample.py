"""`pekoe sample`: what a model says to a prompt, to the rows of a file, or in a chat. Nothing is kept or trained."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from pekoe.config.recipes import EvalConfig
from pekoe.core.errors import UserError
from pekoe.core.progress import ProgressReporter
from pekoe.core.types import Draw, JudgedGroup, Problem, SamplingParams, Trajectory, Verdict
from pekoe.core.words import counted
from pekoe.data import rows
from pekoe.data.formats import ANSWERS, PROMPTS, parse_problem, prompt_text
from pekoe.data.sources import Place
from pekoe.data.tokenizer import Tokenizer
from pekoe.run.build import attach_weights, open_model, open_pool, prepare, sampling_for
from pekoe.run.interrupt import StepTimer, Stop
from pekoe.run.judging import Judge, RandomJudge, make_judge
from pekoe.run.rollouts import Rollouts
from pekoe.run.sample_store import response_lines

MAX_NEW_TOKENS = 1024  # where the recipe does not say
NO_ANSWER = "no answer"  # the kind of a problem that is not judged
Write = Callable[[str], None]


class _Judge:
    """Judges problems that have an answer (implements `run.judging.Judge`)."""

    def __init__(self, judge: Judge) -> None:
        self._judge, self.close = judge, judge.close

    @property
    def limit_s(self) -> float:
        return self._judge.limit_s

    def submit(self, problem: Problem, trajectory: Trajectory) -> Future[Verdict]:
        if problem.kind != NO_ANSWER:
            return self._judge.submit(problem, trajectory)
        future: Future[Verdict] = Future()
        future.set_result(Verdict("unparsed", None, NO_ANSWER))
        return future


class Sampler:
    """A model with its engine and judges. Use `opened`."""

    def __init__(self, config: EvalConfig, rollouts: Rollouts, tokenizer: Tokenizer, context: int) -> None:
        self._config, self._rollouts, self._context = config, rollouts, context
        self.tokenizer = tokenizer

    def sample(self, problems: Sequence[Problem], number: int = 0) -> Iterator[JudgedGroup]:
        """`eval.samples` responses to each problem; another `number` gives others. UserError for a long prompt."""
        longest = max(len(self.tokenizer.encode_prompt(problem.messages)) for problem in problems)
        if longest >= self._context:
            raise UserError(f"prompt: expected fewer tokens than the model's {self._context} positions, got {longest}")
        most = min(self._context - longest, self._config.eval.max_new_tokens or MAX_NEW_TOKENS)
        self._rollouts.put([Draw(problem, number) for problem in problems], _params(self._config, self.tokenizer, most))
        return self._rollouts.stream(len(problems))


def _params(config: EvalConfig, tokenizer: Tokenizer, most: int) -> SamplingParams:
    return sampling_for(config.eval, most, tokenizer.stop_token_ids, config.run.seed)


@contextmanager
def opened(config: EvalConfig, view: ProgressReporter, problems: Sequence[Problem] = ()) -> Iterator[Sampler]:
    """The model that the config names, with its engine, and judges where a problem has an answer."""
    prepare(config.run)
    model, tokenizer, _ = open_model(config.model)
    context = model.spec.max_positions
    stop, params = Stop(), _params(config, tokenizer, min(context - 1, config.eval.max_new_tokens or MAX_NEW_TOKENS))
    with tempfile.TemporaryDirectory(prefix="pekoe-sample-") as logs, ExitStack() as stack:
        pool = open_pool(config, model, context, [params], Path(logs), view, stop, stack)
        weights = attach_weights(config, pool, model, tokenizer, prompt_problem("0"), params, Path(logs), stop)
        seed, judged = config.run.seed, [problem for problem in problems if problem.kind != NO_ANSWER]
        judge = _Judge(make_judge(config.verify, tokenizer, seed, judged) if judged else RandomJudge(seed))
        stack.callback(judge.close)
        common = pool, tokenizer, judge, params, StepTimer(view), view, stop, weights.catch_up
        at_once = config.engine.max_running * len(pool.members)
        yield Sampler(config, Rollouts(*common, at_once=at_once), tokenizer, context)


def prompt_problem(text: str, uid: str = "prompt") -> Problem:
    """A prompt without an answer."""
    return Problem(uid, ({"role": rows.PLAIN, "content": text},), None, NO_ANSWER)


def read_prompts(path: str) -> list[Problem]:
    """The problems of a file of any layout; a row without an answer needs a prompt alone. "-": each line of standard
    input is a prompt."""
    if path == "-":
        lines = [line for line in sys.stdin.read().splitlines() if line.strip()]
        return [prompt_problem(line, str(number)) for number, line in enumerate(lines, 1)]

    def parse(value: Any, place: Place) -> Problem:
        try:
            return parse_problem(value)
        except rows.Malformed:
            row = rows.Row(value if isinstance(value, dict) else {})
            column = row.find(PROMPTS)
            if column is None or row.find(ANSWERS) is not None:
                raise  # it has an answer, or no prompt
            return Problem(str(row.get("uid", place.number)), prompt_text(row, column), None, NO_ANSWER)

    return list(rows.parse_rows(path, parse, False)[0])


def show_responses(
    config: EvalConfig, problems: Sequence[Problem], view: ProgressReporter, write: Write, as_json: bool = False
) -> None:
    """Write the responses to each problem, judged where it has an answer; as JSON, the lines of responses.jsonl."""
    if not problems:
        raise UserError("sample: expected at least one prompt, got none")
    with opened(config, view, problems) as sampler:
        for group in sampler.sample(problems):
            judged = group.problem.kind != NO_ANSWER
            if not as_json and (len(problems) > 1 or config.eval.samples > 1):
                write(f"── {' '.join(group.problem.messages[-1]['content'].split())}")
            for line in response_lines(group, sampler.tokenizer):
                if as_json:
                    left_out = () if judged else ("label", "extracted", "why", "score", "gold", "kind")
                    shown = {key: value for key, value in line.items() if key not in left_out}
                    write(json.dumps(shown, ensure_ascii=False))
                else:
                    verdict = f"; {line['label']}, the answer is {json.dumps(line['gold'])}" if judged else ""
                    write(f"{line['response']}\n{_note(line, verdict)}")


def _note(line: dict[str, Any], verdict: str = "") -> str:
    cut = ", cut there" if line["finish_reason"] == "length" else ""
    return f"   [{counted(line['tokens'], 'token')}{cut}{verdict}]"


def typed() -> Iterator[str]:
    """What the user types, until Ctrl-D or Ctrl-C."""
    print("Ask; an empty line begins a new conversation, Ctrl-D ends.")
    with suppress(EOFError, KeyboardInterrupt):
        while True:
            yield input("> ")


def chat(config: EvalConfig, questions: Iterable[str], view: ProgressReporter, write: Write) -> None:
    """Answer one question after another. A model with a chat template is given the conversation so far; an empty
    question begins a new one, as does a conversation that is longer than the context."""
    config = config.model_copy(update={"eval": config.eval.model_copy(update={"samples": 1})})
    with opened(config, view) as sampler:
        messages: tuple[dict[str, str], ...] = ()
        for turn, question in enumerate(questions):
            if not question.strip():
                messages = ()
                write("   [a new conversation]")
                continue
            problem = prompt_problem(question)
            if sampler.tokenizer.has_chat_template:
                messages = (*messages, {"role": "user", "content": question})
                problem = replace(problem, messages=messages)
            try:
                (group,) = sampler.sample([problem], turn)
            except UserError as error:
                messages = ()
                write(f"   [{error}; a new conversation]")
                continue
            (line,) = response_lines(group, sampler.tokenizer)
            messages = (*messages, {"role": "assistant", "content": line["response"]})
            write(line["response"] + (f"\n{_note(line)}" if line["finish_reason"] == "length" else ""))
