"""I7: free + cached + in use = total, after every call; nothing is freed twice."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from pekoe.engine.embedded.blocks import BlockPool, OutOfBlocks
from pekoe.engine.embedded.radix import PrefixTree

BLOCK = 2


def test_taking_and_releasing():
    pool = BlockPool(3)
    blocks = pool.take(2)
    assert (pool.num_free, pool.num_in_use) == (1, 2)
    pool.retain(blocks[:1])
    pool.release(blocks)
    assert (pool.num_free, pool.num_in_use) == (2, 1)
    with pytest.raises(OutOfBlocks):
        pool.take(3)
    pool.release(blocks[:1])
    assert pool.num_free == 3


def test_a_block_cannot_be_freed_twice():
    pool = BlockPool(2)
    blocks = pool.take(1)
    pool.release(blocks)
    with pytest.raises(AssertionError, match="freed twice"):
        pool.release(blocks)
    with pytest.raises(AssertionError, match="is free"):
        pool.retain(blocks)


def test_integrity_notices_a_wrong_account():
    pool = BlockPool(2)
    (block,) = pool.take(1)
    pool.check_integrity({block: 1}, set())
    with pytest.raises(AssertionError, match="miscounted"):
        pool.check_integrity({block: 2}, set())
    with pytest.raises(AssertionError, match="miscounted"):
        pool.check_integrity({block: 1}, {block})
    pool._free.append(block)
    with pytest.raises(AssertionError):
        pool.check_integrity({block: 1}, set())


class Sequences(RuleBasedStateMachine):
    """Sequences over a two-letter alphabet come, share prefixes, and go, in a pool that is too small for all."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(12)
        self.tree = PrefixTree(self.pool, BLOCK)
        self.live: list[list[int]] = []

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=9))
    def start(self, tokens: list[int]):
        context = np.array(tokens)
        cached = self.tree.match(context[:-1])
        try:
            fresh = self.pool.take(-(-len(tokens) // BLOCK) - len(cached))
        except OutOfBlocks:
            self.pool.release(cached)
            return
        self.live.append(cached + fresh)
        self.tree.insert(context, cached + fresh)

    @rule(which=st.integers(0, 50))
    def end(self, which: int):
        if self.live:
            self.pool.release(self.live.pop(which % len(self.live)))

    @rule(count=st.integers(1, 5))
    def evict(self, count: int):
        self.tree.evict(count)

    @rule()
    def flush(self):
        self.tree.flush()
        assert self.tree.match(np.array([0, 0, 1, 1])) == []

    @invariant()
    def accounts_agree(self):
        users: dict[int, int] = {}
        for blocks in self.live:
            for block in blocks:
                users[block] = users.get(block, 0) + 1
        self.pool.check_integrity(users, self.tree.blocks())
        assert self.pool.num_free + self.pool.num_cached + self.pool.num_in_use == 12


TestSequences = Sequences.TestCase
TestSequences.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_the_tree_finds_whole_blocks_of_a_prefix():
    pool = BlockPool(8)
    tree = PrefixTree(pool, BLOCK)
    blocks = pool.take(3)
    tree.insert(np.array([1, 2, 3, 4, 5]), blocks)  # two full blocks; the third is partly filled
    assert tree.match(np.array([1, 2, 3, 4, 9])) == blocks[:2]
    assert tree.match(np.array([1, 2, 9, 9])) == blocks[:1]
    assert tree.match(np.array([2, 1])) == []


def test_a_used_node_has_a_used_parent():
    """Two sequences admitted together compute the same first block twice; when one ends, all that is idle can go."""
    pool = BlockPool(5)
    tree = PrefixTree(pool, BLOCK)
    short, long = pool.take(1), pool.take(3)
    tree.insert(np.array([1, 1]), short)
    tree.insert(np.array([1, 1, 2, 2, 3, 3]), long)
    pool.release(short)
    assert pool.num_available == 2
    assert len(pool.take(2)) == 2


def test_the_least_recently_used_leaf_goes_first():
    pool = BlockPool(4)
    tree = PrefixTree(pool, BLOCK)
    old, new = pool.take(1), pool.take(1)
    tree.insert(np.array([1, 1]), old)
    tree.insert(np.array([2, 2]), new)
    pool.release(tree.match(np.array([1, 1])))  # now `new` is the older
    pool.release(old + new)
    tree.evict(1)
    assert tree.match(np.array([2, 2])) == []
    assert tree.match(np.array([1, 1])) == old


@given(st.lists(st.tuples(st.sampled_from(["insert", "match", "evict"]), st.lists(st.integers(0, 1), max_size=8))))
def test_eviction_is_least_recently_used_whatever_came_before(steps: list[tuple[str, list[int]]]):
    """Against the plain way: of all leaves that nobody uses, the one whose last use is longest ago."""
    pool = BlockPool(1000)
    tree = PrefixTree(pool, BLOCK)
    used: dict[tuple[int, ...], int] = {}  # prefix by whole blocks -> when it was last used
    for now, (what, tokens) in enumerate(steps):
        prefixes = [tuple(tokens[:end]) for end in range(BLOCK, len(tokens) + 1, BLOCK)]
        if what == "evict":
            leaves = [p for p in used if not any(len(q) > len(p) and q[: len(p)] == p for q in used)]
            tree.evict(1)
            if leaves:
                del used[min(leaves, key=used.__getitem__)]
        else:
            held = tree.match(np.array(tokens, np.int64))
            assert len(held) == sum(p in used for p in prefixes)
            if what == "insert":
                held += pool.take(len(prefixes) - len(held))
                tree.insert(np.array(tokens, np.int64), held)
            used |= dict.fromkeys(prefixes[: len(held)], now)
            pool.release(held)
        assert len(tree.blocks()) == len(used)
        pool.check_integrity({}, tree.blocks())


def test_out_of_date_entries_do_not_pile_up():
    pool = BlockPool(4)
    tree = PrefixTree(pool, BLOCK)
    blocks = pool.take(2)
    tree.insert(np.array([1, 2, 3, 4]), blocks)
    pool.release(blocks)
    for _ in range(1000):
        pool.release(tree.match(np.array([1, 2, 3, 4])))
    assert len(tree._idle) < 100
