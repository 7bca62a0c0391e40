"""Pekoe trains language models to reason, by reinforcement learning on rewards that can be checked."""

__version__ = "0.1.0"
