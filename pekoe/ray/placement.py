"""Ray itself: connection, nodes, placement groups, and the errors and sizes of remote calls."""

from __future__ import annotations

import logging
import os
import pickle
import secrets
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from threading import Lock
from typing import Any

import ray
import torch
from ray.exceptions import AuthenticationError, GetTimeoutError, RayError
from ray.job_config import JobConfig
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from pekoe.config.cluster import ClusterSection
from pekoe.core.errors import RunError, UserError
from pekoe.core.loop import Counters
from pekoe.core.progress import ProgressReporter

_LOCAL_STORE_BYTES = 512 << 20
_LOOK_S = 1.0  # between looks at what is lost
Bundle = dict[str, float]


def connect(section: ClusterSection, view: ProgressReporter, stack: ExitStack) -> None:
    """Join the Ray cluster that the recipe names, or start one here; `stack` leaves or stops it."""
    options: dict[str, Any] = {"address": section.address, "log_to_driver": False, "configure_logging": False}
    # As a client's job: of any other, Ray puts the current directory first on the path of all that it starts.
    options["job_config"] = JobConfig(_client_job=True)
    if section.address is None:
        options |= {"address": "local", "num_cpus": _local_cores(section), "include_dashboard": False}
        options |= {"object_store_memory": _LOCAL_STORE_BYTES}
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # of this process and what it starts
    logging.getLogger("ray").setLevel(logging.ERROR)
    # Ray leaves CUDA_VISIBLE_DEVICES of an actor of 0 GPUs as we set it: with `colocate` an engine has its ranks' GPUs.
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    try:
        with _handlers_kept():
            ray.init(**options)
    except (ConnectionError, RuntimeError, ValueError, AuthenticationError) as error:
        raise UserError(
            f"cluster.address: expected a Ray cluster that answers at {section.address or 'this machine'}, got: {error}"
        ) from None
    stack.callback(ray.shutdown)
    view.say(f"Ray {ray.__version__}: {len(live_nodes())} node(s), {_total('CPU'):g} cores, {_total('GPU'):g} GPUs")


