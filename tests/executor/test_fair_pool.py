from __future__ import annotations

import threading
from concurrent.futures import Future, wait

from trtqwen.executor.fair_pool import FairPool


def test_owners_take_turns_and_one_never_takes_all_threads() -> None:
    pool, order = FairPool(1, "test"), list[str]()
    begun, go_on, done = threading.Event(), threading.Event(), threading.Event()

    def first() -> None:
        begun.set()
        assert go_on.wait(60)

    def note(name: str) -> None:
        order.append(name)
        if name == "bob":
            done.set()

    futures: list[Future[None]] = [pool.submit("alice", first)]
    assert begun.wait(60)
    futures += [pool.submit("alice", lambda: note("alice")), pool.submit("bob", lambda: note("bob"))]
    dropped = pool.submit("alice", lambda: note("dropped"))
    assert done.wait(60)  # while the first one of alice still runs
    assert dropped.cancel()
    go_on.set()
    assert not wait(futures, 60).not_done
    assert order == ["bob", "alice"]
