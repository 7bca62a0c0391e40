"""Modules of assertions that are no tests themselves: their failures are to show values too."""

import pytest

for _name in ("contract", "harness", "leftovers", "reference"):
    pytest.register_assert_rewrite(f"tests.engine.{_name}")
