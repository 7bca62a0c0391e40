"""The engine in this process: continuous batching over paged KV, on CPUs and GPUs."""

from pekoe.engine.embedded.engine import EmbeddedEngine

__all__ = ["EmbeddedEngine"]
