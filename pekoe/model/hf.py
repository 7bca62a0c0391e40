"""Hugging Face checkpoint directories, in and out: config.json, *.safetensors, tokenizer files.

A model directory is not trusted. Nothing in it is unpickled, an index may name only files beside itself, and every
tensor is checked by name and shape, from the file headers, before memory is taken for any.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pekoe.core.errors import UserError, hub_hint, nearest
from pekoe.core.io import TOKENIZER_FILES, fsync
from pekoe.core.spec import Family, FamilySpec, ModelSpec
from pekoe.model.decoder import Decoder
from pekoe.model.families import FamilyModel
from pekoe.model.family_files import check_packing, family_on_meta, file_state, load_family, read_family_spec
from pekoe.model.hf_config import hf_config_to_spec, spec_to_hf_config
from pekoe.model.lora import LoRA, add_lora, fold, is_factor
from pekoe.model.peft import (
    ADAPTER_CONFIG,
    check_base,
    digest_of,
    is_adapter,
    read_lora,
    read_weights,
    write_adapter,
)
from pekoe.model.protocol import Implementation, LanguageModel

_CONFIG, _WEIGHTS, _INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_EMBED, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_FLOAT_TYPES = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class _Stored:
    """A tensor's file, and its entry in the file's header."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str

    def read(self) -> Tensor:
        with _open(self.file) as handle:
            return handle.get_tensor(self.name)


