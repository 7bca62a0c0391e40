"""Recipes as frozen, closed, validated objects, one for each command. The docstring under a key documents it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast

import tomli_w
from pydantic import AfterValidator, Field, ValidationError, model_validator

from pekoe.config.base import (
    ConfigSection,
    FileName,
    FunctionName,
    GiB,
    OneOrOwn,
    Processes,
    Samples,
    Seconds,
    apply_override,
    check_multiple,
    read_toml,
)
from pekoe.config.cluster import ClusterSection, ParallelSection
from pekoe.config.data import Columns, DataSection, ProblemSection, ReferenceCheck
from pekoe.config.engine import EngineSection
from pekoe.config.keys import explain
from pekoe.config.model import LORA_RATE, ModelSection, TrainedModelSection
from pekoe.config.rollout import RolloutSection
from pekoe.core.errors import UserError, nearest


class Process(ConfigSection):
    seed: int = Field(default=0, ge=0, le=2**63 - 1)
    """The seed of everything that is drawn: data order, sampling, minibatches."""
    threads: Processes | None = None
    """CPU threads of torch in this process. Absent: as many as there are cores."""


class RunSection(Process):
    dir: FileName
    """The run directory. Made if absent; a run found there is resumed."""


GROUP_ADVANTAGES = ("grpo", "dr_grpo", "rloo")  # which compare a reward with its group's


class AlgoSection(ConfigSection):
    advantage: Annotated[str, AfterValidator(OneOrOwn("global", *GROUP_ADVANTAGES))] = "global"
    """global: reward normalised over all response tokens of the batch (the release). grpo, dr_grpo, rloo: the
    reward against its group's. "MODULE:NAME": a function of your own, (rewards, lengths, groups) -> advantages."""
    reward: float = Field(default=5.0, gt=0)
    """What CORRECT earns, or a score of 1."""
    reward_wrong: float | None = None
    """What WRONG and UNPARSED earn, or a score of 0. Absent: -reward."""
    reward_formula: Literal["score", "label"] = "score"
    """score: where a verdict has a score (a reward of your own that returns a number), reward_wrong + score x (reward -
    reward_wrong). label, and where it has none: reward or reward_wrong, by the verdict's label."""
    overlong_tokens: int = Field(default=0, ge=0)
    """Soft length penalty (DAPO): over the last so many tokens before rollout.max_new_tokens the reward falls linearly,
    by overlong_penalty in the end; 0 is off."""
    overlong_penalty: float | None = Field(default=None, gt=0)
    """What a response as long as rollout.max_new_tokens loses. Absent: reward."""
    minibatches: int = Field(default=4, ge=1)
    """Optimizer steps a rollout batch; must divide rollout.prompts_per_step unless dynamic_rounds is on."""
    clip_low: float = Field(default=0.2, ge=0, lt=1)
    """The ratio is clipped from below at 1 - clip_low."""
    clip_high: float = Field(default=0.2, ge=0, allow_inf_nan=True)
    """The ratio is clipped from above at 1 + clip_high (DAPO: 0.28)."""
    max_mean_ratio: float = Field(default=5.0, gt=1, allow_inf_nan=True)
    """A minibatch whose mean importance ratio is above this makes no optimizer step."""
    proximal: Literal["engine", "recompute"] = "engine"
    """The ratio's denominator: the engine's log-probs (the release) or the trainer's own, recomputed at each step's
    start. Absent with rollout.max_lag: recompute."""
    correction: Literal["off", "weight", "truncate", "mask_token", "mask_sequence"] = "off"
    """What becomes of tokens whose proximal log-probs differ from the engine's (numerics, or samples of older
    versions); needs proximal = "recompute". weight: the loss times w = exp(proximal - engine's), as decoupled PPO.
    truncate: times min(w, correction_limit). mask_token: times w, or 0 where w is beyond the limit either way.
    mask_sequence: times w, or 0 for responses whose geometric mean of w is beyond it. Absent with rollout.max_lag:
    truncate."""
    correction_limit: float = Field(default=2.0, gt=1, allow_inf_nan=True)
    """See `correction`. For mask_sequence nearer 1: it is a mean over a whole response."""
    mask_truncated: bool = False
    """Leave responses cut at the length limit out of the loss. Off: they are judged like any other."""
    normalise: Literal["token", "sequence", "max_length"] = "token"
    """token: the loss is a mean over the minibatch's response tokens. sequence (GRPO): a mean over its responses, of
    the mean over each one's tokens. max_length (Dr. GRPO): the sum over its tokens, divided by responses x
    rollout.max_new_tokens."""
    kl: float = Field(default=0.0, ge=0)
    """Weight of the KL term to the starting model; the reference forward runs only when above 0."""

    @model_validator(mode="after")
    def _consistent(self) -> AlgoSection:
        if (wrong := self.reward_wrong) is not None and wrong >= self.reward:
            raise ValueError(f"algo.reward_wrong: expected less than algo.reward ({self.reward:g}), got {wrong:g}")
        if self.overlong_penalty is not None and not self.overlong_tokens:
            raise ValueError("algo.overlong_penalty: expected algo.overlong_tokens beside it, which is 0 (off)")
        if self.correction != "off" and self.proximal == "engine":
            raise ValueError(
                f"algo.correction: expected 'off' with algo.proximal = 'engine', whose log-probs are those that it "
                f"would correct, got {self.correction!r}; nearest: algo.proximal = 'recompute'"
            )
        return self


