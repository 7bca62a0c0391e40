"""`python -m tests.families.table` runs the families' tests and writes the table of docs/models.md."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from pekoe.core.errors import RunError, UserError
from pekoe.core.spec import FamilySpec
from pekoe.model import LoRA, load_model
from pekoe.model.lora import add_lora
from tests.families.configs import FAMILIES, RECURRENT, config_of, save
from tests.families.test_engine import test_it_samples_what_the_forward_says
from tests.families.test_families import documents, packed, test_a_packed_row_is_its_documents_one_by_one

PAGE = Path(__file__).parent.parent.parent / "docs" / "models.md"
FIRST, LAST = "<!-- table -->\n", "<!-- end of the table -->\n"


def main() -> int:
    rows = ["| family | | packed | engine | LoRA |", "|---|---|---|---|---|"]
    for family in sorted(FAMILIES):
        packed_row = outcome(lambda place, f=family: test_a_packed_row_is_its_documents_one_by_one(f, place))
        engine = outcome(lambda place, f=family: test_it_samples_what_the_forward_says(f, place))
        rows.append(
            f"| {family} | {described(family)} | {packed_row} | {engine} | {outcome(lambda p, f=family: adapt(f, p))} |"
        )
        print(rows[-1], flush=True)
    rows += [
        f"| {family} | recurrent | {outcome(lambda p, f=family: refuse(f, p))} | | |" for family in sorted(RECURRENT)
    ]
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(FIRST)
    after = rest.partition(LAST)[2]
    PAGE.write_text(f"{before}{FIRST}\n" + "\n".join(rows) + f"\n\n{LAST}{after}", encoding="utf-8")
    return int(any("**no**" in row for row in rows))


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
