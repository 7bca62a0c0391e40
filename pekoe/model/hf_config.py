"""config.json of a Hugging Face checkpoint, to a ModelSpec and back.

It reads `transformers` 4 (`rope_theta`, `rope_scaling`) and 5 (`rope_parameters`), and writes both, so that either
version, vLLM and SGLang load it. Whatever the decoder does not compute is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast, get_args

from pekoe.core.errors import UserError, nearest
from pekoe.core.spec import Family, ModelSpec, RopeKind, RopeSpec

_ARCHITECTURES: dict[str, str] = {
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "llama": "LlamaForCausalLM",
}
MAX_INTEGER = 2**31 - 1  # of a size; and positions are int32 in kernels
MAX_PARAMETERS = 10**14  # whose bytes are counted in int64
_QWEN3_HEAD_DIM = 128  # Qwen3's head_dim does not follow from its width; this is the family's default


@dataclass(frozen=True, slots=True)
class _Fields:
    """Reads typed values of a JSON object. null counts as absent, as in transformers."""

    values: Mapping[str, Any]
    where: str

    def integer(self, key: str, default: int | None = None) -> int:
        return self._checked(key, default, "a positive integer below 2^31", _is_size)

    def number(self, key: str, default: float | None = None) -> float:
        return float(self._checked(key, default, "a positive number below 1e30", _is_positive_number))

    def optional_number(self, key: str) -> float | None:
        return None if self.values.get(key) is None else self.number(key)

    def flag(self, key: str, default: bool = False) -> bool:
        return self._checked(key, default, "true or false", lambda v: type(v) is bool)

    def choice(self, key: str, valid: tuple[str, ...], default: str | None = None) -> str:
        value = self._get(key, default)
        if value not in valid:
            raise UserError(f"{self.where}: {key}: {value!r:.200} is not supported.{nearest(str(value)[:200], valid)}")
        return str(value)

    def wrong(self, key: str, expected: str) -> UserError:
        return UserError(f"{self.where}: {key}: expected {expected}, got {self.values.get(key)!r:.200}")

    def _get(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        value = default if value is None else value
        if value is None:
            raise UserError(f"{self.where}: lacks {key!r}")
        return value

    def _checked(self, key: str, default: Any, expected: str, valid: Callable[[Any], bool]) -> Any:
        value = self._get(key, default)
        if not valid(value):
            raise self.wrong(key, expected)
        return value


def _is_size(value: Any) -> bool:
    return type(value) is int and 1 <= value <= MAX_INTEGER


def _is_positive_number(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < 1e30


def hf_config_to_spec(config: Mapping[str, Any], where: str) -> ModelSpec:
    """Read the parsed config.json found at `where`.

    Raises UserError for a missing or ill-typed key, and for whatever the decoder does not compute.
    """
    fields = _Fields(config, where)
    family = cast(Family, fields.choice("model_type", get_args(Family)))
    _refuse_unsupported(fields)
    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    max_positions = fields.integer("max_position_embeddings")
    rope = _rope_spec(fields, max_positions)
    if rope.kind == "yarn" and rope.original_max_positions:  # Qwen2.5's own recipe leaves max_position_embeddings as is
        max_positions = max(max_positions, int(rope.original_max_positions * rope.factor))
    attention_bias = family != "qwen2" and fields.flag("attention_bias")
    try:
        spec = ModelSpec(
            family=family,
            vocab_size=fields.integer("vocab_size"),
            hidden_size=hidden,
            num_layers=fields.integer("num_hidden_layers"),
            num_heads=heads,
            # Absent in the first Llama configs. A wrong guess leads to a wrong tensor shape.
            num_kv_heads=fields.integer("num_key_value_heads", heads),
            head_dim=fields.integer("head_dim", _QWEN3_HEAD_DIM if family == "qwen3" else hidden // heads),
            intermediate_size=fields.integer("intermediate_size"),
            max_positions=max_positions,
            rope=rope,
            norm_eps=fields.number("rms_norm_eps", 1e-6),
            tied_embeddings=fields.flag("tie_word_embeddings"),
            qkv_bias=family == "qwen2" or attention_bias,
            out_bias=attention_bias,
            mlp_bias=family == "llama" and fields.flag("mlp_bias"),
            qk_norm=family == "qwen3",
        )
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None
    if spec.num_parameters > MAX_PARAMETERS or spec.max_positions > MAX_INTEGER:
        raise UserError(
            f"{where}: expected at most {MAX_PARAMETERS:.0e} parameters and {MAX_INTEGER} positions, "
            f"got {spec.num_parameters:.0e} and {spec.max_positions}"
        )
    return spec


def spec_to_hf_config(spec: ModelSpec) -> dict[str, Any]:
    """The config.json keys that follow from `spec`; token ids and dtypes are not among them.

    Raises UserError where the family's config cannot express the spec (a Qwen2 without QKV bias).
    """
    config: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[spec.family]],
        "model_type": spec.family,
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": spec.max_positions,
        "rms_norm_eps": spec.norm_eps,
        "tie_word_embeddings": spec.tied_embeddings,
    }
    config |= {"mlp_bias": spec.mlp_bias} if spec.family == "llama" else {"use_sliding_window": False}
    if spec.family != "qwen2":
        config["attention_bias"] = spec.out_bias
    scaling = _rope_scaling(spec.rope, spec.max_positions)
    config["rope_theta"] = spec.rope.theta
    config["rope_scaling"] = None if spec.rope.kind == "default" else scaling  # transformers 4
    config["rope_parameters"] = {"rope_theta": spec.rope.theta, **scaling}  # transformers 5

    read = hf_config_to_spec(config, "spec")
    for name in ("qkv_bias", "out_bias", "mlp_bias", "qk_norm"):
        if getattr(read, name) != getattr(spec, name):
            raise UserError(f"{name}: a {spec.family} config means {getattr(read, name)}, got {getattr(spec, name)}")
    return config


def _refuse_unsupported(fields: _Fields) -> None:
    config, where = fields.values, fields.where
    fields.choice("hidden_act", ("silu",), "silu")
    if config.get("quantization_config"):
        raise UserError(f"{where}: quantization_config: expected unquantized weights; use the original checkpoint")
    layer_types = config.get("layer_types")  # where present, it decides layer by layer; use_sliding_window does not
    windowed = fields.flag("use_sliding_window") and config.get("sliding_window") is not None
    if any(kind != "full_attention" for kind in layer_types) if isinstance(layer_types, list) else windowed:
        raise UserError(f"{where}: use_sliding_window: expected false (full attention in every layer)")
    for holder in (config, config.get("rope_parameters"), config.get("rope_scaling")):
        if isinstance(holder, Mapping) and holder.get("partial_rotary_factor") not in (None, 1, 1.0):
            got = holder["partial_rotary_factor"]
            raise UserError(f"{where}: partial_rotary_factor: expected 1 (the whole head is rotated), got {got!r:.200}")


def _rope_spec(fields: _Fields, max_positions: int) -> RopeSpec:
    """Read as transformers does: `rope_scaling` before `rope_parameters`, a theta inside either before `rope_theta`."""
    key = "rope_scaling" if fields.values.get("rope_scaling") else "rope_parameters"
    values = fields.values.get(key) or {}
    if not isinstance(values, Mapping):
        raise fields.wrong(key, "an object")
    rope = _Fields(values, f"{fields.where}: {key}")
    kind_key = "rope_type" if values.get("rope_type") is not None else "type"
    kind = cast(RopeKind, rope.choice(kind_key, get_args(RopeKind), "default"))
    theta = rope.number("rope_theta", fields.number("rope_theta", 10_000.0))
    if kind == "default":
        return RopeSpec(theta)
    if kind in ("dynamic", "linear"):
        return RopeSpec(theta, kind, rope.number("factor"))
    inner = rope.integer("original_max_position_embeddings", max_positions)
    original = fields.integer("original_max_position_embeddings", inner)  # at the top it wins
    if kind == "llama3":
        low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
        if high <= low:
            raise rope.wrong("high_freq_factor", f"more than low_freq_factor ({low:g})")
        return RopeSpec(theta, kind, rope.number("factor"), original, low_freq_factor=low, high_freq_factor=high)
    return RopeSpec(
        theta=theta,
        kind=kind,
        factor=rope.number("factor", max_positions / original),
        original_max_positions=original,
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
        attention_factor=rope.optional_number("attention_factor"),
        mscale=rope.optional_number("mscale"),
        mscale_all_dim=rope.optional_number("mscale_all_dim"),
        truncate=rope.flag("truncate", True),
    )


def _rope_scaling(rope: RopeSpec, max_positions: int) -> dict[str, Any]:
    """The content of both `rope_scaling` and `rope_parameters`. Fields that are None are left out."""
    scaling: dict[str, Any] = {"rope_type": rope.kind}
    if rope.kind != "default":
        scaling["factor"] = rope.factor
    if rope.kind in ("llama3", "yarn"):
        scaling["original_max_position_embeddings"] = rope.original_max_positions or max_positions
    if rope.kind == "llama3":
        scaling |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.kind == "yarn":
        names = ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate")
        scaling |= {name: getattr(rope, name) for name in names if getattr(rope, name) is not None}
    return scaling
