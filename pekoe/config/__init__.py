"""Recipes: the sections of a TOML file as frozen, documented, validated objects."""

from pekoe.config.recipes import CurateConfig, EvalConfig, RLConfig, SFTConfig, dump_config, load_config

__all__ = ["CurateConfig", "EvalConfig", "RLConfig", "SFTConfig", "dump_config", "load_config"]
