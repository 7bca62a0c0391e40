"""The protocol of every engine, embedded or a server."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from pekoe.core.errors import UserError
from pekoe.core.types import Prompt, Rollout, SamplingParams
from pekoe.model import Decoder

WeightSource = Decoder | Path
"""Weights to sample from: a model in this process, or a Hugging Face directory that the engine can read."""


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counters since the engine was made."""

    num_prefill_tokens: int = 0  # context tokens computed
    num_cached_tokens: int = 0  # context tokens found in the prefix cache instead
    num_shared_tokens: int = 0  # context tokens that samples got from their group's one prefill
    num_decode_tokens: int = 0  # response tokens sampled
    num_forwards: int = 0
    num_preemptions: int = 0

    def plus(self, **more: int) -> EngineStats:
        return replace(self, **{name: getattr(self, name) + number for name, number in more.items()})


def validate(prompts: list[Prompt], params: SamplingParams, vocab_size: int, limit: int, limit_name: str) -> None:
    """UserError for what no engine can sample: empty prompts, unknown tokens, sequences above `limit` tokens.

    `limit_name` says where the limit comes from.
    """
    for token in params.stop_token_ids:
        if not 0 <= token < vocab_size:
            raise UserError(f"stop token: expected an id in [0, {vocab_size}), got {token}")
    for prompt in prompts:
        size = len(prompt.tokens)
        if not size:
            raise UserError(f"prompt {prompt.uid}: expected at least one token, got none")
        if size + params.max_new_tokens > limit:
            raise UserError(
                f"prompt {prompt.uid}: expected at most {limit} tokens with its response ({limit_name}), got "
                f"{size} + {params.max_new_tokens} new; most new tokens that fit: {max(0, limit - size)}"
            )
        low, high = int(prompt.tokens.min()), int(prompt.tokens.max())
        if low < 0 or high >= vocab_size:
            bad = low if low < 0 else high
            raise UserError(f"prompt {prompt.uid}: expected token ids in [0, {vocab_size}), got {bad}")


class Generator(Protocol):
    """Samples responses to prompts, at a known version of the weights."""

    @property
    def version(self) -> int:
        """The policy version of the weights now sampling."""
        ...

    def generate(self, prompts: list[Prompt], params: SamplingParams) -> Iterator[Rollout]:
        """Sample `params.n` responses to each prompt; yield each as it finishes, in any order.

        Wrong input (an empty prompt, an unknown token, a sequence longer than the context) raises UserError at the
        call, before anything is sampled. Closing the iterator early aborts what is unfinished.
        """
        ...

    def abort(self, uids: Iterable[str] | None = None) -> None:
        """End unfinished responses of these problems (None: of all); they are yielded with reason `abort`."""
        ...

    @property
    def max_sequence_tokens(self) -> int:
        """The longest prompt with response that fits."""
        ...

    def update_weights(self, source: WeightSource, version: int) -> None:
        """Sample from other weights from now on. Flushes every cached KV (I4).

        Responses in flight go on under the new version, their KV recomputed, their `versions` telling where.
        RunError where the weights cannot be taken or the engine does not hold the version afterwards.
        """
        ...

    def holds(self, model: Decoder) -> bool | None:
        """Whether it samples from exactly `model`'s parameters, by a comparison or checksum over every bit of them.
        None: it cannot tell. Says nothing of KV."""
        ...

    def pause(self) -> None:
        """Stop sampling until `resume`; what is in flight stays."""
        ...

    def resume(self) -> None: ...

    def release(self) -> None:
        """Give back the memory of KV, and of weights that are the engine's own, where a trainer's turn on the same
        device has come. Nothing may be in flight."""
        ...

    def restore(self) -> None:
        """Take that memory again. An update of the weights must follow before anything is sampled."""
        ...

    def health(self) -> bool: ...

    def stats(self) -> EngineStats: ...

    def close(self) -> None:
        """Free everything. Safe to call twice."""
        ...
