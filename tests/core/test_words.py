"""Sentences agree in number."""

from pekoe.core.words import counted


def test_a_noun_agrees_with_its_number():
    assert counted(1, "step") == "1 step"
    assert counted(0, "step") == "0 steps"
    assert counted(1200, "held-out problem") == "1,200 held-out problems"
    assert [counted(2, noun) for noun in ("box", "reply", "day", "batch")] == [
        "2 boxes", "2 replies", "2 days", "2 batches",
    ]  # fmt: skip
