"""The model that Triton serves, as its repository describes it: names, limits, tokenizer, defaults, abilities."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

from trtqwen.artifact.manifest import read_manifest
from trtqwen.artifact.names import MODEL_CONFIG, tokenizer_directory
from trtqwen.diagnostics import InputError
from trtqwen.engine.config import BuildConfig, read_engine_config
from trtqwen.gateway.errors import bad_request
from trtqwen.hf.generation import GenerationDefaults, generation_defaults
from trtqwen.hf.tokenizer import Tokenizer
from trtqwen.triton.launch import replica_count

_PIECE = 1 << 15  # characters tokenized at a time to see whether a long text fits
_CUT_TOKENS = 16
_EXTENSIONS = {
    "torch": frozenset(
        {
            "min_p",
            "top_log_probs",
            "prompt_log_probs",
            "structural_tags",
            "cache_salt",
            "owner",
            "tell_stop",
            "carrier",
        }
    ),
    "vllm": frozenset({"min_p", "top_log_probs", "cache_salt", "tell_stop", "carrier"}),
    "llmapi": frozenset({"min_p", "cache_salt", "tell_stop", "carrier"}),
}


@dataclass(frozen=True)
class ServedModel:
    """Properties of the served model.

    Attributes:
        created: seconds since 1970 when the repository was written.
        fingerprint: changes with the engine and with the way it is run.
        tensors: names of the inputs of `tensorrt_llm`; they differ between releases of TensorRT-LLM.
        kv_cache_tokens: the repository's cap on the KV cache of one engine instance, in tokens.
        instances: number of engine instances in one Triton.
        reuses_kv_cache: whether the engine keeps KV cache blocks for prompts that begin alike.
        guided_decoding: whether the engine can be held to a JSON schema.
        extensions: what the engine does beyond upstream's tensors: `min_p`, `log_probs` (of likely tokens and
            of prompts), `structural_tags`, `cache_salt`, `owner`, `tell_stop` and `carrier`; see docs/extensions.md.
    """

    name: str
    created: int
    fingerprint: str
    tokenizer: Tokenizer
    defaults: GenerationDefaults
    limits: BuildConfig
    vocab_size: int
    tensors: frozenset[str]
    kv_cache_tokens: int | None
    instances: int
    guided_decoding: bool
    extensions: frozenset[str] = frozenset()
    reuses_kv_cache: bool = False

    def cache_tokens(self, configured: int | None) -> int:
        """Return the tokens that the KV cache of one engine instance holds.

        Args:
            configured: a user's setting; None is the repository's cap, otherwise room for a batch of full-length
                requests.
        """
        return configured or self.kv_cache_tokens or self.limits.max_batch_size * self.limits.max_seq_len

    def encode(
        self, text: str, param: str, *, mark: str = "", raw: bool = False, most: int | None = None
    ) -> tuple[int, ...]:
        """Token ids of a text.

        Args:
            mark: a character that is not part of the text; a special token that contains it is plain text.
            raw: add the tokens that the tokenizer adds around a raw prompt, such as BOS.
            most: largest number of tokens of the text; None is the context. A longer one is refused before
                all of it is tokenized.

        Raises:
            ApiError: naming `param`, if it holds half a surrogate pair, which JSON can carry and UTF-8 cannot, or
                exceeds the context.
        """
        try:
            text.encode()
        except UnicodeEncodeError as problem:
            what = f"{param}: character {problem.start} is half a surrogate pair"
            raise bad_request(f"{what}; send whole characters", param=param) from None
        if len(text) > _PIECE:
            self._check_length(text, param, most or self.limits.max_seq_len)
        if mark and mark in text:
            return tuple(self.tokenizer.encode_marked(text, mark))
        return tuple(self.tokenizer.encode_prompt(text) if raw else self.tokenizer.encode(text))

    def _check_length(self, text: str, param: str, most: int) -> None:
        """Refuse a text whose beginning has too many tokens: a megabyte of digits has a million tokens."""
        tokens = 0
        for start in range(0, len(text), _PIECE):
            # A cut may change the tokens around it.
            tokens += max(0, len(self.tokenizer.encode(text[start : start + _PIECE])) - _CUT_TOKENS)
            if tokens > most:
                raise bad_request(
                    f"{param}: has {len(text)} characters, of which the first {start + _PIECE} alone exceed the "
                    f"{most} tokens that may be; shorten it",
                    param=param,
                    code="context_length_exceeded",
                )


def load_model(repository: Path, name: str | None = None) -> ServedModel:
    """Read a finished model repository.

    Args:
        name: what clients call the model; None is the directory's name.

    Raises:
        InputError: if the repository, its engine's config or its tokenizer cannot be used.
    """
    manifest = read_manifest(repository, "repository")
    path = repository / "tensorrt_llm" / MODEL_CONFIG
    try:
        config = text_format.Parse(path.read_text(encoding="utf-8"), ModelConfig())
    except (OSError, text_format.ParseError) as problem:
        raise InputError(f"{path}: cannot be read ({problem})", "write the repository again") from None
    parameters = {key: value.string_value for key, value in config.parameters.items()}
    cap = parameters.get("max_tokens_in_paged_kv_cache", "")
    tokenizer = Tokenizer(tokenizer_directory(repository))
    engine = read_engine_config(Path(parameters["gpt_model_path"]))
    return ServedModel(
        name=name or repository.resolve().name,
        created=int(path.stat().st_mtime),
        fingerprint=f"fp_{manifest.key[:12]}",
        tokenizer=tokenizer,
        defaults=generation_defaults(tokenizer.directory),
        limits=engine.build_config,
        vocab_size=engine.pretrained_config.vocab_size,
        tensors=frozenset(tensor.name for tensor in config.input),
        kv_cache_tokens=int(cap) if cap.isdecimal() else None,
        instances=replica_count(config),
        guided_decoding=bool(parameters.get("guided_decoding_backend")),
        extensions=_EXTENSIONS.get(engine.backend, frozenset()),
        reuses_kv_cache=parameters.get("enable_kv_cache_reuse", "").lower() == "true",
    )
