"""What waiting at OpenMP's barriers costs: one optimizer step, alone and beside a busy process (decision 0002).

    python benchmarks/bench_wait_policy.py

Each case is a process of its own; the cases take turns, three rounds, and the medians are printed as JSON.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time

NUM_SEQUENCES, NUM_STEPS, NUM_ROUNDS = 64, 6, 3
VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
SPINS = [f"GOMP_SPINCOUNT={count}" for count in (100, 1000, 10_000, 100_000)]
CASES = ["", "OMP_WAIT_POLICY=ACTIVE", "OMP_WAIT_POLICY=PASSIVE", *SPINS]


def child() -> None:
    """Print the median seconds of an optimizer step of the demo's model."""
    import numpy as np

    from pekoe.algo.loss import cross_entropy
    from pekoe.config.recipes import OptimSection
    from pekoe.core.types import Sample
    from pekoe.demo.run import model_spec
    from pekoe.model import Decoder
    from pekoe.train import Trainer

    rng = np.random.default_rng(0)
    model = Decoder(model_spec(26))
    model.init_weights(0)
    samples: list[Sample] = []
    for length in rng.integers(40, 60, NUM_SEQUENCES):
        mask = np.arange(length) >= 12
        zeros = np.zeros(length, np.float32)
        samples.append(Sample(rng.integers(0, 26, length), mask, zeros, zeros))
    trainer = Trainer(model, OptimSection(), 8192, 100)
    trainer.step(samples, cross_entropy)
    seconds: list[float] = []
    for _ in range(NUM_STEPS):
        start = time.perf_counter()
        trainer.step(samples, cross_entropy)
        seconds.append(time.perf_counter() - start)
    print(statistics.median(seconds))


def measure(case: str, busy: bool) -> float:
    environment = {k: v for k, v in os.environ.items() if k not in VARIABLES}
    environment |= dict([case.split("=")] if case else [])
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else None
    try:
        done = subprocess.run(
            [sys.executable, __file__, "child"], env=environment, check=True, capture_output=True, text=True
        )
        return float(done.stdout)
    finally:
        if other:
            other.kill()
            other.wait()


def main() -> None:
    seconds: dict[str, dict[str, list[float]]] = {}
    for _ in range(NUM_ROUNDS):
        for busy in ("alone", "beside a busy process"):
            for case in CASES:
                seconds.setdefault(case or "unset", {}).setdefault(busy, []).append(measure(case, busy != "alone"))
    medians = {c: {b: round(statistics.median(v), 3) for b, v in values.items()} for c, values in seconds.items()}
    print(json.dumps(medians, indent=1))


if __name__ == "__main__":
    child() if sys.argv[1:] == ["child"] else main()
