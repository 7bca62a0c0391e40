"""Floor 2: engines sample. They speak token ids, never text, and never see a reward."""

from pekoe.core.types import SamplingParams
from pekoe.engine.base import Engine, EngineStats
from pekoe.engine.embedded import EmbeddedEngine
from pekoe.engine.servers.remote import RemoteEngine
from pekoe.engine.servers.sglang import SGLangEngine
from pekoe.engine.servers.vllm import VLLMEngine

__all__ = ["EmbeddedEngine", "EngineStats", "Generator", "RemoteEngine", "SGLangEngine", "SamplingParams", "VLLMEngine"]
