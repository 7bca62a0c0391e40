"""Model directories as nobody should publish them: each is read, or refused with one clear message.

A program: `python -m tests.fuzz_models --seconds 300 --seed 1`; its short form is a test. The files of a small model
are changed at random: values, keys, bytes, sizes, names. A library's panic prints lines of its own on stderr.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

from pekoe.core.spec import ModelSpec
from pekoe.data import chat
from pekoe.data.tokenizer import Tokenizer
from pekoe.demo.char_tokenizer import make_char_tokenizer
from pekoe.model import Decoder, load_model, save_model

from .fuzzing import Cases, changed, main

SPEC = ModelSpec("qwen2", 32, 32, 2, 4, 2, 8, 48, 128, qkv_bias=True, tied_embeddings=True)
QUESTION = ({"role": "user", "content": "7+25="},)
TEMPLATES = (
    "{{ 1 // 0 }}",
    "{{ messages[9].content }}",
    "{% for m in messages %}",
    "{{ 'x' * 10**10 }}",
    "{{ 10 ** (10**9) }}",
    "{{ messages }}" * 3000,
    "{{" + "(" * 3000 + ")" * 3000 + "}}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% set n = namespace(x='ab') %}{% for i in range(50) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ ''.__class__.__mro__ }}",
    "{{ no_such_thing() }}",
    "{{ 'a' | no_such_filter }}",
    "".join("{% for a in [1] %}" for _ in range(30)) + "{% endfor %}" * 30,
    "{{ '\ud800' }}",
)


def _json(text: bytes, random: random.Random) -> bytes:
    data = json.dumps(changed(json.loads(text), random)).encode()
    return data.replace(b"NaN", b"nan", random.randrange(2))


def _bytes(data: bytes, random: random.Random) -> bytes:
    at = random.randrange(len(data) + 1)
    return random.choice(
        [
            lambda: data[:at],
            lambda: data[:at] + random.randbytes(random.randrange(1, 9)) + data[at + 1 :],
            lambda: b"\xef\xbb\xbf" + data,
            lambda: b"[" * 200_000,
            lambda: b'{"a":' * 100_000,
            lambda: random.choice([b"", b"null", b"[]", b"5", b'"x"', b"{}", b"\xff\xfe", b"\0" * 64]),
        ]
    )()


def _header(data: bytes, random: random.Random) -> bytes:
    """Weights with another header."""
    size = int.from_bytes(data[:8], "little")
    header = _json(data[8 : 8 + size], random)
    length = len(header) if random.random() < 0.8 else random.choice([0, 1, 2**31, 2**63, 2**64 - 1])
    return length.to_bytes(8, "little") + header + data[8 + size :]


def _template(_: bytes, random: random.Random) -> bytes:
    return random.choice(TEMPLATES).encode(errors="surrogatepass")


CHANGES: dict[str, tuple[Callable[[bytes, random.Random], bytes], ...]] = {
    "config.json": (_json, _json, _bytes),
    "generation_config.json": (_json, _json, _bytes),
    "tokenizer_config.json": (_json, _json, _bytes),
    "special_tokens_map.json": (_json, _bytes),
    "tokenizer.json": (_json, _json, _json, _bytes),
    "chat_template.jinja": (_template, _template, _bytes),
    "model.safetensors": (_header, _header, _bytes),
}


def make_directory(folder: Path) -> None:
    """A model directory in order."""
    files = make_char_tokenizer("0123456789+=\\{}boxed")
    model = Decoder(SPEC)
    model.init_weights(0)
    model.assets = dict(files)
    save_model(model, folder)
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    more = {
        "generation_config.json": {"eos_token_id": [1, 2], "temperature": 0.6},
        "special_tokens_map.json": {"bos_token": {"content": "0", "lstrip": False}, "eos_token": "1"},
        "tokenizer_config.json": {"chat_template": template, "add_bos_token": True, "model_max_length": 10**30},
    }
    for name, value in more.items():
        if not (folder / name).is_file():
            (folder / name).write_text(json.dumps(value))
    if not (folder / "chat_template.jinja").is_file():
        (folder / "chat_template.jinja").write_text(template)


def _use(folder: Path) -> None:
    tokenizer = Tokenizer.load(folder)
    tokenizer.encode_prompt(QUESTION)
    tokenizer.encode_prompt(({"role": "raw", "content": "7+25="},))
    tokenizer.decode([0, 1, 2], skip_special_tokens=True)


def fuzz(seconds: float, seed: int) -> Cases:
    """Cases for so long, from `seed` on."""
    cases = Cases()
    with tempfile.TemporaryDirectory() as place, mock.patch.object(chat, "CPU_LIMIT_S", 0.3):
        good, folder = Path(place) / "good", Path(place) / "changed"
        make_directory(good)
        cases.in_order("a directory in order", lambda: (_use(good), load_model(good)))
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            seed += 1
            draw = random.Random(seed)
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(good, folder)
            name = draw.choice(list(CHANGES))
            file = folder / name
            how = draw.choice(CHANGES[name])
            if draw.random() < 0.97:
                file.write_bytes(how(file.read_bytes(), draw))
            else:
                file.unlink()
                if (instead := draw.randrange(3)) == 1:
                    file.mkdir()
                elif instead == 2:
                    file.symlink_to(name)
            cases.run(f"seed {seed}: {name} by {how.__name__[1:]}", lambda: (_use(folder), load_model(folder)))
    return cases


if __name__ == "__main__":
    sys.exit(main(__doc__, lambda seconds, seed, _: fuzz(seconds, seed).end()))
