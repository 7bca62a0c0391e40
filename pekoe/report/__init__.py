"""Floor 3: what people look at. Reads run directories and hears journal events; knows `core` alone, never torch."""

from pekoe.report.terminal import LiveView, PlainView, make_view

__all__ = ["LiveView", "PlainView", "make_view"]
