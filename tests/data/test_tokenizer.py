from __future__ import annotations

import io
import json
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from pekoe.config.data import TemplateSection
from pekoe.core.errors import UserError
from pekoe.data import Tokenizer, chat
from pekoe.demo.char_tokenizer import make_char_tokenizer
from pekoe.demo.problems import ARITHMETIC_ALPHABET

ALPHABET = ARITHMETIC_ALPHABET
CHAT = [{"role": "user", "content": "7+25="}]


def write(directory: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (directory / name).write_bytes(content)
    return directory


@pytest.fixture(scope="session")
def char_dir(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("char"), make_char_tokenizer(ALPHABET))


@pytest.fixture(scope="session")
def ours(char_dir) -> Tokenizer:
    return Tokenizer.load(char_dir)


@pytest.fixture(scope="session")
def theirs(char_dir):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(char_dir)


class TestCharTokenizer:
    @given(text=st.text(st.sampled_from(ALPHABET), max_size=40))
    def test_one_id_a_character_and_back(self, text):
        tokenizer = Tokenizer(make_char_tokenizer(ALPHABET))
        assert tokenizer.encode(text) == [4 + ALPHABET.index(char) for char in text]
        assert tokenizer.decode(tokenizer.encode(text)) == text

    def test_special_tokens(self, ours):
        ids = ours.encode("<|user|>1+1=<|assistant|>2<|end|><|pad|>")
        assert (ids[0], ids[5], ids[-2], ids[-1]) == (1, 2, 3, 0)
        assert len(ids) == 9
        assert ours.decode(ids) == "<|user|>1+1=<|assistant|>2<|end|><|pad|>"
        assert ours.decode(ids, skip_special_tokens=True) == "1+1=2"
        assert ours.stop_token_ids == (3,)
        assert ours.eos_token_id == 3
        assert ours.vocab_size == 4 + len(ALPHABET)

    def test_transformers_gives_the_same(self, ours, theirs):
        text = "<|user|>7+25=<|assistant|>7+25=32\n\\boxed{32}<|end|>"
        assert theirs(text)["input_ids"] == ours.encode(text)
        assert theirs.decode(ours.encode(text)) == text
        assert theirs.decode(ours.encode(text), skip_special_tokens=True) == "7+25=7+25=32\n\\boxed{32}"
        assert len(theirs) == ours.vocab_size
        assert (theirs.eos_token_id, theirs.pad_token_id) == (3, 0)
        dialogue = [*CHAT, {"role": "assistant", "content": "32"}, *CHAT]
        for turns, prompt in ((CHAT, True), (dialogue, True), (dialogue, False)):
            rendered = theirs.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompt)
            assert ours.apply_chat_template(turns, prompt) == rendered
        assert ours.apply_chat_template(CHAT) == "<|user|>7+25=<|assistant|>"

    def test_refuses_what_the_alphabet_lacks(self, ours):
        with pytest.raises(UserError, match=r"expected characters of its vocabulary, got \['z', 'é'\]"):
            ours.encode("<|user|>1+é=z1")

    def test_refuses_roles_it_has_no_token_for(self, ours):
        with pytest.raises(UserError, match="expected the roles user and assistant, got system"):
            ours.apply_chat_template([{"role": "system", "content": "1"}])

    def test_alphabet_is_of_single_characters(self):
        with pytest.raises(ValueError, match="expected single characters, got 'ab'"):
            make_char_tokenizer(["a", "ab"])
        assert Tokenizer(make_char_tokenizer("abca")).vocab_size == 7


