"""A grader of the field in a process of its own, in its own environment: answers one line of JSON for each.

    python verify_grader.py math-verify|prime-math|minerva

in: {"gold": text or list of texts, "response"}; out: {"correct": bool}. Nothing of Pekoe is imported here.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import logging
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

Grader = Callable[[str, str], bool]


def math_verify() -> Grader:
    library = importlib.import_module("math_verify")

    def grade(gold: str, response: str) -> bool:
        reference = library.parse(gold if "$" in gold or "\\boxed" in gold else f"${gold}$")
        return bool(library.verify(reference, library.parse(response)))

    return grade


def _package_without_its_init(name: str) -> None:
    """Its modules can be imported, its own `__init__` (torch, ray) is not run."""
    spec = importlib.util.find_spec(name)
    assert spec is not None
    package = types.ModuleType(name)
    package.__path__ = list(spec.submodule_search_locations or [])
    sys.modules[name] = package


def _unlimited(**_: Any) -> Callable[[Any], Any]:
    return lambda function: function


def prime_math() -> Grader:
    """verl's `prime_math`: prm800k's grader, then sympy. Its own time limits want torch: ours hold."""
    for name in ("verl", "verl.utils", "verl.utils.reward_score"):
        _package_without_its_init(name)
    limits: Any = types.ModuleType("verl.utils.py_functional")
    limits.timeout_limit = _unlimited
    sys.modules[limits.__name__] = limits
    library = importlib.import_module("verl.utils.reward_score.prime_math")
    return lambda gold, response: bool(library.compute_score(response, gold)[0])


def minerva() -> Grader:
    """lm-evaluation-harness' Minerva grader, on the last box."""
    for name in ("lm_eval", "lm_eval.tasks", "lm_eval.tasks.minerva_math"):
        _package_without_its_init(name)
    library = importlib.import_module("lm_eval.tasks.minerva_math.utils")

    def grade(gold: str, response: str) -> bool:
        boxed = library.last_boxed_only_string(response)
        if boxed is None:
            return False
        texts = [library.normalize_final_answer(text) for text in (library.remove_boxed(boxed), gold)]
        return texts[0] == texts[1] or bool(library.is_equiv(*texts))

    return grade


GRADERS = {"math-verify": math_verify, "prime-math": prime_math, "minerva": minerva}


def main() -> None:
    protocol = os.dup(1)
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    logging.disable(logging.CRITICAL)
    grade = GRADERS[sys.argv[1]]()
    os.chdir(Path(sys.argv[2]))  # some execute answers: not here
    os.write(protocol, b'{"ready": true}\n')
    for line in sys.stdin:
        case: dict[str, Any] = json.loads(line)
        golds = case["gold"] if isinstance(case["gold"], list) else [case["gold"]]
        correct = False
        with contextlib.suppress(Exception):  # as each system does: what fails is wrong
            correct = any(grade(str(gold), case["response"]) for gold in golds)
        os.write(protocol, json.dumps({"correct": correct}).encode() + b"\n")


if __name__ == "__main__":
    main()
