"""Pools of embedded engines that hold weights of their own, some of which lie."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pekoe.config.engine import EngineSection
from pekoe.core.loop import Route
from pekoe.core.types import IntArray
from pekoe.engine import EmbeddedEngine, EnginePool
from pekoe.engine.base import Engine, EngineLost, WeightSource
from pekoe.engine.pool import Starter
from pekoe.model import Decoder
from pekoe.weights import LocalSender, Receiver, WeightChannel, forward_logprobs


class Reference(EmbeddedEngine):
    """An engine on a copy of a model, which can be made to fail. `lie` is called in place of an update."""

    def __init__(self, model: Decoder, dtype: torch.dtype, member: Member) -> None:
        config = EngineSection.model_validate({"block_tokens": 4})  # the canary fills some
        own = copy.deepcopy(model).to(member.weights)
        super().__init__(own, config, 120, dtype, owns_model=True, receive=Receiver())
        self.member, self.dead = member, False

    def update_weights(self, source: WeightSource, version: int) -> None:
        self.member.updates += 1
        if self.dead or self.member.dies_at == self.member.updates:
            self.dead = True
            raise EngineLost("it died")
        if isinstance(source, Decoder) and not self.member.shares:
            source = copy.deepcopy(source)
        super().update_weights(source, version)
        if self.member.lie is not None:
            self.member.lie(self, version)

    def health(self) -> bool:
        return not self.dead and super().health()


@dataclass
class Member:
    """Starts one engine (implements `engine.pool.Starter`)."""

    model: Decoder
    dtype: torch.dtype
    number: int
    shares: bool = False
    kind: Any = "embedded"
    lie: Callable[[Reference, int], None] | None = None
    dies_at: int = -1  # which update, over all engines of this member
    updates: int = 0
    engines: list[Reference] = field(default_factory=list[Reference])
    weights: torch.dtype = torch.float32  # of its own weights

    @property
    def name(self) -> str:
        return f"engine {self.number}"

    def start(self) -> Engine:
        self.engines.append(Reference(self.model, self.dtype, self))
        return self.engines[-1]


@dataclass
class Bench:
    """A trained model, its engines, and the channel between them."""

    model: Decoder
    members: list[Member]
    pool: EnginePool
    sender: LocalSender
    channel: WeightChannel

    def learn(self, rate: float = 0.05, seed: int = 0) -> None:
        """Other weights, as after an optimizer step of Adam."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.add_(rate * torch.randn(parameter.shape, generator=generator).sign())


@pytest.fixture
def canary() -> IntArray:
    return np.arange(1, 10, dtype=np.int64)


@pytest.fixture
def several_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets one process be several ranks of a group: torch knows one group by a name."""
    for name in ("_register_process_group", "_unregister_process_group"):
        monkeypatch.setattr(f"torch.distributed.distributed_c10d.{name}", lambda *_: None)


@pytest.fixture
def make_bench(
    several_ranks: None, make_model: Callable[..., Decoder], canary: IntArray, tmp_path: Path
) -> Iterator[Callable[..., Bench]]:
    with ExitStack() as stack:

        def make(
            route: Route = "copy",
            num: int = 2,
            dtype: torch.dtype = torch.float32,
            checksum_every: int = 1,
            limit_s: float = 20.0,
            weights: torch.dtype = torch.float32,
            **shape: Any,
        ) -> Bench:
            model = make_model(**shape)
            members = [Member(model, dtype, number, route == "alias", weights=weights) for number in range(num)]
            starters: Sequence[Starter] = members
            pool = EnginePool(starters, start_limit_s=60)
            stack.callback(pool.close)
            sender = LocalSender(model, dtype, partial(forward_logprobs, model, 1.0, dtype), engine_dtype=weights)
            stack.callback(sender.close)
            channel = WeightChannel(
                pool,
                sender,
                route=route,
                canary=canary,
                temperature=1.0,
                checksum_every=checksum_every,
                limit_s=limit_s,
                folder=tmp_path / "weights",
                bucket_bytes=4000,
            )
            pool.wait_started()
            return Bench(model, members, pool, sender, channel)

        yield make
