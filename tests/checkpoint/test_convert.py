from __future__ import annotations

import json
import os
import resource
import shutil
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

from tests.models import random_model
from tests.slow import SLOW, slow
from trtqwen.artifact.digest import digest_file
from trtqwen.artifact.manifest import read_manifest
from trtqwen.checkpoint.convert import plan_conversion, run_conversion
from trtqwen.demo import MODEL
from trtqwen.diagnostics import CheckpointError, InputError, OutputError, SourceError
from trtqwen.quantize.ranges import ACT_RANGES
from trtqwen.recipe import CheckpointRecipe

GOLDEN_RANGES = Path(__file__).parent.parent / "golden" / "g09_sq_pertensor_fp16_tp1" / "act_range.safetensors"
FP16_TP2 = CheckpointRecipe(dtype="float16", tp_size=2)
BF16_TP2 = CheckpointRecipe(dtype="bfloat16", tp_size=2)
STATED = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def convert(model: Path, output: Path, dtype: str = "float16", **options: Any) -> list[dict[str, torch.Tensor]]:
    """The tensors of every rank."""
    plan = plan_conversion(model, CheckpointRecipe.model_validate({"dtype": dtype, **options}))
    run_conversion(plan, output)
    return [load_file(output / f"rank{rank}.safetensors") for rank in range(plan.mapping.world_size)]


@pytest.mark.parametrize(
    ("dtype", "tp_size"),
    [
        ("float16", 8),
        ("bfloat16", 2),
        *(slow("float16", size) for size in (1, 2, 4)),
        *(slow("bfloat16", size) for size in (1, 4, 8)),
    ],
)
def test_model_opt_exports_the_same_tensors(
    hf_directory: Callable[..., Path], tmp_path: Path, dtype: str, tp_size: int
) -> None:
    """NVIDIA ModelOpt shards the embedding over the ranks; everything else is laid out alike."""
    warnings.filterwarnings("ignore")
    from modelopt.torch.export import export_tensorrt_llm_checkpoint

    model = random_model(seed=7)  # vocabulary 515 needs padding
    ranks = convert(hf_directory(seed=7), tmp_path / "ours", dtype, tp_size=tp_size)
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
layers_and_stages = st.sampled_from([(1, 1), (2, 2), (3, 2), (5, 3), (5, 4), (4, 4)])


@settings(max_examples=30, deadline=None)
@given(
    heads,
    st.sampled_from([1, 2, 3, 4, 6, 8]),
    layers_and_stages,
    st.integers(50, 70),
    st.sampled_from(["none", "vocab", "hidden"]),
    st.booleans(),
    st.integers(0, 99),
)
def test_shards_reassemble_to_the_source(
    tmp_path_factory: pytest.TempPathFactory,
    heads: tuple[int, int],
    tp_size: int,
    layers_and_stages: tuple[int, int],
    vocab: int,
    sharding: str,
    tied: bool,
    seed: int,
) -> None:
    """Whatever sizes are accepted: joining the ranks gives back every source tensor exactly, and no more."""
    (query, kv), (layers, stages), size, inner = heads, layers_and_stages, 8, 48
    shape: dict[str, Any] = {
        "num_attention_heads": query,
        "num_key_value_heads": kv,
        "hidden_size": query * size,
        "intermediate_size": inner,
        "vocab_size": vocab,
        "num_hidden_layers": layers,
        "tie_word_embeddings": tied,
    }
    model = random_model(seed, **shape)
    home = tmp_path_factory.mktemp("reassemble")
    model.save_pretrained(home / "hf")
    options = {"tp_size": tp_size, "pp_size": stages, "embedding_sharding": sharding}
    legal = (
        query % tp_size == 0 and (kv % tp_size == 0 if tp_size <= kv else tp_size % kv == 0) and inner % tp_size == 0
    )
    if not legal:
        with pytest.raises(CheckpointError, match=f"tp_size {tp_size}: .*; use tp_size 1"):
            convert(home / "hf", home / "out", "float32", **options)
        return
    ranks = convert(home / "hf", home / "out", "float32", **options)
    state = model.state_dict()

    table = [rank.pop("transformer.vocab_embedding.weight") for rank in ranks[:tp_size]]
    for part in table if sharding == "none" else [torch.cat(table, dim=1 if sharding == "hidden" else 0)]:
        assert torch.equal(part[:vocab], state["model.embed_tokens.weight"])
        assert not part[vocab:].any()
    last = ranks[-tp_size:]
    head = torch.cat([rank.pop("lm_head.weight") for rank in last])
    assert torch.equal(head[:vocab], state["lm_head.weight"])
    assert not head[vocab:].any()
    assert all(torch.equal(rank.pop("transformer.ln_f.weight"), state["model.norm.weight"]) for rank in last)

    layer = 0
    for stage in range(stages):
        group = ranks[stage * tp_size : (stage + 1) * tp_size]
        own = layers // stages + (stage < layers % stages)  # the first stages take the remainder
        for local in range(own):
            check_layer(group, f"transformer.layers.{local}", state, f"model.layers.{layer}", (query, kv, size))
            layer += 1
    assert layer == layers
    assert [list(rank) for rank in ranks] == [[]] * len(ranks)


