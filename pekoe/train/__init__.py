"""Floor 2: training. `trainer.py` holds the only backward(); nothing here knows of rollouts or engines."""

from pekoe.train import checkpoint
from pekoe.train.parallel import Layout
from pekoe.train.trainer import StepStats, Trainer

__all__ = ["Layout", "StepStats", "Trainer", "checkpoint"]
