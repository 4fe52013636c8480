"""Checks of a running server by its answers."""

from __future__ import annotations

import itertools
import time
from abc import abstractmethod
from collections import Counter
from typing import ClassVar

from trtqwen.diagnostics import Diagnostic, ServerError
from trtqwen.doctor.check import Check, Result
from trtqwen.doctor.endpoint import Endpoint, chat_prompt
from trtqwen.doctor.subject import Skip, Subject

_NAN = "logits may be NaN: build with bfloat16, check the all-reduce with `trtqwen doctor --gpu`, check INT8 scales"
_USED = "kv_cache_block_metrics/used"
_BEYOND_ANY = 131073  # tokens; more than any Qwen2.5 reads
_PARALLEL, _MIN_PIECES, _MIN_IN_FLIGHT = 8, 4, 2.0
_TOKENS_BEFORE_LEAVING, _CANCEL_SECONDS = 5, 1.0
_NOISE = {"top_p": 1.0, "temperature": 50.0}  # answers that no end token cuts short


class LiveCheck(Check):
    """A check of a server; the one that `reports_silence` fails if there is none, the others skip."""

    reports_silence: ClassVar[bool] = False

    def run(self, subject: Subject) -> Result:
        if subject.url is None:
            raise Skip("give --url")
        host, _, port = subject.url.rpartition(":")
        metrics = subject.metrics or f"{host}:{int(port) + 1}"  # as Triton's own ports lie
        with Endpoint(subject.url, metrics) as endpoint:
            if not self.reports_silence and not endpoint.alive():
                raise Skip(f"no server, see {Sanity.id}")
            return self.ask(endpoint, subject)

    @abstractmethod
    def ask(self, endpoint: Endpoint, subject: Subject) -> Result:
        """Send requests to the server."""


class Sanity(LiveCheck):
    """A question gets an answer that ends by itself and does not repeat one token."""

    id = "D29"
    level = "error"
    title = "sanity of answers"
    reports_silence = True

    def ask(self, endpoint: Endpoint, subject: Subject) -> Result:
        prompt, end_id = endpoint.encode(chat_prompt("What is 2+2? Answer in one short sentence."))
        limit = 256
        ids = list(itertools.chain(*endpoint.tokens(prompt, limit, end_id=end_id)))
        problems = []
        longest = max((len(list(run)) for token, run in itertools.groupby(ids) if token == 0), default=0)
        if longest >= 8:
            problems.append(Diagnostic(f"token 0 ('!') {longest} times in a row", _NAN))
        elif ids and len(set(ids)) < 3:
            problems.append(Diagnostic(f"{len(ids)} tokens, but only {len(set(ids))} different ones", _NAN))
        if not ids:
            text = "a question gets an empty answer"
            problems.append(Diagnostic(text, "look whether the prompt arrives: preprocessing's tokenizer_dir"))
        if len(ids) >= limit:
            text = f"'What is 2+2?' is not answered within {limit} tokens: no end id {end_id} came"
            problems.append(Diagnostic(text, "see D12: serve an Instruct model with its own end ids"))
        return self.judge(problems, f"{len(ids)} tokens, {len(set(ids))} different, ended by itself")


class InFlightBatching(LiveCheck):
    """The pieces of eight answers that are requested at once come between each other."""

    id = "D30"
    level = "warning"
    title = "in-flight batching"

    def ask(self, endpoint: Endpoint, subject: Subject) -> Result:
        order = endpoint.order_of_pieces("Once upon a time", 64, range(_PARALLEL), **_NOISE)
        pieces = Counter(order)
        if len(pieces) < _PARALLEL or min(pieces.values()) < _MIN_PIECES:
            least = min(pieces.values()) if len(pieces) == _PARALLEL else 0
            raise Skip(f"an answer comes in {least} pieces; is it streamed? See {Sanity.id}")
        # Whose pieces come between whose, not when: durations say little on a busy machine.
        spans = [len(order) - order[::-1].index(name) - order.index(name) for name in pieces]
        in_flight = sum(spans) / len(order)
        text = f"of {_PARALLEL} requests at once {in_flight:.1f} are answered at a time"
        if in_flight >= _MIN_IN_FLIGHT:
            return Result("ok", text)
        hint = "see D20 and D23: KV cache for one request only, a queue delay, or one BLS instance"
        return self.found(text, hint)


