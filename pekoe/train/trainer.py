"""The trainer: samples in, one optimizer step out. The only backward() of the house."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint as recompute

from pekoe.algo.loss import Sums, chosen_logprobs
from pekoe.algo.packing import MicroBatch, allocate, assign, pack
from pekoe.config.recipes import OptimSection
from pekoe.core.errors import StopRequested, UserError
from pekoe.core.loop import StepStats
from pekoe.core.spec import ModelSpec
from pekoe.core.types import AnySample, FloatArray
from pekoe.model import (
    Attention,
    Balance,
    Decoder,
    LanguageModel,
    OwnRouting,
    PackedAttention,
    Replay,
    Routing,
    check_balance,
)
from pekoe.model.lora import adapters_off
from pekoe.model.peft import check_base
from pekoe.train import checkpoint
from pekoe.train.adamw import MAX_BETA2, LeanAdamW
from pekoe.train.context_parallel import CPShard
from pekoe.train.memory import PeakMemory
from pekoe.train.parallel import Layout, compute_of

Objective = Callable[[Tensor, Tensor, MicroBatch], tuple[Tensor, Sums]]
"""(log-probs [N], entropies [N], micro-batch) -> (summed loss, statistics), which have the same names also at N = 0, as
they are summed over ranks."""


@dataclass(frozen=True, slots=True)
class RankBatch:
    """One data-parallel rank's part of a mini-batch, with totals over all ranks.

    Example: samples a, b, c for two ranks: bins ((a, c),) and ((b,),), indices ((0, 2),) and ((1,),).
    """

    bins: tuple[tuple[AnySample, ...], ...]  # its micro-batches; empty ones where it has no work
    indices: tuple[tuple[int, ...], ...]  # the same, as indices into the mini-batch
    num_tokens: int  # of the whole mini-batch, as are the next two
    num_targets: int
    num_bins: int


def pack_minibatch(samples: Sequence[AnySample], token_budget: int, spec: ModelSpec, num_ranks: int) -> list[RankBatch]:
    """Pack a mini-batch into micro-batches of at most `token_budget` tokens, with the same number and even compute for
    each rank."""
    lengths = [len(sample) for sample in samples]
    bins = allocate(lengths, token_budget, num_ranks)
    costs = [sum(compute_of(lengths[i], spec) for i in members) for members in bins]
    total = sum(lengths), sum(sample.num_targets for sample in samples), len(bins)
    return [
        RankBatch(tuple(tuple(samples[i] for i in bins[b]) for b in mine), tuple(tuple(bins[b]) for b in mine), *total)
        for mine in assign(costs, num_ranks)
    ]


class Trainer:
    """Implements `core.loop.Trainer`: owns the weights and the optimizer.

    Args:
        model: updated in place, so an engine that shares its parameters needs no copy.
        optim: optimizer settings.
        token_budget: the most tokens of a micro-batch at one process.
        total_updates: optimizer steps of the whole run (the schedule's length).
        temperature: log-probs are of the distribution at this temperature.
        compute_dtype: dtype of the matrix products; weights stay as they are. In one process by autocast; where weights
            of a `Decoder` are sharded they are gathered in it, and all is computed in it but norms, logits and sums of
            gradients.
        activation_checkpointing: compute each layer again in backward: a third more compute, a fraction of the memory,
            the same numbers.
        compile: run layers through torch.compile. Numbers change in their last bits.
        layout: how several processes share weights and work. All of them call the same methods with the same arguments
            (a `RankBatch` aside), and get the same results.
        reference: a model that is not trained, for `logprobs`; sharded like the model. A model with adapters has its
            own: itself without them.
        moments: dtype of AdamW's two moments; `moments_on_host`: whether they are in the host's memory, which one
            process can have.
        balance_loss: weight of `model.Balance`, the mean over trained tokens of their sequence's, beside the objective.
    """

    def __init__(
        self,
        model: LanguageModel,
        optim: OptimSection,
        token_budget: int,
        total_updates: int,
        temperature: float = 1.0,
        compute_dtype: torch.dtype = torch.float32,
        layout: Layout | None = None,
        activation_checkpointing: bool = False,
        compile: bool = False,
        reference: LanguageModel | None = None,
        moments: torch.dtype = torch.float32,
        moments_on_host: bool = False,
        balance_loss: float = 0.0,
    ) -> None:
        if balance_loss:
            check_balance(model)
            if layout is not None and layout.context is not None:
                raise UserError(f"train.balance_loss: expected 0 with cp = {layout.cp}, got {balance_loss:g}")
        self._balance_loss = balance_loss
        self.reference = reference
        self.model, self._layout, self._compile = model, layout, compile
        if compile and model.implementation == "transformers":
            raise UserError(
                f"train.compile: expected false for {model.spec.family}, which transformers computes, got true"
            )
        if compile:
            model.wrap_blocks(partial(torch.compile, dynamic=True))
        if activation_checkpointing:
            # Layers draw no random numbers, so there is no generator state to restore.
            model.wrap_blocks(_recomputed)
        # Of other families we do not know what they compute in float32 by themselves.
        self._autocast = compute_dtype is not torch.float32 and (layout is None or not isinstance(model, Decoder))
        if layout is not None:
            low = None if self._autocast or compute_dtype is torch.float32 else compute_dtype
            for decoder in [model] if reference is None else [model, reference]:
                layout.apply(decoder, low)
        if moments_on_host and layout is not None:
            raise UserError("train.moments_on_host: expected one process (several share the moments), got several")
        self.optimizer = _make_optimizer(model, optim, moments, moments_on_host)
        self.num_updates = 0
        self.num_not_finite = 0
        self._optim, self._total = optim, total_updates
        self._token_budget, self.temperature, self.compute_dtype = token_budget, temperature, compute_dtype
        self._busy_s, self._num_tokens = 0.0, 0
        self.chunk_values: int | None = None
        """Logits held at once; None: as many as suit the device."""
        self.stopping: Callable[[], bool] | None = None
        """Where one process trains, asked at every layer whether to drop what is begun: `step` and `logprobs` raise
        StopRequested then, and the weights are what they were. (Several processes would have to agree each time.)"""

    def skip(self, num_updates: int) -> None:
        self.num_updates += num_updates

    def counters(self) -> dict[str, float]:
        """Seconds in `step` and `logprobs`, and tokens that all ranks computed in them."""
        return {"busy_s": self._busy_s, "num_tokens": self._num_tokens}

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set at any of the processes that train."""
        return flag if self._layout is None else self._layout.any(flag)

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The group of all processes that write checkpoints; None for one process."""
        return None if self._layout is None else self._layout.writers

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def step(
        self,
        samples: Sequence[AnySample] | RankBatch,
        objective: Objective,
        denominator: float | None = None,
        max_mean_ratio: float | None = None,
    ) -> StepStats:
        """Make one optimizer step on a mini-batch, in micro-batches within the token budget.

        Args:
            samples: the mini-batch, or this process's part of it.
            denominator: divides the summed loss; by default the mini-batch's trained tokens (I3).
            max_mean_ratio: with a mean importance ratio above this no update is made.
        """
        rank_batch = samples if isinstance(samples, RankBatch) else self._pack(samples)
        start = time.perf_counter()
        peak = PeakMemory(self.device)
        divisor = float(denominator or rank_batch.num_targets)
        self.optimizer.zero_grad(set_to_none=True)
        added = None
        with suppress(StopRequested):
            added = self._add_gradients(rank_batch, objective, divisor)
        if added is None:
            self.optimizer.zero_grad(set_to_none=True)
            raise StopRequested  # anew: the first one holds activations
        loss_sum, sums = added
        if self._layout is not None:
            loss_sum = self._layout.sum(loss_sum)
            for name in sorted(sums):
                self._layout.sum(sums[name], largest=name.endswith("_max"))
        means = {k: float(v) if k.endswith("_max") else float(v) / rank_batch.num_targets for k, v in sums.items()}
        if (loads := self.model.take_expert_loads()) is not None:
            means |= expert_balance(loads if self._layout is None else self._layout.sum(loads))
        lr = learning_rate(self._optim, self.num_updates, self._total)
        grad_norm = self._clip()
        loss_mean = float(loss_sum) / divisor
        skipped = None
        self.num_updates += 1  # before the weights change: an error above leaves them, and this, as they were
        if not (np.isfinite(grad_norm) and np.isfinite(loss_mean)):
            skipped = f"not finite: loss {loss_mean}, gradient norm {grad_norm}"
        elif max_mean_ratio is not None and means["ratio"] > max_mean_ratio:
            skipped = f"mean importance ratio {means['ratio']:.2f} above {max_mean_ratio}"
        else:
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        self.num_not_finite = self.num_not_finite + 1 if skipped and skipped.startswith("not finite") else 0
        self.optimizer.zero_grad(set_to_none=True)
        self._count(rank_batch, start)
        peak_bytes = peak.bytes
        if self._layout is not None and peak_bytes is not None:
            value = torch.tensor(peak_bytes, dtype=torch.float64, device=self.device)
            peak_bytes = int(self._layout.sum(value, largest=True))
        num = rank_batch.num_tokens, rank_batch.num_targets, rank_batch.num_bins
        return StepStats(loss_mean, grad_norm, lr, *num, means, skipped, peak_bytes)

    def _add_gradients(self, rank_batch: RankBatch, objective: Objective, divisor: float) -> tuple[Tensor, Sums]:
        """Forward and backward, micro-batch by micro-batch. Returns the summed loss and the sums of statistics."""
        loss_sum, sums = torch.zeros((), dtype=torch.float64, device=self.device), dict[str, Tensor]()
        for members in rank_batch.bins:
            batch = pack([sample.resolve() for sample in members]).to(self.device)
            routing = self._routing(batch)
            balance = Balance(routing or OwnRouting(), *_sequences(batch)) if self._balance_loss else None
            loss, parts = objective(*self._logprobs(batch, balance or routing), batch)
            total = loss / divisor
            if balance is not None:
                uneven = balance.losses() @ _num_targets(batch)
                total = total + self._balance_loss * uneven / rank_batch.num_targets
                parts = parts | {"balance_loss": uneven.detach()}
            total.backward()
            loss_sum += loss.detach().double()
            for name, value in parts.items():
                combine = torch.maximum if name.endswith("_max") else torch.add
                sums[name] = combine(sums[name], value) if name in sums else value
        return loss_sum, sums

    def logprobs(self, samples: Sequence[AnySample], reference: bool = False) -> list[FloatArray]:
        rank_batch = self._pack(samples)
        out = [np.zeros(len(sample), np.float32) for sample in samples]
        for members, logprobs in zip(rank_batch.indices, self.logprobs_packed(rank_batch, reference), strict=True):
            for i, values in zip(members, logprobs, strict=True):
                out[i] = values
        if self._layout is not None and out:
            whole = self._layout.sum(torch.from_numpy(np.concatenate(out)).to(self.device)).cpu().numpy()
            out = np.split(whole, np.cumsum([len(sample) for sample in samples])[:-1])
        return out

    @torch.no_grad()
    def logprobs_packed(self, rank_batch: RankBatch, reference: bool = False) -> list[list[FloatArray]]:
        """As `logprobs`, given this process's part: for each micro-batch, those of its samples."""
        adapted = self.model.lora is not None
        assert adapted or self.reference is not None or not reference, "no reference model was loaded"
        start, out = time.perf_counter(), list[list[FloatArray]]()
        for members in rank_batch.bins:
            batch = pack([sample.resolve() for sample in members])
            flat = np.zeros(len(batch.tokens), np.float32)
            with adapters_off(self.model) if reference and adapted else nullcontext():
                placed = batch.to(self.device)
                routing = None if reference else self._routing(placed)  # of the reference its routers choose
                logprobs = self._logprobs(placed, routing, self.reference if reference else None)[0]
            flat[batch.targets.numpy()] = logprobs.float().cpu().numpy()
            out.append(np.split(flat, batch.bounds[1:-1]) if members else [])
        if reference and isinstance(self.reference, FSDPModule):
            self.reference.reshard()  # embeddings and head, as no backward does it
        self._count(rank_batch, start)
        return out

    def _count(self, rank_batch: RankBatch, start: float) -> None:
        self._busy_s += time.perf_counter() - start
        self._num_tokens += rank_batch.num_tokens

    def _pack(self, samples: Sequence[AnySample]) -> RankBatch:
        layout = self._layout
        num_ranks, cp, rank = (1, 1, 0) if layout is None else (layout.num_ranks, layout.cp, layout.rank)
        return pack_minibatch(samples, self._token_budget * cp, self.model.spec, num_ranks)[rank]

    def _clip(self) -> float:
        """Clip the gradients; returns their norm before."""
        if self._layout is None:
            return float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self._optim.grad_clip))
        return self._layout.clip(self.model, self._optim.grad_clip)

    def _routing(self, batch: MicroBatch) -> Routing | None:
        """The experts that were recorded."""
        return None if batch.routing is None else Replay(batch.routing)

    def _logprobs(
        self, batch: MicroBatch, routing: Routing | None, model: LanguageModel | None = None
    ) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies [N] of the batch's targets."""
        group = self._layout.context if self._layout is not None else None
        model = model or self.model
        if group is None:
            rows, targets = batch.targets - 1, batch.tokens[batch.targets]
            attention = PackedAttention(batch.bounds)
            return self.forward(model, batch.tokens, batch.positions, attention, rows, targets, routing)
        assert routing is None, "refused by the recipe"
        part = CPShard.of(batch, group)
        logprobs, entropy = self.forward(model, part.tokens, part.positions, part.attention, part.rows, part.targets)
        return part.gather(logprobs), part.gather(entropy)

    def forward(
        self,
        model: LanguageModel,
        tokens: Tensor,
        positions: Tensor,
        attention: Attention,
        rows: Tensor,
        targets: Tensor,
        routing: Routing | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies [N] of `targets` [N], predicted at `rows` [N] of the tokens [T]."""
        # A weight's copy in the lower dtype goes with its product: autocast's cache would hold those of all layers.
        with torch.autocast(self.device.type, self.compute_dtype, enabled=self._autocast, cache_enabled=False):
            if self.stopping is not None and self._layout is None:
                attention = partial(_or_stop, self.stopping, attention)
            # Attention differs by micro-batch, and would be compiled again for each.
            plain = torch.compiler.disable(attention) if self._compile else attention
            hidden = model(tokens, positions, plain, routing)
            vocab = model.spec.vocab_size
            return chosen_logprobs(hidden[rows], model.head, targets, self.temperature, vocab, self.chunk_values)

    def snapshot(self) -> checkpoint.Snapshot:
        return checkpoint.snapshot(self.model, self.state_dict(), self.group)

    def load(self, path: Path) -> None:
        state = self.state_dict()
        checkpoint.read(path, state, self.group)
        if (lora := self.model.lora) is not None:
            check_base(path, lora.base, state["base"], lora.digest)
        self.load_state_dict(state)

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides the trainer's future, in the layout-free form of torch.distributed.checkpoint."""
        model, optimizer = get_state_dict(self.model, self.optimizer, options=self._options)
        counts: dict[str, Any] = {"num_updates": self.num_updates, "num_not_finite": self.num_not_finite}
        if self.model.lora is not None:
            counts["base"] = self.model.lora.digest
        return {"model": model, "optimizer": optimizer, **counts}

    @property
    def _options(self) -> StateDictOptions:
        """Of an adapter's base nothing is written or read."""
        return StateDictOptions(ignore_frozen_params=True, strict=self.model.lora is None)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=self._options,
        )
        self.num_updates, self.num_not_finite = state["num_updates"], state["num_not_finite"]


