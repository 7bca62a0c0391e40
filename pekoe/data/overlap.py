"""Finds equal problems, near duplicates, and problems of evaluation sets, by the text of their prompts.

Two problems that differ in one number are two problems: near duplicates must agree in their numbers and answers.
"""

from __future__ import annotations

import hashlib
import json
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from pekoe.core.progress import NoProgress, ProgressReporter, track
from pekoe.core.types import Problem
from pekoe.data.tables import needs

# Text about the form of the answer, not about the problem: it would hide duplicates and pretend overlap.
_FRAME = re.compile(
    r"<[|｜][^<>\s|｜]{3,40}[|｜]>(?:(?<=start\|>)(?:system|user|assistant)\b)?|</?think>"
    r"|please reason step by step,? and (?:put|enclose) your final answer (?:with)?in \\boxed\{\}\.?",
    re.IGNORECASE,
)
_TOKEN = re.compile(r"[\u3040-\u9fff]|\d+|[^\W\d_]+|[-+*/=<>^%!]")  # an ideograph, a number, a word, an operator
_SPELLINGS = (("\\dfrac", "\\frac"), ("\\tfrac", "\\frac"), ("\\left", ""), ("\\right", ""), ("$", ""))
_SHINGLE = 3
_STOCK = 2  # a run in more evaluation problems than this is a stock phrase, and no sign of contamination


def text_of(problem: Problem) -> str:
    """The question, without chat markers and the instruction to box the answer."""
    return _FRAME.sub(" ", "\n".join(message["content"] for message in problem.messages))


def tokens_of(problem: Problem) -> list[str]:
    """Words in lower case, numbers and operators; punctuation and LaTeX's braces do not count."""
    return _TOKEN.findall(text_of(problem).lower())


def prompt_key(problem: Problem) -> bytes:
    """A key that is equal for prompts which differ only in spaces, chat markers and the instruction to box."""
    text = f"{problem.kind}\n{''.join(text_of(problem).split())}"
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def gold_key(gold: Any) -> str:
    """A key that is equal for reference answers which are surely the same. A judge may find more of them equal."""
    if isinstance(gold, list) and all(isinstance(value, str) for value in gold):
        return "|".join(sorted(map(gold_key, gold)))
    if not isinstance(gold, str):
        return json.dumps(gold, sort_keys=True)
    for spelling, plain in _SPELLINGS:
        gold = gold.replace(spelling, plain)
    return re.sub(r"\s+|(?<=\d)\.0+$", "", gold)


def near_duplicates(
    problems: Sequence[Problem], threshold: float, view: ProgressReporter | None = None
) -> dict[int, int]:
    """Index of each problem to drop -> index of the earlier one that it nearly repeats.

    Same kind, gold and numbers, and Jaccard similarity of the sets of three-token runs at least `threshold`.
    Candidates come from MinHash with locality-sensitive hashing (Broder 1997; datasketch), and are then compared
    exactly: no problem is dropped wrongly, and a few pairs at the threshold may be missed.

    Raises UserError where datasketch is absent.
    """
    try:
        from datasketch import MinHash, MinHashLSH
    except ImportError:
        raise needs("datasketch", "data.dedup = 'near'") from None
    view = view or NoProgress()
    alike: dict[Hashable, list[int]] = defaultdict(list)
    for index, problem in enumerate(track(view, "near", problems)):
        numbers = " ".join(sorted(token for token in tokens_of(problem) if token.isdigit()))
        alike[problem.kind, gold_key(problem.gold), numbers].append(index)
    duplicates: dict[int, int] = {}
    empty = MinHash(num_perm=128, hashfunc=int)
    for group in track(view, "near", [group for group in alike.values() if len(group) > 1]):
        lsh: Any = MinHashLSH(num_perm=128, params=_bands(threshold))
        kept: dict[int, frozenset[int]] = {}
        for index in group:
            shingles = _shingles(tokens_of(problems[index]))
            sketch = empty.copy()  # a new MinHash would compute its permutations again
            sketch.update_batch(shingles)
            for other in sorted(lsh.query(sketch)):
                if len(kept[other] & shingles) / len(kept[other] | shingles) >= threshold:
                    duplicates[index] = other
                    break
            else:
                kept[index] = shingles
                lsh.insert(index, sketch)
    return duplicates


def _bands(threshold: float) -> tuple[int, int]:
    """The most rows a band (fewest candidates) with which a pair at `threshold` is found with probability 0.98."""
    rows = max(r for r in range(1, 17) if r == 1 or 1 - (1 - threshold**r) ** (128 // r) >= 0.98)
    return 128 // rows, rows


def _shingles(tokens: list[str]) -> frozenset[int]:
    ends = range(_SHINGLE, max(len(tokens), _SHINGLE) + 1)
    return frozenset(zlib.crc32(" ".join(tokens[end - _SHINGLE : end]).encode()) for end in ends)


class Contamination:
    """Finds problems that share n tokens in a row with an evaluation problem (Brown et al. 2020, appendix C: n = 13).

    A run of half that length that occurs in more than two different evaluation problems is a stock phrase ("where m
    and n are relatively prime", the opening of a family of puzzles); a run of n that is made mostly of them does not
    count. An evaluation problem is also found by its whole text: the only way for one shorter than n.
    """

    def __init__(self, sets: Mapping[str, Sequence[Problem]], n: int) -> None:
        """`sets`: evaluation problems by the name of their set."""
        self._n = n
        self._whole: dict[str, str] = {}
        for name, problems in sets.items():
            for problem in problems:  # a problem that occurs twice keeps its first label
                self._whole.setdefault(" ".join(tokens_of(problem)), f"{name}: {problem.uid}")
        half = (n + 1) // 2
        pieces = Counter(piece for text in self._whole for piece in set(_runs(text.split(), half)))
        self._owner: dict[str, str] = {}
        for text, label in self._whole.items():
            for run in _runs(text.split(), n):
                stock = [pieces[piece] > _STOCK for piece in _runs(run.split(), half)]
                if sum(stock) <= len(stock) // 2:
                    self._owner.setdefault(run, label)

    def find(self, problem: Problem) -> tuple[str, str] | None:
        """The evaluation problem that this one shares text with, and the shared text; None if there is none."""
        tokens = tokens_of(problem)
        text = " ".join(tokens)
        if text in self._whole:
            return self._whole[text], text
        return next(((self._owner[run], run) for run in _runs(tokens, self._n) if run in self._owner), None)


def _runs(tokens: list[str], n: int) -> list[str]:
    return [" ".join(tokens[start : start + n]) for start in range(len(tokens) - n + 1)]
