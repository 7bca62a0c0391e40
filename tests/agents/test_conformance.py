"""The conformance suite passes our endpoint, and fails each that does not record what was sampled."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from pekoe.agents.conformance import Reference, Suite, main
from pekoe.core.io import TOKENIZER_FILES
from pekoe.engine.embedded import EmbeddedEngine
from pekoe.model import Decoder, save_model
from tests.agents.sampling import HERMES, TEMPLATES, text_tokenizer
from tests.agents.scripted import KEY, Serving, serving

TRIM = HERMES.replace("{{ message.content }}\n", "{{ message.content | trim }}\n")


@pytest.fixture(scope="module")
def model(make_model: Callable[..., Decoder]) -> Decoder:
    return make_model(vocab_size=text_tokenizer().vocab_size, max_positions=1024, scale=1.0)


@pytest.fixture(scope="module")
def served(model: Decoder) -> Iterator[Serving]:
    engine = EmbeddedEngine(model)
    with serving(engine, text_tokenizer(TRIM), 1024) as one:
        yield one
    engine.close()


@pytest.fixture(scope="module")
def folder(model: Decoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    save_model(model, path)
    for name, data in text_tokenizer(TRIM).files.items():
        assert name in TOKENIZER_FILES
        (path / name).write_bytes(data)
    return path


def test_our_endpoint_conforms(served: Serving, folder: Path, capsys: pytest.CaptureFixture[str]):
    status = main(["--base-url", served.url, "--key", KEY, "--model", str(folder)])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["pass"] * 8, lines
    assert status == 0
    main(["--base-url", served.url, "--key", KEY])
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["pass", "skip", *["pass"] * 6]


def test_a_model_without_tools_is_not_at_fault(model: Decoder, capsys: pytest.CaptureFixture[str]):
    engine, plain = EmbeddedEngine(model), text_tokenizer(TEMPLATES["append"])
    with serving(engine, plain, 1024) as one:
        assert main(["--base-url", one.url, "--key", KEY]) == 0
    engine.close()
    assert "skip  so it is with tools" in capsys.readouterr().out


def test_a_wrong_key_fails_everything(served: Serving, capsys: pytest.CaptureFixture[str]):
    assert main(["--base-url", served.url, "--key", "wrong"]) == 1
    assert "got 401" in capsys.readouterr().out


class Broken(httpx.BaseTransport):
    """An endpoint that changes what ours answers."""

    def __init__(self, change: Callable[[Any, Any], None]) -> None:
        self._inner, self._change = httpx.HTTPTransport(), change

    def close(self) -> None:
        self._inner.close()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        response = self._inner.handle_request(request)
        response.read()
        if response.status_code == 200 and response.headers["content-type"] == "application/json":
            body = response.json()
            self._change(json.loads(request.content), body)
            return httpx.Response(200, json=body)
        return httpx.Response(response.status_code, content=response.content)


def drop_last(asked: Any, body: Any) -> None:
    body["choices"][0]["token_ids"].pop()


def other_temperature(asked: Any, body: Any) -> None:
    for entry in body["choices"][0]["logprobs"]["content"]:
        entry["logprob"] *= 1.1


def other_text(asked: Any, body: Any) -> None:
    body["choices"][0]["message"]["content"] = "never said"


def tokenised_again(asked: Any, body: Any) -> None:
    """As a server does that renders the conversation anew: the last answer's first ids are others."""
    if len(asked["messages"]) > 1:
        body["prompt_token_ids"][12] += 1


def forgetful_of_edits(known: dict[str, Any], asked: Any, body: Any) -> None:
    messages = asked["messages"]
    if len(messages) == 1:
        known["ids"] = body["prompt_token_ids"] + body["choices"][0]["token_ids"]
    elif messages[1]["content"].startswith("7"):
        body["prompt_token_ids"] = known["ids"] + body["prompt_token_ids"]


def without_ids(asked: Any, body: Any) -> None:
    del body["prompt_token_ids"]


def crowded(count: list[int], asked: Any, body: Any) -> None:
    count.append(1)
    if asked["temperature"] == 0 and len(count) % 5 == 0:
        body["choices"][0]["token_ids"][0] += 1


@pytest.mark.parametrize(
    ("change", "fails"),
    [
        (drop_last, "returns the ids that it sampled"),
        (other_text, "returns the ids that it sampled"),
        (other_temperature, "log-probs are those of a reference forward"),
        (tokenised_again, "a growing chat is one sequence"),
        (lambda asked, body, known={}: forgetful_of_edits(known, asked, body), "an edited chat is another sequence"),
        (without_ids, "a growing chat is one sequence"),
        (lambda asked, body, count=[]: crowded(count, asked, body), "many chats at once are as one alone"),
        (other_text, "a stream has what one answer has"),
    ],
)
def test_an_endpoint_that_is_broken_fails(served: Serving, folder: Path, change: Any, fails: str):
    from pekoe.agents.conformance import load_reference

    reference: Reference = load_reference(folder)
    headers = {"authorization": f"Bearer {KEY}.{fails.split()[1]}"}
    with httpx.Client(base_url=f"{served.url}/", headers=headers, transport=Broken(change), timeout=60) as client:
        results = {result.name: result for result in Suite(client, "m", reference).run()}
    assert results[fails].passed is False, results[fails]
