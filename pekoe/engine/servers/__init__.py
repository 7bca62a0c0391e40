"""Engines behind HTTP: SGLang and vLLM servers, launched here or attached to."""
