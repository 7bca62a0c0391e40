r"""kind = "gym:TASK": a task of reasoning-gym, by its own scorer. gold: the generator's entry, {"question", "answer",
"metadata"}. The answer is what the last `\boxed{...}` or `<answer>...</answer>` holds; CORRECT from a score of 0.99 on,
as scorers give partial credit for less.

Some of these scorers `eval` the answer (reasoning-gym 0.1.25: binary_matrix, n_queens, spiral_matrix, string_insertion)
or have sympy do so (countdown, puzzle24, polynomial_multiplication, simple_ and intermediate_integration), in the
process that makes the verdict. Code could write that verdict and all later ones, so a hook refuses, before it runs, all
code made of text that is more than a formula, besides files opened for writing, sockets, other processes and signals
(`pekoe.verify.audit_hook`); what is refused is WRONG. Time and memory have the pool's limits. What the hook does
not see is a scorer that reads text as code by means of its own. Some scorers err: one that refuses its own answer, or
accepts nonsense, gives FAULT, which names it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
from typing import Any

from pekoe.core.types import Verdict
from pekoe.verify.kinds.base import Verifier, bad_reference, tagged_answer

MAX_ANSWER_CHARS, PASSES = 20_000, 0.99
_NONSENSE = "no answer at all 0x"


def prepare(response: str, gold: Any) -> Verdict | str:
    if not isinstance(gold, dict) or not {"question", "answer"} <= gold.keys():
        return bad_reference("must be an entry of reasoning-gym", gold)
    return tagged_answer(response, MAX_ANSWER_CHARS)


@functools.lru_cache(64)
def _scorer(task: str) -> Any:
    return importlib.import_module("reasoning_gym").create_dataset(task, size=1, seed=0)


def _score(task: str, answer: Any, entry: dict[str, Any]) -> float:
    return float(_scorer(task).score_answer(answer=answer, entry=entry))


@functools.lru_cache(1024)
def _fault(task: str, gold: str) -> str:
    """Return what is wrong with the scorer for this entry; empty if nothing is."""
    entry = json.loads(gold)
    if entry["answer"] is not None and _score(task, entry["answer"], entry) < PASSES:
        return f"gym:{task}: its scorer refuses its own answer"
    with contextlib.suppress(Exception):  # to raise is to refuse
        if _score(task, _NONSENSE, entry) >= PASSES:
            return f"gym:{task}: its scorer accepts nonsense"
    return ""


def _decide(task: str, answer: str, gold: Any) -> Verdict:
    if fault := _fault(task, json.dumps(gold, sort_keys=True)):
        return Verdict("fault", None, fault)
    try:
        score = _score(task, answer, gold)
    except (MemoryError, RecursionError):  # limits: the worker's to tell
        raise
    except Exception as error:  # of the answer's making: its own answer went through
        return Verdict("wrong", None, f"the scorer: {type(error).__name__}"[:100])
    return Verdict("correct" if score >= PASSES else "wrong", None, f"score {score:.3g}")


def _check_reference(task: str, gold: Any) -> Verdict:
    fault = _fault(task, json.dumps(gold, sort_keys=True))
    return Verdict("fault", None, fault) if fault else Verdict("correct")


def make_verifier(task: str) -> Verifier:
    """Return the verifier of one task, which reasoning-gym must have: if not, each of its verdicts is FAULT."""
    decide, check = functools.partial(_decide, task), functools.partial(_check_reference, task)
    warm_up = functools.partial(importlib.import_module, "reasoning_gym")  # some seconds
    return Verifier(f"gym:{task}", prepare, decide, check, warm_up, worker_group="gym", audit_hook="formulas")
