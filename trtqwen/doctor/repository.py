"""Checks of a model repository, made by trtqwen or not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from trtqwen.artifact.manifest import MANIFEST
from trtqwen.diagnostics import Diagnostic
from trtqwen.doctor.check import Check, Result
from trtqwen.doctor.configs import ModelFile
from trtqwen.doctor.lint import lint
from trtqwen.doctor.subject import Skip, Subject


class RepositoryLint(Check):
    """The model configurations agree with each other and with TensorRT-LLM's contract.

    The check compares tensors, types, shapes, ensemble steps and parameters.
    """

    id = "D22"
    level = "error"
    title = "model repository"

    def run(self, subject: Subject) -> Result:
        models = subject.model_files
        return self.judge(list(lint(models)), f"{len(models)} models: {', '.join(models)}")


class Queue(Check):
    """Requests do not wait for a batch, since the engine batches in flight.

    The queue has a limit, and BLS has an instance for each request of a batch.
    """

    id = "D23"
    level = "warning"
    title = "queue delay and size"

    def run(self, subject: Subject) -> Result:
        models = subject.model_files
        problems = [problem for model in models.values() for problem in _delays(model)]
        engine = models.get("tensorrt_llm")
        if engine is not None and engine.config is not None:
            if not engine.config.dynamic_batching.default_queue_policy.max_queue_size:
                text = "tensorrt_llm: max_queue_size is 0: requests queue without end"
                problems.append(Diagnostic(text, "set serve.max_queue_size, such as twice engine.max_batch_size"))
            problems += _bls_instances(subject)
        return self.judge(problems, "no delay, bounded queue")


def _delays(model: ModelFile) -> Iterator[Diagnostic]:
    if model.config is None:
        return
    delay = model.config.dynamic_batching.max_queue_delay_microseconds
    if delay:
        text = (
            f"{model.name}: max_queue_delay_microseconds {delay}: every request waits, the engine batches in flight"
        )
        yield Diagnostic(text, "set it to 0")


def _bls_instances(subject: Subject) -> Iterator[Diagnostic]:
    """Upstream's tensorrt_llm_bls serves one request per instance; that of our own repositories serves many."""
    bls = subject.model_files.get("tensorrt_llm_bls")
    if bls is None or bls.config is None or subject.engine is None or subject.repository is None:
        return
    if (subject.repository / MANIFEST).is_file():
        return
    count = sum(group.count or 1 for group in bls.config.instance_group) or 1
    batch = subject.engine_config.build_config.max_batch_size
    if count < batch:
        text = f"tensorrt_llm_bls: {count} instances for an engine of max_batch_size {batch}: one request each"
        yield Diagnostic(text, f"set its instance_group count to {batch}, or let clients use ensemble")


class GuidedDecoding(Check):
    """The backend of guided decoding can load its vocabulary, and that has the engine's size."""

    id = "D24"
    level = "warning"
    title = "guided decoding"

    def run(self, subject: Subject) -> Result:
        engine = subject.model_files.get("tensorrt_llm")
        if engine is None or engine.config is None:
            raise Skip("tensorrt_llm cannot be read, see D22")
        backend = engine.parameter("guided_decoding_backend")
        if not backend:
            return Result("ok", "off: requests that ask for a schema are refused")
        if backend != "xgrammar":
            text = f"guided_decoding_backend {backend!r}: the model will not load"
            return self.found(text, "set it to xgrammar, or leave it empty")
        return self.judge(list(_xgrammar(engine, subject)), "xgrammar")


def _xgrammar(engine: ModelFile, subject: Subject) -> Iterator[Diagnostic]:
    info = engine.parameter("xgrammar_tokenizer_info_path")
    if engine.config is not None and engine.config.backend == "python":
        if not engine.parameter("tokenizer_dir"):
            yield Diagnostic("guided decoding on the python backend needs tokenizer_dir", "set it in tensorrt_llm")
        return
    hint = "write it with upstream's generate_xgrammar_tokenizer_info.py"
    try:
        vocabulary = json.loads(Path(info).read_text(encoding="utf-8"))["encoded_vocab"]
    except (OSError, ValueError, KeyError, TypeError):
        yield Diagnostic(f"xgrammar_tokenizer_info_path {info!r}: cannot be read", hint)
        return
    if subject.engine is not None and len(vocabulary) != (size := subject.engine_config.pretrained_config.vocab_size):
        text = (
            f"xgrammar's vocabulary has {len(vocabulary)} entries, the engine {size}: masks fall on the wrong words"
        )
        yield Diagnostic(text, f"{hint}, with the model's vocab_size")


CHECKS: tuple[Check, ...] = (RepositoryLint(), Queue(), GuidedDecoding())
