"""Keys of blocks; how the pool hands blocks out is tested through the scheduler."""

from __future__ import annotations

import itertools

from trtqwen.executor.kv_cache import BlockPool, block_key, salt_key


def test_a_key_stands_for_everything_up_to_the_blocks_end() -> None:
    blocks = [(1, 2), (2, 1), (1, 2, 0), (258,), (1, 2**31)]
    first = [block_key(b"", block) for block in blocks]
    second = [block_key(before, block) for before, block in itertools.product(first, blocks)]
    assert len({*first, *second}) == len(first) + len(second)
    assert block_key(block_key(b"", (1, 2)), (3, 4)) == block_key(block_key(b"", (1, 2)), (3, 4))


def test_of_two_blocks_with_one_content_the_first_is_found_and_the_second_is_free_like_any_other() -> None:
    pool = BlockPool(3, 4)
    twins: list[list[int]] = [[], []]
    for owned in twins:
        assert pool.grow(owned, 4)
        pool.publish(owned[0], b"key")
    assert pool.find([b"key", b"unknown"]) == twins[0]
    pool.release(twins[0])
    pool.release(twins[1])
    taken: list[int] = []
    assert pool.grow(taken, 8)
    assert twins[0][0] not in taken
    pool.share(pool.find([b"key"]))
    assert pool.num_free == 0
    assert not pool.grow(taken, 12)


def test_blocks_of_one_salt_are_not_found_under_another() -> None:
    tokens = [1, 2, 3, 4]
    first = {salt: block_key(salt_key(salt), tokens) for salt in ("", "alice", "bob")}
    assert len(set(first.values())) == 3
    assert len({block_key(key, tokens) for key in first.values()}) == 3
    assert block_key(salt_key("alice"), tokens) == first["alice"]
