"""Text to token ids and back, with a model directory's own tokenizer and chat template."""

from __future__ import annotations

import contextlib
import copy
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from pekoe.config.base import read_toml
from pekoe.config.data import TemplateSection
from pekoe.core.errors import UserError
from pekoe.core.io import TOKENIZER_FILES
from pekoe.core.types import IntArray
from pekoe.data.chat import FAMILIES, OPENING, ChatTemplate
from pekoe.data.rows import MAX_CHARS, PLAIN, RAW, Malformed, is_half, loads, plain
from pekoe.data.sources import missing

MAX_GROWTH = 1_000  # characters that a tokenizer may make of one
_JSON_FILES = ("special_tokens_map.json", "tokenizer_config.json", "generation_config.json", "config.json")


class LibraryFailed(Exception):
    """An error of the tokenizers library."""


@contextlib.contextmanager
def _library() -> Iterator[None]:
    """Its errors, which are bare Exceptions, and its panics, which are BaseExceptions, as LibraryFailed."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise LibraryFailed(str(error)[:500]) from None


class Tokenizer:
    """A model directory's tokenizer. Ids are those that `transformers` gives for the same files.

    `files` are the directory's tokenizer files as bytes, to be written unchanged beside trained weights.
    `stop_token_ids` are the ends of sequence named by generation_config.json, config.json and the tokenizer, ascending.
    """

    def __init__(self, files: Mapping[str, bytes], model_config: bytes = b"{}", origin: str = "tokenizer") -> None:
        """`model_config` is config.json, which may name stop tokens. Raises UserError for files that do not parse."""
        self.files = dict(files)
        self._origin = origin
        try:
            with _library():
                self._tokenizer = tokenizers.Tokenizer.from_buffer(self.files["tokenizer.json"])
        except LibraryFailed as error:
            raise UserError(f"{origin}: expected a tokenizer.json of the tokenizers library, got {error}") from None
        if (growth := _growth(self._tokenizer.normalizer) * _growth(self._tokenizer.decoder)) > MAX_GROWTH:
            raise UserError(
                f"{origin}: tokenizer.json: expected replacements that make at most {MAX_GROWTH:,} characters of one, "
                f"got {growth:.1e}"
            )
        self._tokenizer.no_truncation()  # saved files may carry the limits of whoever saved them
        self._tokenizer.no_padding()
        sources = self.files | {"config.json": model_config}
        special, config, generation, model = (
            _parse_json(sources.get(name, b"{}"), f"{origin}/{name}") for name in _JSON_FILES
        )
        self._config = special | config
        self._special: dict[str, str] = {}
        for key, value in self._config.items():  # a special token is text, or an object with its text in `content`
            text = value.get("content") if isinstance(value, dict) else value
            if key.endswith("_token") and text and isinstance(text, str):
                self._special[key] = text
        self._template = self._load_template()
        self._directive = self._opening = ""
        self._today = date.today()
        self._variables: Mapping[str, Any] = {}
        stops: set[int | None] = {self._tokenizer.token_to_id(self._special.get("eos_token", ""))}
        stops |= _stop_ids(generation, f"{origin}/generation_config.json") | _stop_ids(model, f"{origin}/config.json")
        self.stop_token_ids = tuple(sorted(token for token in stops if token is not None))

    @classmethod
    def load(cls, model_dir: str | Path) -> Tokenizer:
        """Read a Hugging Face model directory. Raises UserError where it, or its tokenizer.json, is missing."""
        path = Path(model_dir)
        if not path.is_dir():
            raise missing(path, "a model directory")
        files = {name: (path / name).read_bytes() for name in TOKENIZER_FILES if (path / name).is_file()}
        if "tokenizer.json" not in files:
            got = ", ".join(sorted(entry.name for entry in path.iterdir())[:20]) or "an empty directory"
            raise UserError(
                f"{path}: expected tokenizer.json, got {got}. "
                "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR) of transformers writes one."
            )
        config = path / "config.json"
        return cls(files, config.read_bytes() if config.is_file() else b"{}", str(path))

    def with_template(self, section: TemplateSection) -> Tokenizer:
        """This tokenizer, with prompts as `section` says. Raises UserError where it lacks the template's tokens."""
        other = copy.copy(self)
        other._directive, other._opening = section.directive, OPENING if section.think else ""
        other._variables = section.variables
        if section.date is not None:
            other._today = date.fromisoformat(section.date)
        if section.name != "model":
            family = FAMILIES[section.name]
            absent = [text for text in (*family.markers, family.end) if self._tokenizer.token_to_id(text) is None]
            if absent:
                raise UserError(
                    f"model.template.name: expected a model that has the tokens of {section.name!r}, "
                    f"got {self._origin} without {', '.join(absent)}; nearest: 'model'"
                )
            other._template = ChatTemplate(family.source, self._special, f"model.template.name = {section.name!r}")
            other._special = self._special | {"eos_token": family.end}
            other.stop_token_ids = tuple(sorted({*self.stop_token_ids, self.encode(family.end)[0]}))
        return other

    @property
    def vocab_size(self) -> int:
        """Ids the tokenizer knows, added tokens included (a model's embedding may have more rows)."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    @property
    def has_chat_template(self) -> bool:
        """Whether conversations can be rendered."""
        return self._template is not None

    @property
    def template_source(self) -> str:
        """The chat template's Jinja text; empty where there is none."""
        return "" if self._template is None else self._template.source

    @property
    def eos_token_id(self) -> int:
        """The token that ends a response we train on: the tokenizer's own, else the first stop token."""
        own = self._tokenizer.token_to_id(self._special.get("eos_token", ""))
        if own is None and not self.stop_token_ids:
            raise UserError(f"{self._origin}: expected an eos_token in tokenizer_config.json, got none")
        return self.stop_token_ids[0] if own is None else own

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`. Special tokens written in it are recognised; none is added.

        Raises UserError for a character that the vocabulary cannot write: it would otherwise be dropped or changed.
        """
        if len(text) > MAX_CHARS:
            raise UserError(f"{self._origin}: expected a text of at most {MAX_CHARS:,} characters, got {len(text):,}")
        try:
            with _library():
                return self._tokenizer.encode(text, add_special_tokens=False).ids
        except LibraryFailed as error:  # a word-level model without an unknown token; half of a surrogate pair
            added = (re.escape(token.content) for token in self._tokenizer.get_added_tokens_decoder().values())
            rest = re.sub("|".join(added), "", text)
            unknown = sorted({char for char in rest if is_half(char) or self._tokenizer.token_to_id(char) is None})
            if not unknown:
                raise UserError(f"{self._origin}: the tokenizer failed on {text[:80]!r}: {error}") from None
            raise UserError(
                f"{self._origin}: expected characters of its vocabulary, got {unknown} in {text[:80]!r}"
            ) from None

    def decode(self, ids: Sequence[int] | IntArray, skip_special_tokens: bool = False) -> str:
        """The text of `ids`, with special tokens spelt out or left out."""
        try:
            with _library():
                return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)
        except LibraryFailed as error:
            raise UserError(f"{self._origin}: the tokenizer failed on tokens {list(ids[:8])}...: {error}") from None

    def is_byte(self, token: int) -> bool:
        """Whether the token is one byte of a character that has none of its own, as in "<0xE2>"."""
        return re.fullmatch(r"<0x[0-9A-F]{2}>", self._tokenizer.id_to_token(token) or "") is not None

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Render a conversation, with the schemas of `tools` and with template variables beside those of the recipe.

        Raises UserError when the model has no chat template, or it refuses.
        """
        if self._template is None:
            raise UserError(
                f"{self._origin}: expected a chat template (chat_template.jinja), got none. Add one to the model "
                "directory, or give each problem a plain 'prompt' string, which is used as it is."
            )
        turns = [{**message, "role": "user"} if message["role"] == PLAIN else message for message in messages]
        return self._template.render(
            turns, add_generation_prompt, self._today, tools, {**self._variables, **(variables or {})}
        )

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> IntArray:
        """The tokens [P] of a conversation of many turns, up to where the assistant's next one begins.

        The opening of `with_template` ends them; there is no directive, since turns are those of a program.
        """
        return np.array(self.encode("".join(self.conversation(messages, tools, variables))), dtype=np.int64)

    def conversation(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> tuple[str, str]:
        """The text that the next answer follows, and the opening of `with_template` that follows the text.

        Contents of a raw conversation, and of a plain one on a model without a template, stand one after another.
        """
        if self._is_plain(messages):
            opening = "" if messages[0]["role"] == RAW else self._opening
            return "".join(message["content"] for message in messages), opening
        text = self.apply_chat_template(messages, True, tools, variables)
        return text, "" if text.endswith(self._opening) else self._opening  # some models' own templates end with it

    def _is_plain(self, messages: Sequence[Mapping[str, Any]]) -> bool:
        """Whether no template writes them."""
        role = messages[0]["role"]
        return role == RAW or (role == PLAIN and not self.has_chat_template)

    def with_directive(self, messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """A problem's messages with the directive of `with_template` after the last question; a raw prompt has none."""
        *before, last = messages
        return [*before, last if last["role"] == RAW else {**last, "content": last["content"] + self._directive}]

    def encode_prompt(self, messages: Sequence[Mapping[str, str]]) -> IntArray:
        """The tokens [P] to sample a response from, for `Problem.messages`.

        A chat goes through the template. One message of role "raw", or of role "prompt" on a model without a
        template, is used as it is, after the tokens that the tokenizer puts before plain text (mostly a BOS token).
        The directive of `with_template` follows the last question, and its opening ends the prompt; a raw prompt has
        neither.
        """
        return self.encode_conversation("".join(self.conversation(self.with_directive(messages))), messages)

    def encode_conversation(self, text: str, messages: Sequence[Mapping[str, Any]]) -> IntArray:
        """The tokens [P] of the text of a whole conversation."""
        return np.array(self._encode_plain(text) if self._is_plain(messages) else self.encode(text), dtype=np.int64)

    def encode_response(self, response: str) -> IntArray:
        """The tokens [R] of a demonstrated response, its stop token last, without an opening that the prompt has."""
        return np.array([*self.encode(response.removeprefix(self._opening)), self.eos_token_id], dtype=np.int64)

    def _encode_plain(self, text: str) -> list[int]:
        ids = self.encode(text)
        bos = self._tokenizer.token_to_id(self._special.get("bos_token", ""))
        if bos is None or ids[:1] == [bos]:
            return ids
        try:
            with _library():
                probe = self._tokenizer.encode("", add_special_tokens=True).ids
        except LibraryFailed as error:
            raise UserError(f"{self._origin}: the tokenizer failed on empty text: {error}") from None
        adds_bos = self._config.get("add_bos_token", probe[:1] == [bos])
        return [bos, *ids] if adds_bos else ids

    def _load_template(self) -> ChatTemplate | None:
        source: Any = self._config.get("chat_template")
        if "chat_template.jinja" in self.files:
            source = _text(self.files["chat_template.jinja"], f"{self._origin}/chat_template.jinja")
        try:
            if isinstance(source, list):  # several named templates
                source = {entry["name"]: entry["template"] for entry in source}.get("default")
            if not isinstance(source, str | None):
                raise TypeError
        except (TypeError, KeyError):
            got = f"{source!r:.80}"
            raise UserError(
                f"{self._origin}: chat_template: expected a text, or a list of name and template, got {got}"
            ) from None
        return None if source is None else ChatTemplate(source, self._special, self._origin)


def decoder_of(run: Path) -> Callable[[Sequence[int]], str] | None:
    """Decodes with the tokenizer of a run's model, or of the one that the run started from, if one is there."""
    folders = [run / "model"]
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        folders.append(Path(read_toml(run / "config.toml")["model"]["path"]))
    for folder in folders:
        if (folder / "tokenizer.json").is_file():
            tokenizer = Tokenizer.load(folder)
            return lambda tokens: tokenizer.decode(tokens, skip_special_tokens=False)
    return None


def _growth(part: Any) -> float:
    """How many characters a normalizer or decoder may make of one, by its replacements (the rest at most doubles)."""
    steps: list[Any] = [] if part is None else [json.loads(part.__getstate__())]
    growth = 1.0
    while steps:
        step = steps.pop()
        steps += [*step.get("normalizers", ()), *step.get("decoders", ())]
        if step["type"] == "Replace":
            content, pattern = len(step["content"]), len(step["pattern"].get("String", ""))
            growth *= max(1.0, content / pattern if pattern else content + 1)  # a pattern may match nothing, anywhere
    return growth


def _stop_ids(config: Mapping[str, Any], origin: str) -> set[int | None]:
    value = config.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(token) is int and 0 <= token < 2**31 for token in ids):
        raise UserError(f"{origin}: eos_token_id: expected a token's number, or several, got {value!r:.80}")
    return set(ids)


def _text(data: bytes, origin: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{origin}: expected UTF-8 text, got {error}") from None


def _parse_json(data: bytes, origin: str) -> dict[str, Any]:
    try:
        value = plain(loads(_text(data, origin)))
    except Malformed as error:
        raise UserError(f"{origin}: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{origin}: expected a JSON object, got {type(value).__name__}")
    return value
