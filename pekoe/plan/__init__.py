"""What the parts of a run cost on hardware that is not here, in seconds and bytes. Knows core and config; imports no
torch. `benchmarks/bench_plan.py` scores it against published figures; there is no `pekoe plan` yet."""
