"""Parts of `pekoe doctor --gpu` about weights on their way to engines, and a run that needs all of it."""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection

import numpy as np
import torch

from pekoe.config.engine import EngineSection
from pekoe.core.errors import RunError
from pekoe.core.loop import Route
from pekoe.core.spec import ModelSpec
from pekoe.core.types import SamplingParams
from pekoe.engine.base import Broadcast, BroadcastGroup, EngineKind, WeightSource
from pekoe.engine.checksum import checksum
from pekoe.engine.embedded import EmbeddedEngine
from pekoe.engine.pool import EnginePool
from pekoe.model import Decoder
from pekoe.run.first_hour.site import Figure, Site, Skip, at_least, at_most, is_true, small_spec, tokens_of
from pekoe.weights import LocalSender, Receiver, WeightChannel, forward_logprobs
from pekoe.weights.groups import free_port, new_group
from pekoe.weights.proof import TOLERANCE, TOLERANCE_BF16

LIMIT_S = 60.0


class _Deaf(EmbeddedEngine):
    """Says that it took the weights, and keeps those that it has."""

    def update_weights(self, source: WeightSource, version: int) -> None:
        super().update_weights(self.model, version)


@dataclass(frozen=True, slots=True)
class _Starter:
    """Starts an engine on a model (implements `engine.pool.Starter`)."""

    model: Decoder
    dtype: torch.dtype
    cls: type[EmbeddedEngine]
    name: str = "the engine"
    kind: EngineKind = "embedded"

    def start(self) -> EmbeddedEngine:
        return self.cls(self.model, EngineSection(kv_tokens=2048), 256, self.dtype, owns_model=self.cls is _Deaf)


def publish(site: Site) -> Iterator[Figure]:
    """Two versions by each route of one process, proven by canary and checksum; then an engine that keeps the first."""
    for dtype in (torch.float32, torch.bfloat16):
        name, limit = str(dtype).removeprefix("torch."), TOLERANCE_BF16 if dtype is torch.bfloat16 else TOLERANCE
        routes: list[Route] = ["alias", "shm"]
        for route in routes:
            canary, equal, num_bytes = _two_versions(site, dtype, route, EmbeddedEngine)
            yield at_most(f"{name}, {route}: canary's largest difference", canary, limit)
            yield is_true(f"{name}, {route}: checksums over all parameters are equal", equal)
            yield Figure(f"{name}, {route}: bytes of a publish", num_bytes)
        try:
            _two_versions(site, dtype, "shm", _Deaf)
            found = False
        except RunError:
            found = True
        yield is_true(f"{name}: an engine that kept the version before is found out", found)


def _two_versions(site: Site, dtype: torch.dtype, route: Route, cls: type[EmbeddedEngine]) -> tuple[float, bool, int]:
    """The canary's largest difference, whether checksums were equal, and bytes of a publish. RunError where an engine
    does not hold the weights."""
    trained = site.model(small_spec(site))
    with ExitStack() as stack:
        sampled = trained if route == "alias" else copy.deepcopy(trained)
        pool = EnginePool([_Starter(sampled, dtype, cls)], start_limit_s=LIMIT_S)
        stack.callback(pool.close)
        sender = LocalSender(trained, dtype, partial(forward_logprobs, trained, 1.0, dtype))
        stack.callback(sender.close)
        channel = WeightChannel(
            pool, sender, route=route, canary=np.arange(1, 10, dtype=np.int64), temperature=1.0, checksum_every=1,
            limit_s=LIMIT_S, folder=site.folder / "weights",
        )  # fmt: skip
        pool.wait_started()
        reports = [channel.publish(0)]
        with torch.no_grad():
            for number, parameter in enumerate(trained.parameters()):
                noise = torch.Generator(site.device).manual_seed(number)
                parameter.add_(torch.randn(parameter.shape, generator=noise, device=site.device), alpha=0.02)
        reports.append(channel.publish(1))
        differences = [report.canary_diff for report in reports if report.canary_diff is not None]
        equal = all(report.checksum == "equal" for report in reports)
        return max(differences, default=float("nan")), equal, reports[-1].copied_bytes


