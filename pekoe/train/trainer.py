"""The trainer: samples in, one optimizer step out. The only backward() of the house."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.utils.checkpoint import checkpoint as recompute

from pekoe.algo.allocation import allocate, assign
from pekoe.algo.loss import Sums, chosen_logprobs
from pekoe.algo.packing import MicroBatch, pack
from pekoe.config.recipes import OptimSection
from pekoe.core.loop import StepStats
from pekoe.core.spec import ModelSpec
from pekoe.core.types import AnySample, FloatArray
from pekoe.model import Decoder
from pekoe.train import checkpoint
from pekoe.train.context_parallel import Part
from pekoe.train.memory import PeakMemory
from pekoe.train.optim import learning_rate, make_optimizer
from pekoe.train.parallel import Layout, compute_of

Objective = Callable[[Tensor, Tensor, MicroBatch], tuple[Tensor, Sums]]


@dataclass(frozen=True, slots=True)
class Share:
    """What one data-parallel rank computes of a minibatch, with the sums over all ranks."""

    bins: tuple[tuple[AnySample, ...], ...]  # its micro-batches
    indices: tuple[tuple[int, ...], ...]  # the same, as places in the minibatch
    num_tokens: int
    num_targets: int
    num_bins: int


def share_out(samples: Sequence[AnySample], token_budget: int, spec: ModelSpec, num_ranks: int) -> list[Share]:
    """Pack a minibatch into micro-batches of at most `token_budget` tokens, as many for each rank, compute even."""
    lengths = [len(sample) for sample in samples]
    bins = allocate(lengths, token_budget, num_ranks)
    costs = [sum(compute_of(lengths[i], spec) for i in members) for members in bins]
    total = sum(lengths), sum(sample.num_targets for sample in samples), len(bins)
    return [
        Share(tuple(tuple(samples[i] for i in bins[b]) for b in mine), tuple(tuple(bins[b]) for b in mine), *total)
        for mine in assign(costs, num_ranks)
    ]


class Trainer:
    """Owns the weights and the optimizer.

    Args:
        model: the decoder; its parameters are updated in place, so an engine that shares them needs no copy.
        optim: optimizer settings.
        token_budget: most tokens of a micro-batch at one process.
        total_updates: optimizer steps of the whole run (the schedule's length).
        temperature: log-probs are of the distribution at this temperature.
        compute_dtype: dtype of the matrix products (autocast); weights stay as they are.
        activation_checkpointing: keep each layer's input alone for backward and compute the layer again there: a third
            more compute for a fraction of the memory, and the same numbers.
        compile: run layers through torch.compile. Numbers move in their last bits.
        layout: where there are several processes, how they share weights and work. All call the same methods with the
            same arguments (but for shares, which are their own), and get the same answers.
        reference: a model that is not trained, for `logprobs`.
    """

    def __init__(
        self,
        model: Decoder,
        optim: OptimSection,
        token_budget: int,
        total_updates: int,
        temperature: float = 1.0,
        compute_dtype: torch.dtype = torch.float32,
        layout: Layout | None = None,
        activation_checkpointing: bool = False,
        compile: bool = False,
        reference: Decoder | None = None,
    ) -> None:
        self.reference = reference
        self.model, self._layout, self._compile = model, layout, compile
        for layer in model.layers:
            if compile:
                layer.with_gradient = torch.compile(layer.with_gradient, dynamic=True)
            if activation_checkpointing:
                # Nothing in a layer is drawn at random, so there is no state to bring back.
                again = partial(recompute, layer.with_gradient, use_reentrant=False, preserve_rng_state=False)
                layer.with_gradient = again
        if layout is not None:
            layout.apply(model)
        self.optimizer = make_optimizer(model, optim)
        self.num_updates = 0
        self.num_not_finite = 0  # optimizer steps in a row, the last ones, whose loss or gradient was not finite
        self._optim, self._total = optim, total_updates
        self._token_budget, self.temperature, self.compute_dtype = token_budget, temperature, compute_dtype
        self._busy_s, self._num_tokens = 0.0, 0

    def skip(self, num_updates: int) -> None:
        """Advance the schedule without an update."""
        self.num_updates += num_updates

    def counters(self) -> dict[str, float]:
        """Seconds at work in `step` and `logprobs`, and tokens that all ranks computed in them, since it was made."""
        return {"busy_s": self._busy_s, "num_tokens": self._num_tokens}

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set at any of the processes that train."""
        return flag if self._layout is None else self._layout.any(flag)

    @property
    def group(self) -> dist.ProcessGroup | None:
        """Of all processes, for what is written beside training; None where there is one."""
        return None if self._layout is None else self._layout.writers

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def step(
        self,
        samples: Sequence[AnySample],
        objective: Objective,
        denominator: float | None = None,
        max_mean_ratio: float | None = None,
    ) -> StepStats:
        """Make one optimizer step on a minibatch, in as many micro-batches as the token budget asks for.

        Args:
            samples: the minibatch.
            objective: sum over tokens of the loss, and statistics (see `algo.loss`).
            denominator: what the summed loss is divided by; by default the minibatch's trained tokens (I3).
            max_mean_ratio: with a mean importance ratio above this no update is made.
        """
        return self.step_on(self._share(samples), objective, denominator, max_mean_ratio)

    def step_on(
        self,
        share: Share,
        objective: Objective,
        denominator: float | None = None,
        max_mean_ratio: float | None = None,
    ) -> StepStats:
        """As `step`, of a minibatch of which this process is given its own share alone."""
        start = time.perf_counter()
        peak = PeakMemory(self.device)
        divisor = float(denominator or share.num_targets)
        self.optimizer.zero_grad(set_to_none=True)
        loss_sum, sums = torch.zeros((), dtype=torch.float64), {}
        for members in share.bins:
            batch = pack([sample.resolve() for sample in members]).to(self.device)
            loss, parts = objective(*self._logprobs(batch), batch)
            (loss / divisor).backward()
            loss_sum += loss.detach().double().cpu()
            _accumulate(sums, parts)
        if self._layout is not None:
            loss_sum = self._layout.sum(loss_sum.to(self.device))
            for name in sorted(sums):
                self._layout.sum(sums[name], largest=name.endswith("_max"))
        means = {k: float(v) if k.endswith("_max") else float(v) / share.num_targets for k, v in sums.items()}
        lr = learning_rate(self._optim, self.num_updates, self._total)
        grad_norm = self._clip()
        loss_mean = float(loss_sum) / divisor
        skipped = None
        if not (np.isfinite(grad_norm) and np.isfinite(loss_mean)):
            skipped = f"not finite: loss {loss_mean}, gradient norm {grad_norm}"
        elif max_mean_ratio is not None and means["ratio"] > max_mean_ratio:
            skipped = f"mean importance ratio {means['ratio']:.2f} above {max_mean_ratio}"
        else:
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        self.num_updates += 1
        self.num_not_finite = self.num_not_finite + 1 if skipped and skipped.startswith("not finite") else 0
        self.optimizer.zero_grad(set_to_none=True)
        self._count(share, start)
        most = peak.bytes
        if self._layout is not None and most is not None:
            most = int(self._layout.sum(torch.tensor(most, dtype=torch.float64, device=self.device), largest=True))
        return StepStats(
            loss_mean, grad_norm, lr, share.num_tokens, share.num_targets, share.num_bins, means, skipped, most
        )

    def logprobs(self, samples: Sequence[AnySample], reference: bool = False) -> list[FloatArray]:
        """Log-probs [L] of each sample's trained tokens (0 elsewhere), by the trained or the reference model."""
        share = self._share(samples)
        out = [np.zeros(len(sample), np.float32) for sample in samples]
        for members, found in zip(share.indices, self.logprobs_on(share, reference), strict=True):
            for i, values in zip(members, found, strict=True):
                out[i] = values
        if self._layout is not None and out:
            whole = self._layout.sum(torch.from_numpy(np.concatenate(out)).to(self.device)).cpu().numpy()
            out = np.split(whole, np.cumsum([len(sample) for sample in samples])[:-1])
        return out

    @torch.no_grad()
    def logprobs_on(self, share: Share, reference: bool = False) -> list[list[FloatArray]]:
        """As `logprobs`, of this process's share: for each micro-batch, those of its samples."""
        assert self.reference is not None or not reference, "no reference model was loaded"
        start, found = time.perf_counter(), list[list[FloatArray]]()
        for members in share.bins:
            batch = pack([sample.resolve() for sample in members]).to(self.device)
            flat = np.zeros(len(batch.tokens), np.float32)
            logprobs = self._logprobs(batch, self.reference if reference else None)[0]
            flat[batch.targets.cpu().numpy()] = logprobs.float().cpu().numpy()
            found.append(np.split(flat, np.cumsum([len(sample) for sample in members])[:-1]))
        self._count(share, start)
        return found

    def _count(self, share: Share, start: float) -> None:
        self._busy_s += time.perf_counter() - start
        self._num_tokens += share.num_tokens

    def _share(self, samples: Sequence[AnySample]) -> Share:
        layout = self._layout
        num_ranks, cp, rank = (1, 1, 0) if layout is None else (layout.num_ranks, layout.cp, layout.rank)
        return share_out(samples, self._token_budget * cp, self.model.spec, num_ranks)[rank]

    def _clip(self) -> float:
        """Clip the gradients; returns their norm before."""
        if self._layout is None:
            return float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self._optim.grad_clip))
        self._layout.finish_gradients(self.model)
        return self._layout.clip(self.model, self._optim.grad_clip)

    def _logprobs(self, batch: MicroBatch, model: Decoder | None = None) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies [N] of the batch's targets."""
        part = Part.of(batch, self._layout.context if self._layout is not None else None)
        logprobs, entropy = self.forward(part, model)
        return part.gather(logprobs), part.gather(entropy)

    def forward(self, part: Part, model: Decoder | None = None) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies [n] of this process's part of a micro-batch."""
        model = model or self.model
        mixed = self.compute_dtype is not torch.float32
        with torch.autocast(self.device.type, self.compute_dtype, enabled=mixed):
            # Attention's plan is another for each micro-batch: compiled, it would be compiled for each.
            attention = torch.compiler.disable(part.attention) if self._compile else part.attention
            hidden = model(part.tokens, part.positions, attention)
            return chosen_logprobs(hidden[part.rows], model.head_weight, part.targets, self.temperature)

    def snapshot(self) -> checkpoint.Snapshot:
        """A copy of everything that decides the trainer's future. All processes call it together."""
        return checkpoint.snapshot(self.model, self.state_dict(), self.group)

    def load(self, path: Path) -> None:
        """Go back to the state that `Snapshot.write` wrote, on however many processes. All of them call it together."""
        state = self.state_dict()
        checkpoint.read(path, state, self.group)
        self.load_state_dict(state)

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides the trainer's future, in the layout-free form of torch.distributed.checkpoint."""
        model, optimizer = get_state_dict(self.model, self.optimizer)
        counts = {"num_updates": self.num_updates, "num_not_finite": self.num_not_finite}
        return {"model": model, "optimizer": optimizer, **counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        self.num_updates, self.num_not_finite = state["num_updates"], state["num_not_finite"]


def _accumulate(sums: Sums, parts: Sums) -> None:
    for name, value in parts.items():
        if name not in sums:
            sums[name] = value
        elif name.endswith("_max"):
            sums[name] = torch.maximum(sums[name], value)
        else:
            sums[name] = sums[name] + value
