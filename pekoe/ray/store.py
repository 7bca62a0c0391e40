"""The data plane: one depot a node keeps what engines there sampled until the ranks that train on it fetch it.

Tokens and log-probs go from a depot to a rank directly, by Ray's transfer from node to node. The controller knows names
and lengths alone. A depot is a process of its own, so that what an engine finished outlives the engine.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import ray

from pekoe.config.recipes import ModelSection
from pekoe.data.tokenizer import Tokenizer
from pekoe.run.rollouts import RolloutLine
from pekoe.run.run_dir import write_lines

Key = tuple[Any, ...]
"""Of a rollout: (problem uid, draw, sample index, mark of the engine); of log-probs: that, and which."""


@dataclass(frozen=True, slots=True)
class StoreRef:
    """Where a value lies."""

    node: int
    key: Key

    def resolve(self) -> NoReturn:
        raise AssertionError(f"{self.key} lies at node {self.node}: only the ranks fetch it")


class RolloutStore:
    """The actor. Values are payloads of rollouts, and log-probs."""

    def __init__(self) -> None:
        self._values: dict[Key, Any] = {}
        self._tokenizer: Tokenizer | None = None

    def put(self, values: Mapping[Key, Any]) -> None:
        self._values.update(values)

    def get(self, keys: Sequence[Key]) -> list[Any]:
        return [self._values[key] for key in keys]

    def write(self, file: str, lines: Sequence[tuple[dict[str, Any], Key]], model: ModelSection) -> None:
        """Write a part of a rollouts file: what the loop says of each response, and what lies here."""
        if self._tokenizer is None:
            self._tokenizer = Tokenizer.load(Path(model.path)).with_template(model.template)
        tokenizer = self._tokenizer
        found = ((said, self._values[key]) for said, key in lines)
        write_lines(Path(file), (RolloutLine(said, payload).complete(payload, tokenizer) for said, payload in found))

    def pid(self) -> int:
        return os.getpid()

    def clear(self) -> None:
        self._values.clear()


def fetch(stored: Iterable[StoreRef], depots: Mapping[int, Any], limit_s: float) -> dict[StoreRef, Any]:
    """Bring values here, from each depot in one piece, from all at once."""
    wanted: dict[int, list[StoreRef]] = {}
    for each in dict.fromkeys(stored):
        wanted.setdefault(each.node, []).append(each)
    parts = [depots[node].get.remote([each.key for each in some]) for node, some in wanted.items()]
    found = ray.get(parts, timeout=limit_s)
    pairs = zip(wanted.values(), found, strict=True)
    return {each: value for some, part in pairs for each, value in zip(some, part, strict=True)}
