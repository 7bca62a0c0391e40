"""The kinds of judging, by name."""

from __future__ import annotations

import re

from pekoe.core.errors import UserError, nearest
from pekoe.verify.kinds import choice, code, countdown, function, gym, logic, math
from pekoe.verify.kinds.base import Kind

_KINDS = (math.KIND, math.UNBOXED, choice.KIND, logic.KIND, countdown.KIND, code.KIND)
KINDS: dict[str, Kind] = {kind.name: kind for kind in _KINDS}
_MADE = {"gym": (re.compile(r"\w+"), gym.make_kind), "function": (re.compile(r"[\w.]+:\w+"), function.make_kind)}


def find_kind(name: str) -> Kind:
    """Return the kind called `name`; UserError with the nearest valid name where there is none."""
    family, _, rest = name.partition(":")
    if family in _MADE and rest:
        form, make = _MADE[family]
        if not form.fullmatch(rest):
            expected = "gym:TASK" if family == "gym" else "function:PACKAGE.MODULE:NAME"
            raise UserError(f"judge: expected a kind {expected}, got {name!r}")
        return make(rest)
    if name not in KINDS:
        raise UserError(f"judge: unknown kind {name!r}.{nearest(name, [*KINDS, 'gym:TASK', 'function:MODULE:NAME'])}")
    return KINDS[name]
