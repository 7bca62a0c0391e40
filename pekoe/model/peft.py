"""Adapters on disk, in PEFT's layout: adapter_config.json and adapter_model.safetensors.

Written against peft 0.21. A directory of ours loads in PEFT, vLLM and SGLang; one of PEFT's loads here where it is
plain LoRA. The metadata of the tensors' file has a digest of the base's weights: an adapter is of no use on another.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pekoe.core.errors import UserError
from pekoe.core.io import sha256
from pekoe.model.lora import LoRA

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX, _DIGEST = "base_model.model.", "base_sha256"
# Settings under which an adapter would act otherwise than `lora.py` computes, each with the values that are plain LoRA.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "use_rslora": (False, None),
    "use_dora": (False, None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "layer_replication": (None, []),
    "lora_bias": (False, None),
}


def is_adapter(directory: Path) -> bool:
    """Whether a model directory holds an adapter, and no weights of its own."""
    return (directory / ADAPTER_CONFIG).is_file() and not (directory / "config.json").is_file()


def digest_of(files: Sequence[Path]) -> str:
    """Of a base's weight files."""
    lines = [f"{sha256(file)}  {file.name}\n" for file in sorted(files)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def write_adapter(directory: Path, lora: LoRA, weights: Mapping[str, Tensor]) -> None:
    """Write both files. `weights`: A and B of each layer, by their names in the model."""
    alpha = int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": lora.base,
        "r": lora.rank,
        "lora_alpha": alpha,
        "target_modules": list(lora.targets),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
        "use_rslora": False,
        "use_dora": False,
    }
    (directory / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tensors = {_PREFIX + name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    try:
        save_file(tensors, directory / ADAPTER_WEIGHTS, metadata={"format": "pt", _DIGEST: lora.digest})
    except SafetensorError as error:  # such as a full disk
        raise OSError(f"{directory / ADAPTER_WEIGHTS}: {error}") from None


def read_lora(directory: Path) -> LoRA:
    """Rank, alpha and base of an adapter. UserError for what is no plain LoRA of a local base."""
    file = directory / ADAPTER_CONFIG
    try:
        config = json.loads(file.read_bytes())
        lora = LoRA(int(config["r"]), float(config["lora_alpha"]), (), str(config["base_model_name_or_path"]))
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{file}: expected PEFT's settings of an adapter: {type(error).__name__}: {error}") from None
    for name, plain in _PLAIN.items():
        if config.get(name, plain[0]) not in plain:
            raise UserError(f"{file}: {name}: expected {plain[0]!r}, as of plain LoRA, got {config[name]!r}")
    if lora.rank < 1:
        raise UserError(f"{file}: r: expected at least 1, got {lora.rank}")
    if not Path(lora.base).is_dir() or is_adapter(Path(lora.base)):
        got = "an adapter" if Path(lora.base).is_dir() else "none"
        raise UserError(
            f"{file}: base_model_name_or_path: expected the directory of the adapter's base, got {lora.base!r}, where "
            f"there is {got}; write its place there"
        )
    return lora


def read_weights(directory: Path) -> tuple[dict[str, Tensor], str]:
    """A and B of each layer, by their names in the model, and the digest of the base (empty: it is not there)."""
    file = directory / ADAPTER_WEIGHTS
    try:
        with safe_open(file, framework="pt", device="cpu") as handle:
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 (a handle is no mapping)
            digest = (handle.metadata() or {}).get(_DIGEST, "")
    except OSError as error:
        raise UserError(f"{file}: {error.strerror or error}") from None
    except SafetensorError as error:
        raise UserError(f"{file}: not a readable safetensors file: {error}") from None
    return {name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items()}, digest


def check_base(adapter: Path, base: str, recorded: str, found: str) -> None:
    """UserError where an adapter was trained on other weights than its base has now."""
    if recorded != found:
        raise UserError(
            f"{adapter}: expected the base that the adapter was trained on, sha256 {recorded[:12]}…, got others in "
            f"{base}, {found[:12]}…: its weights have changed; bring them back, or begin anew"
        )