class Cancellation(LiveCheck):
    """A client that leaves frees its KV cache blocks within a second."""

    id = "D31"
    level = "error"
    title = "cancellation"

    def ask(self, endpoint: Endpoint, subject: Subject) -> Result:
        if (replicas := endpoint.instances("tensorrt_llm")) > 1:  # serve.replica_mode orchestrator
            raise Skip(f"{replicas} replicas in one server overwrite each other's gauges; serve.replica_mode servers")
        try:
            before = _settled(endpoint)
        except (ServerError, KeyError):
            raise Skip("no engine gauges to look at; give --metrics") from None
        prompt, _ = endpoint.encode("Count: one, two,")
        stream = endpoint.tokens(prompt, 400, end_id=-1)
        # The gauges lag behind by stats_check_period_ms: leave when they have shown the request.
        for count, _ in enumerate(stream, start=1):
            if count >= _TOKENS_BEFORE_LEAVING and endpoint.gauges()[_USED] > before:
                break
        else:
            raise Skip("the answer ended before the gauges showed it")
        stream.close()
        left = time.monotonic()
        while time.monotonic() - left < _CANCEL_SECONDS:
            gauges = endpoint.gauges()
            if gauges[_USED] <= before:
                seconds = time.monotonic() - left
                return Result("ok", f"blocks free {seconds:.1f} s after the client left at token {count}")
            time.sleep(0.02)
        text = f"{gauges[_USED] - before:g} blocks in use {_CANCEL_SECONDS:g} s after the client left"
        return self.found(text, "set cancellation_check_period_ms 100, and cancel at tensorrt_llm")


class Wedge(LiveCheck):
    """A prompt that is too long is refused, and the next request is still answered."""

    id = "D32"
    level = "error"
    title = "prompt length limit"

    def ask(self, endpoint: Endpoint, subject: Subject) -> Result:
        prompt, end_id = endpoint.encode("Hello")
        length = subject.engine_config.build_config.max_seq_len if subject.engine is not None else _BEYOND_ANY
        over_long = (prompt * length)[:length]
        refusal = ""
        try:
            answer = list(itertools.chain(*endpoint.tokens(over_long, 8, end_id=end_id)))
        except ServerError as problem:
            refusal = str(problem)
        else:
            text = f"a prompt of {length:,} tokens is answered with {len(answer)} tokens"
            return self.found(text, "check max_seq_len of the engine")
        try:
            list(endpoint.tokens(prompt, 4, end_id=end_id))
        except ServerError as problem:
            text = f"after a prompt of {length:,} tokens the next request fails: {problem}"
            return self.found(text, "restart the server; refuse long prompts in front of it")
        return Result("ok", f"{length:,} tokens: {refusal.partition('refused the request: ')[2] or refusal}")


class Characters(LiveCheck):
    """Streamed pieces hold no broken characters: a character of several tokens comes as one."""

    id = "D33"
    level = "error"
    title = "characters in streams"

    def ask(self, endpoint: Endpoint, subject: Subject) -> Result:
        prompts = [chat_prompt("请把“聪明”这个词说五十遍。"), "聪明，聪明，聪明，聪明，"]
        pieces = [piece for prompt in prompts for piece in endpoint.text(prompt, 100)]
        broken = sum("\ufffd" in piece for piece in pieces)
        if broken:
            text = f"{broken} of {len(pieces)} pieces hold U+FFFD: each token is decoded alone"
            return self.found(text, "serve a repository of `trtqwen repo`, or BLS with accumulate_tokens")
        return Result("ok", f"{len(pieces)} pieces, {sum(map(len, pieces))} characters, none broken")


class Seeds(LiveCheck):
    """Without a seed TensorRT-LLM draws from a fixed one: unseeded requests repeat, which looks like a fault."""

    id = "D34"
    level = "warning"
    title = "seeds"

    def ask(self, endpoint: Endpoint, subject: Subject) -> Result:
        def sample(**seed: int) -> str:
            return "".join(endpoint.text("Once upon a time", 24, **_NOISE, **seed))

        first, again, other = sample(seed=1), sample(seed=1), sample(seed=2)
        unseeded = Counter(sample() for _ in range(2))
        problems = []
        if first != again:
            text = "two requests with one seed differ"
            problems.append(
                Diagnostic(text, "look at who is between client and engine, and which tensor names it uses")
            )
        if first == other:
            text = "requests with different seeds agree: sampling options do not reach the engine"
            problems.append(Diagnostic(text, "send seed (random_seed before 1.0) as UINT64, and top_p or top_k"))
        repeat = "repeat each other, as the engine's fixed default seed has it: send a seed for variety"
        return self.judge(
            problems, f"seeded requests agree; unseeded ones {repeat if len(unseeded) == 1 else 'differ'}"
        )


def _settled(endpoint: Endpoint) -> float:
    """Return the number of blocks in use after the gauges no longer count requests that have ended."""
    deadline = time.monotonic() + _CANCEL_SECONDS
    while (used := endpoint.gauges()[_USED]) > 0 and time.monotonic() < deadline:
        time.sleep(0.02)
    return used


CHECKS: tuple[Check, ...] = (Sanity(), InFlightBatching(), Cancellation(), Wedge(), Characters(), Seeds())
