"""A model of random weights, an engine that samples from it, and tokenizers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec

import pytest
import torch

from pekoe.config.recipes import EngineSection
from pekoe.core.types import IntArray
from pekoe.data.tokenizer import Tokenizer
from pekoe.demo.char_tokenizer import make_char_tokenizer
from pekoe.engine.embedded import EmbeddedEngine
from pekoe.model import Decoder
from pekoe.model.attention import PackedAttention
from tests.agents.sampling import ALPHABET, TEMPLATES

# In an environment older than the extras `serve` and `test` that bring them.
collect_ignore = (
    []
    if find_spec("openai") and find_spec("uvicorn")
    else ["test_endpoint.py", "test_programs.py", "test_conformance.py", "test_environments.py"]
)


@pytest.fixture(scope="session")
def tokenizers() -> dict[str, Tokenizer]:
    """One for each of `TEMPLATES`."""
    made: dict[str, Tokenizer] = {}
    for name, source in TEMPLATES.items():
        files = make_char_tokenizer(ALPHABET)
        if source is None:
            files["tokenizer_config.json"] = b'{"eos_token": "<|end|>"}'
        else:
            files["chat_template.jinja"] = source.encode()
        made[name] = Tokenizer(files)
    return made


@pytest.fixture(scope="session")
def model(make_model: Callable[..., Decoder], tokenizers: dict[str, Tokenizer]) -> Decoder:
    return make_model(vocab_size=tokenizers["append"].vocab_size, max_positions=512, scale=1.0)


@pytest.fixture(scope="session")
def engine(model: Decoder) -> Iterator[EmbeddedEngine]:
    engine = EmbeddedEngine(model, EngineSection(block_tokens=4, kv_tokens=4096))
    yield engine
    engine.close()


@pytest.fixture(scope="session")
def logprobs_of(model: Decoder) -> Callable[[IntArray], torch.Tensor]:
    """The log-probs [L] that the model gives each token after those before it; the first has 0."""

    @torch.no_grad()
    def compute(tokens: IntArray) -> torch.Tensor:
        ids = torch.from_numpy(tokens)
        hidden = model(ids, torch.arange(len(ids)), PackedAttention([0, len(ids)]))
        logprobs = torch.log_softmax(model.logits(hidden), -1)
        return torch.cat([torch.zeros(1), logprobs[:-1].gather(1, ids[1:, None])[:, 0]])

    return compute
