"""The same loop on a cluster of machines, by Ray: the only place that knows it.

nodes.py            Ray itself, placement, the depots
depot.py            what was sampled on a node, until it is trained on
engine_worker.py    an engine with its judges; engines.py: all of them, as the controller sees them
trainer_worker.py   a rank; trainer.py: all of them
sampler.py, sync.py what the loop calls in place of `run.rollout` and `run.sync`
weights.py          weights from ranks to engines
build.py            puts them together
"""

from pekoe.ray.placement import plan
from pekoe.ray.run import run_cluster

__all__ = ["plan", "run_cluster"]
