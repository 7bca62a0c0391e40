"""The kinds of judging, by name."""

from __future__ import annotations

from pekoe.core.errors import UserError, nearest
from pekoe.verify.kinds import choice, countdown, logic, math
from pekoe.verify.kinds.base import Kind

KINDS: dict[str, Kind] = {
    kind.name: kind for kind in (math.KIND, math.UNBOXED, choice.KIND, logic.KIND, countdown.KIND)
}


def find_kind(name: str) -> Kind:
    """Return the kind called `name`; UserError with the nearest valid name where there is none."""
    if name not in KINDS:
        raise UserError(f"judge: unknown kind {name!r}.{nearest(name, KINDS)}")
    return KINDS[name]