def _or_stop(stopping: Callable[[], bool], attention: Attention, *args: Any, **kwargs: Any) -> Tensor:
    """The attention of a layer, unless the user asked to stop; its backward asks likewise."""

    def check(_: Tensor | None = None) -> None:
        if stopping():
            raise StopRequested

    check()
    out = attention(*args, **kwargs)
    if out.requires_grad:
        out.register_hook(check)
    return out


def expert_balance(loads: Tensor) -> dict[str, float]:
    """How evenly experts were used, of tokens [layers, E] that each had: the entropy of a layer's shares, as a part of
    log E, and the smallest and largest share times E (1: even); the mean over layers."""
    number = loads.shape[1]
    shares = loads / loads.sum(-1, keepdim=True)
    entropy = torch.special.entr(shares).sum(-1) / math.log(max(2, number))
    least, most = (shares.amin(-1) * number).mean(), (shares.amax(-1) * number).mean()
    return {"expert_entropy": float(entropy.mean()), "expert_load_min": float(least), "expert_load_max": float(most)}


def _sequences(batch: MicroBatch) -> tuple[Tensor, Tensor]:
    """Of each token the sequence that it is of [T], and the tokens of each sequence [B]."""
    sizes = torch.tensor(batch.lengths, device=batch.tokens.device)
    number = torch.arange(len(sizes), device=sizes.device)
    return number.repeat_interleave(sizes, output_size=len(batch.tokens)), sizes


