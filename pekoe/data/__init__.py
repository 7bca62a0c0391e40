"""Problems and worked solutions read from files, the order in which they are drawn, and tokens. No torch."""

from pekoe.data.mix import DataReport, gather_problems
from pekoe.data.order import DataOrder
from pekoe.data.problems import (
    Demonstration,
    DemonstrationFile,
    ProblemFile,
    read_demonstrations,
    read_problems,
    write_demonstrations,
    write_problems,
)
from pekoe.data.tokenizer import Tokenizer

__all__ = [
    "DataOrder",
    "DataReport",
    "Demonstration",
    "DemonstrationFile",
    "ProblemFile",
    "Tokenizer",
    "gather_problems",
    "read_demonstrations",
    "read_problems",
    "write_demonstrations",
    "write_problems",
]
