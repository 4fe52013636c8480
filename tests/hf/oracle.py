"""What a release of transformers makes of model directories; a program of its own, so that releases do not mix.

Reads a JSON list of questions from the file named first and writes the answers to the file named second.
"""

from __future__ import annotations

import json
import math
import os
import sys
import warnings
from typing import Any


def asked(question: dict[str, Any]) -> dict[str, Any]:
    """Ids, chats, end ids and perplexity of one directory; a failure is an answer too."""
    from transformers import AutoTokenizer

    directory = question["directory"]
    answer: dict[str, Any] = {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory)
        answer["plain"] = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in question["texts"]]
        answer["raw"] = [tokenizer(text)["input_ids"] for text in question["texts"]]
        answer["chats"] = [chat(tokenizer, options) for options in question["chats"]]
        answer["ends"] = end_ids(tokenizer, directory)
    except Exception as problem:
        answer["failed"] = f"{type(problem).__name__}: {problem}"
    if question["samples"]:
        try:
            answer["perplexity"] = perplexity(directory, question["samples"])
        except Exception as problem:
            answer["failed"] = f"{type(problem).__name__}: {problem}"
    return answer


def chat(tokenizer: Any, options: dict[str, Any]) -> str | None:
    try:
        return str(tokenizer.apply_chat_template(tokenize=False, **options))
    except Exception:
        return None


def end_ids(tokenizer: Any, directory: str) -> list[int]:
    """The union of what the three files name, as the tokenizer and the JSON files have it."""
    ids = {tokenizer.eos_token_id}
    for name in ("generation_config.json", "config.json"):
        if os.path.isfile(f"{directory}/{name}"):
            with open(f"{directory}/{name}", encoding="utf-8") as file:
                value = json.load(file).get("eos_token_id")
            ids |= set(value if isinstance(value, list) else [value])
    return sorted(token for token in ids if token is not None)


def perplexity(directory: str, samples: list[list[int]]) -> float:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory).float().eval()
    total, count = 0.0, 0
    with torch.inference_mode():
        for sample in samples:
            ids = torch.tensor([sample])
            chosen = model(ids).logits[0, :-1].double().log_softmax(-1).gather(1, ids[0, 1:, None])
            total -= float(chosen.sum())
            count += len(sample) - 1
    return math.exp(total / count)


def main(questions: str, answers: str) -> None:
    import torch
    import transformers

    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    with open(questions, encoding="utf-8") as file:
        found = [asked(question) for question in json.load(file)]
    with open(answers, "w", encoding="utf-8") as file:
        json.dump({"version": transformers.__version__, "answers": found}, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