def check_layer(
    ranks: list[dict[str, torch.Tensor]],
    target: str,
    state: dict[str, torch.Tensor],
    source: str,
    sizes: tuple[int, int, int],
) -> None:
    """One layer's shards, taken out of `ranks`, make up the source's layer."""
    (query, kv, size), tp_size = sizes, len(ranks)
    for ours, theirs in [("input_layernorm", "input_layernorm"), ("post_layernorm", "post_attention_layernorm")]:
        assert all(
            torch.equal(rank.pop(f"{target}.{ours}.weight"), state[f"{source}.{theirs}.weight"]) for rank in ranks
        )
    for ours, theirs, axis in [
        ("attention.dense", "self_attn.o_proj", 1),
        ("mlp.fc", "mlp.gate_proj", 0),
        ("mlp.gate", "mlp.up_proj", 0),
        ("mlp.proj", "mlp.down_proj", 1),
    ]:
        joined = torch.cat([rank.pop(f"{target}.{ours}.weight") for rank in ranks], dim=axis)
        assert torch.equal(joined, state[f"{source}.{theirs}.weight"])
    for kind in ("weight", "bias"):
        local_q, local_kv = query // tp_size * size, max(1, kv // tp_size) * size
        parts = [
            rank.pop(f"{target}.attention.qkv.{kind}").split_with_sizes([local_q, local_kv, local_kv])
            for rank in ranks
        ]
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
    plan = plan_conversion(directory, BF16_TP2)
    manifest = run_conversion(plan, out)
    assert read_manifest(out, "checkpoint") == manifest
    assert manifest.key == plan_conversion(directory, BF16_TP2).key()
    assert manifest.key != plan_conversion(directory, FP16_TP2).key()
    files = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()} - {"manifest.json"}
    assert set(manifest.outputs) == files
    assert all(record.digest == digest_file(out / name) for name, record in manifest.outputs.items())


def test_progress_counts_every_byte(hf_directory: Callable[..., Path], tmp_path: Path) -> None:
    plan, seen = plan_conversion(hf_directory(), FP16_TP2), 0

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
    with pytest.raises(SourceError, match="is float8_e4m3fn; save the weights as"):
        plan_conversion(directory)


def test_tensors_that_are_left_out_are_listed(hf_directory: Callable[..., Path]) -> None:
    directory = hf_directory()
    change_weights(directory, lambda tensors: tensors.update({"rotary_emb.inv_freq": torch.zeros(8)}))
    assert plan_conversion(directory).ignored == ["rotary_emb.inv_freq"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"quant": "int8_wo", "int8_layout": "sm80"}])
