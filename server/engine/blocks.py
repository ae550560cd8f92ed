"""Cache blocks: who holds which, and which finished blocks can be shared.

Must not know: tensors, adapters, sampling. Ownership: a block is held by the generations that list it (reference
count), or is spare. A spare block may still carry reusable content; it loses it only when it is handed out again.

Sharing is by exact structure, not by hash: the key of a block is (parent, tokens), where the parent of the first block
is the namespace (adapter version and gate), in a tuple so that it equals no number, and that of a later one is the
serial number of the content before it. Equal keys therefore mean equal namespace and equal token prefix, always
(invariant I3).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from motet.server.engine.types import BlockId


@dataclass(frozen=True, slots=True)
class _Content:
    key: Hashable
    serial: int


class BlockPool:
    """All blocks of the key-value cache.

    Note: used by the engine thread only.
    """

    def __init__(self, blocks: int, block_size: int) -> None:
        self.size = blocks
        self.block_size = block_size
        self._holders = [0] * blocks
        self._spare: OrderedDict[BlockId, None] = OrderedDict.fromkeys(BlockId(i) for i in range(blocks))
        self._content: dict[BlockId, _Content] = {}
        self._by_key: dict[Hashable, BlockId] = {}
        self._serial = 0

    @property
    def spare(self) -> int:
        """Blocks that no generation holds."""
        return len(self._spare)

    def blocks_for(self, tokens: int) -> int:
        """How many blocks that many positions need."""
        return -(-tokens // self.block_size)

    def allocate(self, count: int) -> list[BlockId] | None:
        """Hold `count` blocks, least recently used content first; None when there are not enough."""
        if count > len(self._spare):
            return None
        taken = [self._spare.popitem(last=False)[0] for _ in range(count)]
        for block in taken:
            self._forget(block)
            self._holders[block] = 1
        return taken

    def release(self, blocks: Sequence[BlockId]) -> None:
        """End one hold on each block. The last block of a sequence is reused first, so that prefixes live longest."""
        for block in reversed(blocks):
            self._holders[block] -= 1
            assert self._holders[block] >= 0, f"block {block} was released more often than held"
            if self._holders[block] == 0:
                self._spare[block] = None
                if block not in self._content:
                    self._spare.move_to_end(block, last=False)

    def match(self, namespace: Hashable, tokens: Sequence[int]) -> list[BlockId]:
        """Hold the longest chain of shared full blocks that begins these tokens."""
        found: list[BlockId] = []
        parent: Hashable = (namespace,)
        for start in range(0, len(tokens) - self.block_size + 1, self.block_size):
            block = self._by_key.get((parent, tuple(tokens[start : start + self.block_size])))
            if block is None:
                break
            found.append(block)
            parent = self._content[block].serial
        for block in found:
            if self._holders[block] == 0:
                del self._spare[block]
            self._holders[block] += 1
        return found

    def share(
        self, namespace: Hashable, blocks: Sequence[BlockId], tokens: Sequence[int], start: int, stop: int
    ) -> None:
        """Publish full, computed blocks for reuse.

        Args:
            blocks, tokens: of one generation, in order.
            start, stop: indices into `blocks` of those that were just completed.
        """
        for index in range(start, stop):
            if blocks[index] in self._content:
                continue
            parent: Hashable = (namespace,)
            if index > 0:
                before = self._content.get(blocks[index - 1])
                if before is None:
                    return
                parent = before.serial
            position = index * self.block_size
            key = (parent, tuple(tokens[position : position + self.block_size]))
            if key in self._by_key:
                return
            self._serial += 1
            self._content[blocks[index]] = _Content(key, self._serial)
            self._by_key[key] = blocks[index]

    def _forget(self, block: BlockId) -> None:
        content = self._content.pop(block, None)
        if content is not None:
            del self._by_key[content.key]
