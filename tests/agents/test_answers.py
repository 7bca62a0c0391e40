"""What is said of an answer while it is sampled is how the whole answer begins."""

from __future__ import annotations

import asyncio
from typing import Any, get_args

import numpy as np
import pytest
import tokenizers as library
from hypothesis import given
from hypothesis import strategies as st

from pekoe.agents.answers import Delta, Growing, GrowingText, held_back
from pekoe.agents.tools import AnswerParser, Family
from pekoe.data.tokenizer import Tokenizer
from tests.agents.sampling import text_tokenizer

TOOLS: Any = [{"type": "function", "function": {"name": "add"}}]
PIECES = st.sampled_from(
    [
        *("<think>", "</think>", "\n", "\n\n", " ", "so", "é", "<", "</", "<t", "{", "}", ";"),
        *('<tool_call>{"name": "add", "arguments": {}}</tool_call>', "<tool_call>", "</tool_call>"),
        *("<tool_call><function=add></function></tool_call>", "<function=add>{}</function>", "<|python_tag|>"),
        *('{"name": "add", "parameters": {}}', '{"total": 3}'),
        *("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>add<｜tool▁sep｜>{}<｜tool▁call▁end｜>"),
    ]
)
TEXTS = st.lists(st.one_of(PIECES, st.text(max_size=3)), max_size=8).map("".join)


@given(
    text=TEXTS,
    family=st.sampled_from([None, *get_args(Family)]),
    tools=st.sampled_from([None, TOOLS]),
    in_thought=st.booleans(),
)
def test_whatever_comes_next_the_answer_begins_so(text, family, tools, in_thought):
    parser = AnswerParser(family)
    whole = parser.whole(text, tools, in_thought)
    before = "", ""
    for size in range(len(text) + 1):
        reasoning, content = parser.begun(text[:size], tools, in_thought)
        assert whole.reasoning.startswith(reasoning)
        assert whole.content.startswith(content)
        assert reasoning.startswith(before[0])
        assert content.startswith(before[1])
        before = reasoning, content


@pytest.mark.parametrize(
    ("text", "begun"),
    [
        ("<think>a b", ("a b", "")),
        ("<think>a b</thi", ("a b", "")),
        ("<think>a b</think>\n\nc", ("a b", "c")),
        ("<thing", ("", "<thing")),
        ("so it is", ("", "so it is")),
        ("so <tool", ("", "so")),
        ("so <tool_call>{", ("", "so")),
        ("so <tools", ("", "so <tools")),
    ],
)
def test_what_is_certain_is_told_at_once(text, begun):
    assert AnswerParser("hermes").begun(text, TOOLS, False) == begun


def byte_tokenizer() -> Tokenizer:
    """Of UTF-8 bytes, so that most characters are several tokens."""
    from tokenizers import decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = library.Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return Tokenizer({"tokenizer.json": made.to_str().encode()})


def piece_tokenizer() -> Tokenizer:
    """As of Llama 2: words begin with a mark, and what has no piece is bytes."""
    from tokenizers import decoders, models

    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁it", "▁is", "s", "é"]
    made = library.Tokenizer(models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=[], byte_fallback=True))
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Tokenizer({"tokenizer.json": made.to_str().encode()})


@given(text=st.text(max_size=30), steps=st.lists(st.integers(1, 5), min_size=1))
def test_characters_are_whole(text, steps):
    tokenizer = byte_tokenizer()
    tokens, growing, size, texts = tokenizer.encode(text), GrowingText(tokenizer), 0, [""]
    while size < len(tokens):
        size += steps[len(texts) % len(steps)]
        texts.append(growing.update(tokens[:size]))
        assert text.startswith(texts[-1])
        assert texts[-1].startswith(texts[-2])
    if not text.endswith("\ufffd"):
        assert texts[-1] == text


@given(tokens=st.lists(st.integers(1, 261), max_size=40))
def test_pieces_of_words_are_as_in_the_whole(tokens):
    tokenizer = piece_tokenizer()
    growing, whole, text = GrowingText(tokenizer), tokenizer.decode(tokens), ""
    for size in range(len(tokens) + 1):
        text = growing.update(tokens[:size])
        assert whole.startswith(text)
    if tokens and not tokenizer.is_byte(tokens[-1]):
        assert text == whole


def test_what_may_become_a_mark_is_held_back():
    assert held_back("a<to", ["<tool>", "o"]) == "a"
    assert held_back("a<tool>", ["<tool>"]) == "a<tool>"
    assert held_back("ab", []) == "ab"
    assert held_back("xaab", ["aabc", "b!"]) == "x"


class Heard:
    """The deltas of an answer of which an engine tells."""

    def __init__(self, *steps: tuple[int, str], stops: tuple[str, ...] = ()) -> None:
        tokenizer = text_tokenizer()
        self.deltas: list[Delta] = []

        async def listen() -> None:
            parser = AnswerParser(None)
            growing = Growing(
                *(tokenizer, tokenizer.stop_token_ids, stops),
                *(lambda text: parser.begun(text, None, False), 7, self.deltas.append),
            )
            for start, text in steps:
                growing(start, np.array(tokenizer.encode(text), np.int64))
                await asyncio.sleep(0)
            growing.close()
            growing(99, np.array(tokenizer.encode("x"), np.int64))
            await asyncio.sleep(0)

        asyncio.run(listen())

    @property
    def texts(self) -> list[str]:
        return [delta.text for delta in self.deltas]


def test_a_stop_text_is_never_told_of():
    assert Heard((0, "ab"), (2, "cE"), (4, "N"), (5, "d"), (6, "END"), (9, "x"), stops=("END",)).texts == [
        *("ab", "c", "ENd"),
    ]


def test_the_stop_token_is_no_text():
    heard = Heard((0, "ab"), (2, "c<|end|>"))
    assert heard.texts == ["ab", "c"]
    assert {delta.num_context for delta in heard.deltas} == {7}


def test_an_engine_that_begins_again_tells_only_what_goes_on():
    assert Heard((0, "abc"), (0, "ab"), (2, "cd")).texts == ["abc", "d"]
    assert Heard((0, "abc"), (0, "xyz"), (3, "w")).texts == ["abc"]
