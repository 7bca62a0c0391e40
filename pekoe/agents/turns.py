"""From turns to a trajectory: what continues a recorded sequence extends it, anything else begins another (I11)."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from pekoe.core.types import (
    BoolArray,
    Branch,
    Completion,
    FinishReason,
    FloatArray,
    IntArray,
    Record,
    RoutingArray,
    Turn,
)

NOTHING = Branch(0, 0, (), Record(np.empty(0, np.int64), np.empty(0, np.bool_), np.empty(0, np.float32)))
"""Of an episode that asked for no answer."""


def branches_of(turns: Iterable[Turn]) -> tuple[Branch, ...]:
    """Lay turns out as sequences to train on: each sampled token is trained on once, in the context it was sampled in.

    A turn extends the longest sequence that its whole context begins with; where another turn has extended that one
    already, or there is none, it begins a sequence of its own, and all of its context is masked. The result depends on
    the turns alone, not on their order: turns that ran side by side end in any.
    """
    sequences: list[_Sequence] = []
    for turn in sorted(turns, key=lambda turn: (len(turn.context), turn.context.tobytes(), _own(turn).tobytes())):
        fitting = [sequence for sequence in sequences if sequence.begins(turn.context)]
        if fitting:
            max(fitting, key=lambda sequence: sequence.size).extend(turn)
        else:
            sequences.append(_Sequence(turn))
    return tuple(sequence.branch() for sequence in sequences)


def _own(turn: Turn) -> IntArray:
    return turn.completion.tokens


class _Sequence:
    def __init__(self, turn: Turn) -> None:
        self.size, self._num_sampled = 0, 0
        self._tokens, self._masks, self._logprobs = list[IntArray](), list[BoolArray](), list[FloatArray]()
        self._versions: list[tuple[int, int]] = []
        self._whole = np.empty(0, np.int64)
        self._routing: RoutingArray | None = None
        self.extend(turn)

    def begins(self, context: IntArray) -> bool:
        return self.size <= len(context) and np.array_equal(self._whole, context[: self.size])

    def extend(self, turn: Turn) -> None:
        completion = turn.completion
        routing = completion.handle.resolve().routing
        if self.size and routing is not None:  # what was sampled went where it went then; its last token goes now
            before = None if self._routing is None else self._routing[: self.size - 1]
            routing = None if before is None else np.concatenate([before, routing[self.size - 1 :]])
        self._routing = routing
        self._add(turn.context[self.size :], False, np.zeros(len(turn.context) - self.size, np.float32))
        self._add(completion.tokens, True, completion.logprobs)
        for version, start in completion.versions:
            if not self._versions or self._versions[-1][0] != version:
                self._versions.append((version, self._num_sampled + start))
        self._num_sampled += completion.num_tokens
        self._whole = np.concatenate(self._tokens)

    def _add(self, tokens: IntArray, sampled: bool, logprobs: FloatArray) -> None:
        self._tokens.append(tokens)
        self._masks.append(np.full(len(tokens), sampled, np.bool_))
        self._logprobs.append(logprobs)
        self.size += len(tokens)

    def branch(self) -> Branch:
        record = Record(self._whole, np.concatenate(self._masks), np.concatenate(self._logprobs), self._routing)
        return Branch(self.size - self._num_sampled, self._num_sampled, tuple(self._versions), record)


def cut(turn: Turn, num_tokens: int, finish: FinishReason) -> Turn:
    """The turn without what was sampled after its first `num_tokens` tokens."""
    completion = turn.completion
    versions = tuple((version, start) for version, start in completion.versions if start < num_tokens)
    routing = completion.handle.resolve().routing
    routing = None if routing is None else routing[: len(turn.context) + num_tokens]
    record = Record.of(turn.context, completion.tokens[:num_tokens], completion.logprobs[:num_tokens], routing)
    return Turn(turn.context, Completion(num_tokens, finish, versions, record, completion.num_cached_tokens))
