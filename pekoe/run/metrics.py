"""The metrics of a step, by the names that journal, live view, report and trackers all use."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from pekoe.algo.loss import logprob_diffs_by_lag
from pekoe.algo.scoring import Scored, reward_of
from pekoe.config.recipes import RLConfig
from pekoe.core.functions import load_function
from pekoe.core.loop import Counters, StepStats, Trainer
from pekoe.core.progress import ProgressReporter
from pekoe.core.roofline import sampling_bytes, sampling_flops, training_bytes, training_flops
from pekoe.core.spec import ModelSpec
from pekoe.core.types import JudgedGroup, Trajectory
from pekoe.run.rollouts import Batch

# Above it something computes other numbers than training does. Tests hold every engine to half of the first; the second
# is a guess until bfloat16 has been measured on a GPU.
MAX_LOGPROB_DIFF = {"float32": 1e-3, "bfloat16": 0.5}


def not_finite(trainer: Trainer, most: int, way: str) -> str:
    """Why a run stops after `most` optimizer steps in a row that were not finite; empty where there were not so many.
    `way`: the command that goes on, in words."""
    if (count := trainer.num_not_finite) < most:
        return ""
    return (
        f"the loss or the gradient of the last {count} optimizer steps was not finite (train.max_not_finite = {most}); "
        f"nothing was learned from them. The step is saved: {way} goes on from it, for instance with a lower optim.lr "
        f"or optim.grad_clip"
    )


def step_metrics(
    step: int, batch: Batch, scored: Scored, stats: Sequence[StepStats], config: RLConfig, seconds: dict[str, float]
) -> dict[str, Any]:
    """Everything measured in one step. Rates are per rollout, `*_tokens_per_s` per second of their phase.

    `logprob_diff` and `logprob_diff_max` (I1) are of the first minibatch, whose forward runs on the very weights that
    sampled it; with `rollout.max_lag` they say how far the policy has moved since, and I1 is `lag_logprob_diff_max` at
    lag 0, `sync_canary_diff`, and what `pekoe rl --replay` gives by version.
    """
    pairs = [pair for g in batch.everything() for pair in zip(g.trajectories, g.verdicts, strict=True)]
    judged = [(r, v) for r, v in pairs if v.label != "fault"]
    lengths = np.array([r.num_tokens for r, _ in pairs])
    lagged = config.rollout.max_lag > 0  # then sampling goes on in all phases
    metrics: dict[str, Any] = {
        "step": step,
        "num_prompts": len(batch.groups) + len(batch.dropped),
        "num_rollouts": len(pairs),
        "num_samples": len(scored.samples),
        "num_dropped_groups": len(batch.dropped) + len(scored.dropped),
        "reward": _mean([reward_of(v, config.algo, r.num_tokens, config.rollout.max_new_tokens) for r, v in judged]),
        "pass_rate": _mean([v.label == "correct" for _, v in judged]),
        "unparsed_rate": _mean([v.label == "unparsed" for _, v in judged]),
        "fault_rate": 1 - len(judged) / max(1, len(pairs)),
        "response_tokens": _mean(lengths),
        "response_tokens_max": int(lengths.max(initial=0)),
        "truncation_rate": _mean([r.finish == "length" for r, _ in pairs]),
        "rollout_tokens_per_s": float(lengths.sum() / (sum(seconds.values()) if lagged else seconds["rollout"])),
        "seconds": {name: round(value, 4) for name, value in seconds.items()},
        "step_s": round(sum(seconds.values()), 4),
    }
    if scores := [v.score for _, v in judged if v.score is not None]:
        metrics["score"] = _mean(scores)
        if config.algo.reward_formula == "label":
            metrics["score_rounded_rate"] = _mean([0 < one < 1 for one in scores])
    if episodes := [r.episode for r, _ in pairs if r.episode is not None]:
        metrics |= {
            "turns": _mean([one.num_turns for one in episodes]),
            "branches": _mean([len(r.branches) for r, _ in pairs]),
            "tool_calls": _mean([one.num_tool_calls for one in episodes]),
            "malformed_calls": _mean([one.num_malformed for one in episodes]),
            "episode_tool_s": _mean([one.tool_s for one in episodes]),
            "episode_engine_s": _mean([one.engine_s for one in episodes]),
        }
    if lagged:
        metrics |= lag_metrics(step, [r for r, _ in pairs])
    if not stats:
        return metrics | {"skipped": scored.no_signal or "no sample to train on"}
    targets, first = sum(s.num_targets for s in stats), stats[0].means

    def per_token(name: str) -> float:
        return sum(s.means[name] * s.num_targets for s in stats) / targets

    metrics |= {
        "loss": _mean([s.loss for s in stats]),
        "grad_norm": _mean([s.grad_norm for s in stats]),
        "lr": stats[-1].lr,
        **{name: per_token(name) for name in ("entropy", "clip_fraction", "ratio", "approx_kl")},
        **{name: first[name] for name in ("logprob_diff", "logprob_diff_max")},
        "num_microbatches": sum(s.num_microbatches for s in stats),
        "num_prompt_tokens": sum(r.num_prompt_tokens for r, _ in pairs),
        "train_tokens_per_s": sum(s.num_tokens for s in stats) / seconds["train"],
        "train_peak_bytes": max((s.peak_bytes for s in stats if s.peak_bytes), default=None),
    }
    if lagged:  # proximal log-probs are of the step's start, those of an optimizer step of what the ones before made
        metrics |= logprob_diffs_by_lag(stats if config.algo.proximal == "recompute" else stats[:1])
    optional = ("reference_kl", "correction_weight", "correction_fraction")
    optional += ("expert_entropy", "expert_load_min", "expert_load_max", "balance_loss")
    metrics |= {name: per_token(name) for name in optional if name in first}
    if "correction_weight_max" in first:
        metrics["correction_weight_max"] = max(s.means["correction_weight_max"] for s in stats)
    skipped = [s.skipped for s in stats if s.skipped]
    return metrics | ({"skipped": "; ".join(skipped)} if skipped else {})


def lag_metrics(step: int, trajectories: Sequence[Trajectory]) -> dict[str, Any]:
    """How many versions the weights behind each token were older than those of a synchronous run: mean, maximum and
    tokens by lag."""
    tokens: Counter[int] = Counter()
    for branch in (branch for t in trajectories for branch in t.branches):
        ends = [start for _, start in branch.versions[1:]] + [branch.num_tokens]
        for (version, start), end in zip(branch.versions, ends, strict=True):
            tokens[step - 1 - version] += end - start
    total = max(1, tokens.total())
    return {
        "lag_mean": sum(lag * number for lag, number in tokens.items()) / total,
        "lag_max": max(tokens, default=0),
        "lag_tokens": {str(lag): number for lag, number in sorted(tokens.items())},
    }


def step_work(
    spec: ModelSpec,
    config: RLConfig,
    batch: Batch,
    scored: Scored,
    stats: Sequence[StepStats],
    num_forwards: float | None,
) -> dict[str, float]:
    """Fewest FLOPs and bytes of the step on one process (see `core.roofline`).

    Args:
        num_forwards: of the engine; None where it does not count them.
    """
    dtype = config.model.dtype
    groups = [
        (group.trajectories[0].num_prompt_tokens, [trajectory.num_tokens for trajectory in group.trajectories])
        for group in batch.everything()
    ]
    work = {"rollout_flops": sampling_flops(spec, groups).total}
    if num_forwards and config.cluster is None:  # engines of a cluster sample on devices that are not measured
        work["rollout_bytes"] = sampling_bytes(spec, groups, int(num_forwards), dtype)
    if stats:
        num_targets, num_microbatches = sum(s.num_targets for s in stats), sum(s.num_microbatches for s in stats)
        adapter = config.model.adapter_parameters(spec)
        passes = 4 / 3 if config.algo.kl else 1  # the reference's forward beside a forward and backward
        work["train_flops"] = passes * training_flops(spec, map(len, scored.samples), num_targets, adapter).total
        work["train_bytes"] = training_bytes(spec, num_microbatches, len(stats), dtype, adapter)
    return work


def own_metrics(
    names: Sequence[str], groups: Sequence[JudgedGroup], ours: Mapping[str, Any], view: ProgressReporter
) -> dict[str, float]:
    """What functions of the user's ("MODULE:NAME", see `track.metrics`) measure of a step's groups.

    What one raises is said, and the run goes on without its numbers.
    """
    found: dict[str, float] = {}
    for name in names:
        try:
            numbers = {str(key): float(value) for key, value in load_function(name, "track.metrics")(groups).items()}
            if taken := numbers.keys() & {*ours, *found}:
                raise ValueError(f"expected names of its own, got {', '.join(sorted(taken))}")
            found |= numbers
        except Exception as error:
            view.say(f"warning: track.metrics: {name}: {error!r}")
    return found


_STATES = ("num_engines", "num_lost_engines", "num_ranks")  # counters that are journalled as they are


class StepCounters:
    """What the parts of a run counted, step by step.

    Args:
        parts: each part's `counters`.
        cluster: whether engines and ranks are processes of their own, of which idle shares are journalled.
    """

    def __init__(self, parts: Sequence[Callable[[], Counters]], cluster: bool = False) -> None:
        self._parts, self._cluster = parts, cluster
        self._last, self._since = self._read(), time.perf_counter()

    def _read(self) -> dict[str, float]:
        return {name: value for counters in self._parts for name, value in counters().items()}

    def take(self) -> dict[str, float]:
        """Differences since this was last called, those that are not 0; on a cluster with the idle shares, where 1 is a
        step in which no process of that role did anything."""
        last, self._last = self._last, self._read()
        since, self._since = self._since, time.perf_counter()
        steps = {name: value - last.get(name, 0) for name, value in self._last.items() if name not in _STATES}
        busy = {role: steps.pop(f"{role}_busy_s", 0.0) for role in ("engines", "ranks")}
        taken = {name: round(value, 4) for name, value in steps.items() if value}
        if self._cluster:
            states = {name: self._last[name] for name in _STATES}
            for role, number in (("engines", states["num_engines"]), ("ranks", states.pop("num_ranks"))):
                seconds = max(1.0, number) * (self._since - since)
                taken[f"idle_{role}"] = round(max(0.0, 1 - busy[role] / seconds), 4)
            taken |= states
        return taken


def warnings_of(metrics: dict[str, Any], config: RLConfig) -> list[str]:
    """What looks wrong in a step's metrics, and what to do about it (docs/troubleshooting.md has more)."""
    found: list[str] = []
    largest, allowed = metrics.get("logprob_diff_max", 0.0), MAX_LOGPROB_DIFF[config.model.dtype]
    if config.rollout.max_lag:
        largest = metrics.get("lag_logprob_diff_max", {}).get("0", 0.0)  # of the step's own version
        if config.algo.correction == "off":
            found.append(
                "algo.correction is off, and samples are of older weights (rollout.max_lag): nothing corrects for it; "
                'nearest: algo.proximal = "recompute" with algo.correction = "truncate", the defaults'
            )
    if not largest <= allowed:
        remedy = ', or set algo.proximal = "recompute" with algo.correction = "truncate"'
        found.append(
            f"log-probs of sampling and training differ by up to {largest:.2g} (expected: at most {allowed:g} in "
            f"{config.model.dtype}): look at what the engine is started with"
            f"{remedy if config.algo.correction == 'off' else ''}"
        )
    if "skipped" in metrics and "loss" not in metrics:
        found.append(
            f"nothing was learned ({metrics['skipped']}; pass rate {metrics['pass_rate']:.0%}): `pekoe curate` keeps "
            f"problems that this model sometimes gets right; rollout.samples_per_prompt gives each more tries"
        )
    if metrics.get("score_rounded_rate"):
        found.append(
            f"{metrics['score_rounded_rate']:.1%} of the scores lie between 0 and 1 and count as CORRECT or WRONG "
            'alone (algo.reward_formula = "label"); nearest: "score"'
        )
    if metrics["fault_rate"] > 0:
        found.append(
            f"{metrics['fault_rate']:.1%} of the responses could not be judged (FAULT) and have no reward: "
            f"`pekoe report {config.run.dir}` lists the reasons"
        )
    return [f"warning: step {metrics['step']}: {text}" for text in found]