class OptimSection(ConfigSection):
    lr: float = Field(default=2e-5, gt=0)
    """Learning rate at the end of warm-up; `schedule` says how it goes on."""
    warmup_fraction: float = Field(default=0.001, ge=0, le=1)
    """Share of all optimizer steps in which the rate rises linearly from 0."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """After warm-up: constant, or to zero at the last step, in a line or a cosine."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """AdamW's first decay."""
    beta2: float = Field(default=0.95, ge=0, lt=1)
    """AdamW's second decay."""
    eps: float = Field(default=1e-5, gt=0)
    """AdamW's epsilon."""
    weight_decay: float = Field(default=0.05, ge=0)
    """Decoupled weight decay; none on biases and norms."""
    grad_clip: float = Field(default=1.0, gt=0, allow_inf_nan=True)
    """The gradient's norm is clipped at this."""


class TrainSection(ConfigSection):
    token_budget: int = Field(default=30720, ge=1)
    """Tokens of a micro-batch at one process (times cp); no sequence may be longer. `pekoe doctor` says what fits."""
    activation_checkpointing: bool = False
    """Compute each layer again in backward: a fraction of the memory, a third more compute, the same numbers."""
    compile: bool = False
    """Run layers through torch.compile; on a CPU it needs a C++ compiler. Numbers move in their last bits."""
    moments: Literal["float32", "bfloat16"] = "float32"
    """Dtype of AdamW's two moments: 8 bytes a trained parameter, or 4."""
    moments_on_host: bool = False
    """Keep the moments in the host's memory, from where they come at each optimizer step; in one process."""
    balance_loss: float = Field(default=0.0, ge=0)
    """Mixtures of experts: weight of a loss beside the objective that grows as a sequence's tokens go to few experts
    (Switch Transformer's, by sequence; often 0.001); 0 is off."""
    max_not_finite: int = Field(default=3, ge=1)
    """The run stops after so many optimizer steps in a row whose loss or gradient was not finite; each is skipped."""
    save_every: int = Field(default=10, ge=1)
    """Steps between checkpoints."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """Checkpoints kept; older ones are removed."""


class VerifySection(ConfigSection):
    workers: Processes = 2
    """Judge processes."""
    time_limit_s: Seconds = 5.0
    """Wall-clock limit of one judgement."""
    memory_gib: GiB = 1.0
    """Address space of each judge process. A reward that imports torch needs several GiB."""
    reward: str | None = None
    """A reward of your own, "MODULE:NAME", that judges every problem, whatever kind its row names."""
    functions: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Rewards of your own, each "MODULE:NAME". A row's `kind` may be `function:MODULE:NAME` for these alone."""
    arguments: dict[str, dict[str, Any]] = Field(default_factory=dict[str, dict[str, Any]])
    """Arguments that your rewards are given by name: {"MODULE:NAME" = {limit = 200}}."""
    score_range: tuple[float, float] = Field(default=(0.0, 1.0), strict=False)
    """What your rewards' numbers lie between: the first is the score 0, the second the score 1 (algo.reward_formula). A
    number beyond is FAULT."""
    correct_from: float = Field(default=0.99, gt=0, le=1)
    """A verdict is CORRECT from this score on, in pass rates as in labels."""
    max_fault_rate: float = Field(default=0.05, ge=0, le=1)
    """The run stops when more than this share of a step's verdicts are FAULT."""
    unboxed: bool = False
    """Mathematics: where no box is complete, what a response says that the answer is will do (kind math-unboxed)."""
    random: bool = False
    """A control: verdicts are drawn at random, whatever the response says. The reward must not rise."""

    @property
    def rewards(self) -> tuple[str, ...]:
        """All functions of the user's own."""
        return tuple(dict.fromkeys((*((self.reward,) if self.reward else ()), *self.functions)))

    def kind_of(self, kind: str) -> str:
        """The kind by which a problem of `kind` is judged."""
        if self.reward:
            return f"function:{self.reward}"
        return "math-unboxed" if self.unboxed and kind == "math" else kind

    @model_validator(mode="after")
    def _consistent(self) -> VerifySection:
        for name in self.arguments:
            if name not in self.rewards:
                raise ValueError(
                    f"verify.arguments: expected names of verify.reward or verify.functions, got {name!r}."
                    f"{nearest(name, self.rewards)}"
                )
        if not self.score_range[0] < self.score_range[1]:
            raise ValueError(f"verify.score_range: expected [low, high], got {list(self.score_range)}")
        return self


