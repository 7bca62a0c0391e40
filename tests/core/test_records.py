"""Records of rollouts on disk: exact, in order, of several nodes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pekoe.core.errors import UserError
from pekoe.core.records import read_records, record_of, steps_recorded, write_records
from pekoe.core.types import Record


def record(prompt: int, response: int, seed: int) -> Record:
    rng = np.random.default_rng(seed)
    values = -rng.exponential(3, response).astype(np.float32)
    return Record.of(rng.integers(0, 2**31 - 1, prompt), rng.integers(0, 99, response), values)


def test_arrays_come_back_bit_by_bit_in_the_order_of_the_lines(tmp_path: Path):
    records = [record(3, 10_000, 0), record(1, 0, 1), record(5, 2, 2)]
    lines = [{"group": 0, "sample": 1}, {"group": 1, "sample": 0}, {"group": 0, "sample": 0}]
    write_records(tmp_path / "rollouts" / "step-000007", lines, records)
    found = read_records(tmp_path, 7)
    assert [(line["group"], line["sample"]) for line in found] == [(0, 0), (0, 1), (1, 0)]
    for line, expected in zip(found, (records[2], records[0], records[1]), strict=True):
        values = expected.logprobs[expected.loss_mask]
        assert np.array_equal(line["logprobs"].view(np.int32), values.view(np.int32))
        assert line["tokens"].tolist() == expected.tokens[expected.loss_mask].tolist()
        assert line["prompt_tokens"].tolist() == expected.tokens[~expected.loss_mask].tolist()


def test_the_files_of_several_nodes_are_one_step(tmp_path: Path):
    for node in range(2):
        write_records(
            tmp_path / "rollouts" / f"step-000001.{node}", [{"group": node, "sample": 0}], [record(2, 3, node)]
        )
    write_records(tmp_path / "rollouts" / "step-000002", [], [])
    assert [line["group"] for line in read_records(tmp_path, 1)] == [0, 1]
    assert read_records(tmp_path, 2) == read_records(tmp_path, 3) == []
    assert steps_recorded(tmp_path) == [1, 2]


def test_lines_without_their_arrays_are_an_error(tmp_path: Path):
    stem = tmp_path / "rollouts" / "step-000001"
    write_records(stem, [{"group": 0, "sample": 0}], [record(2, 3, 0)])
    lines = stem.with_name("step-000001.jsonl.zst").read_bytes()
    write_records(stem, [{"group": 0, "sample": 0}] * 2, [record(2, 3, 0)] * 2)
    stem.with_name("step-000001.jsonl.zst").write_bytes(lines)
    with pytest.raises(UserError, match=r"step-000001\.npz\.zst: cannot be read: .*(shorter|longer)"):
        read_records(tmp_path, 1)


def test_experts_come_back_with_the_records_that_have_them(tmp_path: Path):
    rng = np.random.default_rng(0)
    for dtype, most in ((np.uint8, 255), (np.int16, 400)):
        plain = [record(3, 4, 0), record(2, 0, 1), record(1, 2, 2)]
        known = replace(plain[0], routing=rng.integers(0, most, (7, 2, 3)).astype(dtype))
        known = [known, plain[1], replace(plain[2], routing=rng.integers(0, most, (3, 2, 3)).astype(dtype))]
        lines = [{"group": i, "sample": 0} for i in range(3)]
        write_records(tmp_path / "rollouts" / "step-000001", lines, known)
        found = [record_of(line).routing for line in read_records(tmp_path, 1)]
        assert found[1] is None
        for mine, theirs in zip(found, known, strict=True):
            if mine is not None:
                assert theirs.routing is not None
                assert mine.dtype == dtype
                assert np.array_equal(mine, theirs.routing)