def test_weights_that_are_not_finite_are_counted(
    hf_directory: Callable[..., Path], tmp_path: Path, value: float, dtype: torch.dtype, options: dict[str, str]
) -> None:
    directory, name = hf_directory(dtype=dtype), "model.layers.1.mlp.up_proj.weight"
    change_weights(directory, lambda tensors: tensors[name][-1, -3:].fill_(value))
    with pytest.raises(SourceError, match=r"'model\.layers\.1\.mlp\.up_proj\.weight' holds 3 values .* not finite"):
        convert(directory, tmp_path / "out", "auto", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("largest", [65504.0, -65519.0, 65536.0, -1e30])
def test_float16_overflow_is_refused_with_the_remedy(
    hf_directory: Callable[..., Path], tmp_path: Path, largest: float
) -> None:
    directory, name = hf_directory(), "model.layers.0.self_attn.k_proj.bias"
    change_weights(directory, lambda tensors: tensors[name][5:7].fill_(largest))
    convert(directory, tmp_path / "bf16", "bfloat16")
    if torch.tensor(largest).half().isfinite():
        assert all(tensor.isfinite().all() for tensor in convert(directory, tmp_path / "out", "float16")[0].values())
        return
    with pytest.raises(CheckpointError, match=rf"2 values of tensor '{name}' overflow float16 .* use dtype bfloat16"):
        convert(directory, tmp_path / "out", "float16")
    with pytest.raises(CheckpointError, match="INT8 KV caches compute in it: use quant int8_wo or none with dtype"):
        convert(
            directory, tmp_path / "out", "bfloat16", kv_cache="int8", act_ranges=str(GOLDEN_RANGES)
        )  # goes through float16 whatever the checkpoint's dtype
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, {"tp_size": 8, "quant": "int8_sq"}, "SmoothQuant cannot repeat the 4 KV heads; use at most tp_size 4"),
        (
            {"intermediate_size": 160},
            {"quant": "int8_wo"},
            "intermediate size 160 is not a multiple of 64; use int8_layout sm80",
        ),
        (
            {"intermediate_size": 192},
            {"quant": "int8_wo", "tp_size": 2},
            "tp_size 2: intermediate size 192 is not a multiple of 128",
        ),
        (
            {"hidden_size": 96},
            {"quant": "int8_wo", "int8_layout": "sm80"},
            "hidden size 96 is not a multiple of 64; lower tp_size",
        ),
        ({}, {"pp_size": 3}, "pp_size 3: the model has only 2 layers"),
        (
            {"num_hidden_layers": 3},
            {"pp_size": 2, "release": "0.17.0"},
            "does not divide 3 layers, and release 0.17.0",
        ),
    ],
)
def test_what_cannot_be_converted_is_refused(
    hf_directory: Callable[..., Path], changes: dict[str, int], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        plan_conversion(hf_directory(**changes), CheckpointRecipe(**options))
    assert "\n" not in str(caught.value)


def test_too_little_disk_is_found_before_anything_is_written(
    hf_directory: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_conversion(hf_directory())
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=plan.nbytes - 1))
    with pytest.raises(OutputError, match=r"needs 0\.9 MB, but .* has 0\.9 MB free; free some space"):
        run_conversion(plan, tmp_path / "deep" / "out")
    assert not (tmp_path / "deep").exists()


def test_a_disk_that_fills_up_is_one_sentence(hf_directory: Callable[..., Path], tmp_path: Path) -> None:
    """ENOSPC while a writer's thread writes: a limit on the file size stands for it."""
    plan = plan_conversion(hf_directory(**BIG))
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8 << 20, limit[1]))
    try:
        with pytest.raises(OutputError, match="cannot be written"):
            run_conversion(plan, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, previous)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_older_releases_get_the_keys_they_read(hf_directory: Callable[..., Path], tmp_path: Path) -> None:
    """What 0.17's reader refuses or does not have is left out; the tensors are the same."""
    directory, configs = hf_directory(), []
    for release in ("1.2.1", "0.17.0"):
        convert(directory, tmp_path / release, release=release)
        configs.append(json.loads((tmp_path / release / "config.json").read_text()))
    new, old = configs
    dropped = {"mlp_only_layers", "decoder_sparse_step"}
    assert set(new) - set(old) == dropped
    sizes = dict.fromkeys(["world_size", "cp_size", "tp_size", "pp_size", "moe_tp_size", "moe_ep_size"], 1)
    assert old["mapping"] == sizes | {"gpus_per_node": 8}
    assert set(new["quantization"]) - set(old["quantization"]) == {"mamba_ssm_cache_dtype"}
    rest = set(old) - {"mapping", "quantization"}
    assert {key: old[key] for key in rest} == {key: new[key] for key in rest}
    ranks = [(tmp_path / release / "rank0.safetensors").read_bytes() for release in ("1.2.1", "0.17.0")]
    assert ranks[0] == ranks[1]