class EvalSection(ConfigSection):
    samples: Samples = 32
    """Responses sampled for each problem."""
    temperature: float = Field(default=1.0, ge=0)
    """Sampling temperature (SFT models 0.6, RL models 1.0)."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus truncation (SFT models 0.95, RL models 1.0)."""
    max_new_tokens: int | None = Field(default=None, ge=1)
    """Length limit. Absent: rollout.max_new_tokens; for `pekoe eval`, what the model's context leaves beside
    max_prompt_tokens."""
    columns: Columns = Field(default_factory=dict)
    """As data.columns, of the held-out problems."""


class EvalData(EvalSection):
    data: FileName | Annotated[tuple[FileName, ...], Field(strict=False, min_length=1)]
    """Held-out problems: a file, or a list of them, measured each and together."""
    check: ReferenceCheck = "warn"
    """As data.check. A published set is measured whole unless you say otherwise, and FAULTs count in no figure."""


class PeriodicEval(EvalSection):
    data: FileName | None = None
    """Held-out problems."""
    every: int | None = Field(default=None, ge=1)
    """Steps between evaluations while training, the first before step 1. Absent: none."""


class Config(ConfigSection):
    """What every recipe shares."""

    model: ModelSection


class Logging(ConfigSection):
    """Where else the journal's metrics go, by the same names."""

    tensorboard: bool = False
    """Event files in the run directory, below tensorboard/."""
    wandb: str | None = None
    """A project of Weights & Biases."""
    trackio: str | None = None
    """A project of Trackio."""


class TrainingConfig(Config):
    """What every recipe that trains shares: a run directory."""

    model: TrainedModelSection  # pyright: ignore[reportIncompatibleVariableOverride]  # frozen: never set
    run: RunSection
    track: Logging = Logging()

    @model_validator(mode="before")
    @classmethod
    def _rate_of_lora(cls, tree: Any) -> Any:
        """With adapters the default of the learning rate is another one."""
        if not isinstance(tree, dict):
            return tree
        tree = cast("dict[str, Any]", tree)
        model, optim = tree.get("model"), tree.get("optim", {})
        adapters = isinstance(model, dict) and cast("dict[str, Any]", model).get("lora") is not None
        if not adapters or not isinstance(optim, dict) or "lr" in optim:
            return tree
        default: OptimSection = OptimSection() if "optim" in tree else cls.model_fields["optim"].default
        return {**tree, "optim": {**default.model_dump(), **optim, "lr": LORA_RATE * default.lr}}


class RLLogging(Logging):
    """As of every run, and metrics of one's own."""

    metrics: Annotated[tuple[FunctionName, ...], Field(strict=False)] = ()
    """Functions of your own, each "MODULE:NAME": (groups of a step, judged) -> {name: number}, which go into the
    journal and wherever its metrics go."""