def _num_targets(batch: MicroBatch) -> Tensor:
    """Trained tokens of each sequence [B], in float32."""
    sequence, sizes = _sequences(batch)
    return torch.bincount(sequence[batch.targets], minlength=len(sizes)).float()


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    return partial(recompute, forward, use_reentrant=False, preserve_rng_state=False)


def _make_optimizer(
    model: LanguageModel, optim: OptimSection, moments: torch.dtype, on_host: bool
) -> torch.optim.AdamW | LeanAdamW:
    """AdamW; weight decay on matrices only, none on biases and norms (the vectors)."""
    if moments is torch.bfloat16 and optim.beta2 > MAX_BETA2:
        raise UserError(
            f"train.moments: expected 'float32' with optim.beta2 = {optim.beta2:g}, got 'bfloat16', which rounds such "
            f"small updates away; nearest: optim.beta2 = {MAX_BETA2:g}"
        )
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": optim.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if moments is torch.bfloat16 or on_host:
        low = moments if moments is torch.bfloat16 else None
        return LeanAdamW(groups, optim.lr, (optim.beta1, optim.beta2), optim.eps, low, on_host)
    adamw = torch.optim.AdamW(groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=True)
    for parameter in parameters:
        # AdamW's initial state, before the first step: a checkpoint loads into existing state alone, silently.
        adamw.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return adamw


def learning_rate(optim: OptimSection, update: int, total: int) -> float:
    """The rate at optimizer step `update` (from 0) of `total`: linear warm-up, then constant, linear or cosine."""
    warmup = math.ceil(optim.warmup_fraction * total)
    if update < warmup:
        return optim.lr * (update + 1) / warmup
    if optim.schedule == "constant":
        return optim.lr
    progress = min(1.0, (update - warmup) / max(1, total - warmup))
    return optim.lr * (1 - progress if optim.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress)))
