"""Check of a running server's greedy tokens against the Hugging Face model, computed in float32 on the CPU."""

from __future__ import annotations

import importlib.util
import itertools
from concurrent.futures import ThreadPoolExecutor

from trtqwen.diagnostics import Diagnostic
from trtqwen.doctor.check import Check, Result
from trtqwen.doctor.endpoint import Endpoint
from trtqwen.doctor.live import LiveCheck
from trtqwen.doctor.subject import Skip, Subject
from trtqwen.hf.source import HfModel

_PROMPTS = ("The capital of France is", "def add(a, b):", "床前明月光，", "Once upon a time")
_TOKENS = 12
_MARGIN = 1.0  # of logits: rounding turns such near ties round, a wrong all-reduce is off by many
_LEAST = 0.9  # share of tokens


class TokenParity(LiveCheck):
    """Greedy tokens of the server, alone and in a batch, are those of the Hugging Face model in float32 on the CPU.

    Near ties may differ.
    """

    id = "D28"
    level = "error"
    title = "greedy tokens"

    def ask(self, endpoint: Endpoint, subject: Subject) -> Result:
        source = subject.source
        if importlib.util.find_spec("torch") is None:
            raise Skip("needs PyTorch")
        prompts = [endpoint.encode(prompt)[0] for prompt in _PROMPTS]

        def answer(prompt: list[int]) -> list[int]:
            return list(itertools.chain(*endpoint.tokens(prompt, _TOKENS, end_id=-1)))

        with ThreadPoolExecutor(len(prompts)) as pool:
            runs = {"alone": [answer(prompts[0])], "in a batch of four": list(pool.map(answer, prompts))}
        problems, shares = [], []
        for name, answers in runs.items():
            share = _agreement(source, [(prompt, ids) for prompt, ids in zip(prompts, answers, strict=False)])
            shares.append(f"{share:.0%} {name}")
            if share < _LEAST:
                text = f"{share:.0%} of the greedy tokens {name} are the model's"
                hint = "check the all-reduce with `trtqwen doctor --gpu` and the checkpoint with `trtqwen verify`"
                problems.append(Diagnostic(text, hint))
        return self.judge(problems, f"{', '.join(shares)}, within {_MARGIN:g} of the best logit")


def _agreement(source: HfModel, answers: list[tuple[list[int], list[int]]]) -> float:
    """Return the share of answer tokens that the model rates within the margin of its best token."""
    import torch  # the other checks start without PyTorch

    from trtqwen.hf.forward import LayerwiseModel

    model = LayerwiseModel(source, torch.float32, torch.device("cpu"), torch.float32)
    hidden = [model.embed(prompt + answer) for prompt, answer in answers]
    for index in range(model.num_layers):
        layer = model.layer(index)
        hidden = [layer(states) for states in hidden]
    right = total = 0
    for (prompt, answer), states in zip(answers, hidden, strict=True):
        logits = model.logits(states[len(prompt) - 1 : -1])
        chosen = logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
        right += int((chosen >= logits.max(dim=1).values - _MARGIN).sum())
        total += len(answer)
    return right / max(total, 1)


CHECKS: tuple[Check, ...] = (TokenParity(),)
