"""The prefix tree: which KV blocks hold which token prefixes, for reuse within one version of the weights.

A node is one full block; the path from the root spells its tokens. Only full blocks are shared, so a block in the
tree is never written again. Leaves that no sequence uses are given back in least-recently-used order.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from pekoe.core.types import IntArray
from pekoe.engine.embedded.blocks import BlockPool

Key = bytes  # the tokens of one block


class Node:
    """One block of a prefix."""

    __slots__ = ("block", "children", "key", "last_used", "parent")

    def __init__(self, key: Key, block: int, parent: Node | None) -> None:
        self.key, self.block, self.parent = key, block, parent
        self.children: dict[Key, Node] = {}
        self.last_used = 0


class PrefixTree:
    """Prefixes by whole blocks. Becomes the pool's `evict` and `idle`."""

    def __init__(self, pool: BlockPool, block_tokens: int) -> None:
        self._pool, self._block_tokens = pool, block_tokens
        self._root = Node(b"", -1, None)
        self._clock = 0
        self._node_of: dict[int, Node] = {}  # by block
        self._idle: list[tuple[int, int]] = []  # heap of (last use, block): leaves that had no user when entered
        pool.evict, pool.idle = self.evict, self._enter

    def match(self, tokens: IntArray) -> list[int]:
        """Blocks of the longest known prefix of `tokens`, each with one more user. The caller releases them."""
        blocks: list[int] = []
        for node in self._walk(tokens):
            self._touch(node)
            blocks.append(node.block)
        self._pool.retain(blocks)
        return blocks

    def insert(self, tokens: IntArray, blocks: list[int]) -> None:
        """Remember that `blocks` hold the full blocks of `tokens`.

        Where another block holds a prefix already, that one stays, and the caller's blocks are not remembered from
        there on: a sequence that uses a node must use its parent too, or a parent that nobody uses could not be
        taken back.
        """
        node = self._root
        for position, key in enumerate(self._keys(tokens)):
            child = node.children.get(key)
            if child is None:
                child = node.children[key] = Node(key, blocks[position], node)
                self._node_of[child.block] = child
                self._pool.tree_holds(child.block)
            elif child.block != blocks[position]:
                return
            self._touch(child)
            node = child

    def evict(self, count: int) -> None:
        """Give back at least `count` unused blocks, leaves first, least recently used first, as far as there are."""
        while count > 0 and self._idle:
            last_used, block = heapq.heappop(self._idle)
            node = self._node_of.get(block)
            if node is None or node.last_used != last_used or not self._is_idle_leaf(node):
                continue  # used again since, or entered twice
            parent = node.parent
            assert parent is not None
            del parent.children[node.key], self._node_of[block]
            self._pool.tree_drops(block)
            count -= 1
            if parent is not self._root:
                self._enter(parent.block)

    def flush(self) -> None:
        """Forget everything: the weights have changed. Blocks that sequences use stay theirs."""
        for block in self._node_of:
            self._pool.tree_drops(block)
        self._node_of.clear()
        self._idle.clear()
        self._root.children.clear()

    def blocks(self) -> set[int]:
        return set(self._node_of)

    def _enter(self, block: int) -> None:
        """This block may have become an idle leaf."""
        node = self._node_of[block]
        if not self._is_idle_leaf(node):
            return
        heapq.heappush(self._idle, (node.last_used, block))
        if len(self._idle) > 2 * len(self._node_of) + 64:  # mostly entries that are out of date
            self._idle = [(n.last_used, n.block) for n in self._node_of.values() if self._is_idle_leaf(n)]
            heapq.heapify(self._idle)

    def _is_idle_leaf(self, node: Node) -> bool:
        return not node.children and self._pool.num_users(node.block) == 0

    def _touch(self, node: Node) -> None:
        self._clock += 1
        node.last_used = self._clock

    def _keys(self, tokens: IntArray) -> Iterator[Key]:
        size = self._block_tokens
        for start in range(0, len(tokens) - size + 1, size):
            yield tokens[start : start + size].tobytes()

    def _walk(self, tokens: IntArray) -> Iterator[Node]:
        node = self._root
        for key in self._keys(tokens):
            child = node.children.get(key)
            if child is None:
                return
            yield child
            node = child
