"""A real vLLM: the embedded engine's answers on the bundled model, and exports of NVIDIA's checkpoints.

One process of vLLM loads one model after the other: each start of its own would take a minute.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.export.test_export import GOLDEN
from trtqwen.artifact.manifest import write_manifest
from trtqwen.executor.executor import Executor
from trtqwen.executor.request import OutputConfig, Request
from trtqwen.export.export import plan_export, run_export
from trtqwen.vllm.server import PYTHON_VARIABLE, server_environment

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(PYTHON_VARIABLE not in os.environ, reason=f"{PYTHON_VARIABLE} names no vLLM"),
    pytest.mark.timeout(900),
]
PROMPTS = [list(range(3, 40)), [5, 17, 200, 300], [401, 402, 7]]
TOKENS = 12
CASES: dict[str, dict[str, Any]] = {
    "g02_bf16_tp2_tied": {},
    "g04_bf16src_to_fp16_tp4_kvdup": {},
    "g05_parallel_embedding_dim0_oddvocab_tp2": {},
    "g07_int8wo_fp16_tp2": {"activations": "int8"},
    "g10_sq_perchannel_static_bf16_tp2": {},
    "g13_sq_pertoken_pertensor_fp16_tp1_int8kv": {},
}
# Runs in vLLM's environment. The log probability of each of our tokens, and vLLM's own greedy ones.
PROGRAM = """
import json, logging, sys
job = json.load(open(sys.argv[1]))
if __name__ == "__main__":
    import os
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams
    from vllm.model_executor.kernels.linear.scaled_mm.cpu import CPUInt8ScaledMMLinearKernel as Kernel
    chosen = []
    before = Kernel.__init__
    def note(self, *words, **names):
        chosen.append(type(self).__name__)
        before(self, *words, **names)
    Kernel.__init__ = note
    results = {}
    for name, model in job["models"].items():
        chosen.clear()
        options = {"dtype": "float32", "max_model_len": 128, "enforce_eager": True, "skip_tokenizer_init": True}
        llm = LLM(model=model["path"], **options)
        greedy = SamplingParams(temperature=0, max_tokens=job["tokens"], ignore_eos=True, detokenize=False)
        prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
        answers = [list(one.outputs[0].token_ids) for one in llm.generate(prompts, greedy, use_tqdm=False)]
        whole = [{"prompt_token_ids": ids + own} for ids, own in zip(job["prompts"], model["answers"])]
        score = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        scored = llm.generate(whole, score, use_tqdm=False)
        log_probs = [
            [next(entry.logprob for key, entry in place.items() if key == token) for token, place in
             zip(own, one.prompt_logprobs[-len(own):])]
            for own, one in zip(model["answers"], scored)
        ]
        results[name] = {"answers": answers, "log_probs": log_probs, "kernels": sorted(set(chosen))}
        del llm
    json.dump(results, open(sys.argv[2], "w"))
