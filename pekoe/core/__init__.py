"""Floor 0: the nouns, the config, the errors, the journal. No torch, nothing heavy."""

from pekoe.core.config import EvalConfig, RLConfig, SFTConfig, dump_config, load_config
from pekoe.core.errors import Interrupted, RunError, UserError
from pekoe.core.types import (
    Group,
    Payload,
    Problem,
    Prompt,
    Rollout,
    Sample,
    SamplingParams,
    Verdict,
)

__all__ = [
    "EvalConfig",
    "Group",
    "Interrupted",
    "Payload",
    "Problem",
    "Prompt",
    "RLConfig",
    "Rollout",
    "RunError",
    "SFTConfig",
    "Sample",
    "SamplingParams",
    "UserError",
    "Verdict",
    "dump_config",
    "load_config",
]
