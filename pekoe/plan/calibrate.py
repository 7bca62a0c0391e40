"""Constants of this machine from measurements of it, and the profile that `pekoe plan --hardware FILE.toml` reads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

import tomli_w

from pekoe.core.hardware import Device, Timing
from pekoe.core.spec import ModelSpec
from pekoe.plan.costs import Constants, Engine, Training, fitted
from pekoe.plan.shapes import Shape

SAMPLES = 8  # of a group, whose prompt is computed once
FITTED = {
    "sample": ("layer_s", "step_s", "sequence_s", "weight_share", "decode_flops", "kv_share", "prefill_flops"),
    "train": ("train_flops", "train_passes", "train_layer_s", "batch_s"),
}
# Of one machine: nothing is sent, no controller stands between, and eager products are what was measured.
LOCAL = {"rollout_share": 1.0, "train_eager": 1.0, "train_foreign": 1.0, "step_overhead": 0.0, "reload_s": 0.0,
         "sync_s": 0.01, "prefill_s": 0.0}  # fmt: skip
_START = {"weight_share": 0.5, "decode_flops": 0.3, "kv_share": 0.3, "prefill_flops": 0.3, "train_flops": 0.3,
          "train_attention": 0.1, "layer_s": 1e-4, "step_s": 1e-3, "sequence_s": 1e-5, "batch_s": 1e-2}  # fmt: skip


def shape_of(spec: ModelSpec) -> Shape:
    sizes = spec.num_layers, spec.hidden_size, spec.num_heads, spec.num_kv_heads, spec.head_dim
    return Shape("small", *sizes, spec.intermediate_size, spec.vocab_size, spec.tied_embeddings)


def predicted(timing: Timing, device: Device, constants: Constants, size: float) -> float:
    """Seconds of what was timed. `size`: bytes of a number of the weights that are sampled from."""
    shape = shape_of(timing.spec)
    if timing.kind == "train":
        length = timing.prompt + timing.response
        training = Training(shape, device, recompute=0.0, sharded=False, constants=constants)
        return training.step(timing.sequences * length, length, 1)
    engine = Engine(shape, device, 1, size, size, constants)
    decode = engine.decode(timing.sequences, timing.prompt + timing.response / 2)
    return timing.response * decode + timing.sequences / SAMPLES * engine.prefill(timing.prompt)


def calibrate(device: Device, timings: Sequence[Timing], size: float = 4.0) -> tuple[Constants, float]:
    """Constants fitted to `timings` by coordinate descent on their logarithms, and the median error that is left."""
    constants = replace(fitted(), **(LOCAL | _START))

    def loss(tried: Constants, kind: str) -> float:
        chosen = [timing for timing in timings if timing.kind == kind]
        return sum(abs(math.log(predicted(timing, device, tried, size) / timing.seconds)) for timing in chosen)

    for kind, names in FITTED.items():
        best, steps = loss(constants, kind), dict.fromkeys(names, 0.5)
        for _ in range(40):
            for name in names:
                for sign in (1, -1):
                    value = getattr(constants, name) * math.exp(sign * steps[name])
                    if value > 1 and name.endswith(("_share", "_flops")):
                        continue  # nothing is faster than the hardware
                    if (found := loss(tried := replace(constants, **{name: value}), kind)) < best:
                        best, constants, steps[name] = found, tried, steps[name] * 1.3
                        break
                else:
                    steps[name] /= 2
    errors = [abs(predicted(timing, device, constants, size) / timing.seconds - 1) for timing in timings]
    return constants, median(errors)


def write_profile(path: Path, device: Device, timings: Sequence[Timing]) -> str:
    """Write what `pekoe plan --hardware` reads; returns a sentence on it."""
    constants, error = calibrate(device, timings)
    names = [*FITTED["sample"], *FITTED["train"], *LOCAL, "train_attention"]
    own = {
        "name": device.name,
        "measured": True,
        "memory_gb": device.memory_bytes / 1e9,
        "memory_gb_s": device.byte_s / 1e9,
        "tflop_s": device.flop_s / 1e12,
        "link_gb_s": device.link_byte_s / 1e9,
        "network_gb_s": device.network_byte_s / 1e9,
        "per_node": device.per_node,
        "constants": {name: float(f"{getattr(constants, name):.4g}") for name in dict.fromkeys(names)},
    }
    path.write_text(tomli_w.dumps(own), encoding="utf-8")
    return (
        f"{path}: {device.flop_s / 1e12:.3g} TFLOP/s, memory {device.byte_s / 1e9:.3g} GB/s; {len(timings)} "
        f"measurements, which the constants meet within {error:.0%} (median). Next: pekoe plan RECIPE --hardware {path}"
    )
