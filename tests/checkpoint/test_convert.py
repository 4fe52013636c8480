from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.conftest import random_model
from trtqwen.artifact import digest_file, read_manifest
from trtqwen.checkpoint.convert import plan_conversion, run_conversion
from trtqwen.errors import CheckpointError, InputError, SourceError
from trtqwen.recipe import CheckpointRecipe

STATED = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def convert(model: Path, output: Path, dtype: str = "float16", tp_size: int = 1) -> list[dict[str, torch.Tensor]]:
    run_conversion(plan_conversion(model, CheckpointRecipe(dtype=dtype, tp_size=tp_size)), output)  # type: ignore[arg-type]
    return [load_file(output / f"rank{rank}.safetensors") for rank in range(tp_size)]


@pytest.mark.parametrize("tp_size", [1, 2, 4, 8])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_model_opt_exports_the_same_tensors(
    hf_directory: Callable[..., Path], tmp_path: Path, dtype: str, tp_size: int
) -> None:
    """NVIDIA ModelOpt shards the embedding over the ranks; everything else is laid out alike."""
    warnings.filterwarnings("ignore")
    from modelopt.torch.export import export_tensorrt_llm_checkpoint

    model = random_model(seed=7)  # vocabulary 515 needs padding
    ranks = convert(hf_directory(seed=7), tmp_path / "ours", dtype, tp_size)
    # The decoder type only decides which keys ModelOpt's config.json gets; qwen needs tensorrt_llm installed.
    export_tensorrt_llm_checkpoint(
        model, "llama", STATED[dtype], export_dir=tmp_path / "theirs", inference_tensor_parallel=tp_size
    )
    theirs = [load_file(tmp_path / "theirs" / f"rank{rank}.safetensors") for rank in range(tp_size)]
    embedding = "transformer.vocab_embedding.weight"
    joined = torch.cat([rank.pop(embedding) for rank in theirs])
    for ours, other in zip(ranks, theirs, strict=True):
        assert torch.equal(ours.pop(embedding), joined[:515])
        assert set(ours) == set(other)
        for name, tensor in ours.items():
            assert tensor.dtype == other[name].dtype
            assert torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("max_shard_size", ["5GB", "100KB"])
@pytest.mark.parametrize("tied", [False, True])
def test_tied_and_sharded_sources(
    hf_directory: Callable[..., Path], tmp_path: Path, tied: bool, max_shard_size: str
) -> None:
    directory = hf_directory(tie_word_embeddings=tied, max_shard_size=max_shard_size)
    (rank,) = convert(directory, tmp_path / "out", "float32")
    state = random_model(tie_word_embeddings=tied).state_dict()
    assert torch.equal(rank["lm_head.weight"], state["lm_head.weight"])
    assert torch.equal(rank["transformer.vocab_embedding.weight"], state["model.embed_tokens.weight"])
    assert torch.equal(rank["lm_head.weight"], rank["transformer.vocab_embedding.weight"]) == tied


heads = st.sampled_from([(4, 1), (4, 2), (4, 4), (8, 2), (8, 4), (6, 3), (6, 1)])


