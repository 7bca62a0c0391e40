"""A character-level tokenizer made from an alphabet, as files that `transformers` loads too."""

from __future__ import annotations

import json
from collections.abc import Iterable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

PAD, USER, ASSISTANT, END = "<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"

# A user's turn has no end of its own: in a small model every token of the prompt costs time.
CHAT_TEMPLATE = """{%- for message in messages -%}
    {%- if message['role'] == 'user' -%}
        {{- '<|user|>' + message['content'] -}}
    {%- elif message['role'] == 'assistant' -%}
        {{- '<|assistant|>' + message['content'] + '<|end|>' -}}
    {%- else -%}
        {{- raise_exception('expected the roles user and assistant, got ' + message['role']) -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|assistant|>' -}}
{%- endif -%}
"""


def make_char_tokenizer(alphabet: Iterable[str]) -> dict[str, bytes]:
    """Tokenizer files, name to bytes, for a vocabulary of four special tokens and the characters of `alphabet`.

    `<|pad|>` is 0, `<|user|>` 1, `<|assistant|>` 2, `<|end|>` 3 (the end of sequence); characters follow in the order
    given, repeats dropped. There is no unknown token: text outside the alphabet is refused, never blurred.
    """
    specials = [PAD, USER, ASSISTANT, END]
    characters = list(dict.fromkeys(alphabet))
    wide = [char for char in characters if len(char) != 1]
    if wide:
        raise ValueError(f"alphabet: expected single characters, got {wide[0]!r}")
    vocabulary = {token: index for index, token in enumerate([*specials, *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|none|>"))  # not in the vocabulary: encoding refuses
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": PAD,
        "eos_token": END,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    generation = {"eos_token_id": vocabulary[END], "pad_token_id": vocabulary[PAD]}
    return {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": json.dumps(config, indent=2).encode(),
        "generation_config.json": json.dumps(generation, indent=2).encode(),
    }
