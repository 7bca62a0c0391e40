"""The pool of KV blocks. It knows numbers of blocks, not what is in them.

Every block is in exactly one of three states (I7):
    free    nobody refers to it
    cached  the prefix tree holds it, no running sequence uses it; may be taken back
    in use  at least one running sequence uses it (the tree may hold it too)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from pekoe.core.errors import RunError


class OutOfBlocks(RunError):
    """No block is free and none can be taken back. The scheduler preempts; a user never sees this."""


class BlockPool:
    """Reference-counted blocks.

    `evict(n)` asks the owner of cached blocks to give at least n back, if it can; `idle(block)` tells it that a block
    of its tree has lost its last user.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.evict: Callable[[int], None] = lambda _: None
        self.idle: Callable[[int], None] = lambda _: None
        self._free = list(range(num_blocks - 1, -1, -1))
        self._users = [0] * num_blocks
        self._in_tree = [False] * num_blocks
        self._num_cached = 0

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_cached(self) -> int:
        return self._num_cached

    @property
    def num_in_use(self) -> int:
        return self.num_blocks - self.num_free - self.num_cached

    @property
    def num_available(self) -> int:
        """Blocks that `take` could give."""
        return self.num_free + self.num_cached

    def take(self, count: int) -> list[int]:
        """Return `count` blocks, each with one user. Takes cached ones back if it must; OutOfBlocks changes nothing
        but the cache."""
        if count > len(self._free):
            self.evict(count - len(self._free))
        if count > len(self._free):
            raise OutOfBlocks(f"{count} KV blocks wanted, {len(self._free)} free of {self.num_blocks}")
        taken = [self._free.pop() for _ in range(count)]
        for block in taken:
            self._users[block] = 1
        return taken

    def retain(self, blocks: Iterable[int]) -> None:
        """One more user for each block, which must be in use or cached."""
        for block in blocks:
            assert self._users[block] > 0 or self._in_tree[block], f"block {block} is free"
            self._num_cached -= not self._users[block]
            self._users[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """One user less for each block; a block without users or tree is free again."""
        for block in blocks:
            assert self._users[block] > 0, f"block {block} freed twice"
            self._users[block] -= 1
            if self._users[block]:
                continue
            if self._in_tree[block]:
                self._num_cached += 1
                self.idle(block)
            else:
                self._free.append(block)

    def num_users(self, block: int) -> int:
        return self._users[block]

    def tree_holds(self, block: int) -> None:
        assert self._users[block] > 0, f"block {block} is not in use: it cannot enter the tree"
        assert not self._in_tree[block], f"block {block} is in the tree already"
        self._in_tree[block] = True

    def tree_drops(self, block: int) -> None:
        assert self._in_tree[block], f"block {block} is not in the tree"
        self._in_tree[block] = False
        if not self._users[block]:
            self._num_cached -= 1
            self._free.append(block)

    def check_integrity(self, users: dict[int, int], in_tree: set[int]) -> None:
        """Prove I7 against the owners' own accounts: users of each block, and the blocks of the prefix tree."""
        free = set(self._free)
        assert len(free) == len(self._free), "a block is free twice"
        assert users == {b: number for b, number in enumerate(self._users) if number}, "users are miscounted"
        assert in_tree == {b for b, held in enumerate(self._in_tree) if held}, "the tree's blocks are miscounted"
        assert self.num_cached == len(in_tree - set(users)), "cached blocks are miscounted"
        assert self.num_in_use == len(users), "free + cached + in use != total"
        assert not free & (set(users) | in_tree), "a free block is still referred to"