def load_model(
    path: str | os.PathLike[str],
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    implementation: Implementation | Literal["auto"] = "auto",
) -> LanguageModel:
    """Load the checkpoint directory `path`, one tensor at a time, converting to `dtype` on `device`.

    Of a directory of PEFT's with an adapter (plain LoRA), the base that it names is loaded, and the adapter added.
    Raises UserError for whatever is missing, malformed, mismatched or not supported.

    Args:
        implementation: our decoder, or transformers' own modules; auto: ours for the families that it has.
    """
    directory = Path(path)
    if is_adapter(directory):
        model = load_model(read_lora(directory).base, dtype, device, implementation)
        add_adapter(model, directory)
        fold(model)
        return model
    spec, config = read_spec(directory, implementation)
    stored = _headers(_weight_files(directory))
    if isinstance(spec, FamilySpec):
        other = load_family(directory, config, {name: tensor.shape for name, tensor in stored.items()}, dtype, device)
        other.assets = _read_assets(directory)
        return other
    last_layer = f"model.layers.{spec.num_layers - 1}.input_layernorm.weight"
    if last_layer not in stored:  # before a config's absurd depth costs memory
        raise UserError(f"{directory}: lacks tensor {last_layer} (num_hidden_layers = {spec.num_layers})")

    with torch.device("meta"):
        model = Decoder(spec).to(dtype)
    if spec.tied_embeddings:
        _settle_tied_head(stored, directory)
    _check_tensors(model, stored, directory)
    model.to_empty(device=device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(stored[name].read())
    model.hf_config = config
    model.assets = _read_assets(directory)
    return model


def _read_assets(directory: Path) -> dict[str, bytes]:
    return {name: (directory / name).read_bytes() for name in TOKENIZER_FILES if (directory / name).is_file()}


def base_of(path: str | os.PathLike[str]) -> tuple[str, str]:
    """A model directory's absolute path, and the digest of its weights: what an adapter on it is worth nothing without.

    UserError for a directory with an adapter.
    """
    directory = Path(os.path.abspath(path))
    if is_adapter(directory):
        raise UserError(
            f"{path}: expected a whole model as the base of an adapter, got an adapter; make one of it first: "
            f"pekoe merge {path} NEW_DIRECTORY"
        )
    return str(directory), digest_of(_weight_files(directory))


def add_adapter(model: LanguageModel, directory: Path) -> None:
    """Give `model`, the base that is named there, the adapter of a directory of PEFT's. UserError for another base."""
    lora, (weights, recorded) = read_lora(directory), read_weights(directory)
    if recorded:
        check_base(directory, lora.base, recorded, digest_of(_weight_files(Path(lora.base))))
    layers = tuple(dict.fromkeys(name.rpartition(".lora_")[0] for name in weights))
    try:
        add_lora(model, LoRA(lora.rank, lora.alpha, layers), 0)
    except UserError as error:
        raise UserError(f"{directory}: its tensors do not fit its base, {lora.base}: {error}") from None
    factors = {name: p for name, p in model.named_parameters() if p.requires_grad}
    wrong = [
        n for n in {*factors, *weights} if n not in weights or n not in factors or weights[n].shape != factors[n].shape
    ]
    if wrong:
        raise UserError(f"{directory}: its tensors do not fit its base, {lora.base}, and rank {lora.rank}: {wrong[0]}")
    with torch.no_grad():
        for name, parameter in factors.items():
            parameter.copy_(weights[name])


def merge_adapter(adapter: Path, target: Path, float32: bool = False) -> torch.dtype:
    """Write the sum of an adapter and its base as a model directory. It is computed in float32, and rounded to the
    dtype that the base's config.json names unless `float32`. Returns the dtype."""
    if not is_adapter(adapter):
        whole = " a whole model, which needs no merge" if (adapter / "config.json").is_file() else " none"
        raise UserError(f"{adapter}: expected a directory with {ADAPTER_CONFIG} and no config.json, got{whole}")
    model = load_model(adapter)
    named = model.hf_config.get("dtype") or model.hf_config.get("torch_dtype")
    half = {"bfloat16": torch.bfloat16, "float16": torch.float16}
    dtype = torch.float32 if float32 else half.get(str(named), torch.float32)
    save_model(model, target, dtype=dtype)
    return dtype


def with_adapter(model: LanguageModel, directory: Path) -> LanguageModel:
    """The same base, on the same memory, with the factors of a directory of PEFT's in place of the model's own."""
    weights, _ = read_weights(directory)
    frozen = {id(p): p for name, p in model.named_parameters() if not is_factor(name)}
    twin = copy.deepcopy(model, dict(frozen))
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if id(parameter) not in frozen:
                parameter.copy_(weights[name])
    return twin


def check_model(model: LanguageModel) -> None:
    """UserError for a family of transformers whose packed documents are not what each is alone."""
    if isinstance(model, FamilyModel):
        check_packing(model)


def save_adapter(
    model: LanguageModel, path: str | os.PathLike[str], weights: Mapping[str, Tensor] | None = None
) -> None:
    """Write the adapter of `model` as a directory of PEFT's with the tokenizer's files, whole or not at all, as
    `save_model`. `weights`: A and B of each layer in place of the model's own."""
    lora = model.lora
    assert lora is not None, "the model has no adapter"
    factors = weights or {name: p for name, p in model.named_parameters() if p.requires_grad}

    def write(directory: Path) -> None:
        _write_assets(model, directory)
        write_adapter(directory, lora, factors)

    _replace_directory(Path(os.path.abspath(path)), write)


def read_spec(
    directory: Path, implementation: Implementation | Literal["auto"] = "auto"
) -> tuple[ModelSpec, dict[str, Any]]:
    """The shape of a checkpoint directory's model, and its config.json. Raises UserError as `load_model`."""
    if not directory.is_dir():
        parent = directory.parent
        siblings = [p.name for p in parent.iterdir() if (p / _CONFIG).is_file()] if parent.is_dir() else []
        got = "a file" if directory.exists() else "nothing there"
        hint = nearest(directory.name, siblings) + hub_hint(str(directory))
        raise UserError(f"{directory}: expected a model directory, got {got}.{hint}")
    if is_adapter(directory):
        return read_spec(Path(read_lora(directory).base), implementation)
    config = _read_json(directory / _CONFIG)
    ours = config.get("model_type") in (None, *get_args(Family)) or implementation == "pekoe"
    if implementation == "transformers" or not ours:
        return read_family_spec(config, str(directory / _CONFIG)), config
    return hf_config_to_spec(config, str(directory / _CONFIG)), config


def model_on_meta(directory: Path, spec: ModelSpec) -> LanguageModel:
    """A checkpoint directory's model of this shape without values: the names of its parameters, and their shapes."""
    if not isinstance(spec, FamilySpec):
        with torch.device("meta"):
            return Decoder(spec)
    base = Path(read_lora(directory).base) if is_adapter(directory) else directory
    return family_on_meta(_read_json(base / _CONFIG), str(base / _CONFIG))


def file_weights(model: LanguageModel, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Whole parameters by their names in memory -> what of a model is in files, by its names there."""
    return file_state(model, weights) if isinstance(model, FamilyModel) else weights


def save_model(
    model: LanguageModel,
    path: str | os.PathLike[str],
    max_shard_bytes: int = 5_000_000_000,
    dtype: torch.dtype | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Write `model` as a Hugging Face checkpoint directory, in `dtype` (by default its own), whole or not at all.

    Everything is synced under a temporary name, then renamed. A model directory that is there is replaced; a crash
    between the two renames leaves it as `.<name>.old`. Raises UserError if `path` holds anything else.

    Args:
        weights: written in place of the model's own (a copy, or the whole of sharded ones).
    """
    dtype = dtype or next(model.parameters()).dtype
    state = file_state(model, weights) if isinstance(model, FamilyModel) else weights or model.state_dict()
    _replace_directory(
        Path(os.path.abspath(path)), lambda partial: _write_directory(model, state, partial, max_shard_bytes, dtype)
    )


def _replace_directory(target: Path, write: Callable[[Path], None]) -> None:
    """Call `write` with a directory of a temporary name, sync it, and rename it to `target`."""
    _check_replaceable(target)
    partial, old = (target.with_name(f".{target.name}.{suffix}") for suffix in ("partial", "old"))
    shutil.rmtree(partial, ignore_errors=True)  # of a save that was killed
    try:
        partial.mkdir(parents=True)
        write(partial)
        for file in (*partial.iterdir(), partial):
            fsync(file)
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)  # not sooner: it may be the only whole copy
            target.rename(old)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    fsync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


# Reading


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        inside = path.parent / "model"  # of a run directory
        hint = f". Did you mean {str(inside)!r}?" if inside.is_dir() else ""
        raise UserError(f"{path}: missing; a model directory holds config.json and *.safetensors{hint}")
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: expected JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def _weight_files(directory: Path) -> list[Path]:
    if (directory / _WEIGHTS).is_file():
        return [directory / _WEIGHTS]
    if not (directory / _INDEX).is_file():
        if pickled := sorted(p.name for p in directory.iterdir() if p.suffix in (".bin", ".pt", ".pth")):
            raise UserError(
                f"{directory}: expected {_WEIGHTS}, got {pickled[0]}. Pickled weights can run code and are never "
                "loaded: convert them to safetensors where you trust them (transformers: save_pretrained)"
            )
        raise UserError(f"{directory}: expected {_WEIGHTS} or {_INDEX}, got neither")
    weight_map = _read_json(directory / _INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(
            f"{directory / _INDEX}: weight_map: expected tensor names to file names, got {weight_map!r:.80}"
        )
    names = {str(name) for name in weight_map.values()}
    for name in sorted(names):
        # A bare name, so that no index reaches out of its directory. (Links are fine: the hub's cache is made of them.)
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise UserError(f"{directory / _INDEX}: expected the name of a .safetensors file beside it, got {name!r}")
        if not (directory / name).is_file():
            raise UserError(f"{directory / _INDEX}: names {name}, which is missing (an unfinished download?)")
    return [directory / name for name in sorted(names)]


@contextmanager
def _open(file: Path) -> Generator[Any]:
    try:
        with safe_open(file, framework="pt", device="cpu") as handle:
            yield handle
    except SafetensorError as error:
        raise UserError(f"{file}: not a readable safetensors file: {error!s:.300}") from None


def _headers(files: list[Path]) -> dict[str, _Stored]:
    stored: dict[str, _Stored] = {}
    for file in files:
        with _open(file) as handle:
            for name in handle.keys():  # noqa: SIM118 (a handle is no mapping)
                if name in stored:
                    raise UserError(f"{file}: tensor {name} is also in {stored[name].file.name}")
                if not name.endswith(".rotary_emb.inv_freq"):  # old Llama checkpoints store it; it follows from config
                    header = handle.get_slice(name)
                    stored[name] = _Stored(file, name, tuple(header.get_shape()), header.get_dtype())
    return stored


def _settle_tied_head(stored: dict[str, _Stored], directory: Path) -> None:
    """Reduce a tied pair to the embeddings, whichever of the two names (or both) the checkpoint stores it under."""
    head = stored.pop(_HEAD, None)
    if head is None:
        return
    if _EMBED not in stored:
        stored[_EMBED] = head
    elif not torch.equal(head.read(), stored[_EMBED].read()):
        raise UserError(
            f"{directory}: tie_word_embeddings is true, but {_HEAD} and {_EMBED} differ. "
            "Set it to false in config.json if the head is meant to be its own"
        )


def _check_tensors(model: Decoder, stored: Mapping[str, _Stored], directory: Path) -> None:
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    problems = [f"{name}: expected {list(expected[name])}, got nothing" for name in expected if name not in stored]
    problems += [f"{name}: unexpected, {list(stored[name].shape)}" for name in stored if name not in expected]
    for name in expected.keys() & stored.keys():
        if stored[name].shape != expected[name]:
            problems.append(f"{name}: expected {list(expected[name])}, got {list(stored[name].shape)}")
        elif stored[name].dtype not in _FLOAT_TYPES:
            problems.append(f"{name}: expected one of {', '.join(_FLOAT_TYPES)}, got {stored[name].dtype}")
    if problems:
        shown = "\n  ".join(sorted(problems)[:8])
        more = f"\n  and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise UserError(f"{directory}: its tensors do not fit its config.json:\n  {shown}{more}")


# Writing


def _check_replaceable(target: Path) -> None:
    expected = "expected a new name or a model directory to replace"
    ours = (_CONFIG, _INDEX, ADAPTER_CONFIG, *TOKENIZER_FILES)
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise UserError(f"{target}: {expected}, got a file or link")
    paths = sorted(target.iterdir()) if target.exists() else []
    foreign = [p for p in paths if not p.is_file() or (p.name not in ours and p.suffix != ".safetensors")]
    if foreign or (paths and not {target / _CONFIG, target / ADAPTER_CONFIG} & {*paths}):
        raise UserError(
            f"{target}: {expected}, got a directory with {', '.join(p.name for p in (foreign or paths)[:4])}"
        )


def _write_directory(
    model: LanguageModel, state: Mapping[str, Tensor], directory: Path, max_shard_bytes: int, dtype: torch.dtype
) -> None:
    dtype_name = str(dtype).removeprefix("torch.")
    own = {} if isinstance(model, FamilyModel) else spec_to_hf_config(model.spec)
    config = {**model.hf_config, **own, "dtype": dtype_name, "torch_dtype": dtype_name}
    (directory / _CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    _write_assets(model, directory)
    shards = _shards(state, max_shard_bytes)
    weight_map: dict[str, str] = {}
    for i, names in enumerate(shards, start=1):
        file = _WEIGHTS if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: state[name].detach().to("cpu", dtype).contiguous() for name in names}
        try:
            save_file(tensors, directory / file, metadata={"format": "pt"})
        except SafetensorError as error:  # such as a full disk
            raise OSError(f"{directory / file}: {error}") from None
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        total = sum(tensor.numel() * dtype.itemsize for tensor in state.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / _INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _write_assets(model: LanguageModel, directory: Path) -> None:
    for name, content in model.assets.items():
        (directory / name).write_bytes(content)


def _shards(state: Mapping[str, Tensor], max_bytes: int) -> list[list[str]]:
    """Names in order, cut wherever the next tensor would pass `max_bytes` (a larger tensor lies alone)."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in state.items():
        if shards[-1] and size + tensor.nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    return shards
