"""A recipe on named devices as a `Setup`: the model's shape, the layout, lengths. What no file says is assumed here."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from pekoe.config.base import ConfigSection
from pekoe.config.cluster import ParallelSection
from pekoe.config.keys import explain
from pekoe.config.recipes import RLConfig, load_config
from pekoe.core.errors import UserError, nearest
from pekoe.core.hardware import DEVICES, Device
from pekoe.core.records import read_records, record_files
from pekoe.core.words import counted
from pekoe.plan.configs import shape_of
from pekoe.plan.costs import (
    LOCAL,
    NAMES,
    ONE_PROCESS,
    Constants,
    Engine,
    Training,
    Transport,
    check_constants,
    fitted,
)
from pekoe.plan.kernels import kernel_constants
from pekoe.plan.rollout import SIGMA, Lengths
from pekoe.plan.shapes import Shape, recognise_model
from pekoe.plan.step import Pace, Setup, steady_seconds

PROMPT = 128  # tokens of a problem with its template, where nothing is said
MEAN_SHARE = 0.3  # of rollout.max_new_tokens: the mean response, where nothing is said (the release: 8,000 of 27,648)
SEEN_STEPS = 20  # of a run's last ones, whose lengths are taken
# Of a judge process for a token: make bench-verify (8,192 responses of 32,768 characters each, 39 s on 2 cores), at 4
# characters a token.
JUDGE_TOKEN_S = 2 * 39.04 / 8192 / (32768 / 4)


Rate = Annotated[float, Field(ge=1e-6, le=1e9)]


class OwnDevice(ConfigSection):
    """A device of a user's own file. Rates are a second, dense; links count one direction."""

    name: str = "own"
    memory_gb: Rate
    memory_gb_s: Rate
    tflop_s: Rate
    """Of the dtype that the recipe trains in."""
    fp8_tflop_s: float = Field(default=0, ge=0, le=1e9)
    link_gb_s: Rate
    """To the others of its node."""
    network_gb_s: Rate
    """To other nodes, this device's share."""
    per_node: int = Field(default=8, ge=1)
    measured: bool = False
    """Whether rates and constants are measurements, as `pekoe doctor --measure` makes them; links are not."""
    constants: dict[str, float] = Field(default_factory=dict[str, float])
    """Measured in place of fitted ones: `pekoe.plan.costs.Constants`."""


@cache
def read_device(name: str, one_process: bool = False) -> tuple[Device, Constants, bool]:
    """A device by its name, or from a TOML file, and whether it was measured. UserError where neither is known.

    Args:
        one_process: constants of a run in one process, but for those that the file has.
    """
    constants = replace(fitted(), **ONE_PROCESS) if one_process else fitted()
    plain = name.lower().removesuffix("-sxm").removesuffix("-80")
    if plain in DEVICES:
        return DEVICES[plain], constants, False
    path = Path(name)
    if path.suffix != ".toml":
        raise UserError(f"--hardware: expected a device or a TOML file, got {name!r}.{nearest(plain, DEVICES)}")
    try:
        own = OwnDevice.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        raise UserError(explain(error, OwnDevice, name)) from None
    except (OSError, ValueError) as error:
        raise UserError(f"--hardware: expected a TOML file of a device, got {name}: {error}") from None
    if unknown := sorted(own.constants.keys() - set(NAMES)):
        raise UserError(f"{name}: unknown constant {unknown[0]!r}.{nearest(unknown[0], NAMES)}")
    if wrong := check_constants(own.constants):
        raise UserError(f"{name}: {wrong}")
    rates = own.memory_gb_s * 1e9, own.tflop_s * 1e12, own.fp8_tflop_s * 1e12, 0.0
    links = own.link_gb_s * 1e9, own.network_gb_s * 1e9
    device = Device(own.name, own.memory_gb * 1e9, *rates, *links, own.per_node, name)
    return device, replace(constants, **own.constants), own.measured


def read_shape(folder: str) -> tuple[Shape, str]:
    """A model's shape, and where it is from: its config.json, or a known model's by the directory's name."""
    file, name = Path(folder) / "config.json", Path(folder).name
    if not file.is_file():
        shape = recognise_model(name)
        if shape is None:
            raise UserError(
                f"model.path: expected a directory with a config.json, or one named as a known model such as "
                f"Qwen2.5-7B, got {folder!r}"
            )
        source = f"{folder} is not here: the shape is {shape.name}'s, by its name"
    else:
        shape, source = shape_of(file, name), str(file)
    return shape, source


