"""PeakMemory resident memory; and, as a program, what log-probs over a large vocabulary take, chunked or not.

python train_memory.py '{"chunked": true, "vocab": 151936, "hidden": 64, "tokens": 8192, "threads": 2}'
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def _status(name: str) -> int:
    lines = STATUS.read_text().splitlines() if STATUS.is_file() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name)), 0)


class PeakMemory:
    """PeakMemory resident memory from now on, and what there is now. 0 where there is no /proc."""

    def __init__(self) -> None:
        if CLEAR.exists():
            CLEAR.write_text("5")  # resets VmHWM
        self.base = _status("VmRSS:")

    def about(self) -> dict[str, int]:
        return {"base_bytes": self.base, "peak_bytes": _status("VmHWM:")}


def head(options: dict[str, Any]) -> dict[str, Any]:
    """Log-probs, entropies and backward of `tokens` targets, in float32.

    Unchunked is written as frugally as plain torch allows: nothing is divided by a temperature of 1, no logits outlive
    their log-softmax, entropy's one temporary is overwritten in place. What is left is three times the logits.
    """
    import torch

    from pekoe.algo.loss import CHUNK_VALUES, chosen_logprobs

    def unchunked(hidden: Any, weight: Any, targets: Any, temperature: float) -> tuple[Any, Any]:
        assert temperature == 1.0
        logprobs = torch.log_softmax(hidden @ weight.T, -1)
        entropy = -logprobs.detach().exp().mul_(logprobs.detach()).sum(-1)
        return logprobs.gather(-1, targets[:, None])[:, 0], entropy

    torch.set_num_threads(options["threads"])
    torch.manual_seed(0)
    hidden = torch.randn(options["tokens"], options["hidden"], requires_grad=True)
    weight = (torch.randn(options["vocab"], options["hidden"]) * 0.02).requires_grad_()
    targets = torch.randint(options["vocab"], (options["tokens"],))
    way = chosen_logprobs if options["chunked"] else unchunked
    few = CHUNK_VALUES // options["vocab"] + 1  # more than one chunk: what it imports is not charged to it
    logprobs, _ = way(hidden[:few], weight, targets[:few], 1.0)
    logprobs.sum().backward()
    hidden.grad = weight.grad = None
    peak, start = PeakMemory(), time.perf_counter()
    logprobs, entropy = way(hidden, weight, targets, 1.0)
    logprobs.sum().backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return {
        "seconds": time.perf_counter() - start,
        "logprob_mean": float(logprobs.detach().mean()),
        "entropy_mean": float(entropy.detach().mean()),
        "grad_norms": [float(hidden.grad.norm()), float(weight.grad.norm())],
        **peak.about(),
    }


if __name__ == "__main__":
    print(json.dumps(head(json.loads(sys.argv[1]))))
