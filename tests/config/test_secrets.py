"""What looks like a secret is hidden, and nothing else is."""

from __future__ import annotations

from typing import Any

import pytest

from pekoe.config.recipes import RLConfig, load_config
from pekoe.config.secrets import without_secrets

HIDDEN: list[tuple[Any, Any]] = [
    ({"env": {"HF_TOKEN": "s3cret"}}, {"env": {"HF_TOKEN": "***"}}),
    ({"env": {"OPENAI_API_KEY": "s3cret", "apikey": "s3cret"}}, {"env": {"OPENAI_API_KEY": "***", "apikey": "***"}}),
    ({"env": {"DB_PASSWORD": "s3cret", "AWS_SECRET": "s3cret"}}, {"env": {"DB_PASSWORD": "***", "AWS_SECRET": "***"}}),
    ({"args": ["--api-key", "s3cret", "--port", "1"]}, {"args": ["--api-key", "***", "--port", "1"]}),
    ({"args": ("--api-key=s3cret", "--admin-api-key=s3cret")}, {"args": ["--api-key=***", "--admin-api-key=***"]}),
    ({"urls": ["http://user:s3cret@host:1/v1"]}, {"urls": ["http://***@host:1/v1"]}),
    ({"urls": ["https://user:s3c@s3cret@host:1"]}, {"urls": ["https://***@host:1"]}),
    ({"urls": ["https://host:1/x?a=1&api_key=s3cret&b=2"]}, {"urls": ["https://host:1/x?a=1&api_key=***&b=2"]}),
    ({"urls": ["https://host:1/x?token=s3cret"]}, {"urls": ["https://host:1/x?token=***"]}),
]


@pytest.mark.parametrize(("tree", "shown"), HIDDEN)
def test_a_secret_is_hidden(tree: Any, shown: Any):
    assert without_secrets(tree) == shown
    assert "s3cret" in str(tree)


def test_a_recipe_without_secrets_stays_as_it_is():
    tree = {"model": {"path": "m"}, "run": {"dir": "r"}, "num_steps": 1, "data": {"train": "hf:a/b@c:train"}}
    tree |= {"engine": {"kv_tokens": 4096, "server": {"env": {"VLLM_USE_V1": "1", "TOKENIZERS_PARALLELISM": "0"}}}}
    config = load_config(tree, kind=RLConfig).model_dump(mode="json")
    assert without_secrets(config) == config
