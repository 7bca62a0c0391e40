"""An engine of either kind as a member of the group by which weights come: one in this process, or a server."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from pekoe.config.recipes import RLConfig
from pekoe.core.progress import NoProgress
from pekoe.core.types import Prompt, Rollout, SamplingParams
from pekoe.engine import EmbeddedEngine, Generator, RemoteEngine
from pekoe.engine.fingerprints import Fingerprints, PlainPrints, prints_of
from pekoe.engine.transfer import Group, buckets, close_group, open_group
from pekoe.model import Decoder, load_model, read_spec
from pekoe.ray.weights import receive
from pekoe.run.build import open_engine, open_servers

Asked = Sequence[SamplingParams]


class Member(Protocol):
    """What `EngineWorker` needs of its engine."""

    @property
    def engine(self) -> Generator: ...

    @property
    def num_workers(self) -> int:
        """How many members of the group it is."""
        ...

    def join(self, group: Group) -> None:
        """Become members, from rank `group.first_rank` on; leave the group of before."""
        ...

    def receive(self, version: int, max_bytes: int) -> None:
        """Take the weights that rank 0 sends meanwhile, in buckets of this size."""
        ...

    def load(self, directory: Path, version: int) -> None:
        """Take the weights of a Hugging Face directory."""
        ...

    def fingerprints(self) -> Fingerprints | None:
        """Of every parameter that it samples from; None: it cannot tell."""
        ...

    def probe(self, canary: Prompt, params: SamplingParams) -> list[Rollout]: ...

    def release(self) -> None: ...

    def restore(self) -> None: ...

    def alive(self) -> bool:
        """Whether what samples is there, whatever weights it has."""
        ...

    def signs_of_life(self) -> int:
        """A number that grows while it gets on. May take as long as a server's health check."""
        ...


class EmbeddedMember:
    """An embedded engine, on weights of its own in this process."""

    num_workers = 1

    def __init__(self, config: RLConfig, device: str, longest: int, asked: Asked, logs: Path) -> None:
        self._model = load_model(config.model.path, torch.float32, device).requires_grad_(False)
        engine = open_engine(config, self._model, longest, asked, logs, NoProgress())
        assert isinstance(engine, EmbeddedEngine)
        self._engine = engine
        self._handle: Any = None

    @property
    def engine(self) -> EmbeddedEngine:
        return self._engine

    def join(self, group: Group) -> None:
        close_group(self._handle)
        self._handle = None
        self._handle = open_group(group, group.first_rank)

    def receive(self, version: int, max_bytes: int) -> None:
        receive(self._handle, buckets(self._model, max_bytes))
        self.engine.update_weights(self._model, version)

    def load(self, directory: Path, version: int) -> None:
        self.engine.update_weights(directory, version)
        self._model = self.engine.model.requires_grad_(False)

    def fingerprints(self) -> Fingerprints:
        assert self.engine.holds(self._model), "packed copies of the weights differ from them"
        return prints_of(self._model, PlainPrints(torch.float32, names_head=False))

    def probe(self, canary: Prompt, params: SamplingParams) -> list[Rollout]:
        return list(self.engine.generate([canary], params))

    def release(self) -> None:
        self.engine.release()
        self._resize(False)

    def restore(self) -> None:
        self._resize(True)
        self.engine.restore()

    def _resize(self, whole: bool) -> None:
        """The parameters stay, and lose or get their memory."""
        for parameter in self._model.parameters():
            parameter.untyped_storage().resize_(parameter.nbytes if whole else 0)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # to the other processes of this GPU

    def alive(self) -> bool:
        return True

    def signs_of_life(self) -> int:
        return self.engine.stats().num_decode_tokens


class ServerMember:
    """One SGLang or vLLM server, started here or attached to."""

    def __init__(self, config: RLConfig, device: str, longest: int, asked: Asked, logs: Path) -> None:
        assert config.cluster is not None
        self._spec, _ = read_spec(Path(config.model.path))
        self._dtype: torch.dtype = getattr(torch, config.model.dtype)
        threads = max(1, int(config.cluster.generation.cpus_per_engine))
        colocate = config.cluster.colocate
        self._engine = open_servers(config, self._spec, device, threads, longest, asked, logs, NoProgress(), colocate)
        self._life = 0

    @property
    def engine(self) -> RemoteEngine:
        return self._engine

    @property
    def num_workers(self) -> int:
        return self._engine.num_workers

    def join(self, group: Group) -> None:
        self.engine.join(group)

    def receive(self, version: int, max_bytes: int) -> None:
        with torch.device("meta"):
            shapes = Decoder(self._spec)
        self.engine.receive(buckets(shapes, max_bytes, self._dtype), version)

    def load(self, directory: Path, version: int) -> None:
        self.engine.update_weights(directory, version)

    def fingerprints(self) -> Fingerprints | None:
        return self.engine.prove()

    def probe(self, canary: Prompt, params: SamplingParams) -> list[Rollout]:
        return self.engine.probe(canary, params)

    def release(self) -> None:
        self.engine.release()

    def restore(self) -> None:
        self.engine.restore()

    def alive(self) -> bool:
        return self._engine.alive()

    def signs_of_life(self) -> int:
        """A server tells of a response when it is whole; until then, that it is well."""
        self._life += self.engine.health()
        return self._life
