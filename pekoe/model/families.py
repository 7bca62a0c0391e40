"""Models of any family that `transformers` knows: its own modules, with our attention registered in its seam.

A family's attention layers compute queries, keys and values, and call a function by name (`AttentionInterface`); masks
are made by another (`AttentionMaskInterface`). Ours gives the forward's `Attention` object in place of a mask, and
calls it. So one packed row needs no padding, and an engine keeps keys and values itself.

What a family asks for beyond that (`Scores`) is passed on; whatever is not known here is refused. Layers that mix
tokens in another way (recurrences, convolutions) would mix documents: such families are refused too.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pekoe.core.errors import UserError
from pekoe.core.spec import FamilySpec, LayerShape
from pekoe.model.lora import LoRA
from pekoe.model.protocol import Attention, Head, Implementation, LanguageModel, Routing, Scores

NAME = "pekoe"  # of our functions, in the registries
_FAR = 1 << 19  # a query at this place shows how long a window is
_PROBED = 4  # tokens of the forward that shows what a family's layers ask for

# What families hand on to their attention function and no kernel uses.
_WITHOUT_MEANING = {
    "position_ids", "cache_position", "use_cache", "is_causal", "output_attentions", "output_hidden_states",
    "output_router_logits", "return_dict", "deterministic", "logits_to_keep",
}  # fmt: skip


@dataclass(slots=True)
class _Forward:
    """One forward: handed to every layer in place of a mask, so that a layer that is computed again has it too."""

    attention: Attention
    routing: Routing | None = None
    logits: Tensor | None = None  # of the router that was computed last
    calls: dict[int, int] = field(default_factory=dict)  # of layers that attend more than once: calls until now


@dataclass(frozen=True, slots=True)
class _Mask:
    """A mask of a family, read while its layers are probed."""

    window: int | None


@dataclass(frozen=True, slots=True)
class Site:
    """Which calls of a forward a module makes, and the window of them."""

    first: int
    num_calls: int
    window: int | None


@dataclass(slots=True)
class _Probe:
    """Collects what each call of attention asks for."""

    family: str
    shapes: list[LayerShape] = field(default_factory=list)
    modules: list[nn.Module] = field(default_factory=list)
    experts: tuple[int, int] = (0, 0)  # of a layer, and of a token
    mixtures: list[nn.Module] = field(default_factory=list)  # the experts of each layer that has some


_current: ContextVar[_Forward | _Probe] = ContextVar("pekoe_forward")


def register() -> None:
    """Put our functions into transformers' registries."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.moe import ExpertsInterface

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _mask)
    ExpertsInterface.register(NAME, _experts)


def _mask(*args: Any, mask_function: Callable[..., Tensor] | None = None, **others: Any) -> Any:
    current = _current.get()
    if isinstance(current, _Forward):
        return current
    if mask_function is None:
        raise UserError(f"{current.family}: its masks are not made by a function that transformers' version 5 has")
    return _Mask(_window_of(mask_function, current.family))