@dataclass(frozen=True, slots=True)
class Layout:
    """Who samples and who trains. `shares`: both on the same devices."""

    engines: int
    engine_gpus: int
    ranks: int
    tp: int = 1
    cp: int = 1
    replicas: int = 1
    shares: bool = False
    one_process: bool = False  # with `shares`: engine and trainer hold their memory at the same time
    cluster: bool = True  # by a section cluster; else one process trains
    route: Transport = "buckets"

    @property
    def gpus(self) -> int:
        return self.ranks if self.shares else self.engines * self.engine_gpus + self.ranks

    @property
    def shards(self) -> int:
        """Ranks over which FSDP shards the weights."""
        return self.ranks // (self.tp * self.replicas)

    def __str__(self) -> str:
        each = f" of {counted(self.engine_gpus, 'GPU')}" if self.engine_gpus > 1 else ""
        split = "".join(f", {name} {n}" for name, n in (("tp", self.tp), ("cp", self.cp)) if n > 1)
        together = ", on the same devices in turns" if self.shares else ""
        return f"{counted(self.engines, 'engine')}{each}, {counted(self.ranks, 'training rank')}{split}{together}"


def layout_of(config: RLConfig, gpus: int | None, engine_gpus: int) -> tuple[Layout, list[str]]:
    """The layout of a recipe, scaled to `gpus` where they are given, and the keys that say so.

    Args:
        engine_gpus: what an engine needs at least, where the recipe does not say how many it has.
    """
    own = _own_layout(config)
    if gpus is None or gpus == own.gpus:
        return own, []
    if config.cluster is None:
        if gpus == 1:
            raise UserError("--gpus: expected 2 or more, as the recipe's servers have GPUs of their own, got 1")
        own = Layout(1, engine_gpus, engine_gpus)
    unit = own.tp * own.cp
    if own.shares:
        step = max(own.engine_gpus, unit)
        if gpus % step:
            near = max(step, gpus - gpus % step)
            raise UserError(f"--gpus: expected a multiple of {step}, got {gpus}; nearest: {near}")
        scaled = replace(own, engines=gpus // own.engine_gpus, ranks=gpus, replicas=1)
    else:
        wanted = gpus * (1 - own.ranks / own.gpus)
        each, least = own.engine_gpus, own.engine_gpus + unit
        fits = [n for n in range(1, gpus // each + 1) if gpus > n * each and (gpus - n * each) % unit == 0]
        if not fits:
            raise UserError(
                f"--gpus: expected engines of {each} and training ranks in groups of {unit} (tp x cp), got {gpus}; "
                f"nearest: {max(least, gpus - (gpus - least) % max(each, unit))}"
            )
        engines = min(fits, key=lambda n: (abs(n * each - wanted), n))
        scaled = replace(own, engines=engines, ranks=gpus - engines * each, replicas=1)
    return scaled, layout_keys(config, scaled)


def layout_keys(config: RLConfig, layout: Layout) -> list[str]:
    """The keys that give a recipe this layout, of a cluster."""
    keys = {"generation.engines": layout.engines, "generation.gpus_per_engine": layout.engine_gpus}
    keys |= {"training.ranks": layout.ranks, "training.gpus_per_rank": 1}
    own = config.cluster.training if config.cluster else ParallelSection()
    splits = {"tp": layout.tp, "cp": layout.cp, "replicas": layout.replicas}
    keys |= {f"training.{name}": value for name, value in splits.items() if value != getattr(own, name)}
    changes = [f"cluster.{key}={value}" for key, value in keys.items()]
    if config.engine.server.count > 1 or config.engine.server.gpus:  # which a section cluster has no use for
        changes += ["engine.server.count=1", "engine.server.gpus=[]"]
    return changes


def _own_layout(config: RLConfig) -> Layout:
    cluster, server = config.cluster, config.engine.server
    if cluster is not None:
        training = cluster.training
        sizes = cluster.generation.engines, max(1, cluster.generation.gpus_per_engine), training.ranks
        route: Transport = "disk" if cluster.sync == "disk" else "buckets"
        return Layout(*sizes, training.tp, training.cp, training.replicas, cluster.colocate, route=route)
    if config.engine.backend == "embedded":
        return Layout(1, 1, 1, shares=True, one_process=True, cluster=False, route="device")
    each = len(server.gpus[0].split(",")) if server.gpus else 1
    route = "buckets" if server.sync == "broadcast" else "disk"
    return Layout(len(server.urls) or server.count, each, 1, cluster=False, route=route)


@dataclass(frozen=True, slots=True)
class Own:
    """What a run measured of itself (`pekoe.plan.own`): factors are its seconds over those of the formulas."""

    device: Device
    sigma: float  # of its lengths' log-normal
    sampling: float = 1.0
    judging: float = 1.0
    pace: Pace = field(default_factory=Pace)


@dataclass(frozen=True, slots=True)
class Asked:
    """What a user asks about: a recipe on devices, and what no recipe says."""

    recipe: str | Mapping[str, Any]
    overrides: tuple[str, ...] = ()
    hardware: str = "h100"
    gpus: int | None = None  # in all; None: as many as the recipe has
    mean_response: float | None = None
    mean_prompt: float | None = None
    lengths: str | None = None  # a run directory, whose responses' lengths are drawn
    price: float | None = None  # of a device and hour
    failures: float = 0.0  # of a device in 1,000 hours
    own: Own | None = None  # in place of `hardware`
    kernels: str | None = None  # whose kernels' times engines take, of `plan.kernels`

    def changed(self, changes: Iterable[str]) -> Asked:
        """The same with keys of the recipe changed, or `gpus=N`, `hardware=NAME`. UserError for a wrong number."""
        asked = self
        for change in changes:
            key, _, value = change.partition("=")
            if key == "hardware":
                asked = replace(asked, hardware=value)
            elif key == "gpus":
                if not value.isdecimal() or int(value) < 1:
                    raise UserError(f"gpus: expected a number of 1 or more, got {value!r}")
                asked = replace(asked, gpus=int(value))
            else:
                asked = replace(asked, overrides=(*asked.overrides, change))
        return asked


@dataclass(frozen=True, slots=True)
class Plan:
    """A recipe on devices: what to time, and what was taken for granted."""

    config: RLConfig
    setup: Setup
    layout: Layout
    changes: list[str]  # keys of the recipe that the layout changes
    assumed: list[str]
    measured: bool  # whether the device's rates were measured, else they are published or a user's

    @property
    def published(self) -> bool:
        """Whether the device's rates are its maker's."""
        return self.setup.engine.device in DEVICES.values()

    @property
    def longest(self) -> int:
        return self.config.data.max_prompt_tokens + self.config.rollout.max_new_tokens


def read_plan(asked: Asked) -> Plan:
    """Raises UserError for an unknown device or model, or a layout or lengths that are not possible."""
    config = load_config(asked.recipe, asked.overrides, RLConfig)
    own = asked.own
    device, k, measured = read_device(asked.hardware) if own is None else _calibrated(own)
    shape, source = read_shape(config.model.path)
    rollout, half = config.rollout, config.model.dtype == "bfloat16"
    longest = config.data.max_prompt_tokens + rollout.max_new_tokens
    size = 2 if half else 4
    least = 1 if config.engine.backend == "embedded" else least_gpus(Engine(shape, device, 1, size, size, k), longest)
    layout, changes = layout_of(config, asked.gpus, least)
    lengths, prompt, drawn = _lengths_of(asked, config)
    assumed = [f"model: {source}", *drawn]
    if layout.one_process and own is None:
        _, k, _ = read_device(asked.hardware, one_process=True)
    if layout.one_process and not measured:
        given = ", ".join(f"{name} = {getattr(k, name):g}" for name in ONE_PROCESS)
        assumed.append(f"one process: no controller stands between sampling and training, {given}")
    if shape.num_experts:
        active = (shape.layer_active + shape.head_parameters) / 1e9
        assumed.append(
            f"a mixture of experts, {active:.2f}B parameters of which a token uses; the memory "
            "of a training rank is by formulas of dense ones, experts are sharded whole (FSDP)"
        )
    if not half and not measured:
        assumed.append("model.dtype = float32: timed at the device's stated rate, which is bfloat16's in the table")
    if rollout.dynamic_rounds:
        assumed.append("rollout.dynamic_rounds: no group is drawn again")
    if config.model.lora is not None:
        assumed.append("model.lora: memory and weight sync are those of whole weights; pekoe doctor counts adapters")
    if config.eval.every:
        assumed.append("eval.every: the time of evaluations is left out")
    limit = None
    if config.engine.backend == "embedded":
        limit = config.engine.kv_room(longest, int(shape.kv_per_token * size))
    elif config.engine.kv_tokens:
        limit = config.engine.kv_tokens
    engine = Engine(shape, device, layout.engine_gpus, size, size, k, limit)
    if asked.kernels is not None:
        own_k, said = kernel_constants(engine, asked.kernels)
        engine = replace(engine, constants=own_k)
        assumed.append(said)
    training = Training(
        shape, device, layout.ranks, layout.tp, layout.cp, recompute=float(config.train.activation_checkpointing),
        lora=config.model.lora is not None, compiled=config.train.compile, native=False,
        sharded=layout.shards > 1, constants=k,
    )  # fmt: skip
    most = config.engine.max_running
    if config.engine.backend != "embedded":
        most = min(most, config.engine.server.max_requests)
    setup = Setup(
        engine, layout.engines, training, rollout.prompts_per_step, rollout.samples_per_prompt, prompt,
        lengths, config.algo.minibatches, config.train.token_budget * layout.cp,
        (config.algo.proximal == "recompute") + (config.algo.kl > 0), layout.shares, rollout.max_lag, layout.route,
        most=most, goes_on=rollout.during_update == "go_on", window=rollout.window,
    )  # fmt: skip
    judging = judging_s(config, setup)  # judges work while others are sampled: what is left is the last group's
    setup = replace(setup, judge_s=max(judging / setup.prompts, judging - steady_seconds(replace(setup, lag=0))))
    if own is not None:
        setup = replace(setup, pace=own.pace, judge_s=own.judging * setup.judge_s)
    return Plan(config, setup, layout, changes, assumed, measured)


def _calibrated(own: Own) -> tuple[Device, Constants, bool]:
    """As `read_device`. What a loop takes beside its stages is in those that were measured."""
    given = ONE_PROCESS if own.device.name in DEVICES else LOCAL
    return own.device, replace(fitted(), **given | {"rollout_share": 1 / own.sampling}), True


def _lengths_of(asked: Asked, config: RLConfig) -> tuple[Lengths, float, list[str]]:
    """Lengths of responses, the mean prompt, and what they are from."""
    most, longest = config.rollout.max_new_tokens, config.data.max_prompt_tokens
    if asked.lengths is not None:
        if asked.mean_response is not None:
            raise UserError("--mean-response: expected no mean beside --lengths, whose responses have their own")
        prompts, responses = _seen(Path(asked.lengths))
        mean = asked.mean_prompt or sum(prompts) / len(prompts)
        seen = Lengths(1.0, most, seen=responses)
        return seen, mean, [f"responses and prompts: {len(responses):,} of {asked.lengths} (measured), on average "
                            f"{seen.mean:,.0f} and {mean:,.0f} tokens"]  # fmt: skip
    prompt = asked.mean_prompt or float(min(PROMPT, longest))
    mean = asked.mean_response or MEAN_SHARE * most
    if not 0 < prompt <= longest:
        raise UserError(f"--mean-prompt: expected at most data.max_prompt_tokens = {longest}, got {prompt:g}")
    if not 0 < mean < most:
        raise UserError(f"--mean-response: expected below rollout.max_new_tokens = {most}, got {mean:g}")
    given = "--mean-response" if asked.mean_response else "assumed; give --mean-response or --lengths RUN_DIR"
    sigma = asked.own.sigma if asked.own else SIGMA
    return Lengths.of_mean(mean, most, sigma), prompt, [
        f"responses: {mean:,.0f} tokens on average ({given}), log-normal with sigma {sigma:g} (assumed)",
        f"prompts: {prompt:,.0f} tokens ({'--mean-prompt' if asked.mean_prompt else 'assumed; give --mean-prompt'})",
    ]  # fmt: skip


def _seen(run_dir: Path) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Lengths of prompts and responses in the last steps of a run. UserError where it has none."""
    steps = sorted({step for _, step in record_files(run_dir)})[-SEEN_STEPS:]
    lines = [line for step in steps for line in read_records(run_dir, step)]
    if not lines:
        raise UserError(f"--lengths: expected a run directory with rollouts, got {run_dir}")
    return tuple(len(line["prompt_tokens"]) for line in lines), tuple(max(1, len(line["tokens"])) for line in lines)


def judging_s(config: RLConfig, setup: Setup) -> float:
    """Seconds of judging all responses of a step."""
    return JUDGE_TOKEN_S * setup.lengths.mean * setup.responses / config.verify.workers


def least_gpus(engine: Engine, longest: int) -> int:
    """The fewest devices of an engine, a power of two, that hold its weights and the KV of the longest sequence."""
    tp = 1
    while replace(engine, tp=tp).kv_tokens() < longest and tp < 64:
        tp *= 2
    return tp
