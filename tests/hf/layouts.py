"""Model directories as people have them: the bundled model in published layouts, and with properties of real files.

Each is either computed and served as transformers does, or refused with a sentence that names the property.
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from trtqwen.demo import MODEL

DATA = Path(__file__).with_name("data")
Tensors = dict[str, torch.Tensor]
Change = Callable[[Path], Any]
TEMPLATES = {name: (DATA / f"{name}.jinja").read_text() for name in ("qwen2.5_instruct", "qwq", "r1_distill")}
OWN_TEMPLATE: str = json.loads((MODEL / "tokenizer_config.json").read_text())["chat_template"]
PLAIN = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}


@dataclass(frozen=True)
class Layout:
    """A directory to make.

    Attributes:
        refused: what the refusal names; empty if the directory is taken.
        oracle: the release of transformers that decides; 0 is both.
        weights: whether config or weights differ from the bundled ones, so that perplexities are compared.
        warns: what a warning names.
    """

    name: str
    change: Change
    refused: str = ""
    oracle: int = 0
    weights: bool = False
    warns: str = ""

    def make(self, home: Path) -> Path:
        directory = home / self.name
        shutil.copytree(MODEL, directory, copy_function=_linked)
        self.change(directory)
        return directory


def _linked(source: str, target: str) -> None:
    """Weights are linked, so that a hundred copies cost nothing; small files are copied."""
    if source.endswith(".safetensors"):
        os.link(bundled_weights(), target)
    else:
        shutil.copyfile(source, target)


@cache
def bundled_weights() -> Path:
    """A copy of this process: a link changes its file, and a conversion refuses a file that changes meanwhile."""
    directory = Path(tempfile.mkdtemp(prefix="layouts-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return Path(shutil.copyfile(MODEL / "model.safetensors", directory / "model.safetensors"))


def edit(path: Path, drop: tuple[str, ...] = (), **changes: Any) -> None:
    content = json.loads(path.read_text()) if path.is_file() else {}
    content |= changes
    for key in drop:
        content.pop(key, None)
    path.write_text(json.dumps(content, ensure_ascii=False))


def config(drop: tuple[str, ...] = (), **changes: Any) -> Change:
    return lambda directory: edit(directory / "config.json", drop, **changes)


def tokenizer_config(drop: tuple[str, ...] = (), **changes: Any) -> Change:
    return lambda directory: edit(directory / "tokenizer_config.json", drop, **changes)


def tokenizer(**changes: Any) -> Change:
    return lambda directory: edit(directory / "tokenizer.json", **changes)


def generation(drop: tuple[str, ...] = (), **changes: Any) -> Change:
    return lambda directory: edit(directory / "generation_config.json", drop, **changes)


def without(*names: str) -> Change:
    def change(directory: Path) -> None:
        for name in names:
            (directory / name).unlink()

    return change


def both(*changes: Change) -> Change:
    return lambda directory: [change(directory) for change in changes]


def tensors(change: Callable[[Tensors], Any], name: str = "model.safetensors") -> Change:
    """Change the weights; what `change` returns replaces them, if it returns some."""

    def apply(directory: Path) -> None:
        found = load_file(directory / "model.safetensors")
        found = change(found) or found
        (directory / "model.safetensors").unlink()
        save(found, directory / name)

    return apply


def save(found: Tensors, path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    save_file({key: value.contiguous().clone() for key, value in found.items()}, path, metadata={"format": "pt"})


def grown(rows: int) -> Change:
    """A larger vocabulary: rows of small random numbers behind the bundled ones."""

    def change(found: Tensors) -> None:
        torch.manual_seed(rows)
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            table = found[name]
            more = torch.randn(rows - len(table), table.shape[1]).to(table.dtype) * 0.01
            found[name] = torch.cat([table, more])

    return both(tensors(change), config(vocab_size=rows))


def added(directory: Path, *names: str, special: bool = True) -> list[dict[str, Any]]:
    """Append tokens to tokenizer.json; returns its list of added tokens."""
    content = json.loads((directory / "tokenizer.json").read_text())
    first = max(token["id"] for token in content["added_tokens"]) + 1
    fields = PLAIN | {"special": special}
    content["added_tokens"] += [{"id": first + place, "content": name, **fields} for place, name in enumerate(names)]
    (directory / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False))
    tokens: list[dict[str, Any]] = content["added_tokens"]
    return tokens


def template_processing(begin: str, token_id: int) -> dict[str, Any]:
    """The post-processor that puts a token first."""
    piece, special = {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": begin, "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [special, piece],
        "pair": [special, piece, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {begin: {"id": begin, "ids": [token_id], "tokens": [begin]}},
    }


def r1_distill(directory: Path) -> None:
    """DeepSeek-R1-Distill-Qwen: Llama's tokenizer class, BOS first, tokens of DeepSeek, no added_tokens_decoder."""
    grown(4160)(directory)
    names = ("<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<｜begin▁of▁sentence｜>", "<|EOT|>")
    tokens = added(directory, *names)
    added(directory, "<think>", "</think>", special=False)
    begin = next(token["id"] for token in tokens if token["content"] == names[3])
    edit(directory / "tokenizer.json", post_processor=template_processing(names[3], begin))
    named = {"__type": "AddedToken", **PLAIN, "normalized": True}
    del named["special"]
    (directory / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "add_bos_token": True,
                "add_eos_token": False,
                "bos_token": named | {"content": names[3]},
                "clean_up_tokenization_spaces": False,
                "eos_token": named | {"content": names[0]},
                "legacy": True,
                "model_max_length": 16384,
                "pad_token": named | {"content": names[0]},
                "sp_model_kwargs": {},
                "unk_token": None,
                "tokenizer_class": "LlamaTokenizerFast",
                "chat_template": TEMPLATES["r1_distill"],
            },
            ensure_ascii=False,
        )
    )
    without("special_tokens_map.json", "vocab.json", "merges.txt")(directory)
    end = begin - 3
    (directory / "generation_config.json").write_text(
        json.dumps(
            {
                "_from_model_config": True,
                "bos_token_id": begin,
                "eos_token_id": end,
                "do_sample": True,
                "temperature": 0.6,
                "top_p": 0.95,
                "transformers_version": "4.39.3",
            }
        )
    )
    edit(
        directory / "config.json",
        ("dtype", "layer_types", "rope_scaling"),
        bos_token_id=begin,
        eos_token_id=end,
        torch_dtype="bfloat16",
        use_mrope=False,
        sliding_window=4096,
        max_position_embeddings=131072,
        transformers_version="4.44.0",
    )