class RLConfig(TrainingConfig):
    """A recipe of `pekoe rl`."""

    track: RLLogging = RLLogging()  # pyright: ignore[reportIncompatibleVariableOverride]  # frozen: never set

    num_steps: int = Field(ge=1)
    """Steps: rollout batches, each with `algo.minibatches` optimizer steps."""
    data: ProblemSection
    rollout: RolloutSection = RolloutSection()
    engine: EngineSection = EngineSection()
    algo: AlgoSection = AlgoSection()
    optim: OptimSection = OptimSection()
    train: TrainSection = TrainSection()
    verify: VerifySection = VerifySection()
    eval: PeriodicEval = PeriodicEval()
    cluster: ClusterSection | None = None
    """Absent: one process samples and trains. With a section, even an empty one, Ray places several."""

    @model_validator(mode="before")
    @classmethod
    def _corrected_with_lag(cls, tree: Any) -> Any:
        """Where sampling runs ahead, its log-probs are of older weights: decoupled PPO is the default then."""
        if not isinstance(tree, dict):
            return tree
        tree = cast("dict[str, Any]", tree)
        rollout, algo = tree.get("rollout"), tree.get("algo", {})
        if not isinstance(rollout, dict) or not isinstance(algo, dict) or not rollout.get("max_lag"):
            return tree
        defaults = {"proximal": "recompute"}
        if algo.get("proximal", "recompute") == "recompute":
            defaults["correction"] = "truncate"
        return {**tree, "algo": {**defaults, **algo}}

    @model_validator(mode="after")
    def _possible(self) -> RLConfig:
        rollout, algo = self.rollout, self.algo
        if not rollout.dynamic_rounds:
            minibatches = f"algo.minibatches ({algo.minibatches})"
            check_multiple("rollout.prompts_per_step", rollout.prompts_per_step, algo.minibatches, minibatches)
        if rollout.min_new_tokens > rollout.max_new_tokens:
            raise ValueError(
                f"rollout.min_new_tokens: expected at most rollout.max_new_tokens ({rollout.max_new_tokens}), "
                f"got {rollout.min_new_tokens}"
            )
        if algo.overlong_tokens > rollout.max_new_tokens:
            raise ValueError(
                f"algo.overlong_tokens: expected at most rollout.max_new_tokens ({rollout.max_new_tokens}), "
                f"got {algo.overlong_tokens}"
            )
        longest = self.data.max_prompt_tokens + rollout.max_new_tokens
        cp = 1 if self.cluster is None else self.cluster.training.cp
        if self.train.token_budget * cp < longest:
            over = "" if cp == 1 else f" over cluster.training.cp = {cp}"
            raise ValueError(
                f"train.token_budget: expected at least the longest sequence, data.max_prompt_tokens + "
                f"rollout.max_new_tokens = {longest}{over}, got {self.train.token_budget}; nearest: {-(-longest // cp)}"
            )
        if algo.advantage in GROUP_ADVANTAGES and rollout.samples_per_prompt < 2:
            raise ValueError(
                f"rollout.samples_per_prompt: expected at least 2 for algo.advantage = {algo.advantage!r} "
                f"(a reward is compared with its group's), got {rollout.samples_per_prompt}"
            )
        self._check_schedule()
        self._check_routing(cp)
        if self.cluster is not None:
            self._check_engines(self.cluster)
        if self.cluster is None or self.cluster.generation.num_servers == self.cluster.generation.engines:
            self.engine.refuse_unread()
        if self.eval.every and self.eval.data is None:
            raise ValueError("eval.data: expected a problem file, as eval.every is set, got none")
        return self

    def _check_schedule(self) -> None:
        rollout = self.rollout
        if not rollout.max_lag and rollout.during_update == "go_on":
            raise ValueError(
                "rollout.during_update: expected 'wait' with rollout.max_lag = 0, where nothing runs as weights come, "
                "got 'go_on'; nearest: rollout.max_lag = 1"
            )
        if rollout.max_lag and self.cluster is not None and self.cluster.colocate:
            raise ValueError(
                f"rollout.max_lag: expected 0 with cluster.colocate, whose engines and ranks share devices, got "
                f"{rollout.max_lag}; nearest: 0, or cluster.colocate = false"
            )
        aborts = self.engine.backend != "embedded" and self.engine.server.during_update == "abort"
        if rollout.during_update == "go_on" and aborts:
            raise ValueError(
                "engine.server.during_update: expected 'keep' with rollout.during_update = 'go_on', whose responses go "
                "on under new weights, got 'abort'; nearest: 'keep'"
            )
        if rollout.during_update == "wait":
            if rollout.max_lag and rollout.dynamic_rounds:
                raise ValueError(
                    f"rollout.dynamic_rounds: expected 0 with rollout.max_lag and during_update = 'wait', as problems "
                    f"that are drawn again would meet a later version, got {rollout.dynamic_rounds}; nearest: 0, or "
                    f"rollout.during_update = 'go_on'"
                )
            if rollout.window > 1:
                raise ValueError(
                    f"rollout.window: expected 1 with rollout.during_update = 'wait', whose batches are fixed, got "
                    f"{rollout.window}; nearest: 1, or rollout.during_update = 'go_on'"
                )

    def _check_routing(self, cp: int) -> None:
        if self.rollout.replay_routing and cp > 1:
            raise ValueError(
                f"rollout.replay_routing: expected false with cluster.training.cp = {cp}, whose ranks have pieces of "
                "sequences, got true; nearest: cluster.training.cp = 1"
            )

    def _check_engines(self, cluster: ClusterSection) -> None:
        generation, server = cluster.generation, self.engine.server
        if self.engine.backend == "embedded":
            if generation.servers:
                raise ValueError(
                    f"cluster.generation.servers: expected 0 with engine.backend = 'embedded', got "
                    f"{generation.servers}; nearest: 0, or engine.backend = 'vllm' or 'sglang'"
                )
            return
        if server.urls and len(server.urls) != generation.num_servers:
            raise ValueError(
                f"engine.server.urls: expected one for each of the cluster's {generation.num_servers} servers, "
                f"got {len(server.urls)}"
            )
        if server.count > 1 or server.gpus:
            raise ValueError(
                "engine.server: expected no count and no gpus with a section cluster, which says how many engines "
                "there are (cluster.generation) and whose GPUs Ray gives out; leave them out"
            )

    @model_validator(mode="after")
    def _adapters_reach_servers(self) -> RLConfig:
        embedded = self.engine.backend == "embedded"
        key, sync = "engine.server.sync", self.engine.server.sync
        if self.cluster is not None:
            key, sync = "cluster.sync", self.cluster.sync
        if self.model.lora is not None and not embedded and sync == "broadcast":
            raise ValueError(
                f"{key}: expected 'disk' with model.lora, as servers load adapters from files, got {sync!r}"
            )
        return self

    def kind_of_engine(self, number: int) -> Literal["embedded", "sglang", "vllm"]:
        """The backend of one of a cluster's engines."""
        assert self.cluster is not None
        generation = self.cluster.generation
        return self.engine.backend if number >= generation.engines - generation.num_servers else "embedded"

    def engine_config(self, number: int) -> RLConfig:
        """This config for one of a cluster's engines."""
        assert self.cluster is not None
        kind, server = self.kind_of_engine(number), self.engine.server
        if kind != "embedded" and server.urls:
            url = server.urls[number - self.cluster.generation.engines]
            server = server.model_copy(update={"urls": (url,)})
        return self.model_copy(update={"engine": self.engine.model_copy(update={"backend": kind, "server": server})})


