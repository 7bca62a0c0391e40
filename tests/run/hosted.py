"""Servers that are none: a backend whose every server is an embedded engine on weights of its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from pekoe.core.types import Prompt, SamplingParams
from pekoe.engine import EmbeddedEngine
from pekoe.engine.fingerprints import Fingerprints, SGLangPrints, prints_of
from pekoe.engine.servers.client import Answer, Backend, Server, Setup
from pekoe.engine.servers.sglang import SGLang
from pekoe.engine.transfer import Group, Tensors
from pekoe.model import Decoder, load_model

URLS = ("http://127.0.0.1:1", "http://127.0.0.1:2")


class Hosted(Backend):
    """Takes weights by every route. What is in `deaf` says yes to an update and keeps its weights; what is in
    `off_by_a_bit` then has one number that is the next one up; what is in `ahead` says another version."""

    name = "hosted"
    deaf: ClassVar[set[str]] = set()
    off_by_a_bit: ClassVar[set[str]] = set()
    ahead: ClassVar[set[str]] = set()

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.engines: dict[str, EmbeddedEngine] = {}
        self.probed: list[str] = []

    def at(self, server: Server) -> EmbeddedEngine:
        if server.url not in self.engines:
            self.engines[server.url] = EmbeddedEngine(load_model(self.setup.model), max_sequence_tokens=64)
        return self.engines[server.url]

    def take(self, server: Server, model: Decoder, version: int) -> None:
        engine = self.at(server)
        if server.url in self.off_by_a_bit:
            with torch.no_grad():
                weight = model.get_parameter("model.layers.1.self_attn.k_proj.weight")
                weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(9.0))
        engine.update_weights(engine.model if server.url in self.deaf else model, version)

    def command(self, port: int) -> tuple[list[str], dict[str, str]]:
        raise NotImplementedError

    async def ready(self, server: Server) -> bool:
        return True

    def check_params(self, params: SamplingParams) -> None:
        SGLang(self.setup).check_params(params)

    async def sample(self, server: Server, prompt: Prompt, index: int, params: SamplingParams, rid: str) -> Answer:
        if prompt.uid == "canary":
            self.probed.append(server.url)
        rollouts = self.at(server).generate([prompt], params)
        (rollout,) = (rollout for rollout in rollouts if rollout.sample_index == index)
        payload = rollout.payload.resolve()
        versions = [(version + (server.url in self.ahead), start) for version, start in rollout.versions]
        return Answer(payload.tokens.tolist(), payload.logprobs.tolist(), rollout.finish_reason, versions)

    async def abort(self, server: Server, rids: Sequence[str] | None) -> None: ...

    async def pause(self, server: Server, mode: Literal["abort", "keep"]) -> None: ...

    async def resume(self, server: Server) -> None: ...

    async def flush(self, server: Server) -> None: ...

    async def version_of(self, server: Server) -> str:
        return str(self.at(server).version)

    async def set_version(self, server: Server, version: int) -> None: ...

    async def load_from_disk(self, server: Server, directory: Path, version: int) -> None:
        self.take(server, load_model(directory), version)

    async def join_group(self, server: Server, group: Group) -> None: ...

    def open_group(self, group: Group) -> Any:
        return {}

    def broadcast(self, handle: Any, tensors: Tensors) -> None:
        handle.update({name: tensor.clone() for name, tensor in tensors})

    def close_group(self, handle: Any) -> None: ...

    async def receive(self, server: Server, group: Group, tensors: Tensors) -> None: ...

    async def finish_update(self, server: Server, version: int) -> None:
        model = load_model(self.setup.model)
        model.load_state_dict(server.group[1], strict=False)
        self.take(server, model, version)

    def expected(self, model: Decoder) -> Fingerprints:
        return prints_of(model, SGLangPrints(torch.float32))

    async def fingerprints(self, server: Server) -> Fingerprints:
        return prints_of(self.at(server).model, SGLangPrints(torch.float32))