@contextmanager
def _handlers_kept() -> Iterator[None]:
    """Put back the handlers of signals that `ray.init` replaces: at a SIGTERM, Ray would abort without saving."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    kept = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():  # no other may set any
            for number, handler in kept.items():
                if handler is not None:  # None: installed by other than Python
                    signal.signal(number, handler)


def plan(section: ClusterSection, view: ProgressReporter) -> list[str]:
    """Where engines and ranks would be, a line a node. UserError where there is no room for all."""
    with ExitStack() as stack:
        if section.address is None:
            free = {"this machine": {"CPU": float(_local_cores(section)), "GPU": float(torch.cuda.device_count())}}
        else:
            connect(section, view, stack)
            free = {node["NodeManagerAddress"]: dict(node["Resources"]) for node in live_nodes()}
    placed: dict[str, list[str]] = {name: [] for name in free}
    for kind, needed in bundles(section).items():
        for number, bundle in enumerate(needed):
            fitting = [n for n, has in free.items() if all(has.get(k, 0.0) >= v for k, v in bundle.items())]
            if not fitting:
                asked = ", ".join(f"{value:g} {name}" for name, value in bundle.items())
                raise UserError(
                    f"cluster: expected room for {kind} {number} ({asked}) on one node, got none that has it"
                )
            name = fitting[0]
            if kind == "rank":  # ranks are spread
                name = min(fitting, key=lambda n: sum(each.startswith(kind) for each in placed[n]))
            free[name] = {k: v - bundle.get(k, 0.0) for k, v in free[name].items()}
            placed[name].append(f"{kind} {number}")
    return [f"{name:<20} {', '.join(on_node) or 'nothing'}" for name, on_node in placed.items()]


def _local_cores(section: ClusterSection) -> int:
    """The number of cores that Ray counts on: more processes than cores are slow, but right."""
    needed = sum(bundle["CPU"] for each in bundles(section).values() for bundle in each)
    return max(os.cpu_count() or 1, int(needed + 0.999))


def bundles(section: ClusterSection) -> dict[str, list[Bundle]]:
    """The resources of each engine and of each rank: a bundle is on one node. With `colocate`, a bundle is for an
    engine together with the ranks that take turns with it on the same devices."""
    engine, rank = section.generation, section.training
    if section.colocate:
        cpus = engine.cpus_per_engine + rank.ranks // engine.engines * rank.cpus_per_rank
        return {"engine with its ranks": [_bundle(cpus, engine.gpus_per_engine)] * engine.engines}
    return {
        "engine": [_bundle(engine.cpus_per_engine, engine.gpus_per_engine)] * engine.engines,
        "rank": [_bundle(rank.cpus_per_rank, rank.gpus_per_rank)] * rank.ranks,
    }


def _bundle(cpus: float, gpus: float) -> Bundle:
    return {"CPU": cpus, **({"GPU": gpus} if gpus else {})}


def live_nodes() -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]


def _total(resource: str) -> float:
    return sum(node["Resources"].get(resource, 0.0) for node in live_nodes())


def place(needed: list[Bundle], strategy: str, what: str, limit_s: float, stack: ExitStack) -> PlacementGroup:
    """Reserve these bundles; returns when Ray has placed them. `stack` gives them back."""
    for name in ("CPU", "GPU"):
        asked = sum(bundle.get(name, 0.0) for bundle in needed)
        if asked > _total(name):
            raise UserError(f"cluster: expected {asked:g} {name}s for {what}, got {_total(name):g} on Ray's nodes")
    group = placement_group(needed, strategy=strategy)
    stack.callback(remove_placement_group, group)
    if not group.wait(limit_s):
        raise RunError(f"waited {limit_s:g} s for Ray to place {what}: the room is there, but taken")
    return group


def node_of(group: PlacementGroup, bundle: int) -> str | None:
    """The id of the node that a bundle is on; None where that node is lost, and Ray has no other yet."""
    table: Any = ray.util.placement_group_table(group)
    node = table["bundles_to_node_id"].get(bundle)
    alive = {each["NodeID"] for each in live_nodes()}
    return node if table["state"] == "CREATED" and node in alive else None


def nodes_of(group: PlacementGroup, limit_s: float, what: str) -> list[str]:
    """The ids of the nodes of all bundles; waits until lost nodes are back, or others have room."""
    end = time.monotonic() + limit_s
    while True:
        nodes = [node for bundle in range(group.bundle_count) if (node := node_of(group, bundle)) is not None]
        if len(nodes) == group.bundle_count:
            return nodes
        if time.monotonic() > end:
            raise RunError(f"waited {limit_s:g} s for Ray to place {what} again: a node is lost, and no other has room")
        time.sleep(_LOOK_S)


class WorkerLost(RunError):
    """A process of the cluster died, hangs, or failed: training starts again from the last checkpoint."""

    retried = True


def ray_get(refs: Any, limit_s: float, what: str) -> Any:
    """`ray.get` with a limit; errors as by `translated`. `what` says what the caller waits for."""
    try:
        return ray.get(refs, timeout=limit_s)
    except GetTimeoutError:
        raise WorkerLost(f"waited {limit_s:g} s for {what}") from None
    except RayError as error:
        raise translated(error, what) from error


def translated(error: BaseException, what: str) -> Exception:
    """UserError, RunError or OSError where the remote method raised it, else WorkerLost."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, (UserError, RunError, OSError)):
        return cause
    return WorkerLost(f"{what}: {first_line(error)}")


def first_line(error: BaseException) -> str:
    """The type of an error, and the first line of its message."""
    cause = getattr(error, "cause", None) or error
    text = str(cause).strip() or type(cause).__name__
    return f"{type(cause).__name__}: {text.splitlines()[0]}"


class ByteCount:
    """Pickles what passes through the controller, and counts the bytes: requests, lengths, verdicts, problems.

    Ray copies bytes as they are. Thread-safe.
    """

    def __init__(self) -> None:
        self._num_bytes, self._lock = 0, Lock()

    def pack(self, value: object) -> bytes:
        return self._counted(pickle.dumps(value))

    def unpack(self, packed: bytes) -> Any:
        return pickle.loads(self._counted(packed))

    def _counted(self, packed: bytes) -> bytes:
        with self._lock:
            self._num_bytes += len(packed)
        return packed

    def counters(self) -> Counters:
        return {"controller_bytes": self._num_bytes}
