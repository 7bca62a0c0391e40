"""Training: `trainer.py` has the only backward(); nothing here knows of rollouts or engines."""

from pekoe.train.parallel import Layout
from pekoe.train.trainer import StepStats, Trainer

__all__ = ["Layout", "StepStats", "Trainer"]
