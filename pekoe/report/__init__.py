"""Floor 3: what people look at. Reads run directories and hears journal events; knows `core` alone, never torch."""

from pekoe.report.terminal import LiveProgress, PlainProgress, make_progress

__all__ = ["LiveProgress", "PlainProgress", "make_progress"]
