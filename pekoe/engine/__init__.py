"""Engines sample. They speak token ids, never text, and never see a reward."""

from pekoe.core.types import SamplingParams
from pekoe.engine.base import Engine, EngineStats, requests_of
from pekoe.engine.embedded import EmbeddedEngine
from pekoe.engine.pool import EnginePool
from pekoe.engine.servers import SGLangEngine, VLLMEngine

__all__ = [
    "EmbeddedEngine",
    "Engine",
    "EnginePool",
    "EngineStats",
    "SGLangEngine",
    "SamplingParams",
    "VLLMEngine",
    "requests_of",
]
