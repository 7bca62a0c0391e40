"""Which KV blocks are free, cached or in use, and which prefixes the cached ones hold. It knows no tensors.

Every block is in exactly one of three states (I7):
    free    nobody refers to it
    cached  the prefix tree holds it, no sequence uses it; it may be evicted
    in use  at least one sequence uses it (the tree may hold it too)

A node of the prefix tree is one full block; the path from the root spells its tokens. Only full blocks are shared, so
a block in the tree is never written again, until `flush` forgets everything because the weights have changed.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator

from pekoe.core.errors import RunError
from pekoe.core.types import IntArray


class OutOfBlocks(RunError):
    """No block is free and none can be evicted. The scheduler preempts; a user never sees this."""


class _Node:
    """One block of a prefix. `key` is its tokens as bytes."""

    __slots__ = ("block", "children", "key", "last_used", "parent")

    def __init__(self, key: bytes, block: int, parent: _Node | None) -> None:
        self.key, self.block, self.parent = key, block, parent
        self.children: dict[bytes, _Node] = {}
        self.last_used = 0


class KVCacheManager:
    """Reference-counted blocks, and a prefix tree whose unused leaves are evicted least recently used first."""

    def __init__(self, num_blocks: int, block_tokens: int) -> None:
        self.num_blocks, self._block_tokens = num_blocks, block_tokens
        self._free = list(range(num_blocks - 1, -1, -1))
        self._users = [0] * num_blocks
        self._root = _Node(b"", -1, None)
        self._nodes: dict[int, _Node] = {}  # of the tree, by block
        self.num_cached = 0
        self._clock = 0
        self._evictable: list[tuple[int, int]] = []  # heap of (last use, block): leaves that had no user when entered

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_in_use(self) -> int:
        return self.num_blocks - self.num_free - self.num_cached

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` could give."""
        return self.num_free + self.num_cached

    def allocate(self, count: int) -> list[int]:
        """Return `count` blocks, each with one user, evicting cached ones if it must. OutOfBlocks takes none."""
        self.evict(count - len(self._free))
        if count > len(self._free):
            raise OutOfBlocks(f"{count} KV blocks wanted, {len(self._free)} free of {self.num_blocks}")
        blocks = [self._free.pop() for _ in range(count)]
        for block in blocks:
            self._users[block] = 1
        return blocks

    def retain(self, blocks: Iterable[int]) -> None:
        """One more user for each block, which must be in use or cached."""
        for block in blocks:
            assert self._users[block] > 0 or block in self._nodes, f"block {block} is free"
            self.num_cached -= not self._users[block]
            self._users[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """One user less for each block; a block that nobody uses and the tree does not hold is free again."""
        for block in blocks:
            assert self._users[block] > 0, f"block {block} freed twice"
            self._users[block] -= 1
            if not self._users[block] and block in self._nodes:
                self.num_cached += 1
                self._note_evictable(self._nodes[block])
            elif not self._users[block]:
                self._free.append(block)

    def match_prefix(self, tokens: IntArray) -> list[int]:
        """Blocks of the longest known prefix of `tokens`, each with one more user. The caller releases them."""
        blocks: list[int] = []
        node = self._root
        for key in self._keys(tokens):
            child = node.children.get(key)
            if child is None:
                break
            node = self._touch(child)
            blocks.append(node.block)
        self.retain(blocks)
        return blocks

    def insert_prefix(self, tokens: IntArray, blocks: list[int]) -> None:
        """Remember that `blocks`, which are in use, hold the full blocks of `tokens`.

        Where another block holds a prefix already, that one stays, and the caller's blocks are not remembered from
        there on: a sequence that uses a node must use its parent too, or an unused parent could not be evicted.
        """
        node = self._root
        for position, key in enumerate(self._keys(tokens)):
            child = node.children.get(key)
            if child is None:
                block = blocks[position]
                assert self._users[block] > 0, f"block {block} is not in use: it cannot enter the tree"
                assert block not in self._nodes, f"block {block} is in the tree already"
                child = node.children[key] = self._nodes[block] = _Node(key, block, node)
            elif child.block != blocks[position]:
                return
            node = self._touch(child)

    def evict(self, count: int) -> None:
        """Free at least `count` cached blocks, leaves first, least recently used first, as far as there are."""
        while count > 0 and self._evictable:
            last_used, block = heapq.heappop(self._evictable)
            node = self._nodes.get(block)
            if node is None or node.last_used != last_used or not self._is_unused_leaf(node):
                continue  # used again since, or entered twice
            parent = node.parent
            assert parent is not None
            del parent.children[node.key], self._nodes[block]
            self.num_cached -= 1
            self._free.append(block)
            count -= 1
            if parent is not self._root:
                self._note_evictable(parent)

    def flush(self) -> None:
        """Forget all prefixes. Blocks that sequences use stay theirs."""
        self._free += [block for block in self._nodes if not self._users[block]]
        self.num_cached = 0
        self._nodes.clear()
        self._evictable.clear()
        self._root.children.clear()

    def check_integrity(self, users: dict[int, int]) -> None:
        """Prove I7 against the sequences' own account: the number of users of each block that has any."""
        free, in_tree = set(self._free), set(self._nodes)
        assert len(free) == len(self._free), "a block is free twice"
        assert users == {b: number for b, number in enumerate(self._users) if number}, "users are miscounted"
        assert self.num_cached == len(in_tree - set(users)), "cached blocks are miscounted"
        assert self.num_in_use == len(users), "free + cached + in use != total"
        assert not free & (set(users) | in_tree), "a free block is still referred to"

    def _note_evictable(self, node: _Node) -> None:
        """Enter a node in the heap, if it has become an unused leaf."""
        if not self._is_unused_leaf(node):
            return
        heapq.heappush(self._evictable, (node.last_used, node.block))
        if len(self._evictable) > 2 * len(self._nodes) + 64:  # mostly entries that are out of date
            self._evictable = [(n.last_used, n.block) for n in self._nodes.values() if self._is_unused_leaf(n)]
            heapq.heapify(self._evictable)

    def _is_unused_leaf(self, node: _Node) -> bool:
        return not node.children and not self._users[node.block]

    def _touch(self, node: _Node) -> _Node:
        self._clock += 1
        node.last_used = self._clock
        return node

    def _keys(self, tokens: IntArray) -> Iterator[bytes]:
        size = self._block_tokens
        for start in range(0, len(tokens) - size + 1, size):
            yield tokens[start : start + size].tobytes()