def qwq(directory: Path) -> None:
    """QwQ-32B: thinking begins in the prompt; think and tool marks are tokens that are not special."""
    grown(4160)(directory)
    added(directory, "<tool_call>", "</tool_call>", "<think>", "</think>", special=False)
    tokens = json.loads((directory / "tokenizer.json").read_text())["added_tokens"]
    decoder = {str(token.pop("id")): token for token in tokens}
    edit(directory / "tokenizer_config.json", added_tokens_decoder=decoder, chat_template=TEMPLATES["qwq"])
    edit(directory / "config.json", max_position_embeddings=40960, sliding_window=32768, max_window_layers=64)


def base_model(directory: Path) -> None:
    """Qwen2.5 base: the end of a text ends an answer, though the template ends turns otherwise."""
    edit(directory / "tokenizer_config.json", eos_token="<|endoftext|>", chat_template=TEMPLATES["qwen2.5_instruct"])
    (directory / "generation_config.json").write_text(
        json.dumps({"bos_token_id": 4093, "do_sample": False, "eos_token_id": 4093, "max_new_tokens": 2048})
    )
    edit(directory / "config.json", eos_token_id=4093)


def sharded(extra: Callable[[Tensors, Tensors], Any] | None = None, folder: str = "") -> Change:
    """Two shards and their index."""

    def change(directory: Path) -> None:
        found = load_file(directory / "model.safetensors")
        names = sorted(found)
        parts = [{name: found[name] for name in names[start::2]} for start in (0, 1)]
        if extra is not None:
            extra(*parts)
        placed: dict[str, str] = {}
        for place, part in enumerate(parts, 1):
            file = f"{folder}model-{place:05}-of-00002.safetensors"
            save(part, directory / file)
            placed |= dict.fromkeys(part, file)
        (directory / "model.safetensors").unlink()
        (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))

    return change


