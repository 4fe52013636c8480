"""Requests of different salts share no KV cache blocks, whatever they hold."""

from __future__ import annotations

from trtqwen.executor.request import Request
from trtqwen.executor.scheduler import Scheduler, SchedulerConfig

PROMPT = tuple(range(1, 81))


def test_a_salt_keeps_prompts_apart() -> None:
    config = SchedulerConfig(
        max_batch_size=4,
        max_num_tokens=256,
        max_seq_len=256,
        tokens_per_block=16,
        num_blocks=64,
        vocab_size=1000,
        batch_scheduler_policy="guaranteed_no_evict",
        enable_chunked_context=True,
        enable_kv_cache_reuse=True,
        max_queue_size=0,
    )
    scheduler = Scheduler(config)

    def computed(name: str, salt: str) -> int:
        """Prompt tokens that the engine has to read."""
        scheduler.add(Request(id=name, input_token_ids=PROMPT, max_tokens=1, cache_salt=salt))
        count = 0
        while not scheduler.idle:
            step = scheduler.schedule()
            assert step is not None
            count += sum(len(chunk.token_ids) for chunk in step.chunks)
            scheduler.update(step, {chunk.request_id: 5 for chunk in step.chunks if chunk.samples})
        return count

    salts = ("alice", "alice", "bob", "", "", "bob")
    assert [computed(str(number), salt) for number, salt in enumerate(salts)] == [80, 16, 80, 80, 16, 16]
