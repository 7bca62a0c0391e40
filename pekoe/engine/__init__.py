"""Floor 2: engines sample. They speak token ids, never text, and never see a reward."""

from pekoe.core.types import SamplingParams
from pekoe.engine.base import EngineStats, Generator
from pekoe.engine.embedded import EmbeddedEngine

__all__ = ["EmbeddedEngine", "EngineStats", "Generator", "SamplingParams"]
