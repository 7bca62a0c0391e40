"""I7: free + cached + in use = total, after every call; nothing is freed twice."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from pekoe.engine.embedded.cache_manager import KVCacheManager, OutOfBlocks

BLOCK = 2


def test_taking_and_releasing():
    cache = KVCacheManager(3, BLOCK)
    blocks = cache.allocate(2)
    assert (cache.num_free, cache.num_in_use) == (1, 2)
    cache.retain(blocks[:1])
    cache.release(blocks)
    assert (cache.num_free, cache.num_in_use) == (2, 1)
    with pytest.raises(OutOfBlocks):
        cache.allocate(3)
    cache.release(blocks[:1])
    assert cache.num_free == 3


def test_a_block_cannot_be_freed_twice():
    cache = KVCacheManager(2, BLOCK)
    blocks = cache.allocate(1)
    cache.release(blocks)
    with pytest.raises(AssertionError, match="freed twice"):
        cache.release(blocks)
    with pytest.raises(AssertionError, match="is free"):
        cache.retain(blocks)


def test_integrity_notices_a_wrong_account():
    cache = KVCacheManager(2, BLOCK)
    (block,) = cache.allocate(1)
    cache.check_integrity({block: 1})
    with pytest.raises(AssertionError, match="miscounted"):
        cache.check_integrity({block: 2})
    cache._free.append(block)
    with pytest.raises(AssertionError):
        cache.check_integrity({block: 1})


class Sequences(RuleBasedStateMachine):
    """Sequences over a two-letter alphabet come, share prefixes, and go, in a cache that is too small for all."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = KVCacheManager(12, BLOCK)
        self.live: list[list[int]] = []

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=9))
    def start(self, tokens: list[int]):
        context = np.array(tokens)
        cached = self.cache.match_prefix(context[:-1])
        try:
            fresh = self.cache.allocate(-(-len(tokens) // BLOCK) - len(cached))
        except OutOfBlocks:
            self.cache.release(cached)
            return
        self.live.append(cached + fresh)
        self.cache.insert_prefix(context, cached + fresh)

    @rule(which=st.integers(0, 50))
    def end(self, which: int):
        if self.live:
            self.cache.release(self.live.pop(which % len(self.live)))

    @rule(count=st.integers(1, 5))
    def evict(self, count: int):
        self.cache.evict(count)

    @rule()
    def flush(self):
        self.cache.flush()
        assert self.cache.match_prefix(np.array([0, 0, 1, 1])) == []

    @invariant()
    def accounts_agree(self):
        users: dict[int, int] = {}
        for blocks in self.live:
            for block in blocks:
                users[block] = users.get(block, 0) + 1
        self.cache.check_integrity(users)
        assert self.cache.num_free + self.cache.num_cached + self.cache.num_in_use == 12


TestSequences = Sequences.TestCase
TestSequences.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_the_tree_finds_whole_blocks_of_a_prefix():
    cache = KVCacheManager(8, BLOCK)
    blocks = cache.allocate(3)
    cache.insert_prefix(np.array([1, 2, 3, 4, 5]), blocks)  # two full blocks; the third is partly filled
    assert cache.match_prefix(np.array([1, 2, 3, 4, 9])) == blocks[:2]
    assert cache.match_prefix(np.array([1, 2, 9, 9])) == blocks[:1]
    assert cache.match_prefix(np.array([2, 1])) == []


def test_a_used_node_has_a_used_parent():
    """Two sequences admitted together compute the same first block twice; when one ends, all that is idle can go."""
    cache = KVCacheManager(5, BLOCK)
    short, long = cache.allocate(1), cache.allocate(3)
    cache.insert_prefix(np.array([1, 1]), short)
    cache.insert_prefix(np.array([1, 1, 2, 2, 3, 3]), long)
    cache.release(short)
    assert cache.num_available == 2
    assert len(cache.allocate(2)) == 2


def test_the_least_recently_used_leaf_goes_first():
    cache = KVCacheManager(4, BLOCK)
    old, new = cache.allocate(1), cache.allocate(1)
    cache.insert_prefix(np.array([1, 1]), old)
    cache.insert_prefix(np.array([2, 2]), new)
    cache.release(cache.match_prefix(np.array([1, 1])))  # now `new` is the older
    cache.release(old + new)
    cache.evict(1)
    assert cache.match_prefix(np.array([2, 2])) == []
    assert cache.match_prefix(np.array([1, 1])) == old


@given(st.lists(st.tuples(st.sampled_from(["insert", "match", "evict"]), st.lists(st.integers(0, 1), max_size=8))))
def test_eviction_is_least_recently_used_whatever_came_before(steps: list[tuple[str, list[int]]]):
    """Against the plain way: of all leaves that nobody uses, the one whose last use is longest ago."""
    cache = KVCacheManager(1000, BLOCK)
    used: dict[tuple[int, ...], int] = {}  # prefix by whole blocks -> when it was last used
    for now, (what, tokens) in enumerate(steps):
        prefixes = [tuple(tokens[:end]) for end in range(BLOCK, len(tokens) + 1, BLOCK)]
        if what == "evict":
            leaves = [p for p in used if not any(len(q) > len(p) and q[: len(p)] == p for q in used)]
            cache.evict(1)
            if leaves:
                del used[min(leaves, key=used.__getitem__)]
        else:
            held = cache.match_prefix(np.array(tokens, np.int64))
            assert len(held) == sum(p in used for p in prefixes)
            if what == "insert":
                held += cache.allocate(len(prefixes) - len(held))
                cache.insert_prefix(np.array(tokens, np.int64), held)
            used |= dict.fromkeys(prefixes[: len(held)], now)
            cache.release(held)
        assert cache.num_cached == len(used)
        cache.check_integrity({})


def test_out_of_date_entries_do_not_pile_up():
    cache = KVCacheManager(4, BLOCK)
    blocks = cache.allocate(2)
    cache.insert_prefix(np.array([1, 2, 3, 4]), blocks)
    cache.release(blocks)
    for _ in range(1000):
        cache.release(cache.match_prefix(np.array([1, 2, 3, 4])))
    assert len(cache._evictable) < 100
