"""Compiles the GPU's kernels for each generation of devices, on a machine that has none of them.

Of each kernel, at each shape of the models that Pekoe knows, as it is launched: registers of a thread, bytes that it
keeps in memory because they do not fit there (spills; any is a failure in bfloat16), and shared memory of a block,
beside what the device has. The assembler is the one that triton ships; figures are read from the binary.

    python benchmarks/compile_kernels.py [--quick] [--dtype bfloat16] [--out FILE.json]
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from rollout_report import about
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pekoe.engine.embedded import triton_kernels
from pekoe.engine.embedded.attention_cuda import launch, next_power_of_2, tile_queries
from pekoe.plan.shapes import SHAPES

# Compute capability: devices, and shared memory that a block may have (CUDA C++ Programming Guide, table of technical
# specifications per compute capability: "maximum amount of shared memory per thread block").
DEVICES = {
    80: ("A100", 163),
    86: ("A6000, A40, RTX 3090", 99),
    89: ("L40S, L4, RTX 4090", 99),
    90: ("H100, H200", 227),
    100: ("B200", 227),
    120: ("RTX PRO 6000, RTX 5090", 99),
}
warnings.filterwarnings("ignore", "TRITON_DEFAULT_FP_FUSION")
BLOCK_TOKENS = 16  # engine.block_tokens
TYPES = {"bfloat16": "*bf16", "float32": "*fp32"}
CUOBJDUMP = Path(str(triton.__file__)).parent / "backends/nvidia/bin/cuobjdump"


@dataclass(frozen=True)
class Compiled:
    """One kernel for one device."""

    kernel: str
    dtype: str
    head_dim: int
    heads_per_kv: int
    sm: int
    constants: dict[str, int]
    registers: int
    spilled_bytes: int
    shared_bytes: int
    shared_limit: int

    @property
    def good(self) -> bool:
        """In float32, which no run needs to be fast, the assembler spills up to 16 bytes of some shapes, to stay at 128
        registers."""
        most = 0 if self.dtype == "bfloat16" else 16
        return self.spilled_bytes <= most and self.shared_bytes <= self.shared_limit


def shapes(quick: bool) -> list[tuple[int, int]]:
    """(head_dim, query heads of a key/value head): of known dense models, and the largest taken."""
    if quick:
        return [(128, 7)]
    dense = [shape for shape in SHAPES.values() if not shape.num_experts and shape.full_layers is None]
    sizes = {(shape.head_dim, shape.num_heads // shape.num_kv_heads) for shape in dense if shape.head_dim <= 128}
    return sorted({*sizes, (256, 8)})


def cases(dtypes: list[str], quick: bool) -> Iterator[tuple[str, str, int, int, dict[str, int]]]:
    """(name, dtype, head_dim, heads_per_kv, constants) of every launch in `CUDACache`."""
    for dtype in dtypes:
        for dim, per in shapes(quick):
            itemsize = getattr(torch, dtype).itemsize
            if dim * itemsize > 512:  # `CUDACache.takes`
                continue
            common = {"S": BLOCK_TOKENS, "G": per, "D": dim}
            for queries in (max(16, next_power_of_2(per)), tile_queries(dim, itemsize)):
                for window, cap in ((0, 0), (4096, 50)):  # 4096 and 50: Gemma 2's
                    special = {"WINDOW": window, "CAP": cap}
                    yield "attend", dtype, dim, per, common | launch(queries, dim, itemsize, cap > 0) | special
            heads = {"G": per, "D": dim, "HEADS": next_power_of_2(per), "ROOM": max(16, next_power_of_2(dim))}
            for sinks in (0, 1):
                yield "merge", dtype, dim, per, heads | {"SINKS": sinks}
            width = 4 * dim  # of four key/value heads
            yield "write", dtype, dim, per, {"S": BLOCK_TOKENS, "KD": width, "ROOM": next_power_of_2(width)}


def signature(name: str, pointer: str) -> dict[str, str]:
    """Types of a kernel's arguments, as `CUDACache` gives them."""
    integers, wide = ("width", "K"), ("outs", "maxima", "sums")
    numbers = {"k", "v", "q", "keys", "values", "result", "sinks"}
    types: dict[str, str] = {}
    for argument in getattr(triton_kernels, name).arg_names:
        if argument.isupper() and argument != "K":
            types[argument] = "constexpr"
        elif argument in integers:
            types[argument] = "i32"
        elif argument == "scale":
            types[argument] = "fp32"
        else:
            types[argument] = "*fp32" if argument in wide else pointer if argument in numbers else "*i32"
    return types


