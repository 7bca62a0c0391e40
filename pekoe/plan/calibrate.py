"""Constants of this machine from measurements of it, and the profile that `pekoe plan --hardware FILE.toml` reads."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

import tomli_w

from pekoe.core.hardware import SAMPLES, Device, Timing
from pekoe.core.spec import ModelSpec
from pekoe.plan.costs import LOCAL, Constants, Engine, Training, fitted
from pekoe.plan.shapes import Shape

FITTED = {
    "sample": ("layer_s", "step_s", "sequence_s", "weight_share", "decode_flops", "kv_share", "prefill_flops"),
    "train": ("train_flops", "train_passes", "train_layer_s", "batch_s"),
}
_START = {"weight_share": 0.5, "decode_flops": 0.3, "kv_share": 0.3, "prefill_flops": 0.3, "train_flops": 0.3,
          "layer_s": 1e-4, "step_s": 1e-3, "sequence_s": 1e-5, "batch_s": 1e-2}  # fmt: skip


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


def descend(
    loss: Callable[[Constants], float], constants: Constants, names: Sequence[str], rounds: int, step: float
) -> Constants:
    """Coordinate descent on the logarithms of the constants that are named."""
    best, steps = loss(constants), dict.fromkeys(names, step)
    for _ in range(rounds):
        for name in names:
            for sign in (1, -1):
                tried = replace(constants, **{name: getattr(constants, name) * math.exp(sign * steps[name])})
                if (found := loss(tried)) < best:
                    best, constants, steps[name] = found, tried, steps[name] * 1.3
                    break
            else:
                steps[name] /= 2
    return constants


def calibrate(device: Device, timings: Sequence[Timing], size: float) -> tuple[Constants, float]:
    """Constants fitted to `timings`, and the median error that is left. `size`: see `predicted`."""
    constants = replace(fitted(), **(LOCAL | _START))
    for kind, names in FITTED.items():
        chosen = [timing for timing in timings if timing.kind == kind]

        def loss(tried: Constants, chosen: Sequence[Timing] = chosen, names: Sequence[str] = names) -> float:
            if any(getattr(tried, name) > 1 for name in names if name.endswith(("_share", "_flops"))):
                return math.inf  # nothing is faster than the hardware
            return sum(abs(math.log(predicted(timing, device, tried, size) / timing.seconds)) for timing in chosen)

        constants = descend(loss, constants, names, 40, 0.5)
    errors = [abs(predicted(timing, device, constants, size) / timing.seconds - 1) for timing in timings]
    return constants, median(errors)


def write_profile(path: Path, device: Device, timings: Sequence[Timing], size: float) -> str:
    """Write what `pekoe plan --hardware` reads; returns a sentence on it. `size`: see `predicted`."""
    constants, error = calibrate(device, timings, size)
    names = [*FITTED["sample"], *FITTED["train"], *LOCAL]
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
    path.write_text(f"# {device.source}\n{tomli_w.dumps(own)}", encoding="utf-8")
    return (
        f"{path}: {device.flop_s / 1e12:.3g} TFLOP/s, memory {device.byte_s / 1e9:.3g} GB/s; {len(timings)} "
        f"measurements, which the constants meet within {error:.0%} (median); {device.source}. Next: pekoe plan RECIPE "
        f"--hardware {path}"
    )
