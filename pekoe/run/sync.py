"""The only bridge from trainer to engine: bring the weights over as a numbered version, and prove it (I4).

Three proofs follow every update: the engine says the version; a canary prompt's log-probs are the trainer's, at every
server; and, as often as is asked for, a checksum says that all parameters are. The first would not see weights that
are wrong, the second sees stale KV too, the third sees what eight tokens do not show.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from pekoe.core.errors import RunError
from pekoe.core.types import Prompt, Rollout, SampleRef, SamplingParams
from pekoe.engine import Generator, RemoteEngine
from pekoe.train import Trainer

CANARY_TOKENS = 8
TOLERANCE, TOLERANCE_BF16 = 1e-3, 0.5  # max abs difference of log-probs; a stale cache is off by 0.7 to 2 nats

Route = Literal["alias", "shm", "disk", "broadcast"]
"""alias: the engine samples from the trainer's own parameters. The others: see `engine.server.sync`."""
Checksum = Literal["equal", "unknown", "skipped"]
"""unknown: the engine cannot give a true one. skipped: not due."""


@dataclass(frozen=True, slots=True)
class SyncReport:
    """What a sync cost and proved. `copied_bytes` left the trainer; an update by broadcast goes to each server."""

    version: int
    route: Route
    seconds: float
    copied_bytes: int
    canary_diff: float
    checksum: Checksum

    def as_dict(self) -> dict[str, Any]:
        """What the journal says of it."""
        return {
            "sync_route": self.route,
            "sync_bytes": self.copied_bytes,
            "sync_canary_diff": self.canary_diff,
            "sync_checksum": self.checksum,
        }

    def __str__(self) -> str:
        return (
            f"weights: version {self.version} by {self.route}, {self.copied_bytes / 2**20:.0f} MiB in "
            f"{self.seconds:.1f} s; canary off by {self.canary_diff:.0e}, checksum {self.checksum}"
        )


class WeightSync:
    """Brings the trainer's weights to the engine.

    Args:
        trainer: whose weights; in process, engine and trainer share them, and nothing is copied.
        engine: told to sample from them.
        canary: sampled after each sync, by every server where there are many.
        route: how they travel.
        checksum_every: syncs from one checksum over all parameters to the next; the first two have one (what the run
            starts from, and the first that training made).
    """

    def __init__(
        self, trainer: Trainer, engine: Generator, canary: Prompt, route: Route = "alias", checksum_every: int = 1
    ) -> None:
        self._trainer, self._engine, self._canary = trainer, engine, canary
        self.route: Route = route
        self._checksum_every, self._count = checksum_every, 0

    def __call__(self, version: int) -> SyncReport:
        """Make the engine sample at `version`; RunError if it does not hold the trainer's weights."""
        start = time.perf_counter()
        self._engine.update_weights(self._trainer.model, version)
        diff = self._check_canary(version)
        due = self._count < 2 or self._count % self._checksum_every == 0
        checksum = self._check_parameters(version) if due else "skipped"
        self._count += 1
        seconds = time.perf_counter() - start
        return SyncReport(version, self.route, seconds, self._copied_bytes(), diff, checksum)

    def _check_canary(self, version: int) -> float:
        """Max abs difference between log-probs of a short response, of each server's, and the trainer's."""
        room = self._engine.max_sequence_tokens - len(self._canary.tokens)
        params = SamplingParams(
            max_new_tokens=min(CANARY_TOKENS, room), temperature=self._trainer.temperature, stream="eval"
        )
        engine = self._engine
        if isinstance(engine, RemoteEngine):
            rollouts = engine.probe(self._canary, params)
        else:
            rollouts = list(engine.generate([self._canary], params))
        diff = float(np.max([self._difference(rollout) for rollout in rollouts]))  # not max(): it may pass over NaN
        limit = TOLERANCE_BF16 if self._trainer.compute_dtype is torch.bfloat16 else TOLERANCE
        versions = {engine.version} | {each for rollout in rollouts for each, _ in rollout.versions}
        if versions != {version} or not diff <= limit:
            raise RunError(
                f"weight sync: expected the engine at version {version} with log-probs within {limit} of the "
                f"trainer's, got version {' and '.join(map(str, sorted(versions)))} and {diff}"
            )
        return diff

    def _difference(self, rollout: Rollout) -> float:
        sample = SampleRef(rollout.num_prompt_tokens, rollout.num_tokens, rollout.payload, 0.0, 0, 0).resolve()
        trained = self._trainer.logprobs([sample])[0]
        return float(np.abs(trained - sample.behaviour_logprobs)[sample.loss_mask].max())

    def _check_parameters(self, version: int) -> Checksum:
        holds = self._engine.holds(self._trainer.model)
        if holds is False:
            raise RunError(
                f"weight sync: expected the engine at version {version} to hold the trainer's parameters bit by bit, "
                f"got others: the checksum over all of them differs"
            )
        return "unknown" if holds is None else "equal"

    def _copied_bytes(self) -> int:
        engine, model = self._engine, self._trainer.model
        if not isinstance(engine, RemoteEngine):
            return 0
        times = sum(server.state == "serving" for server in engine.servers) if self.route == "broadcast" else 1
        numbers = sum(p.numel() for p in model.parameters())
        return times * numbers * self._trainer.compute_dtype.itemsize  # converted before they are sent