def test_yarn_needs_a_release_that_computes_it(hf_directory: Callable[..., Path]) -> None:
    directory = hf_directory()
    config = json.loads((directory / "config.json").read_text())
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    (directory / "config.json").write_text(json.dumps(config | {"rope_scaling": yarn}))
    plan_conversion(directory)
    with pytest.raises(CheckpointError, match=r"rope_scaling type yarn: release 0\.17\.0 computes"):
        plan_conversion(directory, CheckpointRecipe(release="0.17.0"))


def test_a_recipe_stretches_the_context_as_a_models_own_config_does(
    hf_directory: Callable[..., Path], tmp_path: Path
) -> None:
    directory = hf_directory()
    convert(directory, tmp_path / "stretched", yarn_factor=4.0)
    config = json.loads((directory / "config.json").read_text())
    original = config["max_position_embeddings"]
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": original}
    changes = {"rope_scaling": yarn, "max_position_embeddings": 4 * original}
    (directory / "config.json").write_text(json.dumps(config | changes))
    convert(directory, tmp_path / "own")
    ours, own = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("stretched", "own"))
    assert ours == own
    assert ours["max_position_embeddings"] == 4 * original
    with pytest.raises(SourceError, match=r"yarn_factor 2: config\.json has a rope_scaling"):
        plan_conversion(directory, CheckpointRecipe(yarn_factor=2.0))


def test_ranges_that_a_checkpoint_holds_make_it_again(tmp_path: Path) -> None:
    """Calibrated once, the ranges file gives the very same rank files, and counts as an input."""
    options: dict[str, Any] = {"quant": "int8_sq", "per_channel": True, "tp_size": 2}
    first = CheckpointRecipe(**options, calib=str(write_texts(tmp_path)))
    run_conversion(plan_conversion(MODEL, first), tmp_path / "first")
    again = CheckpointRecipe(**options, act_ranges=str(tmp_path / "first" / ACT_RANGES))
    manifest = run_conversion(plan_conversion(MODEL, again), tmp_path / "again")
    for rank in ("rank0.safetensors", "rank1.safetensors", ACT_RANGES):
        assert (tmp_path / "again" / rank).read_bytes() == (tmp_path / "first" / rank).read_bytes(), rank
    assert manifest.inputs["act_ranges"] == digest_file(tmp_path / "first" / ACT_RANGES)

    ranges = load_file(tmp_path / "first" / ACT_RANGES)
    ranges["model.layers.0.mlp.up_proj.y"] *= 2
    save_file(ranges, tmp_path / "other.safetensors")
    other = again.model_copy(update={"act_ranges": str(tmp_path / "other.safetensors")})
    assert plan_conversion(MODEL, other).key() != plan_conversion(MODEL, again).key() == manifest.key


def test_the_calibration_texts_are_part_of_the_key(tmp_path: Path) -> None:
    def key(**options: Any) -> str:
        return plan_conversion(MODEL, CheckpointRecipe(quant="int8_sq", **options)).key()

    texts = write_texts(tmp_path)
    before = key(calib=str(texts))
    assert before == key(calib=str(shutil.copy(texts, tmp_path / "same.txt")))
    assert before != key(calib=str(texts), chat_template=True)
    texts.write_text(texts.read_text() + "\n\nand one more", encoding="utf-8")
    assert len({before, key(calib=str(texts)), key()}) == 3


def write_texts(directory: Path) -> Path:
    path = directory / "texts.txt"
    path.write_text("The weather is fine today.\n\n今日はいい天気です。", encoding="utf-8")
    return path


PACKED = {"quant": "int8_wo", "int8_layout": "sm80"}
BIG = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "vocab_size": 4096}


@pytest.mark.parametrize(
    ("moment", "options"),
    [(0.5, {}), (0.9, PACKED), slow(0.0, {}), slow(0.9, {}), slow(0.0, PACKED), slow(0.5, PACKED)],
)
def test_a_killed_conversion_leaves_nothing_acceptable(
    hf_directory: Callable[..., Path], tmp_path: Path, moment: float, options: dict[str, str]
) -> None:
    """SIGKILL while tensors are written: at the given share of the bytes, from inside the process itself."""
    directory, out = hf_directory(**BIG), tmp_path / "out"
    settings = CheckpointRecipe.model_validate({"dtype": "float16", "tp_size": 2, **options})
    plan = plan_conversion(directory, settings)
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
    run_conversion(plan_conversion(directory, settings), out)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@SLOW
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
        delay = max(0.1, 1.3 * delay)
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