def _window_of(mask_function: Callable[..., Tensor], family: str) -> int | None:
    """The window of a causal mask; UserError where it is another mask."""
    with torch.device("cpu"):
        query, zero = torch.tensor(_FAR), torch.tensor(0)
        row = mask_function(zero, zero, query, torch.arange(_FAR + 2)).expand(_FAR + 2)
        size = int(row.sum())
        keys, near = torch.arange(_FAR + 2), torch.tensor(5)
        window = None if size > _FAR else size
        for at in (query, near, torch.tensor(_FAR // 2 + 3)):
            expected = keys <= at
            if window is not None:
                expected &= keys > at - window
            if not torch.equal(mask_function(zero, zero, at, keys).expand(_FAR + 2), expected):
                raise UserError(f"{family}: its mask is neither causal nor a sliding window: it is not supported")
    return window


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """query [1, H, T, D], key [1, K, T, D], value [1, K, T, E] -> [1, T, H, E], as transformers calls it."""
    current = attention_mask if isinstance(attention_mask, _Forward) else _current.get()
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    usual = scaling is None or math.isclose(scaling, q.shape[-1] ** -0.5, rel_tol=1e-6)
    scale = None if usual else scaling
    if isinstance(current, _Probe):
        _check(current.family, module, dropout, others)
        window = attention_mask.window if isinstance(attention_mask, _Mask) else sliding_window
        if sliding_window is not None and window != sliding_window:
            raise UserError(
                f"{current.family}: expected a mask of the layer's window, {sliding_window}, got one of {window}"
            )
        plain = window is None and scale is None and softcap is None and s_aux is None
        current.shapes.append(LayerShape(q.shape[1], k.shape[1], q.shape[2], v.shape[2], window, plain))
        current.modules.append(module)
        return v.new_zeros(1, len(q), q.shape[1], v.shape[2]), None
    site: Site = module.__dict__["pekoe_site"]
    layer, window = site.first, site.window
    if site.num_calls > 1:
        done = current.calls.get(site.first, 0)
        current.calls[site.first] = done + 1
        layer += done % site.num_calls
    scores = None
    if scale is not None or window is not None or softcap is not None or s_aux is not None or q.shape[2] != v.shape[2]:
        scores = Scores(scale, window, softcap, s_aux)
    return current.attention(layer, q, k, v, scores)[None], None


class _Cast:
    """A module's experts in the dtype of autocast, which grouped products do not follow by themselves."""

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        self._module, self._dtype = module, dtype

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        return value.to(self._dtype) if isinstance(value, nn.Parameter) else value


def _experts(module: Any, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """hidden [T, C], experts chosen [T, k] with their weights [T, k] -> [T, C], by transformers' grouped product."""
    from transformers.integrations.moe import grouped_mm_experts_forward

    current, device = _current.get(None), hidden.device.type
    if isinstance(current, _Probe):
        current.experts = (module.num_experts, chosen.shape[-1])
        current.mixtures.append(module)
        return torch.zeros_like(hidden)
    if torch.is_grad_enabled():
        load: Tensor = vars(module).setdefault("pekoe_load", hidden.new_zeros(module.num_experts, dtype=torch.float64))
        flat = chosen.detach().reshape(-1)
        load.index_add_(0, flat, torch.ones_like(flat, dtype=torch.float64))
    if torch.is_autocast_enabled(device):
        module = _Cast(module, torch.get_autocast_dtype(device))
    return grouped_mm_experts_forward(module, hidden, chosen, weights)


class _TopK(TorchFunctionMode):
    """Within a layer's mixture: the router's top k of its scores [T, E] are those that `routing` chooses."""

    def __init__(self, routing: Routing, layer: int, experts: tuple[int, int]) -> None:
        super().__init__()
        self._routing, self._layer, self._shape = routing, layer, experts
        self.experts: Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is not torch.topk and func is not Tensor.topk:
            return out
        scores, indices = args[0], out[1]
        if scores.ndim != 2 or (scores.shape[-1], indices.shape[-1]) != self._shape:  # of groups of experts
            return out
        experts = self.experts = self._routing.choose(self._layer, indices)
        return out if experts is indices else torch.return_types.topk((scores.gather(-1, experts), experts))


def _routed(plain: Callable[..., Any], layer: int, spec: FamilySpec, *args: Any, **kwargs: Any) -> Any:
    """The forward of a layer's mixture: its router, and its experts."""
    current = _current.get(None)
    if not isinstance(current, _Forward) or current.routing is None:
        return plain(*args, **kwargs)
    current.logits = None
    with _TopK(current.routing, layer, (spec.num_experts, spec.experts_per_token)) as mode:
        out = plain(*args, **kwargs)
    if mode.experts is None:
        raise UserError(
            f"{spec.family}: its routers do not choose experts by the largest of their scores: their choice cannot be "
            "recorded and replayed (rollout.replay_routing)"
        )
    current.routing.routed(layer, current.logits, mode.experts)
    return out


def _note_logits(index: int, module: nn.Module, args: Any, output: Any) -> None:
    """A hook of routers."""
    if isinstance(current := _current.get(None), _Forward) and current.routing is not None:
        current.logits = output[index]


def _within(plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A layer's forward, in the forward that its mask is of, also where backward computes it again."""
    forward = next((each for each in (*kwargs.values(), *args) if isinstance(each, _Forward)), None)
    if forward is None or forward.routing is None:
        return plain(*args, **kwargs)
    token = _current.set(forward)
    try:
        return plain(*args, **kwargs)
    finally:
        _current.reset(token)


def _check(family: str, module: nn.Module, dropout: float, others: Mapping[str, Any]) -> None:
    unknown = {name: value for name, value in others.items() if name not in _WITHOUT_MEANING and value is not None}
    if unknown or dropout:
        named = ", ".join(sorted(unknown)) or "dropout"
        raise UserError(f"{family}: {type(module).__name__} asks attention for {named}, which is not supported")


@dataclass(frozen=True, slots=True)
class Mixtures:
    """The mixtures of experts of a model: modules that have a router, and `experts`."""

    num_experts: int
    experts_per_token: int
    names: tuple[str, ...]
    routers: tuple[tuple[str, int], ...]  # with the place of the logits in what they return


def _routers(causal: Any, mixtures: tuple[str, ...]) -> tuple[tuple[str, int], ...]:
    """The routers of a family for which transformers has the loss that balances experts; empty for any other."""
    recorded = (causal._can_record_outputs or {}).get("router_logits")
    if not hasattr(sys.modules[type(causal).__module__], "load_balancing_loss_func"):
        return ()
    kind, index = getattr(recorded, "target_class", None), getattr(recorded, "index", 0)
    found = [
        f"{name}.{child}"
        for name in mixtures
        for child, m in causal.get_submodule(name).named_children()
        if kind is not None and type(m) is kind
    ]
    return tuple((name, index) for name in found) if len(found) == len(mixtures) else ()


def probe(causal: Any, family: str) -> tuple[tuple[LayerShape, ...], dict[str, Site], Mixtures]:
    """What each call of attention in a forward of `causal` (on the meta device) has; the module that makes it, by name;
    mixtures of experts. UserError for a family whose layers do not all attend through the seam."""
    found = _Probe(family)
    causal.eval()
    token = _current.set(found)
    try:
        with torch.no_grad(), torch.device("meta"):
            places = torch.arange(_PROBED)[None]
            _base(causal)(
                input_ids=torch.zeros(1, _PROBED, dtype=torch.long),
                position_ids=places,
                attention_mask=torch.ones_like(places),
                use_cache=False,
            )
    except (TypeError, ValueError, RuntimeError, AttributeError, NotImplementedError, KeyError, IndexError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{family}: its layers could not be followed ({type(error).__name__}: {error!s:.200})"
        ) from error
    finally:
        _current.reset(token)
    names = {id(module): name for name, module in causal.named_modules()}
    calls: dict[str, list[int]] = {}
    for i, module in enumerate(found.modules):
        calls.setdefault(names[id(module)], []).append(i)
    _check_blocks(causal, family, list(calls))
    sites: dict[str, Site] = {}
    for name, places in calls.items():
        windows = {found.shapes[i].window for i in places}
        if len(windows) > 1 or places != list(range(places[0], places[-1] + 1)):
            raise UserError(f"{family}: {name} attends in several ways: it is not supported")
        sites[name] = Site(places[0], len(places), windows.pop())
    mixtures = tuple(names[id(module)].rpartition(".")[0] for module in found.mixtures)
    return tuple(found.shapes), sites, Mixtures(*found.experts, mixtures, _routers(causal, mixtures))


def _check_blocks(causal: nn.Module, family: str, attending: list[str]) -> None:
    """UserError unless every layer attends through the seam, once."""
    prefix, blocks = find_blocks(causal, family)
    silent = [i for i in range(len(blocks)) if not any(name.startswith(f"{prefix}.{i}.") for name in attending)]
    if not attending:
        raise UserError(
            f"{family}: its attention does not go through transformers' AttentionInterface, so that documents in a "
            "packed row would see one another: it is not supported"
        )
    if silent:
        kinds = sorted({type(child).__name__ for child in blocks[silent[0]].children()})
        raise UserError(
            f"{family}: layers {', '.join(map(str, silent[:4]))}{', …' if len(silent) > 4 else ''} do not attend "
            f"({', '.join(kinds)}): recurrent layers, which carry a state from one packed document into the next, are "
            "not supported"
        )


def refuse_recurrent(causal: nn.Module, family: str) -> None:
    """UserError for layers that mix tokens by a convolution, as recurrent ones do beside their state."""
    for name, module in causal.named_modules():
        if isinstance(module, nn.Conv1d):
            raise UserError(
                f"{family}: {name} mixes tokens by a convolution, as recurrent layers do: it would carry a state from "
                "one packed document into the next, which is not supported"
            )


def find_blocks(causal: Any, family: str) -> tuple[str, nn.ModuleList]:
    """The list of a model's layers, and its name."""
    number = causal.config.get_text_config().num_hidden_layers
    for name, module in causal.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == number and "expert" not in name:
            return name, module
    raise UserError(f"{family}: expected a list of {number} layers, found none: it is not supported")


def _base(causal: Any) -> nn.Module:
    return causal.get_submodule(causal.base_model_prefix)


class _Given(nn.Module):
    """In place of the layers: a causal model's own forward is then its head."""

    def forward(self, *_: Any, inputs_embeds: Tensor, **others: Any) -> _Output:
        return _Output(inputs_embeds)


class _Output:
    """What the layers return, with None for whatever is not asked for."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, index: int) -> Tensor:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


class FamilyModel(LanguageModel):
    """A causal model of transformers on packed rows. Its children have their names there, and so its parameters.

    Dropout is off, also while it is trained: sampling and training would be of different distributions (I1).
    """

    implementation: Implementation = "transformers"

    def __init__(self, causal: Any, spec: FamilySpec, sites: Mapping[str, Site]) -> None:
        super().__init__()
        self.spec = spec
        self.hf_config: dict[str, Any] = {}
        self.assets: dict[str, bytes] = {}
        self.lora: LoRA | None = None
        self._base_name: str = causal.base_model_prefix
        self.blocks_name, _ = find_blocks(causal, spec.family)
        for name, child in causal.named_children():
            self.add_module(name, child)
        for name, site in sites.items():
            causal.get_submodule(name).__dict__["pekoe_site"] = site
        for layer, name in enumerate(spec.mixtures):
            mixture = causal.get_submodule(name)
            mixture.forward = partial(_routed, mixture.forward, layer, spec)
        for name, index in spec.routers:
            causal.get_submodule(name).register_forward_hook(partial(_note_logits, index))
        causal.eval()
        outer = copy.copy(causal)
        vars(outer)["_modules"] = {**causal._modules, self._base_name: _Given()}
        object.__setattr__(self, "_outer", outer)  # not a child: its children are ours

    def train(self, mode: bool = True) -> FamilyModel:
        self.training = mode
        return self

    def forward(
        self, tokens: Tensor, positions: Tensor, attention: Attention, routing: Routing | None = None
    ) -> Tensor:
        """See `LanguageModel`. Raises ValueError for a position at or beyond `spec.max_positions`, on CPU."""
        on_host = positions.device.type == "cpu" and type(positions) is Tensor
        if on_host and len(positions) and int(positions.max()) >= self.spec.max_positions:
            raise ValueError(f"position: expected < {self.spec.max_positions}, got {int(positions.max())}")
        places = positions[None]
        token = _current.set(_Forward(attention, routing))
        try:
            # A mask of ones: without one transformers would look for documents in the positions, a wait for the device.
            out = self.get_submodule(self._base_name)(
                input_ids=tokens[None], position_ids=places, attention_mask=torch.ones_like(places), use_cache=False
            )
        finally:
            _current.reset(token)
        return out[0][0]

    def logits(self, hidden: Tensor) -> Tensor:
        outer: Any = self.__dict__["_outer"]
        for name, child in self._modules.items():  # an engine's copy has others
            if name != self._base_name:
                setattr(outer, name, child)
        return outer(inputs_embeds=hidden[None], use_cache=False).logits[0]

    @property
    def head(self) -> Head:
        return self.logits

    @property
    def blocks(self) -> list[nn.Module]:
        return list(self.get_submodule(self.blocks_name).children())

    def take_expert_loads(self) -> Tensor | None:
        loads = [vars(module).pop("pekoe_load") for module in self.modules() if "pekoe_load" in vars(module)]
        return torch.stack(loads) if loads else None

    def wrap_blocks(self, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        for block in self.blocks:
            plain = block.forward
            block.forward = partial(_choose, wrap(partial(_within, plain)), plain)

    @contextmanager
    def own_attention(self) -> Generator[None]:
        """With the family's own attention in place of ours: for one document at a time."""
        config = self.__dict__["_outer"].config
        config._attn_implementation = "eager"
        try:
            yield
        finally:
            config._attn_implementation = NAME

    def file_tensors(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        from transformers.core_model_loading import revert_weight_conversion

        return revert_weight_conversion(self.__dict__["_outer"], dict(weights))


def _choose(with_gradient: Callable[..., Any], plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return (with_gradient if torch.is_grad_enabled() else plain)(*args, **kwargs)
