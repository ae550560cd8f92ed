"""Any life of the block pool: what is held, what is spare, and what may be shared, against a model of plain dicts."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

from hypothesis import HealthCheck, settings, strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, precondition, rule

from motet.adapters.version import AdapterVersion, Digest
from motet.server.engine.blocks import BlockPool
from motet.server.engine.types import BlockId

BLOCK = 2
NAMESPACES: tuple[Hashable, ...] = (
    None,
    AdapterVersion("a", Digest("1")),
    AdapterVersion("a", Digest("2")),
    1,  # equal to a serial number of some content
    2,
)
namespaces = st.sampled_from(NAMESPACES)
token = st.integers(0, 1)


@dataclass(eq=False)
class Holder:
    """What a generation is to the pool."""

    namespace: Hashable
    tokens: list[int]
    blocks: list[BlockId]
    computed: int


@dataclass(frozen=True)
class Published:
    """What a block holds, and whether the chain of blocks before it is still there."""

    namespace: Hashable
    prefix: tuple[int, ...]
    reachable: bool = True


class Blocks(RuleBasedStateMachine):
    holders = Bundle("holders")

    @initialize(blocks=st.integers(3, 8))
    def start(self, blocks: int) -> None:
        self.pool = BlockPool(blocks, BLOCK)
        self.published: dict[BlockId, Published] = {}
        self.live: list[Holder] = []

    @rule(target=holders, namespace=namespaces, tokens=st.lists(token, min_size=1, max_size=9))
    def begin(self, namespace: Hashable, tokens: list[int]) -> Holder:
        expected = self._reachable_chain(namespace, tokens[:-1])
        shared = self.pool.match(namespace, tokens[:-1])
        assert shared == expected
        for i, block in enumerate(shared):
            assert self.published[block] == Published(namespace, tuple(tokens[: (i + 1) * BLOCK]))
        holder = Holder(namespace, list(tokens), shared, len(shared) * BLOCK)
        self.live.append(holder)
        fresh = self._allocate(self.pool.blocks_for(len(tokens)) - len(shared))
        if fresh is None:
            self._release(holder)
        else:
            holder.blocks = shared + fresh
        return holder

    @rule(holder=holders, count=st.integers(1, 6))
    def compute(self, holder: Holder, count: int) -> None:
        """The next tokens are in the cache."""
        if holder not in self.live:
            return
        before, after = holder.computed, min(holder.computed + count, len(holder.tokens))
        start, stop = before // BLOCK, after // BLOCK
        self.pool.share(holder.namespace, holder.blocks, holder.tokens, start, stop)
        self._publish(holder, start, stop)
        holder.computed = after

    @rule(holder=holders, more=st.lists(token, min_size=1, max_size=4))
    def grow(self, holder: Holder, more: list[int]) -> None:
        if holder not in self.live:
            return
        fresh = self._allocate(self.pool.blocks_for(len(holder.tokens) + len(more)) - len(holder.blocks))
        if fresh is not None:
            holder.blocks += fresh
            holder.tokens += more

    @rule(holder=consumes(holders))
    def end(self, holder: Holder) -> None:
        if holder in self.live:
            self._release(holder)

    @precondition(lambda self: self.live)
    @rule()
    def end_all(self) -> None:
        for holder in list(self.live):
            self._release(holder)
        assert self.pool.spare == self.pool.size

    @invariant()
    def spare_is_what_nobody_holds(self) -> None:
        if hasattr(self, "pool"):
            assert self.pool.spare == self.pool.size - len(self._held())

    def teardown(self) -> None:
        if not hasattr(self, "pool"):
            return
        self.end_all()
        everything = self.pool.allocate(self.pool.size)
        assert everything is not None
        assert sorted(everything) == list(range(self.pool.size))
        assert self.pool.spare == 0
        for content in self.published.values():
            assert self.pool.match(content.namespace, content.prefix) == [], "evicted content was found"

    def _held(self) -> set[BlockId]:
        return {block for holder in self.live for block in holder.blocks}

    def _release(self, holder: Holder) -> None:
        self.live.remove(holder)
        self.pool.release(holder.blocks)

    def _allocate(self, count: int) -> list[BlockId] | None:
        held = self._held()
        spare = self.pool.size - len(held)
        taken = self.pool.allocate(count)
        if taken is None:
            assert count > spare
            return None
        assert len(taken) == len(set(taken)) == count <= spare
        assert not held.intersection(taken)
        without_content = {BlockId(i) for i in range(self.pool.size)} - held - self.published.keys()
        for block in taken:
            if block in self.published:
                assert without_content <= set(taken), "content was given up while empty blocks were spare"
                self._evict(block)
        return taken

    def _evict(self, block: BlockId) -> None:
        gone = self.published.pop(block)
        for other, content in list(self.published.items()):
            longer = content.prefix[: len(gone.prefix)] == gone.prefix
            if gone.reachable and content.namespace == gone.namespace and longer:
                self.published[other] = Published(content.namespace, content.prefix, reachable=False)

    def _publish(self, holder: Holder, start: int, stop: int) -> None:
        for index in range(start, stop):
            block, prefix = holder.blocks[index], tuple(holder.tokens[: (index + 1) * BLOCK])
            if block in self.published:
                assert self.published[block] == Published(holder.namespace, prefix)
                continue
            if index > 0 and holder.blocks[index - 1] not in self.published:
                return
            if Published(holder.namespace, prefix) in self.published.values():
                return
            self.published[block] = Published(holder.namespace, prefix)

    def _reachable_chain(self, namespace: Hashable, tokens: list[int]) -> list[BlockId]:
        by_content = {content: block for block, content in self.published.items()}
        chain: list[BlockId] = []
        for stop in range(BLOCK, len(tokens) + 1, BLOCK):
            block = by_content.get(Published(namespace, tuple(tokens[:stop])))
            if block is None:
                break
            chain.append(block)
        return chain


TestBlocks = Blocks.TestCase
TestBlocks.settings = settings(
    max_examples=120,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
