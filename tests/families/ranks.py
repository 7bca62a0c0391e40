"""What each process of `test_fsdp.py` does. A module of its own: spawned processes import it."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from pekoe.config.recipes import OptimSection
from pekoe.model import load_model
from pekoe.train import Layout, Trainer
from tests.train.ranks import STEPS, train

OPTIM = OptimSection(lr=1e-3, warmup_fraction=0.0, grad_clip=0.05)  # below the norm: clipping is in it


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
            if rank == 0:
                snapshot.export(Path(folder) / f"{family}-exported")
                torch.save(said, f"{folder}/{family}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()