class SFTSection(ConfigSection):
    epochs: int = Field(default=1, ge=1)
    """Passes over the demonstrations."""
    batch_size: int = Field(default=64, ge=1)
    """Demonstrations an optimizer step; the last batch of an epoch may be smaller."""
    eval_data: FileName | None = None
    """Held-out demonstrations, whose loss is measured every `eval_every` steps and at the end."""
    eval_every: int = Field(default=100, ge=1)
    """Optimizer steps between these measurements."""


class SFTConfig(TrainingConfig):
    """A recipe of `pekoe sft`."""

    data: DataSection
    sft: SFTSection = SFTSection()
    optim: OptimSection = OptimSection(lr=1e-5, warmup_fraction=0.03, weight_decay=0.1)
    train: TrainSection = TrainSection(token_budget=32768, save_every=100)
    parallel: ParallelSection = ParallelSection()


class EvalConfig(Config):
    """A recipe of `pekoe eval`."""

    eval: EvalData
    run: Process = Process()
    engine: EngineSection = EngineSection()
    verify: VerifySection = VerifySection()
    max_prompt_tokens: int | None = Field(default=None, ge=1)
    """A longer prompt is an error. Absent: as long as the longest of the data."""
    out: FileName | None = None
    """A directory for results.json and the verdicts so far, from which the same command goes on. Absent: neither."""

    @model_validator(mode="after")
    def _possible(self) -> EvalConfig:
        self.engine.refuse_unread()
        return self