"""


def embedded(case: Path, tmp_path: Path) -> tuple[list[list[int]], list[list[float]]]:
    """Greedy answers of the embedded engine, and their log probabilities."""
    engine = tmp_path / "embedded" / case.name
    engine.mkdir(parents=True)
    content = json.loads((case / "expected" / "config.json").read_text())
    limits = {"max_batch_size": 4, "max_num_tokens": 256, "max_seq_len": 128, "tokens_per_block": 32}
    layout = "sm80" if content["quantization"]["quant_algo"] == "W8A16" else None
    config = {"backend": "torch", "int8_layout": layout, "pretrained_config": content, "build_config": limits}
    (engine / "config.json").write_text(json.dumps(config))
    for rank in (case / "expected").glob("rank*.safetensors"):
        (engine / rank.name).symlink_to(rank.resolve())
    write_manifest(engine, "engine", {}, {})
    with Executor(engine) as executor:
        requests = [
            Request(
                id=str(index),
                input_token_ids=tuple(prompt),
                max_tokens=TOKENS,
                output=OutputConfig(return_log_probs=True),
            )
            for index, prompt in enumerate(PROMPTS)
        ]
        done = executor.generate(requests)
    answers = [[token for response in one for token in response.token_ids] for one in done]
    return answers, [[value for response in one for value in response.log_probs] for one in done]


def widen(source: Path, target: Path) -> None:
    """The same model with heads of 32 values instead of 16, which vLLM's CPU attention does not have.

    Zeros fill up heads and hidden states. A head's values keep their rotary frequencies in every second place. The
    norms' gains and epsilon are scaled by the width of the hidden states, queries by that of a head.
    """
    config = json.loads((source / "config.json").read_text())
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    half, root = hidden // heads // 2, 2**0.5
    inside = torch.tensor([2 * place for place in range(half)] + [2 * half + 2 * place for place in range(half)])

    def places(count: int) -> torch.Tensor:
        return torch.cat([4 * half * head + inside for head in range(count)])

    def spread(tensor: torch.Tensor, dim: int, index: torch.Tensor, size: int, fill: float = 0) -> torch.Tensor:
        shape = [size if place == dim % tensor.ndim else length for place, length in enumerate(tensor.shape)]
        return torch.full(shape, fill, dtype=tensor.dtype).index_copy(dim, index, tensor)

    def pad(tensor: torch.Tensor, dim: int, fill: float = 0) -> torch.Tensor:
        return spread(tensor, dim, torch.arange(hidden), 2 * hidden, fill)

    made = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        module, kind = name.split(".")[-2:]
        value = tensor if tensor.dtype == torch.int8 else tensor.float()
        scale = kind == "weight_scale"
        if kind == "input_scale":
            pass
        elif "norm" in module:
            value = pad(value, 0) / root
        elif module in ("q_proj", "k_proj", "v_proj"):
            count = heads if module == "q_proj" else config["num_key_value_heads"]
            value = spread(value, 0, places(count), count * 4 * half, float(scale))
            if module == "q_proj" and tensor.dtype != torch.int8:
                value = value * root
            value = pad(value, 1) if kind == "weight" else value
        elif module == "o_proj":
            value = pad(value, 0, float(scale))
            value = spread(value, 1, places(heads), heads * 4 * half) if kind == "weight" else value
        elif module == "down_proj":
            value = pad(value, 0, float(scale))
        elif kind == "weight":
            value = pad(value, 1)
        made[name] = value.contiguous()
    target.mkdir(parents=True)
    save_file(made, target / "model.safetensors", {"format": "pt"})
    config |= {"hidden_size": 2 * hidden, "rms_norm_eps": config["rms_norm_eps"] / 2, "torch_dtype": "float32"}
    (target / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """By golden case: what the embedded engine and vLLM answer."""
    home = tmp_path_factory.mktemp("exports")
    models: dict[str, Any] = {}
    for name, options in CASES.items():
        run_export(plan_export(GOLDEN / name / "expected", **options), home / "exact" / name)
        widen(home / "exact" / name, home / name)
        answers, log_probs = embedded(GOLDEN / name, home)
        models[name] = {"path": str(home / name), "answers": answers, "log_probs": log_probs}
    (home / "job.json").write_text(json.dumps({"models": models, "prompts": PROMPTS, "tokens": TOKENS}))
    (home / "program.py").write_text(PROGRAM)
    command = [os.environ[PYTHON_VARIABLE], str(home / "program.py"), str(home / "job.json"), str(home / "out.json")]
    environment = server_environment(os.environ, {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"})
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = json.loads((home / "out.json").read_text())
    return {name: {"ours": models[name], "theirs": theirs[name]} for name in CASES}


@pytest.mark.parametrize("name", [name for name in CASES if "sq" not in name and "int8" not in name])
def test_float_exports_answer_as_the_embedded_engine(results: dict[str, Any], name: str) -> None:
    ours, theirs = results[name]["ours"], results[name]["theirs"]
    assert theirs["answers"] == ours["answers"]
    for one, other in zip(ours["log_probs"], theirs["log_probs"], strict=True):
        assert one == pytest.approx(
            other, abs=0.03
        )  # vLLM computes in float32, the checkpoint's dtype has 8 to 11 bits


@pytest.mark.parametrize("name", [name for name in CASES if "sq" in name or "int8" in name])
def test_int8_exports_run_as_int8(results: dict[str, Any], name: str) -> None:
    """vLLM's own kernel for INT8 products, and the embedded engine's log probabilities within quantization noise."""
    ours, theirs = results[name]["ours"], results[name]["theirs"]
    assert theirs["kernels"] == ["CPUInt8ScaledMMLinearKernel"]
    for one, other in zip(ours["log_probs"], theirs["log_probs"], strict=True):
        assert one == pytest.approx(other, abs=0.3)
    same = sum(one[0] == other[0] for one, other in zip(ours["answers"], theirs["answers"], strict=True))
    assert same >= 2