def broadcast(site: Site) -> Iterator[Figure]:
    """From this process to an engine in another, on the second GPU, in buckets."""
    if site.cuda and torch.cuda.device_count() < 2:
        raise Skip("needs two GPUs")
    backend = "nccl" if site.cuda else "gloo"
    spec = small_spec(site)
    if site.cuda:  # 1 GB, so that the rate says something
        spec = small_spec(site, hidden_size=2048, num_heads=32, intermediate_size=6144, num_layers=6)
    trained = site.model(spec)
    group = new_group("127.0.0.1", free_port("127.0.0.1"), 2, backend, LIMIT_S)
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    receiver = context.Process(target=_receive, args=(str(site.device), spec, group, theirs), daemon=True)
    receiver.start()
    sender = LocalSender(trained, torch.float32, partial(forward_logprobs, trained, 1.0, torch.float32))
    sent, seconds = 0, 1.0
    for version in range(2):
        with torch.no_grad():
            for parameter in trained.parameters():
                parameter.mul_(1.01)
        ours.send(version)
        if version == 0:
            sender.open("embedded", group)  # waits for the other to join
        sent = sender.broadcast("embedded", 64 << 20, True)
        if not ours.poll(LIMIT_S):
            raise RunError("the other process did not answer")
        sums, seconds = ours.recv()
        expected = {name: checksum(parameter) for name, parameter in trained.named_parameters()}
        yield is_true(f"version {version}: every parameter arrived, bit by bit", sums == expected)
    ours.send(None)
    yield Figure(f"{backend}: bytes a second", sent / seconds)
    receiver.join(LIMIT_S)
    sender.close()


def _receive(device: str, spec: ModelSpec, group: BroadcastGroup, pipe: Connection) -> None:
    """In another process: an engine that takes what is sent, until there is no more."""
    import time
    from pathlib import Path

    site = Site(torch.device("cuda", 1) if device.startswith("cuda") else torch.device(device), Path())
    if site.cuda:
        torch.cuda.set_device(site.device)
    config = EngineSection(kv_tokens=2048)
    engine = EmbeddedEngine(site.model(spec, seed=9), config, 256, owns_model=True, receive=Receiver())
    place = BroadcastGroup(group.name, group.host, group.port, group.world_size, group.backend, group.limit_s, 1)
    while (version := pipe.recv()) is not None:
        start = time.perf_counter()
        engine.update_weights(Broadcast(place, 64 << 20), version)
        site.wait()
        seconds = time.perf_counter() - start
        pipe.send((engine.checksums(), seconds))
    engine.close()


def colocate(site: Site) -> Iterator[Figure]:
    """An engine with weights of its own gives memory to a trainer on the same device, takes it again, and samples what
    it would have sampled."""
    spec = small_spec(site, num_layers=4)
    model = site.model(spec)
    kv_tokens = 4096 if not site.cuda else 1 << 20
    before = _used(site)
    engine = EmbeddedEngine(copy.deepcopy(model), EngineSection(kv_tokens=kv_tokens), 256, site.dtype, owns_model=True)
    params = SamplingParams(n=8, max_new_tokens=32, seed=3, stop_token_ids=())
    prompts = tokens_of(4, 20, spec.vocab_size)
    expected = [c.tokens.tolist() for group in engine.generate(prompts, params) for c in group]
    held = _used(site) - before
    weights = sum(p.nbytes for p in engine.model.parameters())
    kv = engine.kv_bytes
    engine.offload()
    left = _used(site) - before
    if site.cuda:
        yield Figure("bytes that the engine held", held, f">= {kv + weights:,} (KV and weights)", held >= kv + weights)
        yield at_most("share of these that was not given back", left / held, 0.05)  # cuBLAS keeps its workspaces
    else:
        stored = sum(p.untyped_storage().nbytes() for p in engine.model.parameters())
        yield Figure("bytes of KV that the engine kept", engine.kv_bytes, f"0 of {kv:,}", engine.kv_bytes == 0)
        yield Figure("bytes of weights that it kept", stored, f"0 of {weights:,}", stored == 0)
    engine.onload()
    engine.update_weights(copy.deepcopy(model), 1)
    again = [c.tokens.tolist() for group in engine.generate(prompts, params) for c in group]
    yield is_true("it samples the same tokens as before", again == expected)
    engine.close()


def _used(site: Site) -> int:
    if not site.cuda:
        return 0
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated()


def demo(site: Site) -> Iterator[Figure]:
    """The whole demo on a GPU; on a CPU two steps of each stage, which learn nothing."""
    out = site.folder / "demo"
    words = [sys.executable, "-m", "pekoe.cli", "demo", "--out", str(out), "--device", site.device.type]
    done = subprocess.run([*words, *([] if site.cuda else ["--quick"])], capture_output=True, text=True, env=os.environ)
    if done.returncode:
        raise RunError(f"pekoe demo ended with {done.returncode}: {done.stderr[-2000:]}")
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    for stage in ("sft", "rl"):
        yield Figure(f"pass@1 after {stage}", summary[stage]["pass_at_1"])
    if site.cuda:
        yield at_least("pass@1 after RL", summary["rl"]["pass_at_1"], 0.9)
    rl = json.loads((out / "stages.json").read_text(encoding="utf-8"))["results"]["rl"]
    name, largest = "sampling beside training log-probs, largest of all steps", rl["logprob_diff_max"]
    yield Figure(name, largest) if site.cuda else at_most(name, largest, 1e-4)
    for name, seconds in summary["seconds"].items():
        yield Figure(f"seconds of {name}", seconds)
