"""The overlapped step loop against the synchronous one, on CPU: the same tokens, whatever the requests ask for."""

from __future__ import annotations

import queue
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch

from tests.slow import slow
from trtqwen.artifact.names import TOKENIZER_DIRECTORY
from trtqwen.engine.config import read_engine_config
from trtqwen.executor.config import ExecutorConfig, WorkerConfig, scheduler_config
from trtqwen.executor.device import choose_device
from trtqwen.executor.guided import GuidedDecoder
from trtqwen.executor.loop import Commands, StepLoop
from trtqwen.executor.parallel import SingleRank
from trtqwen.executor.plain_runner import make_runner
from trtqwen.executor.request import (
    Command,
    Event,
    FinishReason,
    OutputConfig,
    Request,
    Response,
    SamplingConfig,
)
from trtqwen.executor.sequence import Generated

CANCELLED = "cancelled"
SETTINGS = {
    "at ease": ExecutorConfig(),
    "pausing": ExecutorConfig(batch_scheduler_policy="max_utilization", max_tokens_in_paged_kv_cache=320),
    "reuse": ExecutorConfig(enable_kv_cache_reuse=True),
}


def hot(seed: int, min_tokens: int = 0) -> SamplingConfig:
    return SamplingConfig(temperature=1.5, top_p=0.95, seed=seed, min_tokens=min_tokens)


def requests() -> list[Request]:
    """Every feature that reads or changes what was sampled before, over prompts of one token to several chunks."""
    prompts = [tuple(range(7 * index, 7 * index + length)) for index, length in enumerate((1, 15, 16, 17, 60, 110))]
    kinds: dict[str, dict[str, object]] = {
        "greedy": {},
        "seeded": {"sampling": hot(11)},
        "penalized": {
            "sampling": SamplingConfig(repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.5)
        },
        "banned": {"bad_words": ((13,), (45, 20))},
        "logged": {"output": OutputConfig(return_log_probs=True, num_top_log_probs=2)},
        "stopped": {"stop_words": ((20,), (45,)), "sampling": hot(5, min_tokens=3)},
        "ended": {"end_id": 13, "embedding_bias": {13: 6.0}, "sampling": hot(6)},
    }
    return [
        Request(id=f"{kind} {index}", input_token_ids=prompt, max_tokens=1 + 5 * index, **options)  # type: ignore[arg-type]
        for kind, options in kinds.items()
        for index, prompt in enumerate(prompts)
    ] + [Request(id=CANCELLED, input_token_ids=prompts[3], max_tokens=200)]


class Heard:
    """What the loop has written, by request."""

    def __init__(self) -> None:
        self.tokens: dict[str, list[int]] = defaultdict(list)
        self.log_probs: dict[str, list[float]] = defaultdict(list)
        self.reasons: dict[str, FinishReason] = {}

    def write(self, batch: Iterable[Event | Generated]) -> None:
        for one in batch:
            response = one.response() if isinstance(one, Generated) else one.response
            if isinstance(response, Response):
                self.tokens[response.request_id] += response.token_ids
                self.log_probs[response.request_id] += response.log_probs
                if response.finish_reason is not None:
                    assert response.request_id not in self.reasons
                    self.reasons[response.request_id] = response.finish_reason


def serve(engine_directory: Path, config: ExecutorConfig, *, overlap: bool) -> Heard:
    engine = read_engine_config(engine_directory)
    worker = WorkerConfig(engine=engine_directory, executor=config, rank=0, rendezvous=Path("/none"), threads=1)
    started = make_runner(worker, engine, choose_device(engine, config, 0), SingleRank())
    limits = scheduler_config(engine, config, started.num_blocks)
    commands: Commands = queue.Queue()
    heard = Heard()
    decoder = GuidedDecoder(engine_directory / TOKENIZER_DIRECTORY, limits.vocab_size)
    loop = StepLoop(
        limits, started.runner, started.sampler, SingleRank(), decoder, commands, heard.write, overlap=overlap
    )
    asked = requests()
    for request in asked:
        commands.put(Command(request=request))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "step", _stepping(loop.step, heard, commands, len(asked)))
        with pytest.raises(_Done):
            loop.run()
    return heard


class _Done(Exception):
    """Every request has ended."""


def _stepping(step: Callable[[], None], heard: Heard, commands: Commands, count: int) -> Callable[[], None]:
    def stepped() -> None:
        step()
        if len(heard.tokens[CANCELLED]) == 20:
            commands.put(Command(cancel=CANCELLED))
        if len(heard.reasons) == count:
            step()  # what is still in flight is dropped without a word
            raise _Done

    return stepped


@pytest.mark.parametrize("setting", [slow(name) if name == "at ease" else name for name in SETTINGS])
def test_both_loops_give_the_same_tokens(bundled_engine: Callable[..., Path], setting: str) -> None:
    engine = bundled_engine(max_num_tokens=48)
    torch.manual_seed(0)
    plain = serve(engine, SETTINGS[setting], overlap=False)
    torch.manual_seed(1)  # nobody draws from the process's own numbers
    overlapped = serve(engine, SETTINGS[setting], overlap=True)
    assert plain.reasons.pop(CANCELLED) == overlapped.reasons.pop(CANCELLED) == FinishReason.CANCELLED
    shorter, longer = sorted((plain.tokens.pop(CANCELLED), overlapped.tokens.pop(CANCELLED)), key=len)
    assert len(shorter) >= 20
    assert longer[: len(shorter)] == shorter
    assert overlapped.reasons == plain.reasons
    assert overlapped.tokens == plain.tokens
    assert {*plain.reasons.values()} == {FinishReason.LENGTH, FinishReason.STOP_WORDS, FinishReason.END_ID}
    logged = [name for name in plain.log_probs if name.startswith("logged")]
    assert len(logged) == 6
    for name in logged:
        assert overlapped.log_probs[name] == pytest.approx(plain.log_probs[name], abs=1e-4)
