"""Weight sync beside a plain broadcast of the same bytes: gather, send, load in buckets, over gloo.

    make bench-sync ARGS="--mib 400 --rounds 7"

Processes on this machine: trainer ranks (FSDP where there are two) and engines. Each round does both ways, in turn; the
figures are medians. The sync is `pekoe.weights.transport`, with loading into the engine's parameters, and without the
canary and the checksum, which have their own times in a run's journal.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from pekoe.core.spec import ModelSpec
from pekoe.engine.buckets import buckets
from pekoe.model import Decoder
from pekoe.weights.transport import receive, send

LIMIT_S = 60.0  # of one transfer


def spec_of(mib: int) -> ModelSpec:
    """A decoder of about so many MiB in float32."""
    hidden = 1024
    layer = 4 * hidden * hidden + 3 * hidden * 3072
    layers = max(1, round(mib * 2**20 / 4 / layer))
    return ModelSpec(
        family="qwen3",
        vocab_size=512,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=8,
        num_kv_heads=8,
        head_dim=128,
        intermediate_size=3072,
        max_positions=128,
        qk_norm=True,
        tied_embeddings=True,
    )


def member(number: int, options: dict[str, Any], folder: str) -> None:
    """Process `number`: the ranks come first, then the engines."""
    torch.set_num_threads(1)
    ranks, engines, size = options["ranks"], options["engines"], options["bucket_mib"] << 20
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
    world = ranks + engines
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=number, world_size=world)
    trainers = dist.new_group(list(range(ranks)))
    senders = [0, *range(ranks, world)]
    group = dist.new_group(senders)
    model = Decoder(spec_of(options["mib"]))
    model.init_weights(0)
    whole = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    if number < ranks and ranks > 1:
        shard(model, trainers)
    taken: dict[str, list[float]] = {"sync": [], "broadcast": []}
    for _ in range(options["rounds"] + 1):
        for way in taken:
            dist.barrier()
            start = time.perf_counter()
            if way == "sync" and number < ranks:
                sent = send(group if number == 0 else None, buckets(model, size), LIMIT_S)
                assert number or sent == whole.nbytes
            elif way == "sync":
                receive(group, buckets(model, size), LIMIT_S)
            elif number in senders:
                dist.broadcast(whole, src=0, group=group)
            dist.barrier()
            taken[way].append(time.perf_counter() - start)
    if number == 0:
        medians = {way: statistics.median(seconds[1:]) for way, seconds in taken.items()}  # the first is warm-up
        result = {"bytes": whole.nbytes, **{f"{way}_s": round(value, 4) for way, value in medians.items()}}
        ratios = [b / a for a, b in zip(taken["sync"][1:], taken["broadcast"][1:], strict=True)]
        result |= {"share_of_broadcast": round(statistics.median(ratios), 3), "num_rounds": options["rounds"]}
        (Path(folder) / "result.json").write_text(json.dumps(result))
    dist.destroy_process_group()


def shard(model: Decoder, trainers: dist.ProcessGroup) -> None:
    """FSDP over the ranks alone, as `train.Layout` does it in a process group of their own."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    mesh = DeviceMesh.from_group(trainers, "cpu")
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=400, help="size of the model in float32")
    parser.add_argument("--bucket-mib", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="also write the results as JSON")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for ranks, engines in ((1, 1), (1, 2), (2, 2)):
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            wanted = {
                "ranks": ranks,
                "engines": engines,
                **{k: getattr(options, k) for k in ("mib", "bucket_mib", "rounds")},
            }
            mp.spawn(member, (wanted, folder), nprocs=ranks + engines)
            row = {"ranks": ranks, "engines": engines, **json.loads((Path(folder) / "result.json").read_text())}
        rows.append(row)
        gib = row["bytes"] / 2**30
        print(
            f"{ranks} rank(s), {engines} engine(s): {gib:.2f} GiB, sync {row['sync_s']:.2f} s "
            f"({gib / row['sync_s']:.2f} GiB/s), plain broadcast {row['broadcast_s']:.2f} s; "
            f"{row['share_of_broadcast']:.0%} of its bandwidth",
            flush=True,
        )
    if options.out:
        about = {"torch": torch.__version__, "cores": os.cpu_count(), "machine": platform.machine()}
        options.out.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
