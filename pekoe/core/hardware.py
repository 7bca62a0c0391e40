"""Devices and how they are connected: what makers state. `pekoe plan` computes with it.

Rates are per device, a second, dense (no sparsity), in operations and bytes; links count one direction. Sources are the
makers' data sheets, by their titles. What a device reaches of these rates is fitted in `pekoe.plan.costs`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from pekoe.core.errors import UserError, nearest
from pekoe.core.spec import ModelSpec

_GB, _TERA = 1e9, 1e12
USABLE = 0.9  # of a memory: the rest for allocators' gaps, an engine's workspace, and what comes and goes
PROCESS = int(0.6 * 2**30)  # bytes of Python, torch and compiled kernels; on a GPU of its context
SAMPLES = 8  # responses of a group that `pekoe doctor --measure` times


@dataclass(frozen=True, slots=True)
class Device:
    """One accelerator."""

    name: str
    memory_bytes: float
    byte_s: float  # of its memory
    flop_s: float  # bfloat16 with float32 accumulation
    fp8_flop_s: float  # 0: none
    fp4_flop_s: float  # 0: none
    link_byte_s: float  # to the others of its node
    network_byte_s: float  # to other nodes, its share
    per_node: int
    source: str

    def rate(self, weight_bytes: float) -> float:
        """Operations a second with weights of so many bytes; formats that it lacks are computed as the next wider."""
        if weight_bytes < 1 and self.fp4_flop_s:
            return self.fp4_flop_s
        return self.fp8_flop_s if weight_bytes == 1 and self.fp8_flop_s else self.flop_s


def _gpu(name: str, gb: float, tb_s: float, bf16: float, fp8: float, fp4: float, link: float, source: str) -> Device:
    network = 50.0 if link >= 150 else 12.5  # 400 Gb/s a device where it has NVLink or its like, else 100 Gb/s
    per_node = 4 if name == "gb200" else 8
    rates = bf16 * _TERA, fp8 * _TERA, fp4 * _TERA, link * _GB, network * _GB
    return Device(name, gb * _GB, tb_s * _TERA, *rates, per_node, source)


_TABLE = (
    _gpu("a100-40", 40, 1.555, 312, 0, 0, 300, "NVIDIA A100 data sheet (2022)"),
    _gpu("a100", 80, 2.039, 312, 0, 0, 300, "NVIDIA A100 data sheet (2022), SXM"),
    _gpu("a800", 80, 2.039, 312, 0, 0, 200, "as A100; NVLink 400 GB/s both ways"),
    _gpu("h100", 80, 3.35, 989.5, 1979, 0, 450, "NVIDIA H100 data sheet (2023), SXM"),
    _gpu("h100-pcie", 80, 2.0, 756, 1513, 0, 64, "NVIDIA H100 data sheet (2023), PCIe gen 5"),
    _gpu("h100-96", 96, 2.4, 800, 1600, 0, 450, "torchtitan paper (arXiv 2410.06511): HBM2e, 500 W"),
    _gpu("h800", 80, 3.35, 989.5, 1979, 0, 200, "as H100; NVLink 400 GB/s both ways"),
    _gpu("h200", 141, 4.8, 989.5, 1979, 0, 450, "NVIDIA H200 data sheet (2024), SXM"),
    _gpu("gh200", 96, 4.0, 989.5, 1979, 0, 450, "NVIDIA GH200 data sheet (2023), HBM3"),
    _gpu("h20", 96, 4.0, 148, 296, 0, 450, "NVIDIA H20, figures of its product brief (2024)"),
    _gpu("b200", 180, 8.0, 2250, 4500, 9000, 900, "NVIDIA DGX B200 data sheet (2024)"),
    _gpu("gb200", 186, 8.0, 2500, 5000, 10000, 900, "NVIDIA GB200 NVL72 data sheet (2024)"),
    _gpu("l40s", 48, 0.864, 362, 733, 0, 32, "NVIDIA L40S data sheet (2023), PCIe gen 4"),
    _gpu("a6000", 48, 0.768, 155, 0, 0, 32, "NVIDIA RTX A6000 data sheet (2021), PCIe gen 4"),
    _gpu("rtx-4090", 24, 1.008, 165, 330, 0, 32, "NVIDIA Ada architecture white paper (2022)"),
    _gpu("rtx-pro-6000", 96, 1.792, 504, 1008, 2016, 64, "NVIDIA RTX Blackwell PRO white paper (2025)"),
    _gpu("mi300x", 192, 5.3, 1307, 2615, 0, 448, "AMD Instinct MI300X data sheet (2023)"),
)
DEVICES = {device.name: device for device in _TABLE}
# How sources spell them, the more special before the more general.
_SPELT = (
    (r"rtx ?pro ?6000", "rtx-pro-6000"), (r"a6000", "a6000"), (r"4090", "rtx-4090"), (r"l40s", "l40s"),
    (r"mi300x?", "mi300x"), (r"gb200", "gb200"), (r"gh200", "gh200"), (r"b200", "b200"), (r"h200", "h200"),
    (r"h100.*2\.4 ?tb", "h100-96"), (r"h100.*pcie", "h100-pcie"), (r"h100", "h100"), (r"h800", "h800"),
    (r"h20\b", "h20"), (r"a100.*40 ?g|a100-40", "a100-40"), (r"a100", "a100"), (r"a800", "a800"),
)  # fmt: skip


def recognise(text: str) -> Device | None:
    """The device that a source names in its own words, such as "NVIDIA H100 80GB HBM3"."""
    if text in DEVICES:
        return DEVICES[text]
    return next((DEVICES[name] for pattern, name in _SPELT if re.search(pattern, text.lower())), None)


def device_named(name: str, who: str) -> Device:
    """The device that a user names, such as h100 or H100-80; UserError, which begins with `who`, for an unknown one."""
    plain = name.lower().removesuffix("-sxm").removesuffix("-80")
    if plain not in DEVICES:
        raise UserError(f"{who}: expected a device, got {name!r}.{nearest(plain, DEVICES)}")
    return DEVICES[plain]


@dataclass(frozen=True, slots=True)
class Timing:
    """A measurement of this machine: how long `sequences` sequences of a model took to be sampled, or to be trained on.

    Kinds: "sample"; "train", in one process; "recompute", the same with activation checkpointing; "shard", by two
    processes that share the weights (FSDP); "gather", all weights from these two, for a publish.

    Example: Timing("sample", spec, 64, 32, 32, 0.41): 64 responses of 32 tokens to prompts of 32, by groups of 8.
    """

    kind: Literal["sample", "train", "recompute", "shard", "gather"]
    spec: ModelSpec
    sequences: int  # of both processes, where there are two
    prompt: int  # tokens of each
    response: int
    seconds: float
    lengths: tuple[int, ...] = ()  # of the responses, where they differ
    micro_batches: int = 1  # of a process