def compiled(name: str, dtype: str, dim: int, per: int, constants: dict[str, int], sm: int) -> Compiled:
    kernel, types = getattr(triton_kernels, name), signature(name, TYPES[dtype])
    # Memory of torch begins at multiples of 16 bytes, as do the parts of a plan but for one counter.
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, argument in enumerate(kernel.arg_names)
        if types[argument].startswith("*") and argument != "count"
    }
    options = {"num_warps": constants.get("num_warps", 4)}
    values = {key: value for key, value in constants.items() if key != "num_warps"}
    binary = triton.compile(
        ASTSource(kernel, types, values, aligned), target=GPUTarget("cuda", sm, 32), options=options
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        told = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", told)}
    # Dynamic shared memory, and what the binary has of its own.
    shared = binary.metadata.shared + found["SHARED"]
    spilled = found["STACK"] + found["LOCAL"]
    return Compiled(name, dtype, dim, per, sm, constants, found["REG"], spilled, shared, DEVICES[sm][1] * 1024)


def show(rows: list[Compiled]) -> str:
    """A line for each kernel: registers, and KiB of shared memory, on each device."""
    lines = [f"{'':<52}" + "".join(f"{f'sm_{sm}':>13}" for sm in DEVICES)]
    lines.append(
        f"{'shared memory of a block':<52}" + "".join(f"{f'{limit} KiB':>13}" for _, limit in DEVICES.values())
    )
    by_case: dict[str, list[Compiled]] = {}
    for row in rows:
        tile = f" {row.constants['M']} x {row.constants['N']}" if "M" in row.constants else ""
        tile += " window, cap" * bool(row.constants.get("CAP")) + " sinks" * bool(row.constants.get("SINKS"))
        case = f"{row.kernel}{tile}, {row.dtype}, D {row.head_dim}, G {row.heads_per_kv}"
        by_case.setdefault(case, []).append(row)
    for case, found in by_case.items():
        cells = [
            f"{row.registers} / {row.shared_bytes / 1024:.0f}" + (f" -{row.spilled_bytes}" if row.spilled_bytes else "")
            for row in found
        ]
        lines.append(f"{case:<52}" + "".join(f"{cell:>13}" for cell in cells))
    bad = sum(not row.good for row in rows)
    lines.append(f"registers / KiB of shared memory; {len(rows)} compiled, {bad} spill or take too much shared memory")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="Qwen2.5-7B's shape alone")
    parser.add_argument("--dtype", choices=TYPES, action="append", help="by default all")
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    parser.set_defaults(device="cpu")
    args = parser.parse_args()
    rows = [compiled(*case, sm) for case in cases(args.dtype or list(TYPES), args.quick) for sm in DEVICES]
    print(show(rows))
    if args.out:
        result: dict[str, Any] = about("compile-kernels", args) | {"rows": [asdict(row) for row in rows]}
        result["versions"] |= {"torch": torch.__version__, "triton": triton.__version__}
        result["devices"] = {f"sm_{sm}": {"devices": names, "shared_kib": kib} for sm, (names, kib) in DEVICES.items()}
        lines = ",\n".join(json.dumps(row) for row in result.pop("rows"))
        args.out.write_text(json.dumps(result, indent=1)[:-2] + f',\n "rows": [\n{lines}\n]\n}}\n')
    return int(not all(row.good for row in rows))


if __name__ == "__main__":
    sys.exit(main())