@settings(max_examples=25, deadline=None)
@given(heads, st.sampled_from([1, 2, 3, 4, 6, 8]), st.integers(50, 70), st.integers(0, 99))
def test_shards_reassemble_to_the_source(
    tmp_path_factory: pytest.TempPathFactory, heads: tuple[int, int], tp_size: int, vocab: int, seed: int
) -> None:
    """Whatever sizes are accepted: joining the ranks gives back every source tensor exactly."""
    (query, kv), size, inner = heads, 8, 48
    shape = {
        "num_attention_heads": query,
        "num_key_value_heads": kv,
        "hidden_size": query * size,
        "intermediate_size": inner,
        "vocab_size": vocab,
        "num_hidden_layers": 1,
    }
    model = random_model(seed=seed, **shape)
    home = tmp_path_factory.mktemp("reassemble")
    model.save_pretrained(home / "hf")
    legal = (
        query % tp_size == 0 and (kv % tp_size == 0 if tp_size <= kv else tp_size % kv == 0) and inner % tp_size == 0
    )
    if not legal:
        with pytest.raises(CheckpointError, match=f"tp_size {tp_size}: .*; use tp_size 1"):
            plan_conversion(home / "hf", CheckpointRecipe(dtype="float32", tp_size=tp_size))
        return
    ranks = convert(home / "hf", home / "out", "float32", tp_size)
    state = model.state_dict()
    layer, source = "transformer.layers.0", "model.layers.0"
    for target, name, axis in [
        ("attention.dense", "self_attn.o_proj", 1),
        ("mlp.fc", "mlp.gate_proj", 0),
        ("mlp.gate", "mlp.up_proj", 0),
        ("mlp.proj", "mlp.down_proj", 1),
    ]:
        joined = torch.cat([rank[f"{layer}.{target}.weight"] for rank in ranks], dim=axis)
        assert torch.equal(joined, state[f"{source}.{name}.weight"])
    head = torch.cat([rank["lm_head.weight"] for rank in ranks])
    assert len(head) % tp_size == 0
    assert torch.equal(head[:vocab], state["lm_head.weight"])
    assert not head[vocab:].any()
    for kind in ("weight", "bias"):
        local_q, local_kv = query // tp_size * size, max(1, kv // tp_size) * size
        parts = [rank[f"{layer}.attention.qkv.{kind}"].split([local_q, local_kv, local_kv]) for rank in ranks]
        copies = max(1, tp_size // kv)
        for index, (letter, step) in enumerate((("q", 1), ("k", copies), ("v", copies))):
            joined = torch.cat([part[index] for part in parts[::step]])
            assert torch.equal(joined, state[f"{source}.self_attn.{letter}_proj.{kind}"])
        for rank, part in enumerate(parts):  # each copy of a KV head is the same
            assert all(torch.equal(a, b) for a, b in zip(part[1:], parts[rank // copies * copies][1:], strict=True))


def test_auto_keeps_16_bit_and_makes_float32_float16(hf_directory: Callable[..., Path]) -> None:
    for source, expected in [(torch.bfloat16, "bfloat16"), (torch.float16, "float16"), (torch.float32, "float16")]:
        assert plan_conversion(hf_directory(dtype=source)).dtype == expected


def test_the_manifest_accounts_for_everything(hf_directory: Callable[..., Path], tmp_path: Path) -> None:
    directory, out = hf_directory(), tmp_path / "out"
    plan = plan_conversion(directory, CheckpointRecipe(dtype="bfloat16", tp_size=2))
    manifest = run_conversion(plan, out)
    assert read_manifest(out, "checkpoint") == manifest
    assert manifest.key == plan_conversion(directory, CheckpointRecipe(dtype="bfloat16", tp_size=2)).key()
    assert manifest.key != plan_conversion(directory, CheckpointRecipe(dtype="float16", tp_size=2)).key()
    files = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()} - {"manifest.json"}
    assert set(manifest.outputs) == files
    assert all(record.digest == digest_file(out / name) for name, record in manifest.outputs.items())


def test_progress_counts_every_byte(hf_directory: Callable[..., Path], tmp_path: Path) -> None:
    plan, seen = plan_conversion(hf_directory(), CheckpointRecipe(dtype="float16", tp_size=2)), 0

    def count(nbytes: int) -> None:
        nonlocal seen
        seen += nbytes

    run_conversion(plan, tmp_path / "out", progress=count)
    assert seen == plan.nbytes


def change_weights(directory: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def test_a_missing_tensor_is_named(hf_directory: Callable[..., Path]) -> None:
    directory = hf_directory()
    change_weights(directory, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(SourceError, match=r"tensor 'model\.layers\.1\.mlp\.up_proj\.weight' is missing"):
        plan_conversion(directory)


def test_a_tensor_of_the_wrong_shape_is_named(hf_directory: Callable[..., Path]) -> None:
    directory = hf_directory()
    change_weights(directory, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(64)}))
    with pytest.raises(
        SourceError, match=r"'model\.norm\.weight' has shape \[64\], but config\.json makes it \[128\]"
    ):
        plan_conversion(directory)


def test_integer_and_float8_weights_are_refused(hf_directory: Callable[..., Path]) -> None:
    directory = hf_directory()
    change_weights(
        directory, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(128, dtype=torch.float8_e4m3fn)})
    )
    with pytest.raises(SourceError, match="is float8_e4m3fn; trtqwen converts"):
        plan_conversion(directory)


def test_tensors_that_are_left_out_are_listed(hf_directory: Callable[..., Path]) -> None:
    directory = hf_directory()
    change_weights(directory, lambda tensors: tensors.update({"rotary_emb.inv_freq": torch.zeros(8)}))
    assert plan_conversion(directory).ignored == ["rotary_emb.inv_freq"]


BIG = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "vocab_size": 4096}


