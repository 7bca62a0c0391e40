"""Memory, step time and price of a run, before anything is rented. Knows core and config; imports no torch."""
