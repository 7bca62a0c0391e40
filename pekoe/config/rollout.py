"""The section `rollout` of a recipe."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pekoe.config.base import ConfigSection, FunctionName, Samples, Seconds


class RolloutSection(ConfigSection):
    prompts_per_step: int = Field(default=512, ge=1)
    """Problems drawn at each step."""
    samples_per_prompt: Samples = 16
    """Responses sampled for each problem (a group)."""
    max_new_tokens: int = Field(default=1024, ge=1)
    """A response is cut at this length."""
    min_new_tokens: int = Field(default=0, ge=0)
    """Stop tokens cannot be sampled before this many tokens."""
    temperature: float = Field(default=1.0, gt=0)
    """Sampling temperature. Log-probs are of the distribution at this temperature."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus truncation; 1 is off."""
    top_k: int = Field(default=0, ge=0)
    """Keep the k likeliest tokens; 0 is off."""
    dynamic_rounds: int = Field(default=0, ge=0)
    """DAPO's dynamic sampling: groups all right or all wrong are dropped, and the missing ones drawn again, in at
    most this many further rounds; 0 is off."""
    max_lag: int = Field(default=0, ge=0)
    """Asynchronous training: steps that sampling may be ahead of training. 0: the two take turns."""
    during_update: Literal["wait", "go_on"] = "wait"
    """With max_lag: responses that run when new weights come are finished first (the batch of step t is sampled wholly
    by version max(0, t - 1 - max_lag), and the run repeats to the bit), or go on under the new weights (faster)."""
    window: int = Field(default=1, ge=1)
    """With during_update = "go_on": a finished group may overtake unfinished ones, within so many groups from the
    oldest; the lag is at most max_lag + ceil((window - 1) / prompts_per_step) then. 1: in the order of their draws."""
    episode: FunctionName | None = None
    """A program of your own, "MODULE:NAME", that talks with the model over many turns, calls tools, and says what came
    of it: async def episode(problem, client) -> Verdict | float | bool | None. Absent: a single answer. With it,
    max_new_tokens is what a conversation may have beyond its prompt, tools' results among it."""
    max_turns: int = Field(default=16, ge=1)
    """Answers that an episode may ask for; one more ends it, UNPARSED where the program does not catch EpisodeLimit."""
    turn_tokens: int | None = Field(default=None, ge=1)
    """Tokens of one answer of an episode. Absent: what max_new_tokens leaves."""
    episode_limit_s: Seconds = 600.0
    """Seconds that an episode may take outside of engines (its tools' time); beyond, it is FAULT."""
    lockstep: bool = False
    """Answers are sampled in rounds, each when every episode has asked for one or ended: with during_update = "wait" a
    run on a CPU repeats to the bit, however long tools take. Off: as they are asked for, which is faster."""

    replay_routing: bool = False
    """Mixtures of experts: training sends each token to the experts that the engine chose for it, and routers learn by
    their probabilities there. Off: they choose again in training, and rounding may choose others."""

    @property
    def lag_bound(self) -> int:
        """The largest lag that a token trained on may have."""
        return self.max_lag + -(-(self.window - 1) // self.prompts_per_step)
