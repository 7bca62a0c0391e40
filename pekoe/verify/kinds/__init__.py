"""The verifiers, by the name of the kind that they judge."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from pekoe.core.errors import UserError, nearest
from pekoe.core.functions import FUNCTION
from pekoe.verify.kinds import code, function, gym, math, structured
from pekoe.verify.kinds.base import Verifier

_ALL = (math.VERIFIER, math.UNBOXED, structured.CHOICE, structured.LOGIC, structured.COUNTDOWN, code.VERIFIER)
VERIFIERS: dict[str, Verifier] = {verifier.name: verifier for verifier in _ALL}


def check_functions(functions: Collection[str]) -> None:
    """Raise UserError unless each of `functions` has the form "PACKAGE.MODULE:NAME"."""
    for path in functions:
        if not FUNCTION.fullmatch(path):
            raise UserError(f"verify.functions: expected PACKAGE.MODULE:NAME, got {path!r:.200}")
        file, _, name = path.partition(":")
        if file.endswith(".py"):
            raise UserError(f"verify.functions: expected a module, not its file: {file[:-3]}:{name}, got {path!r:.200}")


def find_verifier(kind: str, functions: Collection[str] | Mapping[str, function.Options] = ()) -> Verifier:
    """Return the verifier for `kind`. `functions` lists the rewards of the user's own that `kind` may name; a mapping
    says how each is called.

    The kind comes from a data row, so it must not choose freely what is imported and run. Raises UserError with the
    nearest valid kind.
    """
    family, _, rest = kind.partition(":")
    if family == "function":
        if not FUNCTION.fullmatch(rest):
            raise UserError(f"judge: expected a kind function:PACKAGE.MODULE:NAME, got {kind!r:.200}")
        if rest not in functions:
            allowed = ", ".join(sorted(functions)) or "none"
            listed = f"expected a function listed in verify.functions (or by --function) ({allowed})"
            raise UserError(f"judge: {listed}, got {kind!r:.200}.{nearest(rest[:200], functions)}")
        return function.make_verifier(rest, functions[rest] if isinstance(functions, Mapping) else None)
    if family == "gym" and rest:
        if not re.fullmatch(r"\w+", rest):
            raise UserError(f"judge: expected a kind gym:TASK, got {kind!r:.200}")
        return gym.make_verifier(rest)
    if kind not in VERIFIERS:
        valid = [*VERIFIERS, "gym:TASK", *(f"function:{path}" for path in functions)]
        raise UserError(f"judge: unknown kind {kind!r:.200}.{nearest(kind[:200], valid)}")
    return VERIFIERS[kind]
