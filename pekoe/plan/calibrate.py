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
from pekoe.plan.costs import LOCAL, TENSORS, Constants, Engine, Training, fitted
from pekoe.plan.shapes import Shape

FITTED = {
    "sample": ("layer_s", "step_s", "sequence_s", "weight_share", "decode_flops", "kv_share", "prefill_flops"),
    "train": ("train_flops", "train_passes", "train_layer_s", "batch_s"),
    "recompute": ("train_recompute",),
    "shard": ("shard_layer_s", "update_layer_s", "train_link"),
    "gather": ("gather_tensor_s",),
}
_START = {"weight_share": 0.5, "decode_flops": 0.3, "kv_share": 0.3, "prefill_flops": 0.3, "train_flops": 0.3,
          "layer_s": 1e-4, "step_s": 1e-3, "sequence_s": 1e-5, "batch_s": 1e-2, "train_link": 0.3,
          "shard_layer_s": 1e-3, "update_layer_s": 1e-3, "gather_tensor_s": 1e-3}  # fmt: skip
# Of processes that share cores: who waits for a message computes nothing meanwhile.
_SHARED = {"overlap": 0.0}


def shape_of(spec: ModelSpec) -> Shape:
    sizes = spec.num_layers, spec.hidden_size, spec.num_heads, spec.num_kv_heads, spec.head_dim
    return Shape("small", *sizes, spec.intermediate_size, spec.vocab_size, spec.tied_embeddings)


def predicted(timing: Timing, device: Device, constants: Constants, size: float) -> float:
    """Seconds of what was timed. `size`: bytes of a number of the weights that are sampled from."""
    shape = shape_of(timing.spec)
    if timing.kind == "sample":
        return _sampling(timing, Engine(shape, device, 1, size, size, constants))
    if timing.kind == "gather":
        return shape.num_layers * TENSORS * constants.gather_tensor_s
    length, again = timing.prompt + timing.response, float(timing.kind == "recompute")
    number = 2 if timing.kind == "shard" else 1
    training = Training(shape, device, number, recompute=again, sharded=number > 1, constants=constants)
    return training.step(timing.sequences * length, length, timing.micro_batches)


def _sampling(timing: Timing, engine: Engine) -> float:
    """From the end of one response to that of the next the same sequences run."""
    lengths = sorted(timing.lengths or [timing.response] * timing.sequences)
    seconds, before = len(lengths) / SAMPLES * engine.prefill(timing.prompt), 0
    for ended, length in enumerate(lengths):
        if length > before:
            context = timing.prompt + (before + length) / 2
            seconds += (length - before) * engine.decode(len(lengths) - ended, context)
            before = length
    return seconds


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


def names_of(timings: Sequence[Timing]) -> list[str]:
    """The constants that are fitted to these measurements."""
    kinds = {timing.kind for timing in timings}
    return [name for kind, names in FITTED.items() if kind in kinds for name in names]


def calibrate(device: Device, timings: Sequence[Timing], size: float) -> tuple[Constants, float]:
    """Constants fitted to `timings`, and the median error that is left. `size`: see `predicted`."""
    start = {name: _START[name] for name in names_of(timings) if name in _START}
    constants = replace(fitted(), **(LOCAL | start))
    if any(timing.kind == "shard" for timing in timings):
        constants = replace(constants, **_SHARED)
    for kind, names in FITTED.items():
        if kind not in {timing.kind for timing in timings}:
            continue
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
    names = [*names_of(timings), *LOCAL, *(_SHARED if "shard_layer_s" in names_of(timings) else ())]
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
