"""The pool of cache blocks: who holds which, and which full blocks can be used again.

A block is free, or held by one or more sequences, or cached: nobody holds it, but the pool still
knows what it contains and gives it to whoever starts with the same tokens.
"""

from array import array
from collections import OrderedDict
from hashlib import blake2b

from growmoe.models.footprint import BLOCK


def blocks_for(tokens: int) -> int:
    """Blocks that hold this many tokens."""
    return -(-tokens // BLOCK)


def chain(parent: bytes, tokens: list[int]) -> bytes:
    """Digest of a full block that follows the blocks that `parent` is the digest of."""
    return blake2b(parent + array("q", tokens).tobytes(), digest_size=16).digest()


class BlockPool:
    """Reference counts of `total` blocks, an index of full ones by digest, and the cached ones in
    the order in which they will be evicted."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.holders = [0] * total
        self._free = list(range(total - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._block_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}

    @property
    def free(self) -> int:
        """Blocks that hold nothing."""
        return len(self._free)

    @property
    def cached(self) -> int:
        """Blocks that nobody holds and that can be used again."""
        return len(self._cached)

    @property
    def used(self) -> int:
        """Blocks that some sequence holds."""
        return self.total - len(self._free) - len(self._cached)

    @property
    def available(self) -> int:
        """Blocks that `allocate` can give."""
        return len(self._free) + len(self._cached)

    def find(self, digest: bytes) -> int | None:
        """The block with this content, if there is one."""
        return self._block_of.get(digest)

    def allocate(self) -> int:
        """A block with one holder; the cached block that lay idle longest goes when none is free.
        Only to be called when `available`."""
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._cached.popitem(last=False)
            self._forget(block)
        self.holders[block] = 1
        return block

    def share(self, block: int) -> None:
        """One holder more."""
        if not self.holders[block]:
            del self._cached[block]
        self.holders[block] += 1

    def index(self, block: int, digest: bytes) -> None:
        """The block is full and has this content; the first block of a content is the one found."""
        if digest not in self._block_of and block not in self._digest_of:
            self._block_of[digest] = block
            self._digest_of[block] = digest

    def release(self, table: list[int], trusted: bool = True) -> None:
        """One holder fewer of every block of `table`. The last goes first, so that eviction takes
        ends of texts before their beginnings. What is not `trusted` is not found again."""
        for block in reversed(table):
            if not trusted:
                self._forget(block)
            self.holders[block] -= 1
            if self.holders[block]:
                continue
            if block in self._digest_of:
                self._cached[block] = None
            else:
                self._free.append(block)

    def idle(self, block: int) -> bool:
        """Whether nobody holds the block."""
        return not self.holders[block]

    def _forget(self, block: int) -> None:
        digest = self._digest_of.pop(block, None)
        if digest is not None:
            del self._block_of[digest]
