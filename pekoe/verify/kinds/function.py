"""kind = "function:PACKAGE.MODULE:NAME": a function that the user has written.

It is imported in worker processes of its own, from the places that this process imports from and, after them, the
current directory. Its first parameter is given the whole response and the second the reference, whatever they are
called; parameters named `prompt` (the text of the last question), `messages`, `row` (the problem's row of the data), as
a column of the row, or as an argument of the recipe (`verify.arguments`) are given those. verl's `compute_score
(data_source, solution_str, ground_truth, extra_info)` and TRL's `reward(prompts, completions, **columns)`, which is
given batches of one, run as they are.

It returns True or False, a number (a score, see `Options`), a Verdict, or as in verl a dict with `score`. An exception
in it is FAULT, never a wrong answer. Its workers have the pool's limits but no audit hook; it may execute anything, so
the recipe alone names the functions (`verify.functions`, `verify.reward`); a data row chooses among them.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

from pekoe.core.errors import nearest
from pekoe.core.types import Label, Verdict
from pekoe.verify.extract import after_thinking, last_boxed, tagged
from pekoe.verify.kinds.base import Verifier

MAX_RESPONSE_CHARS = 1_000_000
OPTIONS = "PEKOE_REWARD"  # of the environment of its workers: `Options` as JSON
_GIVEN = ("prompt", "messages", "row")
_VERL, _TRL = "solution_str", "completions"  # a parameter by which one knows their functions
_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


@dataclass(frozen=True, slots=True)
class Options:
    """How the recipe has a function called, and what its numbers mean: `low` is the score 0, `high` the score 1, and
    from the score `correct_from` on a verdict is CORRECT. `columns`: which a row may have; None: not known."""

    arguments: Mapping[str, Any] = field(default_factory=dict[str, Any])
    low: float = 0.0
    high: float = 1.0
    correct_from: float = 0.99
    columns: tuple[str, ...] | None = None


def prepare(response: str, gold: Any) -> Verdict | str:
    if len(response) > MAX_RESPONSE_CHARS:
        return Verdict("unparsed", None, f"the response holds {len(response):,} characters")
    return response


def describe(error: BaseException) -> str:
    """Type and message, behind the user's file, line and function where the error was raised there or below."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_users(frame.filename)]
    place = ""
    if frames:
        file, here = frames[-1].filename, os.getcwd()
        place = f"{os.path.relpath(file, here) if file.startswith(here + os.sep) else file}:{frames[-1].lineno}: "
    return f"{place}{type(error).__name__}: {error}"


def _is_users(file: str) -> bool:
    """Not of Pekoe, the standard library or an installed package."""
    ours = file.startswith((str(Path(__file__).parents[2]) + os.sep, os.path.dirname(os.__file__) + os.sep, "<"))
    return not ours and "site-packages" not in file


