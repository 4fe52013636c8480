"""Trains the tiny bundled demo model: corpus -> tokenizer -> train -> export, on CPU or CUDA.

The sources are Debian 12 packages (``apt-get download NAME``, then ``dpkg -x FILE DIRECTORY``):
libreoffice-help-en-us, -zh-cn and -ja 4:7.4.7-1+deb12u14, unicode-cldr-core 41-0.1, gnome-user-docs 43.0-2;
and the standard library of Python 3.11 (libpython3.11-stdlib, or any other 3.11 installation). The released
model was trained with Python 3.11.7's, tokenizers 0.22 and PyTorch 2.11 on one NVIDIA H100:

    train_tiny.py corpus --work W --help-en D --help-zh D --help-ja D --gnome D --cldr D --stdlib D
    train_tiny.py tokenizer --work W
    train_tiny.py train --work W --out W
    train_tiny.py export --work W --checkpoint W/best.pt --model-dir trtqwen/demo/model
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent))

from tiny_corpus import LANGS, SYSTEM_MESSAGE, build_corpus, read_jsonl, take_bytes, write_jsonl

VOCAB_SIZE = 4096
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
END_OF_TEXT, IM_START, IM_END = (VOCAB_SIZE - len(SPECIALS) + i for i in range(len(SPECIALS)))
SPLIT_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{%- if messages[0]['role'] != 'system' %}"
    "{{- '<|im_start|>system\\n" + SYSTEM_MESSAGE + "<|im_end|>\\n' }}"
    "{%- endif %}"
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
SEED = 20240607
CONTEXT = 1024

Array = np.ndarray[Any, np.dtype[Any]]


# --- model ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """The architecture, by the names that config.json uses."""

    hidden_size: int = 256
    num_hidden_layers: int = 4
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    intermediate_size: int = 768
    vocab_size: int = VOCAB_SIZE
    rope_theta: float = 1_000_000.0
    rms_norm_eps: float = 1e-6

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype) * self.weight


def rope_tables(shape: Shape, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    exponents = torch.arange(0, shape.head_dim, 2, device=device).float() / shape.head_dim
    angles = torch.outer(torch.arange(length, device=device).float(), shape.rope_theta**-exponents)
    angles = torch.cat((angles, angles), -1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat((-high, low), -1) * sin


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        kv_size = shape.num_key_value_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.hidden_size, shape.hidden_size)
        self.k_proj = nn.Linear(shape.hidden_size, kv_size)
        self.v_proj = nn.Linear(shape.hidden_size, kv_size)
        self.o_proj = nn.Linear(shape.hidden_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, _ = x.shape
        heads = (batch, length, -1, self.shape.head_dim)
        q, k, v = (p(x).view(heads).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        groups = self.shape.num_attention_heads // self.shape.num_key_value_heads
        q, k = rotate(q, cos, sin).to(v.dtype), rotate(k, cos, sin).to(v.dtype)
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(mixed.transpose(1, 2).reshape(batch, length, -1))  # type: ignore[no-any-return]


class MLP(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]


class Layer(nn.Module):
    def __init__(self, shape: Shape, dropout: float) -> None:
        super().__init__()
        self.self_attn = Attention(shape)
        self.mlp = MLP(shape)
        self.input_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), cos, sin))
        return x + self.dropout(self.mlp(self.post_attention_layernorm(x)))  # type: ignore[no-any-return]


class Backbone(nn.Module):
    def __init__(self, shape: Shape, dropout: float) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Layer(shape, dropout) for _ in range(shape.num_hidden_layers))
        self.norm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)


class TinyQwen2(nn.Module):
    """Qwen2 for training: parameter names are those of Qwen2ForCausalLM, residual dropout is added."""

    def __init__(self, shape: Shape, dropout: float = 0.0) -> None:
        super().__init__()
        self.shape = shape
        self.model = Backbone(shape, dropout)
        self.lm_head = nn.Linear(shape.hidden_size, shape.vocab_size, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                into_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                scale = 1 / math.sqrt(2 * shape.num_hidden_layers) if into_residual else 1
                nn.init.normal_(parameter, std=0.02 * scale)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor) -> Tensor:
        cos, sin = rope_tables(self.shape, tokens.shape[1], tokens.device)
        x = self.model.embed_tokens(tokens)
        for layer in self.model.layers:
            x = layer(x, cos, sin)
        return self.lm_head(self.model.norm(x))  # type: ignore[no-any-return]


# --- corpus and tokenizer ---------------------------------------------------------------------------------


def run_corpus(args: argparse.Namespace) -> None:
    args.work.mkdir(parents=True, exist_ok=True)
    roots = {"en": args.help_en, "zh": args.help_zh, "ja": args.help_ja}
    corpus = build_corpus(roots, args.gnome, args.cldr, args.stdlib)
    write_jsonl(args.work / "train.jsonl", corpus.train)
    write_jsonl(args.work / "val.jsonl", take_bytes(corpus.val, 40_000))
    write_jsonl(args.work / "heldout.jsonl", take_bytes(corpus.test, 22_000))
    write_jsonl(args.work / "calibration.jsonl", corpus.calibration)
    sizes: Counter[str] = Counter()
    for record in corpus.train:
        sizes[f"{record['lang']}/{record['kind']}"] += len(record["text"].encode())
    print("training bytes:", dict(sizes))


def tokenizer_sample(records: list[dict[str, str]]) -> Iterator[str]:
    """Plain text of each language plus its chat, code cut down so that no language crowds out the others."""
    budget = dict.fromkeys(LANGS, 3_500_000)
    for record in sorted(records, key=lambda r: r["kind"], reverse=True):
        if budget[record["lang"]] > 0:
            budget[record["lang"]] -= len(record["text"].encode())
            yield record["text"]


def train_bpe(records: list[dict[str, str]]) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(SPLIT_REGEX), behavior="isolated", invert=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # The special tokens never come out of text, so they must not shape the merges.
    plain = (text.replace("<|im_end|>", "") for text in tokenizer_sample(records))
    texts = (part for text in plain for part in text.split("<|im_start|>"))
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(list(SPECIALS))
    return tokenizer


def tokenizer_config() -> dict[str, Any]:
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    decoder = {str(END_OF_TEXT + i): {"content": token, **flags} for i, token in enumerate(SPECIALS)}
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": decoder,
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 2048,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def write_tokenizer(tokenizer: Any, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"), pretty=False)
    model = json.loads(tokenizer.to_str())["model"]
    (out / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
    merges = "\n".join(" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"])
    (out / "merges.txt").write_text("#version: 0.2\n" + merges + "\n", encoding="utf-8")
    write_json(out / "tokenizer_config.json", tokenizer_config())
    roles = ("additional_special_tokens", "eos_token", "pad_token")
    write_json(out / "special_tokens_map.json", {role: tokenizer_config()[role] for role in roles})


def run_tokenizer(args: argparse.Namespace) -> None:
    records = read_jsonl(args.work / "train.jsonl")
    tokenizer = train_bpe(records)
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    assert [tokenizer.token_to_id(t) for t in SPECIALS] == [END_OF_TEXT, IM_START, IM_END]
    write_tokenizer(tokenizer, args.work / "tokenizer")
    order = np.random.default_rng(SEED).permutation(len(records))
    counts: Counter[str] = Counter()
    stream: list[Array] = []
    starts: list[int] = []
    position = 0
    for index in order:
        record = records[index]
        ids = [*tokenizer.encode(record["text"]).ids, END_OF_TEXT]
        counts[f"{record['lang']}/{record['kind']}"] += len(ids)
        starts.append(position)
        position += len(ids)
        stream.append(np.array(ids, dtype=np.uint16))
    np.save(args.work / "train.npy", np.concatenate(stream))
    np.save(args.work / "starts.npy", np.array(starts, dtype=np.int64))
    for name in ("val", "heldout"):
        save_documents(args.work, name, tokenizer)
    write_json(args.work / "counts.json", dict(counts))
    chat = sum(n for key, n in counts.items() if key.endswith("chat"))
    print(f"training tokens: {position:,}, chat share {chat / position:.1%}", dict(counts))


def save_documents(work: Path, name: str, tokenizer: Any) -> None:
    """Tokenized evaluation documents with their language, so that training needs no tokenizer."""
    records = read_jsonl(work / f"{name}.jsonl")
    encoded = [tokenizer.encode(r["text"]).ids for r in records]
    np.savez(
        work / f"{name}.npz",
        ids=np.concatenate([np.array(ids, dtype=np.uint16) for ids in encoded]),
        lengths=np.array([len(ids) for ids in encoded]),
        langs=np.array([LANGS.index(r["lang"]) for r in records]),
    )


# --- training ---------------------------------------------------------------------------------------------


def load_documents(path: Path) -> list[tuple[str, Tensor]]:
    data = np.load(path)
    ids = torch.from_numpy(data["ids"].astype(np.int64))
    parts = torch.split(ids, data["lengths"].tolist())
    return [(LANGS[lang], part) for lang, part in zip(data["langs"].tolist(), parts, strict=True)]


@torch.no_grad()
def token_losses(model: nn.Module, ids: Tensor) -> Tensor:
    """Negative log-likelihood of each token but the first of every window."""
    losses = []
    for window in torch.split(ids, CONTEXT):
        if len(window) > 1:
            out = model(window[None])
            logits = (out if isinstance(out, Tensor) else out.logits)[0, :-1].float()
            losses.append(F.cross_entropy(logits, window[1:], reduction="none"))
    return torch.cat(losses)


def evaluate(model: nn.Module, documents: list[tuple[str, Tensor]], device: torch.device) -> dict[str, float]:
    """Mean loss by language, and over all tokens."""
    total: Counter[str] = Counter()
    tokens: Counter[str] = Counter()
    was_training = model.training
    model.eval()
    for lang, ids in documents:
        losses = token_losses(model, ids.to(device))
        for key in (lang, "all"):
            total[key] += losses.double().sum().item()  # type: ignore[assignment]
            tokens[key] += len(losses)
    model.train(was_training)
    return {key: total[key] / tokens[key] for key in (*LANGS, "all") if tokens[key]}


class Batches:
    """Random windows; half start at a document, as inference does, half anywhere."""

    def __init__(self, work: Path, batch: int, device: torch.device) -> None:
        self.tokens = torch.from_numpy(np.load(work / "train.npy").astype(np.int32)).to(device)
        starts = torch.from_numpy(np.load(work / "starts.npy"))
        self.starts = starts[starts < len(self.tokens) - CONTEXT - 1]
        self.batch, self.device = batch, device
        self.generator = torch.Generator().manual_seed(SEED)

    def draw(self) -> tuple[Tensor, Tensor]:
        half = self.batch // 2
        at_document = self.starts[torch.randint(len(self.starts), (half,), generator=self.generator)]
        limit = len(self.tokens) - CONTEXT - 1
        anywhere = torch.randint(limit, (self.batch - half,), generator=self.generator)
        offsets = torch.cat((at_document, anywhere)).to(self.device)
        windows = self.tokens[offsets[:, None] + torch.arange(CONTEXT + 1, device=self.device)].long()
        return windows[:, :-1], windows[:, 1:]


def make_optimizer(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() != 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    on_cuda = matrices[0].is_cuda
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), eps=1e-8, fused=on_cuda)


def learning_rate(peak: float, step: int, progress: float, warmup: int) -> float:
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))


class Trainer:
    """One training run; keeps the weights with the best validation loss."""

    def __init__(self, args: argparse.Namespace) -> None:
        torch.manual_seed(SEED)
        self.args = args
        self.device = torch.device(args.device)
        self.model = TinyQwen2(Shape(), args.dropout).to(self.device)
        self.forward = torch.compile(self.model) if args.compile else self.model
        self.optimizer = make_optimizer(self.model, args.lr, args.weight_decay)
        self.batches = Batches(args.work, args.batch, self.device)
        self.val = load_documents(args.work / "val.npz")
        self.best = math.inf
        self.log: list[dict[str, float]] = []

    def step(self, lr: float) -> Tensor:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        inputs, targets = self.batches.draw()
        with torch.autocast(self.device.type, torch.bfloat16):
            logits = self.forward(inputs)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def report(self, step: int, loss: float, elapsed: float) -> None:
        losses = evaluate(self.model, self.val, self.device)
        improved = losses["all"] < self.best
        if improved:
            self.best = losses["all"]
            self.save("best.pt")
        row = {"step": step, "seconds": round(elapsed, 1), "train": loss, **losses}
        self.log.append(row)
        text = " ".join(f"{key}={value:.3f}" for key, value in row.items() if key not in ("step", "seconds"))
        speed = (step + 1) * self.args.batch * CONTEXT / elapsed
        print(f"step {step} {elapsed:.0f}s {speed:,.0f} tok/s {text}{' *' if improved else ''}", flush=True)

    def save(self, name: str) -> None:
        state = {key: tensor.to("cpu", torch.bfloat16) for key, tensor in self.model.state_dict().items()}
        torch.save(state, self.args.out / name)

    def run(self) -> None:
        args = self.args
        self.step(0.0)
        started = time.monotonic()
        progress, step = 0.0, 0
        while progress < 1.0:
            loss = self.step(learning_rate(args.lr, step, progress, args.warmup))
            elapsed = time.monotonic() - started
            progress = max((step + 1) / args.steps, elapsed / args.max_seconds)
            if (step + 1) % args.every == 0 or progress >= 1.0:
                self.report(step, loss.item(), time.monotonic() - started)
            step += 1
        self.save("last.pt")
        summary = {"steps": step, "batch": args.batch, "context": CONTEXT, "curve": self.log}
        write_json(args.out / "log.json", summary)


def run_train(args: argparse.Namespace) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_float32_matmul_precision("high")
    Trainer(args).run()


# --- export and evaluation --------------------------------------------------------------------------------


def model_config() -> Any:
    from transformers import Qwen2Config

    shape = Shape()
    config = Qwen2Config(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_hidden_layers,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_key_value_heads,
        max_position_embeddings=2048,
        rms_norm_eps=shape.rms_norm_eps,
        rope_theta=shape.rope_theta,
        tie_word_embeddings=False,
        bos_token_id=END_OF_TEXT,
        eos_token_id=IM_END,
    )
    return config


def write_model(checkpoint: Path, out: Path) -> None:
    from transformers import GenerationConfig, Qwen2ForCausalLM

    model = Qwen2ForCausalLM(model_config()).to(torch.bfloat16)
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    model.load_state_dict({name: tensor.to(torch.bfloat16) for name, tensor in state.items()})
    model.generation_config = GenerationConfig(
        bos_token_id=END_OF_TEXT,
        pad_token_id=END_OF_TEXT,
        eos_token_id=[IM_END, END_OF_TEXT],
        do_sample=True,
        repetition_penalty=1.05,
        temperature=0.7,
        top_k=20,
        top_p=0.8,
    )
    model.save_pretrained(out)


def unigram_losses(work: Path, documents: list[tuple[str, Tensor]]) -> dict[str, float]:
    """The same scored tokens under add-one-smoothed training token frequencies."""
    tokens = np.load(work / "train.npy")
    counts = torch.from_numpy(np.bincount(tokens, minlength=VOCAB_SIZE)).double() + 1
    log_probs = (counts / counts.sum()).log()
    sums: dict[str, list[float]] = {}
    for lang, ids in documents:
        scored = torch.cat([window[1:] for window in torch.split(ids, CONTEXT)])
        for key in (lang, "all"):
            entry = sums.setdefault(key, [0.0, 0.0])
            entry[0] -= log_probs[scored].sum().item()
            entry[1] += len(scored)
    return {key: total / count for key, (total, count) in sums.items()}


def scored_bytes(vocab: dict[str, int], documents: list[tuple[str, Tensor]]) -> dict[str, tuple[int, int]]:
    """(tokens, bytes) scored by language: one character of a byte-level token is one byte."""
    lengths = torch.zeros(VOCAB_SIZE, dtype=torch.long)
    for token, index in vocab.items():
        lengths[index] = len(token)
    result: dict[str, tuple[int, int]] = {}
    for lang, ids in documents:
        scored = torch.cat([window[1:] for window in torch.split(ids, CONTEXT)])
        for key in (lang, "all"):
            tokens, size = result.get(key, (0, 0))
            result[key] = (tokens + len(scored), size + int(lengths[scored].sum()))
    return result


def run_export(args: argparse.Namespace) -> None:
    from transformers import AutoModelForCausalLM

    write_model(args.checkpoint, args.model_dir)
    for path in sorted((args.work / "tokenizer").iterdir()):
        shutil.copy(path, args.model_dir / path.name)
    model = AutoModelForCausalLM.from_pretrained(args.model_dir, dtype=torch.float32)
    documents = load_documents(args.work / "heldout.npz")
    losses = evaluate(model, documents, torch.device("cpu"))
    baseline = unigram_losses(args.work, documents)
    vocab = json.loads((args.model_dir / "vocab.json").read_text(encoding="utf-8"))
    table = {}
    for key, (tokens, size) in scored_bytes(vocab, documents).items():
        table[key] = {
            "tokens": tokens,
            "bytes": size,
            "perplexity": math.exp(losses[key]),
            "unigram_perplexity": math.exp(baseline[key]),
            "bits_per_byte": losses[key] / math.log(2) * tokens / size,
            "unigram_bits_per_byte": baseline[key] / math.log(2) * tokens / size,
        }
        print(key, {name: round(value, 3) for name, value in table[key].items()})
    write_json(args.work / "evaluation.json", table)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    corpus = commands.add_parser("corpus", help="read the unpacked packages, write JSON lines")
    for name in ("help-en", "help-zh", "help-ja", "cldr", "stdlib"):
        corpus.add_argument(f"--{name}", type=Path, required=True)
    corpus.add_argument("--gnome", type=Path)
    corpus.set_defaults(run=run_corpus)
    tokenizer = commands.add_parser("tokenizer", help="train the BPE and encode the corpus")
    tokenizer.set_defaults(run=run_tokenizer)
    train = commands.add_parser("train", help="train on the encoded corpus")
    train.add_argument("--out", type=Path, required=True)
    train.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    train.add_argument("--compile", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available())
    for name, default in (("steps", 3000), ("batch", 64), ("warmup", 200), ("every", 300)):
        train.add_argument(f"--{name}", type=int, default=default)
    for name, value in (("lr", 2e-3), ("weight-decay", 0.3), ("dropout", 0.3), ("max-seconds", math.inf)):
        train.add_argument(f"--{name}", type=float, default=value)
    train.set_defaults(run=run_train)
    export = commands.add_parser("export", help="write the model directory, score the held-out text")
    export.add_argument("--checkpoint", type=Path, required=True)
    export.add_argument("--model-dir", type=Path, required=True)
    export.set_defaults(run=run_export)
    for command in (corpus, tokenizer, train, export):
        command.add_argument("--work", type=Path, required=True, help="folder of intermediate files")
    return parser.parse_args()


if __name__ == "__main__":
    arguments = parse_args()
    arguments.run(arguments)