# Of the shapes in use: a system turn of its own, a tool list as JSON, thinking cut from earlier answers, a refusal.
TEMPLATE = """
{%- if messages[0].role == 'system' %}
    {{- '<sys>' + messages[0].content | trim + '</sys>\\n' }}
    {%- set turns = messages[1:] %}
{%- else %}
    {%- set turns = messages %}
{%- endif %}
{{ bos_token }}
{%- set ns = namespace(count=0) %}
{% for message in turns %}
    {% if message['role'] == 'tool' %}{% continue %}{% endif %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('turns have to alternate') }}
    {%- endif %}
    {%- set ns.count = ns.count + 1 %}
    {%- if message.role == 'assistant' %}
        {%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}
{% generation %}[{{ ns.count }}:{{ content }}]{{ eos_token }}{% endgeneration %}
    {%- else %}
        {{- {'n': loop.index, 'text': message.content, 'é<': [1, none]} | tojson }}
        {{- message | tojson(indent=2) }}
    {%- endif %}
{% endfor %}
{%- if tools %}never{% endif %}
{% if add_generation_prompt %}<assistant><think>
{% endif %}"""


@pytest.fixture(scope="session")
def byte_files() -> dict[str, bytes]:
    """A byte-level BPE tokenizer, as Qwen's and DeepSeek's are, with the template above."""
    specials = ["<bos>", "<eos>", "<pad>"]
    vocabulary = {
        token: i for i, token in enumerate([*specials, *sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())])
    }
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    tokenizer.enable_truncation(5)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": {"content": "<bos>", "special": True, "__type": "AddedToken"},
        "eos_token": "<eos>",
        "pad_token": None,
        "clean_up_tokenization_spaces": False,
    }
    return {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": json.dumps(config).encode(),
        "chat_template.jinja": TEMPLATE.encode(),
    }


DIALOGUE = [
    {"role": "system", "content": "  Be <brief> & kind. "},
    {"role": "user", "content": "What is 1 < 2?\n"},
    {"role": "assistant", "content": "<think>hm</think>\n\nTrue."},
    {"role": "user", "content": "é 数 'quoted' \"double\""},
]


class TestChatTemplate:
    @pytest.mark.parametrize("messages", [DIALOGUE, DIALOGUE[1:], DIALOGUE[1:2], DIALOGUE[:3]])
    @pytest.mark.parametrize("add_generation_prompt", [True, False])
    def test_renders_and_encodes_as_transformers_does(self, tmp_path, byte_files, messages, add_generation_prompt):
        from transformers import AutoTokenizer

        ours, theirs = Tokenizer.load(write(tmp_path, byte_files)), AutoTokenizer.from_pretrained(tmp_path)
        text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
        assert ours.apply_chat_template(messages, add_generation_prompt) == text
        assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.decode(ours.encode(text)) == text

    def test_tools_and_variables_reach_the_template(self, byte_files):
        source = "{{ bos_token }}{{ tools | tojson }}{% if thinking is defined %}{{ thinking }}{% endif %}{{ n }}"
        files = {**byte_files, "chat_template.jinja": source.encode()}
        tools = [{"type": "function", "function": {"name": "add"}}]
        ours = Tokenizer(files).with_template(TemplateSection(variables={"thinking": False, "n": 1}))
        bos = Tokenizer(files).apply_chat_template(DIALOGUE).removesuffix("null")
        assert ours.apply_chat_template(DIALOGUE) == f"{bos}nullFalse1"
        expected = f"{bos}{json.dumps(tools)}False2"  # a call's own variables win
        assert ours.apply_chat_template(DIALOGUE, tools=tools, variables={"n": 2}) == expected
        assert ours.decode(ours.encode_chat(DIALOGUE, tools, {"n": 2})) == expected

    def test_variables_are_not_what_pekoe_sets(self):
        with pytest.raises(
            ValueError, match=r"variables: expected names that Pekoe does not set itself, got \['tools'\]"
        ):
            TemplateSection(variables={"tools": [], "n": 1})
        with pytest.raises(ValueError, match="variables: expected what JSON can write, got a date"):
            TemplateSection(variables={"day": date(2026, 1, 1)})

    def test_a_refusal_is_the_users_to_mend(self, byte_files):
        with pytest.raises(UserError, match="turns have to alternate"):
            Tokenizer(byte_files).apply_chat_template(DIALOGUE[1:2] * 2)

    @pytest.mark.parametrize(
        "hostile",
        [
            "{{ ''.__class__.__mro__[1].__subclasses__() }}",
            "{{ raise_exception.__globals__['json'].codecs.open('/etc/hostname').read() }}",
            "{{ messages.append(1) }}",
            "{{ range(10**9) | list }}",
            "{{ undefined.attribute }}",
            "{{ 1 // 0 }}",
        ],
    )
    def test_a_hostile_or_broken_template_gets_nowhere(self, byte_files, hostile):
        tokenizer = Tokenizer({**byte_files, "chat_template.jinja": hostile.encode()})
        with pytest.raises(UserError, match="the chat template refused"):
            tokenizer.apply_chat_template(CHAT)

    def test_syntax_errors_are_refused_at_once(self, byte_files):
        with pytest.raises(UserError, match="expected a Jinja chat template"):
            Tokenizer({**byte_files, "chat_template.jinja": b"{% for %}"})

    def test_named_templates_and_dates(self, byte_files):
        config = json.loads(byte_files["tokenizer_config.json"])
        named = [
            {"name": "tool_use", "template": "no"},
            {"name": "default", "template": "{{ strftime_now('%Y') }}{{ bos_token }}"},
        ]
        files = {**byte_files, "tokenizer_config.json": json.dumps({**config, "chat_template": named}).encode()}
        del files["chat_template.jinja"]
        assert Tokenizer(files).apply_chat_template(CHAT)[4:] == "<bos>"