def _import(module: str) -> ModuleType:
    """The module, from where Python looks and then the current directory; ModuleNotFoundError names what is there."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name not in (module, module.partition(".")[0]):  # something that it imports
            raise
        here = [path.stem for path in Path().glob("*.py")]
        raise ModuleNotFoundError(
            f"expected a module that Python finds, or a file in {os.getcwd()}, got {module!r}.{nearest(module, here)}"
        ) from None


class _Reward:
    """A function that is imported, and how it is called."""

    def __init__(self, path: str, options: Options) -> None:
        module, _, name = path.partition(":")
        sys.path.append(os.getcwd())  # in these workers alone, and last: no other code may come from there
        self.path, self.options = path, options
        imported = _import(module)
        if not hasattr(imported, name):
            valid = (other for other, value in vars(imported).items() if callable(value))
            raise AttributeError(f"expected a function of {module}, got {name!r}.{nearest(name, valid)}")
        self._function: Callable[..., Any] = getattr(imported, name)
        try:
            parameters = list(inspect.signature(self._function).parameters.values())
        except ValueError:  # written in C
            parameters = [inspect.Parameter("args", inspect.Parameter.VAR_POSITIONAL)]
        kinds, names = {p.kind for p in parameters}, [p.name for p in parameters]
        placed = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)][:2]
        self._is_trl = _TRL in names
        if self._is_trl or _VERL in names:
            placed = []
        elif placed[1:] and placed[1] in _GIVEN:
            placed = placed[:1]
        self._num_placed = 2 if inspect.Parameter.VAR_POSITIONAL in kinds else len(placed)
        self._placed, self._open = set(placed), inspect.Parameter.VAR_KEYWORD in kinds
        self._named = {p.name: p for p in parameters if p.kind in _NAMED and p.name not in self._placed}
        unknown = [name for name in options.arguments if name not in self._named]
        if unknown and not self._open:
            raise TypeError(
                f"verify.arguments: expected arguments that {path} takes, got {unknown[0]!r}."
                f"{nearest(unknown[0], self._named)}"
            )
        if options.columns is not None:
            names = {"prompts", _TRL} if self._is_trl else {*_GIVEN, _VERL, "ground_truth"}
            self._check(names.union(options.columns, options.arguments))

    def _check(self, given: Collection[str]) -> None:
        """TypeError where a parameter that has no default is not given."""
        missing = [p.name for p in self._named.values() if p.default is p.empty and p.name not in given]
        if missing:
            raise TypeError(
                f"{self.path}: expected a column of the row or an argument in verify.arguments for its parameter "
                f"{missing[0]!r}, got none.{nearest(missing[0], given)}"
            )

    def __call__(self, response: str, gold: Any, context: Mapping[str, Any]) -> Any:
        row, messages = context.get("row"), context.get("messages") or ()
        given: dict[str, Any] = dict(row) if isinstance(row, dict) else {}
        prompt = messages[-1]["content"] if messages else None
        if self._is_trl:
            chat = bool(messages) and messages[0]["role"] not in ("prompt", "raw")
            completion = [{"role": "assistant", "content": response}] if chat else response
            given |= {"prompts": list(messages) if chat else prompt, _TRL: completion}
            given = {name: [value] for name, value in given.items() if name != "prompt"}
        else:
            given |= {"row": row, "messages": list(messages), "prompt": prompt}
            given |= {_VERL: response, "ground_truth": gold} if _VERL in self._named else {}
        given |= self.options.arguments
        self._check(given)
        wanted = given.keys() - self._placed if self._open else given.keys() & self._named.keys()
        placed = (response, gold)[: self._num_placed]
        result = self._function(*placed, **{name: given[name] for name in wanted})
        return result[0] if self._is_trl and isinstance(result, list | tuple) and len(result) == 1 else result


def verdict_of(result: Any, extracted: str | None, options: Options, name: str) -> Verdict:
    """What a reward returned, as a verdict. `extracted` is what was read where the result does not say it.

    Raises TypeError or ValueError, which begin with `name`, for what is none of the things that a reward may return.
    """
    if isinstance(result, Verdict):
        if result.label not in get_args(Label):
            raise ValueError(f"{name}: expected a label of {get_args(Label)}, got {result.label!r}")
        found = extracted if result.extracted is None else _text(result.extracted)
        score = None if result.score is None else float(result.score)  # numpy's and torch's, too
        return replace(result, extracted=found, why=_text(result.why), score=score)
    right, number = None, result
    if isinstance(result, dict) and "score" in result:  # verl
        right, found = result.get("acc"), result.get("pred")
        extracted, number = extracted if found is None else _text(found), result["score"]
    if hasattr(number, "item"):  # numpy's and torch's
        number = number.item()
    if isinstance(number, bool):
        return Verdict("correct" if number else "wrong", extracted)
    if not isinstance(number, int | float):
        raise TypeError(f"{name}: expected bool, float or Verdict, got {type(number).__name__}")
    low, high = options.low, options.high
    if not low <= number <= high:
        raise ValueError(f"{name}: expected a score in [{low:g}, {high:g}] (verify.score_range), got {number:g}")
    score = min(1.0, (number - low) / (high - low))
    right = score >= options.correct_from if right is None else bool(right)
    return Verdict("correct" if right else "wrong", extracted, f"score {number:g}", score)


def _text(value: Any) -> str:
    """As text that every file can hold: half of a surrogate pair becomes "?"."""
    return str(value).encode(errors="replace").decode()


def _answer(response: str) -> str | None:
    """What a majority vote counts where the function does not say what it read: the last box, or what is tagged."""
    said = after_thinking(response)
    boxed = last_boxed(said)
    return tagged(said) if boxed is None else boxed.strip()


def _decide(load: Callable[[], _Reward], response: str, gold: Any, context: Mapping[str, Any] | None) -> Verdict:
    reward = load()
    try:
        result = reward(response, gold, context or {})
        return verdict_of(result, _answer(response), reward.options, f"function:{reward.path}")
    except (MemoryError, RecursionError):  # limits: the worker's to tell
        raise
    except BaseException as error:  # asyncio's CancelledError is no Exception; Ctrl-C is the parent's to hear
        traceback.print_exc()
        return Verdict("fault", None, f"the reward failed: {describe(error)}")


def make_verifier(path: str, options: Options | None = None) -> Verifier:
    """Return the verifier of one function; this process imports nothing."""
    name = f"function:{path}"
    load = functools.cache(functools.partial(_Reward, path, options or Options()))
    decide = functools.partial(_decide, load)
    return Verifier(name, prepare, decide, warm_up=load, worker_group=name, audit_hook="none", is_users=True)
