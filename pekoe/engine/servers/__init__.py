"""Engines behind HTTP: SGLang and vLLM servers, launched here or attached to."""

from pekoe.engine.servers.engine import ServerEngine
from pekoe.engine.servers.sglang import SGLangEngine
from pekoe.engine.servers.vllm import VLLMEngine

__all__ = ["SGLangEngine", "ServerEngine", "VLLMEngine"]