class CurateSection(ConfigSection):
    samples: int = Field(default=8, ge=0, le=65_536)
    """Responses sampled for each problem; 0: problems are read, thinned out and written, and nothing is sampled."""
    temperature: float = Field(default=1.0, ge=0)
    """Sampling temperature."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus truncation; 1 is off."""
    max_new_tokens: int = Field(default=1024, ge=1)
    """A response is cut at this length."""
    drop_all_right: bool = True
    """Leave out problems whose responses are all right: they teach nothing."""
    drop_all_wrong: bool = False
    """Leave out problems of which no response is right."""


class CurateConfig(Config):
    """A recipe of `pekoe curate`."""

    data: ProblemSection
    out: FileName
    """A directory for problems.jsonl, dropped.jsonl, and the verdicts from which the same command goes on."""
    curate: CurateSection = CurateSection()
    run: Process = Process()
    engine: EngineSection = EngineSection()
    verify: VerifySection = VerifySection()

    @model_validator(mode="after")
    def _possible(self) -> CurateConfig:
        self.engine.refuse_unread()
        return self


COMMANDS: dict[str, type[Config]] = {"rl": RLConfig, "sft": SFTConfig, "eval": EvalConfig, "curate": CurateConfig}


class DataConfig(ConfigSection):
    """What `pekoe data` looks at."""

    data: ProblemSection
    model: ModelSection | None = None
    verify: VerifySection = VerifySection()


class DemonstrationsConfig(ConfigSection):
    """What `pekoe data --sft` looks at."""

    data: DataSection
    model: ModelSection | None = None


C = TypeVar("C", bound=ConfigSection)


def load_config(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = (), kind: type[C] = RLConfig) -> C:
    """Read a recipe (a TOML file, or a mapping of the same shape), apply overrides, validate.

    Args:
        source: path of a TOML file, the name of a recipe that comes with Pekoe, or the content as a mapping.
        overrides: each `section.key=value`, whose value is read as TOML, and as a plain string where that fails; or a
            further recipe, whose keys are set.
        kind: the config of a command.

    Raises:
        UserError: with where, expected, got, and the nearest valid name.
    """
    mapping = isinstance(source, Mapping)
    tree = json.loads(json.dumps(source)) if mapping else read_toml(Path(source))
    for override in overrides:
        apply_override(tree, override)
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        where = "recipe" if mapping else str(source)
        own = next((name for name, each in COMMANDS.items() if each is kind), None)
        if own and any(each["type"] == "extra_forbidden" for each in error.errors()) and (other := _command_of(tree)):
            raise UserError(f"{where}: expected a recipe of `pekoe {own}`, got one of `pekoe {other}`") from None
        message = explain(error, kind, where)
        if tree and not mapping and not tree.keys() & {"model", "data", "run", "num_steps"}:
            message += (
                f"\n{where} sets keys of another recipe, and stands behind it: pekoe {own or 'rl'} laptop {where}"
            )
        raise UserError(message) from None


def _command_of(tree: Mapping[str, Any]) -> str | None:
    """The command whose recipe this is, as it stands."""
    for command, kind in COMMANDS.items():
        with suppress(ValidationError):
            kind.model_validate(tree)
            return command
    return None


def dump_config(config: Config) -> str:
    """The resolved config as TOML that `load_config` reads back to an equal object."""
    return tomli_w.dumps(config.model_dump(exclude_none=True))
