"""The protocols of the loop. `run/rl.py` knows these; one process, a cluster and a simulator implement them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from pekoe.core.types import AnySample, Draw, FloatArray, Handle, JudgedGroup, SamplingParams

Counters = Mapping[str, float]
"""Totals since a part was made. They only grow; the journal takes differences."""

Route = Literal["alias", "copy", "shm", "disk", "broadcast"]
"""How weights reach engines. alias: the engine samples from the trainer's own parameters."""
ChecksumResult = Literal["equal", "unknown", "skipped"]
"""unknown: an engine cannot give a true checksum. skipped: not due."""


class InFlight(Protocol):
    """Draws that were put and not taken, as they were at one moment."""

    @property
    def draws(self) -> list[Draw]:
        """In the order in which they were put."""
        ...

    @property
    def places(self) -> list[int]:
        """Of each draw its offset from the oldest of these, in the order of puts; draws that were taken count."""
        ...

    def sampled(self) -> list[JudgedGroup]:
        """Those of which every response is sampled; waits for their verdicts."""
        ...


class Rollouts(Protocol):
    """Draws in, judged groups out."""

    def put(self, draws: Sequence[Draw], params: SamplingParams | None = None) -> None:
        """Begin to sample groups of these problems, `params.n` responses each; None: as the run trains."""
        ...

    def take(self, n: int) -> list[JudgedGroup]:
        """Wait for the next n groups, in the order in which they were put, up to `rollout.window`."""
        ...

    def drain(self) -> None:
        """Wait until everything that was put is sampled."""
        ...

    def in_flight(self) -> InFlight: ...

    def restore(self, draws: Sequence[Draw], places: Sequence[int], sampled: Sequence[JudgedGroup]) -> None:
        """Put draws that were in flight when a run was stopped; those that were sampled then are not sampled again."""
        ...

    def cancel(self) -> None:
        """Drop everything in flight."""
        ...

    def flush_cache(self) -> None:
        """Drop cached KV, so that later samples do not depend on earlier ones."""
        ...

    def offload(self) -> None:
        """Free the engines' memory on devices that the trainer shares. `Weights.publish` takes it back."""
        ...

    def counters(self) -> Counters: ...


@dataclass(frozen=True, slots=True)
class StepStats:
    """One optimizer step. `means` are per trained token; `skipped` says why no update was made."""

    loss: float
    grad_norm: float
    lr: float
    num_tokens: int  # all tokens computed, prompts too
    num_targets: int  # tokens trained on: the denominator
    num_microbatches: int
    means: dict[str, float]
    skipped: str | None = None
    peak_bytes: int | None = None  # the largest peak memory of any process


class Snapshot(Protocol):
    """A trainer's state at one moment, copied, so that training goes on while it is written."""

    def write(self, path: Path) -> None:
        """Write the state to the directory `path`. Raises OSError where a file cannot be written."""
        ...

    def export(self, path: Path) -> None:
        """Write the weights as a Hugging Face directory."""
        ...


class Trainer(Protocol):
    """Owns the weights and the optimizer."""

    @property
    def num_updates(self) -> int:
        """Optimizer steps so far, skipped ones too: the position in the learning-rate schedule."""
        ...

    @property
    def num_not_finite(self) -> int:
        """The last optimizer steps in a row whose loss or gradient was not finite."""
        ...

    def skip(self, num_updates: int) -> None:
        """Advance the schedule without an update."""
        ...

    def step(
        self,
        samples: Sequence[AnySample],
        objective: Callable[..., Any],
        denominator: float | None = None,
        max_mean_ratio: float | None = None,
    ) -> StepStats:
        """See `train.Trainer.step`."""
        ...

    def logprobs(
        self, samples: Sequence[AnySample], reference: bool = False
    ) -> Sequence[FloatArray | Handle[FloatArray]]:
        """Log-probs [L] of each sample's trained tokens (0 elsewhere), by the trained or the reference model."""
        ...

    def snapshot(self) -> Snapshot: ...

    def load(self, path: Path) -> None:
        """Restore the state that `Snapshot.write` wrote."""
        ...

    def counters(self) -> Counters: ...


@dataclass(frozen=True, slots=True)
class SyncReport:
    """What a publish cost and proved. `copied_bytes` left the trainer. `canary_diff` is None where nothing is proven:
    the user asked to stop before the engines had answered."""

    version: int
    route: Route
    seconds: float
    copied_bytes: int
    canary_diff: float | None
    checksum: ChecksumResult
    completed: float | None = None  # Unix time of the proof, where nobody waited for it

    def as_dict(self) -> dict[str, Any]:
        """The fields of a journal event."""
        fields = {
            "sync_time": self.completed and round(self.completed, 3),
            "sync_version": self.version,
            "sync_route": self.route,
            "sync_bytes": self.copied_bytes,
            "sync_canary_diff": self.canary_diff,
            "sync_checksum": self.checksum,
        }
        return {name: value for name, value in fields.items() if value is not None}

    def __str__(self) -> str:
        proof = "not proven" if self.canary_diff is None else f"canary off by {self.canary_diff:.0e}"
        return (
            f"weights: version {self.version} by {self.route}, {self.copied_bytes / 2**20:.0f} MiB in "
            f"{self.seconds:.1f} s; {proof}, checksum {self.checksum}"
        )


class Weights(Protocol):
    """Brings the trainer's weights to the engines."""

    def publish(self, version: int, wait: bool = True) -> SyncReport:
        """Make every engine sample from the trainer's weights as `version`, and prove it (I4), or raise RunError.

        Without `wait` it may return earlier, with the report of the publish before. Requests that are submitted later
        are sampled by this version in any case.
        """
        ...

    def settle(self) -> SyncReport | None:
        """Wait until the last publish is proven; returns its report."""
        ...

    def counters(self) -> Counters: ...
