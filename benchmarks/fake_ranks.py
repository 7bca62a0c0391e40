"""One of many training ranks, on tensors without numbers: builds, trains a micro-batch, steps, gathers its weights.

Nothing is computed and nobody is asked: torch's fake tensors have sizes alone, its fake process group answers at once.
Errors of devices, dtypes and shapes show for any number of ranks, and torch's own tracker tells the memory of a step,
beside what `pekoe doctor` predicts.

    python benchmarks/fake_ranks.py --out benchmarks/results/fake-ranks_DATE.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed._tools.mem_tracker import MemTracker
from torch.testing._internal.distributed.fake_pg import FakeStore

from pekoe.algo.loss import GPU_CHUNK_VALUES
from pekoe.config.recipes import OptimSection
from pekoe.core.spec import ModelSpec, RopeSpec
from pekoe.engine.buckets import buckets
from pekoe.model import Decoder, PackedAttention
from pekoe.train import Layout, Trainer
from pekoe.train.memory_estimate import _flash, predict  # pyright: ignore[reportPrivateUsage]
from pekoe.weights.transport import send

# As in the models' config.json: C, layers, H, K, D, intermediate size.
_COMMON: dict[str, Any] = {"max_positions": 32768, "rope": RopeSpec(1e6), "qkv_bias": True}
SPECS = {
    "1.5b": ModelSpec("qwen2", 151936, 1536, 28, 12, 2, 128, 8960, tied_embeddings=True, **_COMMON),
    "7b": ModelSpec("qwen2", 152064, 3584, 28, 28, 4, 128, 18944, **_COMMON),
    "32b": ModelSpec("qwen2", 152064, 5120, 64, 40, 8, 128, 27648, **_COMMON),
}


def one_rank(
    name: str, ranks: int, layers: int | None, tokens: int, dtype: torch.dtype, device: str = "cpu"
) -> dict[str, Any]:
    """The first of `ranks`: bytes at the peak of forward and backward as torch's tracker counts them, and predicted.

    device: "cuda" as tests/train/test_fake_cuda.py prepares it, where torch's CUDA build says what a GPU would refuse.
    """
    spec = SPECS[name] if layers is None else replace(SPECS[name], num_layers=layers)
    layout = None
    if ranks > 1:
        dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
        dist.new_group = lambda **_: dist.group.WORLD  # of gloo, for checkpoints, which nobody writes here
        layout = Layout(spec, device=device)
    start = time.perf_counter()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device(device):
        model = Decoder(spec)
        trainer = Trainer(
            model, OptimSection(), tokens, 1, compute_dtype=dtype, layout=layout, activation_checkpointing=True
        )
        trainer.chunk_values = GPU_CHUNK_VALUES
        numbers = torch.arange(tokens)
        tracker = MemTracker() if layout is None else FSDPMemTracker(model, trainer.optimizer)
        if layout is None:
            tracker.track_external(model, trainer.optimizer)
        with tracker:
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)  # of the micro-batches before
            attention = _flash if device == "cpu" else PackedAttention([0, tokens])
            trainer.forward(model, numbers, numbers, attention, numbers[:-1], numbers[1:])[0].sum().backward()
        measured = sum(kinds["Total"] for kinds in tracker.get_tracker_snapshot("peak").values())
        assert all(p.grad is not None and p.grad.dtype is torch.float32 for p in model.parameters())
        trainer.optimizer.step()
        send(None, buckets(model, 256 << 20, dtype), 60)  # every parameter is gathered, as for a publish
    predicted = predict(spec, tokens, tokens, dtype, True, "cuda", shards=ranks)
    return {
        "model": name,
        "layers": spec.num_layers,
        "ranks": ranks,
        "tokens": tokens,
        "dtype": str(dtype).removeprefix("torch."),
        "tracked_bytes": measured,
        "predicted_bytes": predicted.total,
        "ratio": predicted.total / measured,
        "seconds": round(time.perf_counter() - start, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=SPECS, help="one case, printed as JSON; by default all, each in a process")
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--layers", type=int, help="fewer than the model has")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    if asked.model:
        dtype = getattr(torch, asked.dtype)
        print(json.dumps(one_rank(asked.model, asked.ranks, asked.layers, asked.tokens, dtype)))
        return
    rows: list[dict[str, Any]] = []
    for model in SPECS:
        for ranks in (1, 8, 64):
            words = [sys.executable, __file__, "--model", model, "--ranks", str(ranks), "--tokens", str(asked.tokens)]
            words += ["--layers", str(asked.layers)] if asked.layers else []
            done = subprocess.run([*words, "--dtype", asked.dtype], capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{model}, {ranks} ranks: {done.stderr[-3000:]}")
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            row = rows[-1]
            gib = [row[key] / 2**30 for key in ("tracked_bytes", "predicted_bytes")]
            print(
                f"{model:>5} {ranks:3} ranks: {gib[0]:7.2f} GiB tracked, {gib[1]:7.2f} predicted ({row['ratio']:.3f})",
                flush=True,
            )
    if asked.out:
        about = {"torch": torch.__version__, "what": __doc__.splitlines()[0], "rows": rows}
        asked.out.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