def _doubled(shift: float) -> Callable[[Tensors, Tensors], None]:
    def change(first: Tensors, second: Tensors) -> None:
        name = sorted(first)[0]
        second[name] = first[name] + shift

    return change


def index_beside(directory: Path) -> None:
    placed = dict.fromkeys(load_file(directory / "model.safetensors"), "model-00001-of-00002.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))


def index_and_single(directory: Path) -> None:
    """`model.safetensors` beside complete shards that differ from it."""
    found = load_file(MODEL / "model.safetensors")
    found["model.norm.weight"] = found["model.norm.weight"] + 1
    save(found, directory / "model.safetensors")


def other_file(shift: float) -> Change:
    def change(directory: Path) -> None:
        found = load_file(directory / "model.safetensors")
        save({"model.norm.weight": found["model.norm.weight"] + shift}, directory / "old.safetensors")

    return change


def folder_template(directory: Path) -> None:
    edit(directory / "tokenizer_config.json", ("chat_template",))
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "default.jinja").write_text(OWN_TEMPLATE)


def template_list(directory: Path) -> None:
    named = [
        {"name": "default", "template": OWN_TEMPLATE},
        {"name": "tool_use", "template": TEMPLATES["qwen2.5_instruct"]},
    ]
    edit(directory / "tokenizer_config.json", chat_template=named)


FEATURES = (
    "{% if tools is not none %}T{{ tools | length }}{% endif %}{% if documents %}D{{ documents[0]['text'] }}{% endif %}"  # noqa: E501
    "{% for m in messages %}{% if loop.index > 9 %}{% break %}{% endif %}{{ m['role'] + eos_token }}"
    "{% generation %}{{ m['content'] }}{% endgeneration %}{% endfor %}{{ pad_token }}{{ bos_token }}"
    "{{ strftime_now('%Y') | length }}{{ additional_special_tokens | length }}"
    "{% if enable_thinking is defined and enable_thinking is false %}N{% endif %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
MACRO = (
    "{%- macro turn(role, text) -%}<|im_start|>{{ role }}\n{{ text | trim }}<|im_end|>{%- endmacro -%}"
    "{%- set ns = namespace(count=0) -%}{%- for m in messages -%}{%- set ns.count = ns.count + 1 -%}"
    "{{ turn(m.role, m['content'] | default('', true)) }}{{ '\n' }}{%- endfor -%}"
    "{{ ns.count }}{{ messages | map(attribute='role') | join(',') }}"
    "{{ tools | default([], true) | tojson(indent=2) }}"
    "{%- if add_generation_prompt -%}<|im_start|>assistant{{ '\n' }}{%- endif -%}"
)
WORD_PIECES = {
    "type": "WordPiece",
    "unk_token": "[UNK]",
    "continuing_subword_prefix": "##",
    "max_input_chars_per_word": 100,
    "vocab": {"[UNK]": 0, "a": 1},
}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
YARN_5 = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 512}
TOOL = {"content": "<tool>", **PLAIN}


def _add_declared(directory: Path) -> None:
    content = json.loads((directory / "tokenizer_config.json").read_text())
    content["added_tokens_decoder"]["4096"] = TOOL
    (directory / "tokenizer_config.json").write_text(json.dumps(content))
    grown(4104)(directory)