class TestPrompts:
    def test_chat(self, ours):
        tokens = ours.encode_prompt(CHAT)
        assert tokens.dtype == np.int64
        assert tokens.tolist() == ours.encode("<|user|>7+25=<|assistant|>")

    def test_plain_text_is_a_user_turn_where_there_is_a_template(self, ours):
        plain = ours.encode_prompt([{"role": "prompt", "content": "7+25="}])
        assert plain.tolist() == ours.encode_prompt(CHAT).tolist()

    def test_raw_text_is_never_templated(self, ours):
        assert ours.encode_prompt([{"role": "raw", "content": "7+25="}]).tolist() == ours.encode("7+25=")

    def test_without_a_template(self, byte_files):
        base = Tokenizer({name: text for name, text in byte_files.items() if name != "chat_template.jinja"})
        assert not base.has_chat_template
        assert base.encode_prompt([{"role": "prompt", "content": "2+2="}]).tolist() == base.encode("2+2=")
        with pytest.raises(UserError, match=r"expected a chat template.*plain 'prompt'"):
            base.encode_prompt(CHAT)

    def test_plain_text_begins_as_the_tokenizer_begins_it(self, byte_files):
        config = json.loads(byte_files["tokenizer_config.json"])
        files = {**byte_files, "tokenizer_config.json": json.dumps({**config, "add_bos_token": True}).encode()}
        raw = Tokenizer(files).encode_prompt([{"role": "raw", "content": "hi"}]).tolist()
        assert raw == [0, *Tokenizer(files).encode("hi")]
        assert Tokenizer(files).encode_prompt([{"role": "raw", "content": "<bos>hi"}]).tolist() == raw
        tokenizer = tokenizers.Tokenizer.from_buffer(byte_files["tokenizer.json"])
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", 0)]
        )
        files = {**byte_files, "tokenizer.json": tokenizer.to_str().encode()}
        assert Tokenizer(files).encode_prompt([{"role": "raw", "content": "hi"}]).tolist() == raw
        assert Tokenizer(files).encode("hi") == raw[1:], "a rendered chat already says how it begins"

    def test_response_ends_with_the_stop_token(self, ours):
        assert ours.encode_response("\\boxed{1}").tolist() == [*ours.encode("\\boxed{1}"), 3]


