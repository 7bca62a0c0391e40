"""What decides a run's result beside its recipe: the problems, how prompts are written, and the sources of rewards.

`inputs.json` in the run directory holds their digests, so that a run that goes on has the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from pekoe.config.recipes import RLConfig, VerifySection
from pekoe.core.types import Problem
from pekoe.data.tokenizer import Tokenizer
from pekoe.verify.sources import source_digest

Inputs = dict[str, Any]
INPUTS = "inputs.json"
_NUM_PROMPTS = 64  # of which the tokens are compared: a template writes all prompts alike


def digest(problem: Problem) -> str:
    """Of all that a problem's prompt and verdicts depend on."""
    about = [problem.messages, problem.gold, problem.kind]
    text = json.dumps(about if problem.row is None else [*about, problem.row], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def reward_sources(verify: VerifySection, kinds: Sequence[str]) -> dict[str, str]:
    """The digests of the rewards of the user's own that judge problems of these kinds, by name."""
    used = {verify.kind_of(kind) for kind in kinds}
    names = sorted(kind.removeprefix("function:") for kind in used if kind.startswith("function:"))
    return {} if verify.random else {name: source_digest(name) for name in names}


def inputs_of(config: RLConfig, tokenizer: Tokenizer, problems: Sequence[Problem]) -> Inputs:
    """The digests of a run."""
    tokens = [tokenizer.encode_prompt(problem.messages).tolist() for problem in problems[:_NUM_PROMPTS]]
    return {
        "problems": {problem.uid: digest(problem)[:8] for problem in problems},
        "prompts": hashlib.sha256(json.dumps(tokens).encode()).hexdigest()[:16],
        "rewards": reward_sources(config.verify, [problem.kind for problem in problems])
        | {
            name: source_digest(_module_of(name))
            for name in (config.algo.advantage, config.rollout.episode or "")
            if ":" in name
        },
    }


def _module_of(function: str) -> str:
    """Of an environment "verifiers:NAME" the module NAME."""
    return function.removeprefix("verifiers:")


def difference(before: Inputs, now: Inputs) -> str:
    """What differs first, for a message; empty where nothing does."""
    old, new = before["problems"], now["problems"]
    if lost := [uid for uid in old if uid not in new]:
        return f"{len(lost):,} of its {len(old):,} problems are not in the data any more, such as {lost[0]!r}"
    if more := [uid for uid in new if uid not in old]:
        return f"the data has {len(more):,} problems that it did not have, such as {more[0]!r}"
    if changed := [uid for uid in old if old[uid] != new[uid]]:
        return (
            f"{len(changed):,} of its {len(old):,} problems have another prompt, answer or kind under the same uid, "
            f"such as {changed[0]!r}"
        )
    if list(old) != list(new):
        return "its problems stand in another order"
    if before["prompts"] != now["prompts"]:
        return "the same problems give other prompt tokens (the model directory's chat template, or its tokenizer)"
    rewards = before["rewards"]
    for name in sorted(now["rewards"].keys() | rewards.keys()):
        if rewards.get(name) != now["rewards"].get(name):
            return f"the source of {name} has changed (or of what it imports from beside it)"
    return ""