def _legacy_tokens(directory: Path) -> None:
    edit(directory / "tokenizer_config.json", ("added_tokens_decoder",))
    names = {"<tool>": 4096, "<|endoftext|>": 4093, "<|im_start|>": 4094, "<|im_end|>": 4095}
    (directory / "added_tokens.json").write_text(json.dumps(names))
    grown(4104)(directory)


def _dropout(directory: Path) -> None:
    content = json.loads((directory / "tokenizer.json").read_text())
    content["model"]["dropout"] = 0.1
    (directory / "tokenizer.json").write_text(json.dumps(content))


def _eats_spaces(directory: Path) -> None:
    grown(4104)(directory)
    tokens = added(directory, "<tool>", special=False)
    tokens[-1] |= {"lstrip": True, "rstrip": True}
    edit(directory / "tokenizer.json", added_tokens=tokens)
    decoder = {str(token["id"]): {key: value for key, value in token.items() if key != "id"} for token in tokens}
    edit(directory / "tokenizer_config.json", added_tokens_decoder=decoder)


def _piece_made_special(directory: Path) -> None:
    """A piece of the vocabulary that fine-tuning made a special token."""
    vocabulary = json.loads((directory / "tokenizer.json").read_text())["model"]["vocab"]
    content = json.loads((directory / "tokenizer_config.json").read_text())
    content["added_tokens_decoder"][str(vocabulary["name"])] = {"content": "name", **PLAIN}
    (directory / "tokenizer_config.json").write_text(json.dumps(content))


def _other_ids(directory: Path) -> None:
    content = json.loads((directory / "tokenizer_config.json").read_text())
    content["added_tokens_decoder"]["4099"] = TOOL
    (directory / "tokenizer_config.json").write_text(json.dumps(content))


def _words_split(directory: Path) -> None:
    content = json.loads((directory / "tokenizer.json").read_text())
    content["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": r"\s?\w+|\s?[^\w\s]+|\s+"}
    (directory / "tokenizer.json").write_text(json.dumps(content))


def _llama(**changes: Any) -> Change:
    named = {"tokenizer_class": "LlamaTokenizerFast", "unk_token": None, "bos_token": "<|endoftext|>"}
    return tokenizer_config(("add_prefix_space",), **named, **changes)


def _attention_bias(found: Tensors) -> None:
    for layer in range(4):
        found[f"model.layers.{layer}.self_attn.o_proj.bias"] = torch.ones(256)


def _lora(found: Tensors) -> None:
    found["model.layers.0.self_attn.q_proj.lora_A.default.weight"] = torch.randn(8, 256)


def _prefixed(prefix: str) -> Change:
    return tensors(lambda found: {prefix + name: value for name, value in found.items()})


def _dropped(*parts: str) -> Change:
    return tensors(lambda found: {name: value for name, value in found.items() if not any(p in name for p in parts)})


def _tied_head_only(found: Tensors) -> Tensors:
    return {name: value for name, value in found.items() if name != "model.embed_tokens.weight"}


def _tie(found: Tensors) -> None:
    found["lm_head.weight"] = found["model.embed_tokens.weight"].clone()


MATH_TEMPLATE = TEMPLATES["qwen2.5_instruct"].replace(
    "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
    "Please reason step by step, and put your final answer within \\\\boxed{}.",
)