@pytest.mark.parametrize("moment", [0.0, 0.1, 0.3, 0.5, 0.7, 0.9])
def test_a_killed_conversion_leaves_nothing_acceptable(
    hf_directory: Callable[..., Path], tmp_path: Path, moment: float
) -> None:
    """SIGKILL while tensors are written: at the given share of the bytes, from inside the process itself."""
    directory, out = hf_directory(**BIG), tmp_path / "out"
    plan = plan_conversion(directory, CheckpointRecipe(dtype="float16", tp_size=2))
    child = os.fork()
    if child == 0:
        written = 0

        def maybe_die(nbytes: int) -> None:
            nonlocal written
            written += nbytes
            if written >= moment * plan.nbytes:
                os.kill(os.getpid(), signal.SIGKILL)

        run_conversion(plan, out, progress=maybe_die)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert not out.exists()
    with pytest.raises(InputError, match="is not a finished checkpoint"):
        read_manifest(out, "checkpoint")
    run_conversion(plan_conversion(directory, CheckpointRecipe(dtype="float16", tp_size=2)), out)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_command_killed_at_any_time_leaves_nothing_acceptable(
    hf_directory: Callable[..., Path], tmp_path: Path
) -> None:
    """SIGKILL from outside, a little later each time, until the command is fast enough to finish."""
    directory = hf_directory(**BIG)
    delay = 0.0
    for attempt in range(40):
        out = tmp_path / f"out{attempt}"
        command = [sys.executable, "-m", "trtqwen", "convert", str(directory), "-o", str(out), "--tp", "2"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(delay)
        process.kill()
        if process.wait() == 0:
            break
        if out.exists():  # killed after the rename: then it must be whole
            manifest = read_manifest(out, "checkpoint")
            assert all(digest_file(out / name) == record.digest for name, record in manifest.outputs.items())
        delay += 0.15
    assert read_manifest(out, "checkpoint")


def test_memory_stays_at_a_few_tensors(hf_directory: Callable[..., Path], tmp_path: Path) -> None:
    """A 370 MB model converts with less than 60 MB above what the imports take."""
    directory = hf_directory(hidden_size=1024, intermediate_size=4096, num_hidden_layers=6, vocab_size=8192)
    assert (directory / "model.safetensors").stat().st_size > 300e6
    script = (
        "import resource, sys\nfrom pathlib import Path\n"
        "from trtqwen.checkpoint.convert import plan_conversion, run_conversion\n"
        "from trtqwen.recipe import CheckpointRecipe\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak()\n"
        "settings = CheckpointRecipe(dtype='float16', tp_size=2)\n"
        "run_conversion(plan_conversion(Path(sys.argv[1]), settings), Path(sys.argv[2]))\n"
        "print(peak() - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, directory, tmp_path / "out"], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) * 1024 < 60e6
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float16"
