"""Progress on a terminal, trackers, and the HTML report of run directories. Imports core and config alone, no torch."""

from pekoe.report.terminal import LiveProgress, PlainProgress, make_progress

__all__ = ["LiveProgress", "PlainProgress", "make_progress"]