LAYOUTS = (
    # as published
    Layout("qwen2.5-instruct", tokenizer_config(chat_template=TEMPLATES["qwen2.5_instruct"]), weights=True),
    Layout("qwen2.5-base", base_model, warns="do not serve it as chat"),
    Layout("qwen2.5-coder", tokenizer_config(chat_template=TEMPLATES["qwen2.5_instruct"], model_max_length=32768)),
    Layout(
        "qwen2.5-math",
        both(
            config(max_position_embeddings=4096, rope_theta=1e4, max_window_layers=21),
            tokenizer_config(chat_template=MATH_TEMPLATE),
        ),
        weights=True,
    ),
    Layout(
        "qwen2.5-1m",
        both(
            tokenizer_config(chat_template=TEMPLATES["qwen2.5_instruct"], model_max_length=1010000),
            config(
                max_position_embeddings=1010000,
                rope_theta=1e7,
                dual_chunk_attention_config={
                    "chunk_size": 262144,
                    "local_size": 8192,
                    "original_max_position_embeddings": 262144,
                },
            ),
        ),
        weights=True,
        warns="dual_chunk_attention_config acts beyond 262,144",
    ),
    Layout("r1-distill", r1_distill, weights=True),
    Layout("qwq", qwq, weights=True),
    # the tokenizer's files
    Layout("no-tokenizer-json", without("tokenizer.json")),
    Layout(
        "truncation",
        tokenizer(truncation={"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}),
    ),
    Layout(
        "padding",
        tokenizer(
            padding={
                "strategy": {"Fixed": 64},
                "direction": "Right",
                "pad_to_multiple_of": None,
                "pad_id": 4093,
                "pad_type_id": 0,
                "pad_token": "<|endoftext|>",
            }
        ),
    ),
    Layout("token-in-tokenizer-config", _add_declared, weights=True),
    Layout("token-in-added-tokens", _legacy_tokens, weights=True),
    Layout(
        "added-tokens-unread",
        lambda directory: (directory / "added_tokens.json").write_text('{"<tool>": 4096}'),
        warns="added_tokens.json lists <tool>",
    ),
    Layout("ids-disagree", _other_ids, refused="'<tool>' is declared as id 4099"),
    Layout("larger-than-embedding", lambda directory: added(directory, "<tool>"), refused="4097 tokens"),
    Layout("named-in-special-tokens-map", tokenizer_config(("added_tokens_decoder", "eos_token", "pad_token"))),
    Layout("eos-as-token", tokenizer_config(eos_token={"__type": "AddedToken", "content": "<|im_end|>", **PLAIN})),
    Layout("extra-tokens-by-name", tokenizer_config(extra_special_tokens={"image_token": "<|im_start|>"}), oracle=4),
    Layout(
        "saved-by-5",
        tokenizer_config(
            ("additional_special_tokens",),
            extra_special_tokens=["<|im_start|>", "<|im_end|>"],
            tokenizer_class="TokenizersBackend",
            backend="tokenizers",
        ),
        oracle=5,
    ),
    Layout("split-special-tokens", tokenizer_config(split_special_tokens=True), warns="not a single token"),
    Layout("other-words", _words_split, oracle=4, warns="splits texts in another way than Qwen2"),
    Layout("llama-class", _llama(add_bos_token=True), oracle=4, warns="transformers 5 does not"),
    Layout("llama-class-eos", _llama(add_bos_token=False, add_eos_token=True), oracle=4, warns="add_eos_token"),
    Layout("bos-flag-alone", tokenizer_config(add_bos_token=True, bos_token="<|endoftext|>")),
    Layout(
        "bos-in-tokenizer-json",
        both(
            tokenizer(post_processor=template_processing("<|endoftext|>", 4093)),
            tokenizer_config(tokenizer_class="PreTrainedTokenizerFast", bos_token="<|endoftext|>"),
        ),
    ),
    Layout("no-tokenizer-config", without("tokenizer_config.json"), warns="no chat template"),
    Layout("dropout", _dropout, refused="dropout of 0.1"),
    Layout("token-eats-spaces", _eats_spaces, weights=True),
    Layout("piece-made-special", _piece_made_special),
    Layout(
        "nothing-declared",
        tokenizer_config(added_tokens_decoder={}, additional_special_tokens=None),
        oracle=4,
        warns="added_tokens_decoder lacks <|endoftext|>",
    ),
    Layout("prefix-space", tokenizer_config(add_prefix_space=True), oracle=4, warns="add_prefix_space is true"),
    Layout("pad-of-its-own", both(tokenizer_config(pad_token="[PAD]"), grown(4104)), weights=True),
    Layout("declared-as-a-list", tokenizer_config(added_tokens_decoder=[TOOL]), refused="not an object"),
    Layout("eos-a-number", tokenizer_config(eos_token=5), refused="eos_token is 5, not a token"),
    Layout("specials-a-word", tokenizer_config(additional_special_tokens="<tool>"), refused="not a list"),
    Layout("bos-not-a-token", tokenizer_config(bos_token="<s>"), refused="4097 tokens"),
    Layout(
        "tokenizer-not-json", lambda directory: (directory / "tokenizer.json").write_text("{"), refused="tokenizer"
    ),
    Layout(
        "tokenizer-config-a-page",
        lambda directory: (directory / "tokenizer_config.json").write_text("<!DOCTYPE html><html>"),
        refused="web page",
    ),
    Layout("word-pieces", tokenizer(model=WORD_PIECES, added_tokens=[]), refused="byte-level BPE"),
    Layout("strange-class", tokenizer_config(tokenizer_class="QWenTokenizer"), refused="QWenTokenizer"),
    # ends of answers
    Layout("eos-null", generation(eos_token_id=None)),
    Layout("eos-null-in-list", generation(eos_token_id=[4095, None])),
    Layout("eos-a-string", generation(eos_token_id="<|im_end|>"), refused="eos_token_id"),
    Layout("eos-beyond", generation(eos_token_id=[4095, 151643]), refused="151643"),
    Layout(
        "no-generation-config",
        both(without("generation_config.json"), tokenizer_config(eos_token="<|endoftext|>")),
    ),
    Layout("top-k-minus-1", generation(top_k=-1)),
    Layout("top-p-2", generation(top_p=2.0), refused="top_p"),
    Layout("min-p", generation(min_p=0.05)),
    Layout("generation-neutral", generation(num_beams=1, no_repeat_ngram_size=0, typical_p=1.0, stop_strings=None)),
    Layout("no-repeat", generation(no_repeat_ngram_size=3), warns="no_repeat_ngram_size 3"),
    Layout("eos-negative", generation(eos_token_id=-1), refused="eos_token_id"),
    # chat templates
    Layout("template-list", template_list),
    Layout("template-folder", folder_template),
    Layout(
        "template-file",
        both(
            tokenizer_config(("chat_template",)),
            lambda directory: (directory / "chat_template.jinja").write_text(TEMPLATES["qwen2.5_instruct"]),
        ),
    ),
    Layout(
        "template-twice",
        lambda directory: (directory / "chat_template.jinja").write_text(TEMPLATES["qwq"]),
        warns="another chat template",
    ),
    Layout("template-macro", tokenizer_config(chat_template=MACRO)),
    Layout("template-empty", tokenizer_config(chat_template=""), refused="is empty"),
    Layout("template-a-number", tokenizer_config(chat_template=7), refused="neither a template"),
    Layout("template-features", tokenizer_config(chat_template=FEATURES), oracle=4),
    Layout("template-none", tokenizer_config(("chat_template",)), warns="no chat template"),
    Layout("template-broken", tokenizer_config(chat_template="{% if x %}"), refused="chat template"),
    Layout("template-cannot-run", tokenizer_config(chat_template="{{ nothing.at.all }}"), refused="chat template"),
    Layout(
        "template-without-default",
        tokenizer_config(chat_template=[{"name": "rag", "template": OWN_TEMPLATE}]),
        refused="none named 'default'",
    ),
    # config.json
    Layout("rope-absent", config(("rope_theta",)), weights=True, warns="rope_theta"),
    Layout("rope-null", config(rope_theta=None), warns="rope_theta"),
    Layout(
        "rope-of-5",
        config(("rope_theta", "rope_scaling"), rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
        weights=True,
        oracle=5,
    ),
    Layout(
        "rope-twice",
        config(rope_theta=1e4, rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
        refused="rope_parameters.rope_theta 1e+06",
    ),
    Layout("rope-inside", config(("rope_theta",), rope_scaling=YARN | {"rope_theta": 1e6}), weights=True, oracle=5),
    Layout("rope-types", config(rope_scaling=YARN | {"rope_type": "linear"}), refused="rope_type"),
    Layout("yarn", config(rope_scaling=YARN), weights=True),
    Layout(
        "yarn-of-5", config(rope_parameters=YARN | {"rope_theta": 1e6}, rope_scaling=None), weights=True, oracle=5
    ),
    Layout("yarn-betas", config(rope_scaling=YARN | {"beta_fast": 16, "beta_slow": 2}), weights=True),
    Layout(
        "yarn-without-original",
        config(rope_scaling={"type": "yarn", "factor": 4.0}),
        weights=True,
        warns="original_max",
    ),
    Layout("yarn-attention", config(rope_scaling=YARN | {"attention_factor": 1.0}), weights=True),
    Layout("yarn-attention-small", config(rope_scaling=YARN | {"attention_factor": 0.7}), weights=True),
    Layout(
        "yarn-attention-alone",
        config(rope_scaling=YARN | {"factor": 1.0, "attention_factor": 2.0}),
        refused="attention by 2",
    ),
    Layout("yarn-attention-word", config(rope_scaling=YARN | {"attention_factor": "x"}), refused="attention_fac"),
    Layout(
        "yarn-usual-attention", config(rope_scaling=YARN | {"attention_factor": 1.1386294361119891}), weights=True
    ),
    Layout("yarn-mscale", config(rope_scaling=YARN | {"mscale": 1.0, "mscale_all_dim": 0.5}), weights=True),
    Layout("yarn-mscale-alone", config(rope_scaling=YARN | {"mscale": 0.5}), weights=True),
    Layout(
        "yarn-type-of-5",
        config(("rope_theta", "rope_scaling"), rope_parameters=YARN_5),
        weights=True,
        oracle=5,
    ),
    Layout("rope-factor-alone", config(rope_scaling={"factor": 4.0}), refused="no rope_type"),
    Layout("rope-of-a-kind-unknown", config(rope_scaling={"type": "su", "factor": 4.0}), refused="'su'"),
    Layout("rope-factor-a-word", config(rope_scaling=YARN | {"factor": "4"}), refused="factor"),
    Layout(
        "rope-default-factor",
        config(rope_scaling={"rope_type": "default", "factor": 4.0}),
        weights=True,
        warns="reads no factor 4.0",
    ),
    Layout("eps-infinite", config(rms_norm_eps=float("inf")), refused="rms_norm_eps"),
    Layout("eps-absent", config(("rms_norm_eps",)), weights=True, warns="has no rms_norm_eps"),
    Layout(
        "positions-absent", config(("max_position_embeddings",)), weights=True, warns="has no max_position_embeddings"
    ),
    Layout("architecture-a-word", config(architectures="Qwen2ForCausalLM"), refused='architectures is "Qwen2'),
    Layout("tied-a-word", config(tie_word_embeddings="true"), refused="tie_word_embeddings"),
    Layout("yarn-truncate", config(rope_scaling=YARN | {"truncate": False}), refused="truncate"),
    Layout("yarn-unknown", config(rope_scaling=YARN | {"wobble": 2}), refused="wobble"),
    Layout("linear", config(rope_scaling={"rope_type": "linear", "factor": 2.0}), weights=True),
    Layout("partial-rotary", config(partial_rotary_factor=0.5), refused="partial_rotary_factor"),
    Layout("window-unused", config(use_sliding_window=True, sliding_window=64, max_window_layers=28), weights=True),
    Layout(
        "window",
        config(("layer_types",), use_sliding_window=True, sliding_window=64, max_window_layers=0),
        refused="sliding window of 64",
    ),
    Layout(
        "window-beyond",
        config(("layer_types",), use_sliding_window=True, sliding_window=2048, max_window_layers=0),
        weights=True,
    ),
    Layout(
        "window-null",
        config(("layer_types",), use_sliding_window=True, sliding_window=None, max_window_layers=0),
        weights=True,
    ),
    Layout("rope-default", config(rope_scaling={"rope_type": "default", "type": "default"}), weights=True),
    Layout("rope-scaling-empty", config(rope_scaling={}), weights=True, oracle=5),
    Layout("yarn-nulls", config(rope_scaling=YARN | {"attention_factor": None, "mscale": None}), weights=True),
    Layout("layer-types", config(layer_types=["full_attention"] * 3), refused="layer_types"),
    Layout("not-causal", config(is_causal=False), refused="is_causal"),
    Layout("gelu", config(hidden_act="gelu"), refused="hidden_act"),
    Layout("swish", config(hidden_act="swish"), weights=True),
    Layout("head-dim", config(head_dim=32), weights=True),
    Layout("head-dim-other", config(head_dim=64), refused="shape"),
    Layout("kv-heads-absent", config(("num_key_value_heads",)), refused="num_key_value_heads"),
    Layout("model-type", config(model_type="qwen2_moe"), refused="model_type"),
    Layout("architectures-absent", config(("architectures",)), weights=True),
    Layout("attention-bias", config(attention_bias=False), weights=True),
    Layout("unknown-key", config(warp_factor=9), weights=True, warns="warp_factor 9"),
    Layout("mlp-bias", config(mlp_bias=True), refused="mlp_bias"),
    Layout("own-code", config(auto_map={"AutoModelForCausalLM": "m.M"}), weights=True, warns="auto_map"),
    Layout("dtype-absent", config(("dtype",)), weights=True, warns="has no dtype"),
    Layout("dtypes-differ", config(torch_dtype="float16"), refused="torch_dtype float16"),
    # weights
    Layout("tied-equal", both(tensors(_tie), config(tie_word_embeddings=True)), weights=True),
    Layout("tied-differ", config(tie_word_embeddings=True), refused="lm_head.weight differs"),
    Layout("untied-without-head", _dropped("lm_head"), refused="'lm_head.weight' is missing"),
    Layout(
        "tied-head-only",
        both(tensors(_tie), tensors(_tied_head_only), config(tie_word_embeddings=True)),
        weights=True,
        oracle=5,
    ),
    Layout("o-proj-bias", tensors(_attention_bias), refused="o_proj.bias"),
    Layout("no-biases", _dropped("_proj.bias"), refused="have biases"),
    Layout("lora-inside", tensors(_lora), refused="adapter such as LoRA"),
    Layout(
        "value-head",
        tensors(lambda found: found.update({"v_head.weight": torch.ones(1)})),
        weights=True,
        warns="v_head",
    ),
    Layout(
        "uint16",
        tensors(lambda found: found.update({"extra": torch.ones(2, dtype=torch.uint16)})),
        weights=True,
        warns="extra",
    ),
    Layout(
        "float64",
        tensors(lambda found: found.update({"model.norm.weight": found["model.norm.weight"].double()})),
        weights=True,
    ),
    Layout("float32", tensors(lambda found: {name: value.float() for name, value in found.items()}), weights=True),
    Layout(
        "more-layers", config(num_hidden_layers=3, layer_types=["full_attention"] * 3), refused="num_hidden_layers"
    ),
    Layout("compiled", _prefixed("_orig_mod."), refused="_orig_mod."),
    Layout("wrapped", _prefixed("module."), refused="module."),
    Layout("doubled-tensor", sharded(_doubled(0.0)), weights=True),
    Layout("two-values", sharded(_doubled(1.0)), refused="both hold tensor"),
    Layout("shards-in-a-folder", sharded(folder="w/"), weights=True),
    Layout("old-index", index_beside, weights=True, warns="does not read model.safetensors.index.json"),
    Layout("nested", _prefixed("model."), refused="begin with 'model.model.'"),
    Layout("index-and-other-single", both(sharded(), index_and_single), refused="both hold tensor"),
    Layout("stale-file", other_file(1.0), refused="both hold tensor"),
    Layout("equal-file", other_file(0.0), weights=True, warns="does not read old.safetensors"),
)
