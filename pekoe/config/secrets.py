"""Values of a recipe that are nobody else's business: they reach neither reports nor trackers nor results."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

HIDDEN = "***"
# Ends of the names of variables (HF_TOKEN, OPENAI_API_KEY) and options (--api-key), whose values are hidden.
_NAME = re.compile(r"(?i)(?:^|[-_])(?:api|auth)?(?:token|key|secret|password|passwd|pwd|credentials?)s?$")
_OPTION = re.compile(r"(--?[\w-]+)=(.*)", re.DOTALL)
_IN_URL = re.compile(r"(\w://)[^/?#@\s]*(?:@[^/?#@\s]*)*@")  # user:password@
_IN_QUERY = re.compile(r"(?i)([?&](?:[\w-]*[-_])?(?:api|auth)?(?:token|key|secret|password|signature|sig)=)[^&#\s]+")


def without_secrets(value: Any, name: str = "") -> Any:
    """A copy of a tree of sections in which texts that look like secrets are "***".

    These are texts under names such as HF_TOKEN or api_key, the argument that follows an option such as --api-key, and
    user names, passwords and keys in urls. Numbers stay: `kv_tokens` is none.
    """
    if isinstance(value, Mapping):
        return {key: without_secrets(item, str(key)) for key, item in cast("Mapping[str, Any]", value).items()}
    if isinstance(value, str):
        return HIDDEN if value and _NAME.search(name) else _shown(value)
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        items = list(cast("Sequence[Any]", value))
        before = ["", *(item if isinstance(item, str) and re.fullmatch(r"--?[\w-]+", item) else "" for item in items)]
        return [without_secrets(item, option) for item, option in zip(items, before, strict=False)]
    return value


def _shown(text: str) -> str:
    option = _OPTION.fullmatch(text)
    if option and _NAME.search(option[1]):
        return f"{option[1]}={HIDDEN}"
    return _IN_QUERY.sub(rf"\1{HIDDEN}", _IN_URL.sub(rf"\1{HIDDEN}@", text))
