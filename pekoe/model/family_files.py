"""Checkpoints of families that `transformers` computes: config.json and weights, by transformers' own conversions.

The directory is not trusted, as in `hf.py`: no code of it runs (`auto_map`), nothing is unpickled, and every parameter
of the model must be in the files, and nothing beside them.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from pekoe.core.errors import UserError, nearest
from pekoe.core.spec import FamilySpec
from pekoe.model import families
from pekoe.model.attention import PackedAttention
from pekoe.model.families import NAME, FamilyModel, Site
from pekoe.model.protocol import LanguageModel

_MOST_LAYERS = 1_000
_TOLERANCE, _TOLERANCE_HALF = 1e-3, 0.5  # of log-probs, between documents packed and alone
_ATTENDING = ("full_attention", "sliding_attention")
_CHECKED = (9, 5, 14)  # tokens of the documents that are compared


@dataclass(frozen=True, slots=True)
class _Described:
    """What a config.json describes."""

    spec: FamilySpec
    sites: dict[str, Site]  # where it attends
    settings: Any  # transformers' config
    causal: Any  # transformers' model, on the meta device


def _describe(config: Mapping[str, Any], where: str) -> _Described:
    family = _family(config, where)
    with _quiet():
        settings, made = _settings(config, family, where), _class_of(config, family, where)
        try:
            with torch.device("meta"):
                causal = made._from_config(settings, attn_implementation=NAME, experts_implementation=NAME)
            families.refuse_recurrent(causal, family)
        except UserError:
            raise
        except Exception as error:  # whatever the family's own code says of its config
            raise UserError(f"{where}: no {family} can be made of it: {error!s:.300}") from None
        shapes, sites, mixtures = families.probe(causal, family)
    return _Described(_spec(causal, family, shapes, mixtures), sites, settings, causal)


def read_family_spec(config: Mapping[str, Any], where: str) -> FamilySpec:
    """The shape of the model that a config.json describes."""
    return _describe(config, where).spec


def load_family(
    directory: Path,
    config: dict[str, Any],
    stored: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    device: str | torch.device,
) -> FamilyModel:
    """The model of a checkpoint directory whose files are all safetensors, with tensors of the shapes `stored`."""
    described = _describe(config, str(directory / "config.json"))
    problems, causal = list[str](), None
    with _quiet():
        try:
            causal, found = type(described.causal).from_pretrained(
                str(directory),
                config=described.settings,
                dtype=dtype,
                attn_implementation=NAME,
                experts_implementation=NAME,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
            )
        except Exception as error:
            problems = _unfit(described.causal, stored) or [f"{error!s:.600}"]
        else:
            wrong = [*found["missing_keys"], *found["unexpected_keys"], *map(str, found["mismatched_keys"])]
            problems = wrong and (_unfit(described.causal, stored) or wrong)
    if problems:
        more = f"\n  and {len(problems) - 8} more" if len(problems) > 8 else ""
        shown = "\n  ".join(sorted(problems)[:8])
        raise UserError(f"{directory}: its tensors do not fit its config.json:\n  {shown}{more}")
    assert causal is not None
    model = FamilyModel(causal.to(device), described.spec, described.sites)
    model.hf_config = config
    return model.requires_grad_(True)


def _unfit(causal: Any, stored: Mapping[str, tuple[int, ...]]) -> list[str]:
    """What the files of a model have less, more or otherwise than transformers would write."""
    from transformers.core_model_loading import revert_weight_conversion

    tied = set(causal.all_tied_weights_keys)
    state = {name: tensor for name, tensor in causal.state_dict().items() if name not in tied}
    expected = {name: tuple(tensor.shape) for name, tensor in revert_weight_conversion(causal, state).items()}
    problems = [
        f"{name}: expected {list(shape)}, got nothing" for name, shape in expected.items() if name not in stored
    ]
    problems += [
        f"{name}: unexpected, {list(shape)}" for name, shape in stored.items() if name not in {*expected, *tied}
    ]
    return problems + [
        f"{name}: expected {list(shape)}, got {list(stored[name])}"
        for name, shape in expected.items()
        if stored.get(name, shape) != shape
    ]


def file_state(model: FamilyModel, weights: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """What is written to a checkpoint: parameters (all of `weights` in place of the model's own) and fixed tensors, by
    their names in files, tied ones once."""
    return model.file_tensors(_whole_state(model, weights))


def _whole_state(model: FamilyModel, weights: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    own, tied = dict(model.named_parameters()), _aliases(model)
    fixed = {name: t for name, t in model.state_dict().items() if name not in tied and name not in own}
    kept = {name: t for name, t in (weights or own).items() if name not in tied}  # a state dict names those twice
    return {**kept, **fixed}


@torch.no_grad()
def file_stream(model: LanguageModel) -> Iterator[tuple[str, Tensor]]:
    """Tensors by their names in files, one by one. A family's are gathered and converted a layer at a time: all
    processes that share a sharded model go through it together. On the meta device: names and shapes."""
    if not isinstance(model, FamilyModel):
        yield from model.named_parameters()
        return
    groups: dict[str, dict[str, Tensor]] = {}
    blocks = f"{model.blocks_name}."
    for name, tensor in _whole_state(model).items():
        number = name.removeprefix(blocks).partition(".")[0] if name.startswith(blocks) else name
        groups.setdefault(number, {})[name] = tensor
    for group in groups.values():
        whole = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in group.items()}
        yield from sorted(model.file_tensors(whole).items())  # the same order, whatever a model was read from


def family_on_meta(config: dict[str, Any], where: str) -> FamilyModel:
    """The model that a config.json describes, without values."""
    described = _describe(config, where)
    return FamilyModel(described.causal, described.spec, described.sites)


def _aliases(model: nn.Module) -> set[str]:
    """Second names of parameters that are tied."""
    once = {name for name, _ in model.named_parameters()}
    return {name for name, _ in model.named_parameters(remove_duplicate=False)} - once


@torch.no_grad()
def check_packing(model: FamilyModel) -> float:
    """Compare short documents packed with themselves one by one, by the family's own attention. Returns the largest
    difference of their log-probs; UserError where it is more than rounding is."""
    family, parameter = model.spec.family, next(model.parameters())
    generator, device = torch.Generator().manual_seed(0), parameter.device
    lengths = [min(length, model.spec.max_positions) for length in _CHECKED]
    documents = [torch.randint(model.spec.vocab_size, (n,), generator=generator).to(device) for n in lengths]
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    places = torch.cat([torch.arange(n, device=device) for n in lengths])
    packed = model.logits(model(torch.cat(documents), places, PackedAttention(bounds)))
    with model.own_attention():
        alone = torch.cat(
            [
                model.logits(model(d, torch.arange(len(d), device=device), PackedAttention([0, len(d)])))
                for d in documents
            ]
        )
    difference = float((packed.float().log_softmax(-1) - alone.float().log_softmax(-1)).abs().max())
    limit = _TOLERANCE if parameter.dtype in (torch.float32, torch.float64) else _TOLERANCE_HALF
    if not difference <= limit:
        raise UserError(
            f"{family}: expected the log-probs of three packed documents to equal those of each alone within {limit}, "
            f"got a difference of {difference:.2g}: this family cannot be trained on packed rows here"
        )
    return difference


# config.json


def _family(config: Mapping[str, Any], where: str) -> str:
    """`model_type`, where transformers has it and may compute it."""
    try:
        from transformers import CONFIG_MAPPING
    except ImportError:
        raise UserError(
            f"{where}: model_type: {config.get('model_type')!r:.200} is computed by transformers, which is not "
            "installed: pip install 'pekoe[models]'"
        ) from None
    family = config.get("model_type")
    if not isinstance(family, str) or not family:
        raise UserError(
            f"{where}: lacks 'model_type'" if family is None else f"{where}: model_type: got {family!r:.200}"
        )
    if family not in CONFIG_MAPPING:
        code = config.get("auto_map")
        hint = " Its own code (auto_map) is never run." if code else nearest(family[:200], CONFIG_MAPPING.keys())
        raise UserError(f"{where}: model_type: {family!r:.200} is not a family of this transformers.{hint}")
    if config.get("quantization_config"):
        raise UserError(f"{where}: quantization_config: expected unquantized weights; use the original checkpoint")
    return family


def _settings(config: Mapping[str, Any], family: str, where: str) -> Any:
    from transformers import CONFIG_MAPPING

    try:
        settings = CONFIG_MAPPING[family].from_dict({k: _plain(v) for k, v in config.items() if k != "auto_map"})
    except Exception as error:
        raise UserError(f"{where}: not a config of {family}: {error!s:.300}") from None
    text = settings.get_text_config()
    layers = getattr(text, "num_hidden_layers", None)
    if type(layers) is not int or not 1 <= layers <= _MOST_LAYERS:
        raise UserError(f"{where}: num_hidden_layers: expected 1 to {_MOST_LAYERS}, got {layers!r:.80}")
    others = [kind for kind in getattr(text, "layer_types", None) or [] if kind not in _ATTENDING]
    if others:
        raise UserError(
            f"{where}: layer_types: {others[0]!r:.80} is not supported ({family}): its layers would carry a state, or "
            f"a summary, from one packed document into the next; supported: {', '.join(_ATTENDING)}"
        )
    return settings


def _plain(value: Any) -> Any:
    """A value of JSON, with transformers' way to write infinity read."""
    if isinstance(value, dict):
        return float(value["__float__"]) if [*value] == ["__float__"] else {k: _plain(v) for k, v in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list) else value


def _class_of(config: Mapping[str, Any], family: str, where: str) -> Any:
    from transformers import CONFIG_MAPPING
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING as CAUSAL

    if CONFIG_MAPPING[family] not in CAUSAL:
        raise UserError(f"{where}: expected a causal language model, got {family}, of which transformers has none")
    made: Any = CAUSAL[CONFIG_MAPPING[family]]
    named = config.get("architectures")
    if isinstance(named, list) and named and made.__name__ not in named:
        raise UserError(
            f"{where}: architectures: expected {made.__name__}, a causal language model, got {named!r:.200}"
        )
    return made


def _spec(causal: Any, family: str, shapes: tuple[Any, ...], mixtures: families.Mixtures) -> FamilySpec:
    text = causal.config.get_text_config()
    sizes = {name: p.numel() for name, p in causal.named_parameters()}
    total = sum(sizes.values())
    routed = sum(size for name, size in sizes.items() if ".experts." in name)
    number, chosen = mixtures.num_experts, mixtures.experts_per_token
    active = total - routed + (routed * chosen // number if number else 0)
    tied = causal.get_output_embeddings().weight is causal.get_input_embeddings().weight
    heads = shapes[0].num_heads
    return FamilySpec(
        family=family,
        vocab_size=causal.get_input_embeddings().weight.shape[0],
        hidden_size=text.hidden_size,
        num_layers=text.num_hidden_layers,
        num_heads=heads,
        num_kv_heads=shapes[0].num_kv_heads,
        head_dim=shapes[0].key_dim,
        intermediate_size=_integer(text, ("intermediate_size", "ffn_dim", "n_inner"), 4 * text.hidden_size),
        max_positions=_max_positions(text),
        tied_embeddings=tied,
        total=total,
        active=active,
        num_experts=number,
        experts_per_token=chosen,
        mixtures=mixtures.names,
        routers=mixtures.routers,
        shapes=shapes,
        linears=tuple(
            (name, module.in_features + module.out_features)
            for name, module in causal.named_modules()
            if type(module) is nn.Linear and name.rpartition(".")[2] != "lm_head"
        ),
        plan=tuple(sorted((getattr(text, "base_model_tp_plan", None) or {}).items())),
    )


def _integer(config: Any, names: Iterable[str], default: int) -> int:
    return next((v for v in (getattr(config, name, None) for name in names) if type(v) is int), default)


def _max_positions(config: Any) -> int:
    """The context. A longrope model is used up to its original context: beyond, all of a row's angles depend on its
    longest document."""
    most = _integer(config, ("max_position_embeddings", "n_positions", "max_sequence_length"), 2**20)
    rope = getattr(config, "rope_parameters", None) or {}
    if isinstance(rope, Mapping) and rope.get("rope_type") == "longrope":
        original = rope.get("original_max_position_embeddings") or getattr(
            config, "original_max_position_embeddings", None
        )
        most = min(most, original or most)
    return most


@contextmanager
def _quiet() -> Generator[None]:
    """Without transformers' warnings and progress bars: what is wrong is raised."""
    from transformers.utils import logging as library

    level, bars = library.get_verbosity(), library.is_progress_bar_enabled()
    library.set_verbosity(logging.CRITICAL)
    library.disable_progress_bar()
    families.register()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        library.set_verbosity(level)
        if bars:
            library.enable_progress_bar()
