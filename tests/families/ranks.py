"""What each process of `test_fsdp.py` and `test_parallel.py` does, and what is made of it. A module of its own: spawned
processes import it."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from pekoe.config.recipes import OptimSection
from pekoe.core.errors import UserError
from pekoe.core.spec import FamilySpec
from pekoe.model import file_stream, load_model, read_spec
from pekoe.train import Layout, Trainer, parallel
from tests.forked import spawn
from tests.train.ranks import STEPS, train

OPTIM = OptimSection(lr=1e-3, warmup_fraction=0.0, grad_clip=0.05)  # below the norm: clipping is in it
LAYOUTS: dict[str, dict[str, int]] = {"FSDP": {}, "TP": {"tp": 2}, "CP": {"cp": 2}}


def make_trainer(place: str, sharded: bool) -> Trainer:
    model = load_model(place, implementation="transformers")
    return Trainer(model, OPTIM, 40, STEPS, layout=Layout(model.spec) if sharded else None)


def fsdp_main(rank: int, folder: str, families: list[str]) -> None:
    torch.set_num_threads(1)
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    try:
        for family in families:
            trainer = make_trainer(f"{folder}/{family}", sharded=True)
            said = train(trainer)
            dcp.save(trainer.state_dict(), checkpoint_id=f"{folder}/{family}-state")
            snapshot = trainer.snapshot()
            streamed = {name: tensor.clone() for name, tensor in file_stream(trainer.model)}  # all ranks together
            if rank == 0:
                save_file(streamed, f"{folder}/{family}-streamed.safetensors")
                snapshot.export(Path(folder) / f"{family}-exported")
                torch.save(said, f"{folder}/{family}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


def gradients_and_more(place: str, layout: dict[str, int] | None) -> dict[str, Any]:
    """What three steps say, and the gradients of each by name, in float64; of mixtures in float32, as grouped products
    have no other. `Layout` may refuse."""
    spec, _ = read_spec(Path(place), "transformers")
    assert isinstance(spec, FamilySpec)
    dtype = torch.float32 if spec.num_experts else torch.float64
    model = load_model(place, dtype, implementation="transformers")
    trainer = Trainer(model, OPTIM, 40, STEPS, layout=None if layout is None else Layout(model.spec, **layout))
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    gradients: list[dict[str, torch.Tensor]] = []

    def keep(optimizer: torch.optim.Optimizer, *_: object) -> None:
        found = {names[id(p)]: p.grad for group in optimizer.param_groups for p in group["params"]}
        whole = {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in found.items() if g is not None}
        gradients.append({name: gradient.clone() for name, gradient in whole.items()})

    trainer.optimizer.register_step_pre_hook(keep)
    return train(trainer) | {"gradients": gradients}


def layouts_main(rank: int, folder: str, families: list[str], layouts: list[str], everything: bool) -> None:
    """Train each family in each layout, or keep what refuses it. `everything`: also by plans that were not proved."""
    torch.set_num_threads(1)
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    limit = timedelta(seconds=300)
    place = f"file://{folder}/rendezvous-layouts"
    dist.init_process_group("gloo", init_method=place, rank=rank, world_size=2, timeout=limit)
    if everything:
        parallel.__dict__["SPLIT"] = frozenset(families)
    try:
        for family in families:
            for name in layouts:
                try:
                    found = gradients_and_more(f"{folder}/{family}", LAYOUTS[name])
                except (UserError, RuntimeError, ValueError, AssertionError) as error:  # at both
                    found = {"error": f"{type(error).__name__}: {error}"}
                if rank == 0:
                    torch.save(found, f"{folder}/{family}-{name}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


def compare_layouts(
    place: Path, families: list[str], layouts: list[str], everything: bool = False
) -> dict[tuple[str, str], float | str]:
    """Of each family and layout: its largest relative difference from one process, or why there is none."""
    spawn(layouts_main, 2, str(place), families, layouts, everything)
    out: dict[tuple[str, str], float | str] = {}
    for family in families:
        alone = gradients_and_more(str(place / family), None)
        for name in layouts:
            found: dict[str, Any] = torch.load(place / f"{family}-{name}.pt", weights_only=False)
            out[family, name] = found.get("error") or difference(alone, found)
    return out


def difference(expected: dict[str, Any], found: dict[str, Any]) -> float:
    """The largest of those of figures, and of gradients by their norms."""
    worst = 0.0
    for name, value in expected.items():
        if name not in ("gradients", "logprob_diff_max"):
            scale = np.abs(value).max() + 1e-12
            worst = max(worst, float(np.abs(np.asarray(found[name]) - np.asarray(value)).max() / scale))
    for ours, theirs in zip(found["gradients"], expected["gradients"], strict=True):
        assert ours.keys() == theirs.keys()
        whole = torch.stack([g.norm() for g in theirs.values()]).norm()
        for name, gradient in theirs.items():  # of a tensor that has nearly none, a share of the whole
            worst = max(worst, float((ours[name] - gradient).norm() / (gradient.norm() + 1e-6 * whole)))
    return worst