class TestFiles:
    def test_saved_truncation_is_undone(self, byte_files):
        assert len(Tokenizer(byte_files).encode("longer than five")) == 16

    def test_stop_tokens_are_united(self, byte_files):
        generation = json.dumps({"eos_token_id": [7, 2]}).encode()
        files = {**byte_files, "generation_config.json": generation}
        assert Tokenizer(files, b'{"eos_token_id": 9}').stop_token_ids == (1, 2, 7, 9)
        assert Tokenizer(files).eos_token_id == 1

    def test_keeps_the_files(self, char_dir, tmp_path):
        files = Tokenizer.load(char_dir).files
        assert files == make_char_tokenizer(ALPHABET)
        assert Tokenizer.load(write(tmp_path, files)).files == files

    def test_no_end_of_sequence(self, byte_files):
        files = {"tokenizer.json": byte_files["tokenizer.json"]}
        assert Tokenizer(files).stop_token_ids == ()
        with pytest.raises(UserError, match="expected an eos_token"):
            Tokenizer(files).encode_response("1")

    def test_missing_directory_names_the_nearest(self, char_dir):
        with pytest.raises(UserError, match=f"expected a model directory.*Did you mean '{char_dir.name}'"):
            Tokenizer.load(char_dir.parent / (char_dir.name + "x"))

    def test_missing_tokenizer(self, tmp_path):
        (tmp_path / "tokenizer.model").touch()
        with pytest.raises(UserError, match=r"expected tokenizer\.json, got tokenizer\.model\..*save_pretrained"):
            Tokenizer.load(tmp_path)

    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("tokenizer.json", b"{"),
            ("tokenizer_config.json", b"{"),
            ("tokenizer_config.json", b"[]"),
            ("generation_config.json", b"\xff"),
        ],
    )
    def test_files_that_do_not_parse(self, tmp_path, byte_files, name, content):
        with pytest.raises(UserError, match=r"expected .*JSON|expected UTF-8|expected a tokenizer\.json"):
            Tokenizer.load(write(tmp_path, {**byte_files, name: content}))


DEEP = b"[" * 200_000
BPE = {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": ["a b"], "continuing_subword_prefix": "##"}


def without_template(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in files.items() if name != "chat_template.jinja"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        *(
            ("generation_config.json", b'{"eos_token_id": %s}' % value, "eos_token_id: expected a token's number")
            for value in (b"1.5", b'"3"', b"[[1]]", b"true", b"{}", b"-1", b"[1, null]", b"4294967296")
        ),
        ("generation_config.json", DEEP, "generation_config.json: expected JSON, got values nested"),
        ("tokenizer_config.json", b'{"a": ' + DEEP, "tokenizer_config.json: expected JSON"),
        ("special_tokens_map.json", b'{"bos_token": "\\ud800"}', "half of a surrogate pair"),
        ("special_tokens_map.json", b'{"bos_token": "\xff"}', "special_tokens_map.json: expected UTF-8 text"),
        *(
            ("tokenizer_config.json", b'{"chat_template": %s}' % value, "chat_template: expected a text, or a list of")
            for value in (b"5", b"{}", b'[{"a": 1}]', b"[1]", b'[{"name": [], "template": "x"}]', b"true")
        ),
        ("chat_template.jinja", b"\xff\xfe{", "chat_template.jinja: expected UTF-8 text"),
        ("chat_template.jinja", b"{{" + b"(" * 5000 + b")" * 5000 + b"}}", "expected a Jinja chat template, got"),
        ("chat_template.jinja", b"{% if 1 %}" * 5000 + b"{% endif %}" * 5000, "expected a Jinja chat template, got"),
        ("tokenizer.json", json.dumps({"model": BPE}).encode(), "expected a tokenizer.json of the tokenizers library"),
        ("tokenizer.json", DEEP, "expected a tokenizer.json of the tokenizers library"),
    ],
)
def test_hostile_files_of_a_model_directory_are_one_message(
    byte_files: dict[str, bytes], name: str, content: bytes, message: str
):
    with pytest.raises(UserError, match=message) as caught:
        Tokenizer({**without_template(byte_files), name: content}, origin="dir")
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "changes",
    [
        {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
        {
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "x", "type_id": 0}}],
                "pair": [],
                "special_tokens": {},
            }
        },
    ],
)
def test_a_tokenizer_that_panics_at_work_is_one_message(byte_files: dict[str, bytes], changes: dict[str, Any]):
    plain = without_template(byte_files)
    plain["tokenizer.json"] = json.dumps(json.loads(byte_files["tokenizer.json"]) | changes).encode()
    plain["tokenizer_config.json"] = b'{"bos_token": "<bos>"}'
    with pytest.raises(UserError, match="dir: the tokenizer failed on "):
        Tokenizer(plain, origin="dir").encode_prompt([{"role": "raw", "content": "ab"}])