def looks_well(metrics: dict[str, Any]) -> bool:
    """Whether a response of a step is right, or most end by themselves (a reward of the user's may call none right)."""
    return metrics.get("pass_rate", 0) > 0 or metrics.get("truncation_rate", 1) < 0.5


def collapse_of(metrics: dict[str, Any], config: RLConfig, was_well: bool) -> str | None:
    """What is wrong where no response of a step is right and all are cut, with the likely cause; None elsewhere.
    `was_well`: whether an earlier step `looks_well`."""
    if metrics["pass_rate"] > 0 or metrics["truncation_rate"] < 1:
        return None
    step, most = metrics["step"], config.rollout.max_new_tokens
    cause = (
        f"the model does not end its responses. Most likely it is a base model, or not prompted in its own format "
        f"(model.template), or needs more room (rollout.max_new_tokens); `pekoe sample --model {config.model.path}` "
        f"shows what it says"
    )
    if was_well:
        cause = (
            f"training has broken the model. Most likely the learning rate is too high (optim.lr = "
            f"{config.optim.lr:g}): stop, and begin again with a lower one, or from a checkpoint before step {step}"
        )
    return f"no response is right and all are cut at {most} tokens: {cause}"


def _mean(values: Any) -> float:
    return float(np.mean(values)) if len(values) else 0.0
