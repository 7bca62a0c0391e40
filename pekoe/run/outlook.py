"""Sets what steps take beside what was predicted, after a setting or the fleet of a run has changed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pekoe.config.base import ConfigSection
from pekoe.core.journal import read_lines
from pekoe.plan.own import AFTER, check_forecast


@dataclass(slots=True)
class Outlook:
    """Counts the steps since the run began or went on, or its number of engines changed."""

    left: int = AFTER + 1  # steps to measure
    num_engines: float | None = None

    def after_step(self, config: ConfigSection, run_dir: Path, num_engines: float | None) -> dict[str, Any] | None:
        """The journal's event "forecast", once enough steps are in it since a change.

        Args:
            num_engines: that serve, of a cluster.
        """
        if self.num_engines not in (None, num_engines):
            self.left = AFTER + 1
        self.num_engines = num_engines
        self.left -= 1
        if self.left:
            return None
        events = [event for event in read_lines(run_dir / "journal.jsonl") if "event" in event]
        return check_forecast(config.model_dump(mode="json", exclude_none=True), events, run_dir)
