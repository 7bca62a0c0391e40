"""Recipes: the sections of a TOML file as frozen, documented, validated objects."""

from pekoe.config.recipes import (
    AlgoSection,
    CurateConfig,
    EvalConfig,
    OptimSection,
    RLConfig,
    SFTConfig,
    dump_config,
    load_config,
)

__all__ = [
    "AlgoSection",
    "CurateConfig",
    "EvalConfig",
    "OptimSection",
    "RLConfig",
    "SFTConfig",
    "dump_config",
    "load_config",
]
