"""`python -m tests.families.table` runs the families' tests and writes the table of docs/models.md.

`--columns FSDP TP` runs those alone, and leaves the others as they are. SGLang and vLLM are run where they are named,
by tests.families.served; PEKOE_SGLANG_PYTHON and PEKOE_VLLM_PYTHON name their environments.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from pekoe.core.errors import RunError, UserError
from pekoe.core.spec import FamilySpec
from pekoe.model import LoRA, load_model
from pekoe.model.lora import add_lora
from tests.families import served
from tests.families.configs import FAMILIES, RECURRENT, config_of, save
from tests.families.ranks import LAYOUTS, compare_layouts
from tests.families.test_engine import test_it_samples_what_the_forward_says
from tests.families.test_families import documents, packed, test_a_packed_row_is_its_documents_one_by_one
from tests.families.test_parallel import TOLERANCE

PAGE = Path(__file__).parent.parent.parent / "docs" / "models.md"
FLOAT32 = 1e-3  # of mixtures, whose products have no float64
FIRST, LAST = "<!-- table -->\n", "<!-- end of the table -->\n"
SERVERS = {"SGLang": "sglang", "vLLM": "vllm"}
OTHERS = ["packed", "engine", *LAYOUTS, "LoRA"]
COLUMNS = ["family", "", "packed", "engine", *SERVERS, *LAYOUTS, "LoRA"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--columns", nargs="+", default=OTHERS, choices=[*OTHERS, *SERVERS])
    columns: list[str] = parser.parse_args().columns
    shared = layouts(sorted(FAMILIES), [name for name in LAYOUTS if name in columns])
    known = cells(table()[1])
    rows: list[list[str]] = []
    for family in sorted(FAMILIES):
        row = known.get(family, {}) | {"family": family, "": described(family)} | shared[family]
        for name in set(columns) - LAYOUTS.keys():
            row[name] = run(family, name, row.get(name, "untested"))
        rows.append([row.get(name, "untested") for name in COLUMNS])
        print(" | ".join(rows[-1]), flush=True)
    for family in sorted(RECURRENT):
        refused = outcome(lambda p, f=family: refuse(f, p))
        rows.append([family, "recurrent", refused, *[""] * (len(COLUMNS) - 3)])
    lines = [COLUMNS, ["---"] * len(COLUMNS), *rows]
    text = "\n".join(f"| {' | '.join(line)} |".replace("|  |", "| |").replace("|  |", "| |") for line in lines)
    before, _, after = table()
    PAGE.write_text(f"{before}{FIRST}\n{text}\n\n{LAST}{after}", encoding="utf-8")
    return int("**no**" in text)


def table() -> tuple[str, str, str]:
    """The page before the table, the table, and the page after it."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(FIRST)
    found, _, after = rest.partition(LAST)
    return before, found, after


def run(family: str, column: str, before: str) -> str:
    if column in SERVERS:
        return served.outcome(family, SERVERS[column]) if family in served.TRIED else before
    check = {
        "packed": lambda place: test_a_packed_row_is_its_documents_one_by_one(family, place),
        "engine": lambda place: test_it_samples_what_the_forward_says(family, place),
        "LoRA": lambda place: adapt(family, place),
    }
    return outcome(check[column])


def cells(text: str) -> dict[str, dict[str, str]]:
    """What a table says, by its first column and by its columns' names."""
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in text.splitlines() if "|" in line]
    return {row[0]: dict(zip(rows[0], row, strict=False)) for row in rows[2:]}


def layouts(families: list[str], names: list[str]) -> dict[str, dict[str, str]]:
    """Of each family on two processes: whether it gives the numbers of one."""
    said: dict[str, dict[str, str]] = {family: {} for family in families}
    if not names:
        return said
    with tempfile.TemporaryDirectory() as place:
        for family in families:
            save(family, Path(place) / family)
        found = compare_layouts(Path(place), families, names)
    for (family, name), result in found.items():
        refused = isinstance(result, str) and result.startswith(UserError.__name__)
        limit = FLOAT32 if "experts" in described(family) else TOLERANCE
        right = not isinstance(result, str) and result <= limit
        said[family][name] = "yes" if right else "refused" if refused else "**no**"
        print(family, name, result, file=sys.stderr, flush=True)
    return said


def outcome(check: Callable[[Path], object]) -> str:
    with tempfile.TemporaryDirectory() as place:
        try:
            check(Path(place))
        except UserError:
            return "refused"
        except (AssertionError, RunError) as error:
            print(error, file=sys.stderr)
            return "**no**"
    return "yes"


def described(family: str) -> str:
    """What its tiny configuration has beside Llama's."""
    with tempfile.TemporaryDirectory() as place:
        spec = load_model(save(family, Path(place)), implementation="transformers").spec
    assert isinstance(spec, FamilySpec)
    shapes = spec.attention_layers
    has = {
        "experts": spec.num_experts > 0,
        "window": any(shape.window for shape in shapes),
        "layers of unequal heads": len({(s.num_kv_heads, s.key_dim) for s in shapes}) > 1,
        "scores of its own": any(not s.plain and not s.window for s in shapes),
        "tied": spec.tied_embeddings,
    }
    return ", ".join(name for name, there in has.items() if there)


def adapt(family: str, place: Path) -> None:
    model = load_model(save(family, place), implementation="transformers")
    model.lora = add_lora(model, LoRA(2, 4.0, ()), 0)
    packed(model, documents()).sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if ".lora_B." in name)


def refuse(family: str, place: Path) -> None:
    config_of(family).save_pretrained(place)
    (place / "model.safetensors").touch()
    load_model(place)


if __name__ == "__main__":
    sys.exit(main())