def test_half_a_surrogate_pair_is_a_character_that_no_vocabulary_has(byte_files: dict[str, bytes]):
    with pytest.raises(UserError, match="expected characters of its vocabulary"):
        Tokenizer(byte_files, origin="dir").encode("a\ud800")


@pytest.mark.parametrize(
    ("source", "got"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "it takes more than 0.2 s"),
        (
            "{% macro f(n) %}{{ f(n - 1) }}{{ f(n - 1) }}{% endmacro %}{{ f(100) }}",
            "it takes more than 0.2 s|maximum recursion",
        ),
        ("{{ messages[0].content * 10**9 }}", "it made .* characters|it takes more"),
        ("{{ 10 ** (10**9) }}", "it takes more"),
        ("{{ '%9999999999d' | format(1) }}", "it takes more memory|too"),
        ("{{ 'x'.center(10**10) }}", "it takes more memory"),
        (
            "{% set n = namespace(x=messages[0].content) %}"
            "{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x | length }}",
            "it takes more",
        ),
        ("{{ (messages[0].content ~ ' ') * 3000000 }}", "it made .* characters, more than 4,000,000"),
    ],
)
def test_a_template_that_loops_or_multiplies_meets_a_limit(
    byte_files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, source: str, got: str
):
    monkeypatch.setattr(chat, "CPU_LIMIT_S", 0.2)
    tokenizer = Tokenizer({**byte_files, "chat_template.jinja": source.encode()}, origin="dir")
    for _ in range(2):  # a new process after one that was ended
        with pytest.raises(UserError, match=f"dir: the chat template refused messages of roles .*: ({got})"):
            tokenizer.apply_chat_template(CHAT)


def test_a_tokenizer_that_multiplies_is_refused(byte_files: dict[str, bytes]):
    replace = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 11}
    growing = {"normalizer": {"type": "Sequence", "normalizers": [replace] * 3}}
    file = json.dumps(json.loads(byte_files["tokenizer.json"]) | growing).encode()
    with pytest.raises(UserError, match=r"dir: tokenizer.json: expected replacements that .* got 1\.3e\+03"):
        Tokenizer({**byte_files, "tokenizer.json": file}, origin="dir")


def test_a_text_is_bounded(byte_files: dict[str, bytes]):
    with pytest.raises(UserError, match="expected a text of at most 4,000,000 characters, got 4,000,001"):
        Tokenizer(byte_files).encode("a" * 4_000_001)


def test_ctrl_c_leaves_no_answer_for_the_next_conversation(
    byte_files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
):
    class Interrupted(io.StringIO):
        def readline(self, *_: Any) -> str:
            raise KeyboardInterrupt

    template = chat.ChatTemplate("{{ messages[0].content }}", {}, "t")
    render = partial(template.render, add_generation_prompt=True, today=date(2026, 1, 1))
    for text in "ab":
        assert render([{"role": "user", "content": text}]) == text
    process = template._process
    stdout = process.stdout
    with monkeypatch.context() as patch:
        patch.setattr(process, "stdout", Interrupted())
        with pytest.raises(KeyboardInterrupt):
            render([{"role": "user", "content": "never read"}])
    assert render([{"role": "user", "content": "c"}]) == "c"
    assert process.poll() is not None
    stdout.close()


def test_the_templates_process_finds_an_interpreters_own_libraries(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LD_LIBRARY_PATH", "/nowhere")
    monkeypatch.setenv("SECRET", "x")
    process = chat._start()
    names = {entry.partition("=")[0] for entry in Path(f"/proc/{process.pid}/environ").read_text().split("\0") if entry}
    chat._end(process)
    assert names == {"LD_LIBRARY_PATH", "PYTHONPATH", "PYTHONHASHSEED"}
