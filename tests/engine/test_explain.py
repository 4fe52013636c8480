from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from tests.slow import SLOW
from trtqwen.engine.explain import Finding, explain, failures

# Lines as users posted them; the words after them are what the explanation must speak of.
LOGS = [
    ("[TRT] [E] IRuntime::deserializeCudaEngine: Error Code 1: Serialization (Serialization assertion "
     "stdVersionRead == kSERIALIZATION_VERSION failed.Version tag does not match.)", "another TensorRT"),
    ("[E] 6: The engine plan file is not compatible with this version of TensorRT", "another TensorRT"),
    ("[E] 6: The engine plan file is generated on an incompatible device, expecting compute 8.0 got compute 8.9",
     "another kind of GPU"),
    ("unable to load shared library: /opt/tritonserver/backends/tensorrtllm/libtriton_tensorrtllm.so: undefined "
     "symbol: _ZN12tensorrt_llm8executor8ExecutorC1", "different releases"),
    ("TypeError: __init__() got an unexpected keyword argument 'moe_tp_size'", "one image"),
    ("AttributeError: 'QWenConfig' object has no attribute 'seq_length'", "one image"),
    ("[libprotobuf ERROR] 29:17: Expected integer, got: $", "placeholder"),
    ("unable to find backend library for backend '${triton_backend}'", "placeholder"),
    ("[json.exception.parse_error.101] parse error at line 1, column 1", "engine directory is empty"),
    ("Assertion failed: mpiSize == tp * pp (1 != 4)", "another number of MPI processes"),
    ("assert communicationMode == kLEADER", "another number of MPI processes"),
    ("NCCL WARN Error: failed to extend /dev/shm/nccl-abc to 33030532 bytes", "shared memory"),
    ("Signal: Bus error (7)", "shared memory"),
    ("Failed to create shm region triton_python_backend_shm_region_1: already exists", "prefix of shared memory"),
    ("CUDA runtime error in cudaDeviceEnablePeerAccess: peer access is not supported between these two devices",
     "each other's memory"),
    ("cudaIpcOpenMemHandle(&ptr, handle) failed: invalid device ordinal (101)", "each other's memory"),
    ("node1:312:312 [0] NCCL INFO comm 0x55 rank 0 nranks 4 - Init COMPLETE", "first collective"),
    ("Assertion failed: maxTokensInPagedKvCache (64) must be large enough to process at least 1 sequence",
     "does not hold one sequence"),
    ("Assertion failed: Can't allocate new blocks. No free blocks left.", "KV cache is exhausted"),
    ("[TRT] [E] [virtualMemoryBuffer.cpp::nvinfer1::StdVirtualMemoryBufferImpl::resizePhysical::154] Error Code 2: "
     "OutOfMemory (Requested size was 2833252352 bytes.)", "GPU's memory"),
    ("Loading checkpoint shards: 100%\nKilled", "once for every rank"),
    ("[TRT] [I] engine\nKilled", "a process was killed"),
    ("Prompt length (9000) exceeds maximum input length (8192)", "chunked context is off"),
    ("Assertion failed: inputLength (9000) should not exceed max_num_tokens (8192)", "chunked context is off"),
    ("KV cache reuse disabled because model was not built with paged context FMHA support", "paged context FMHA"),
    ("GuidedDecoder is not setup", "guided decoding"),
    ("ModelInfer RPC doesn't support models with decoupled transaction policy", "streaming request"),
    ("Streaming is only supported in decoupled mode.", "streaming request"),
    ("CUDA error 804: forward compatibility was attempted on non supported HW", "no forward compatibility"),
    ("ValueError: max_workers must be greater than 0", "no GPU"),
    ("RuntimeError: No CUDA GPUs are available", "no GPU"),
    ("Warning: Large KV activation detected: 921.0", "8-bit KV cache"),
    ("KeyError: 'lm_head.weight'", "ties lm_head"),
    ("RuntimeError: Required but not provided tensors:{'lm_head.weight'}", "lacks tensors"),
    ("RuntimeError: Encounter error 'The value updated is not the same shape' for parameter 'lm_head.weight'",
     "another shape"),
    ("AssertionError: Unsupported model architecture: Qwen9ForCausalLM", "does not build"),
    ("AssertionError: Unsupported Qwen type: qwen9", "qwen_type"),
    ("AssertionError: num_attention_heads must be divisible by tp_size", "divisor"),
    ("NotImplementedError: GPTQ with desc_act=True is not implemented", "act-order"),
    ("RuntimeError: multiple_profiles is enabled, while opt_num_tokens is set.", "exclude each other"),
    ("RuntimeError: Gather context logits is not support with draft len > 0.", "exclude each other"),
    ("trtllm-build: error: unrecognized arguments: --max_output_len=5", "does not take a flag"),
    ("ImportError: libcuda.so.1: cannot open shared object file: No such file", "without the GPU driver"),
    ("OSError: [Errno 28] No space left on device", "disk is full"),
    ("    assert (paged_kv_cache_val == True", "contradicts --kv_cache_type"),
    ("AssertionError: StreamingLLM is not supported", "not for Qwen2"),
    ("CUDA initialization: CUDA driver version is insufficient for CUDA runtime version", "driver is older"),
    ("AssertionError: Engine building failed, please check error log.", "earlier error"),
    ("[TRT-LLM] [W] Provided but not required tensors: {'x'}", "harmless by itself"),
    ("n1:42:42 [0] misc/ibvwrap.cc:63 NCCL WARN Failed to open libibverbs.so[.1]", "harmless on a single host"),
    ("[TensorRT-LLM][ERROR] Received stop request for requestId 7 but it's not active", "harmless"),
    ("what(): boost::interprocess::lock_exception", "a fault of Triton"),
    ("CUDA-capable device(s) is/are busy: the GPU is in exclusive process mode", "exclusive compute mode"),
]  # fmt: skip


# Lines written from the format strings of TensorRT-LLM (TLLM_CHECK), NCCL (WARN), Triton (Status) and the shells.
FORMATS = [
    ("[TensorRT-LLM][ERROR] Assertion failed: KV cache block reuse must be enabled for speculative "
     "decoding target model "
     "(/src/tensorrt_llm/cpp/tensorrt_llm/batch_manager/trtGptModelInflightBatching.cpp:1)", "speculative"),
    ("[TensorRT-LLM][ERROR] Assertion failed: lookahead requires setup w (9) <= max_w (8) "
     "(/src/tensorrt_llm/cpp/tensorrt_llm/layers/lookaheadAlgorithm.cpp:1)", "speculative"),
    ("[TensorRT-LLM][ERROR] Assertion failed: maxDraftTokens <= mModelConfig.getMaxDecodingDraftTokens() "
     "(/src/tensorrt_llm/cpp/tensorrt_llm/batch_manager/x.cpp:1)", "speculative"),
    ("[TensorRT-LLM][ERROR] Assertion failed: Input length (8) + max new tokens (9) + draft tokens (0) "
     "must be less than max sequence length (16). "
     "(/src/tensorrt_llm/cpp/tensorrt_llm/runtime/gptDecoderBatched.cpp:1)", "too-long"),
    ("[TensorRT-LLM][ERROR] Assertion failed: Beam width (4) must be smaller than maxBeamWidth (1) passed "
     "to decoder setup function. "
     "(/src/tensorrt_llm/cpp/tensorrt_llm/batch_manager/createNewDecoderRequests.cpp:1)", "beam-width"),
    ("[TensorRT-LLM][ERROR] Assertion failed: The embedding bias shape is not as expected. Expected last "
     "dimension to be same as vocab size: 152064. (/src/x.cpp:1)", "bias-shape"),
    ("[TensorRT-LLM][ERROR] Assertion failed: Without enabling chunked context, the max context length "
     "(9) needs to be less than or equal to the max number of tokens (8). "
     "(/src/tensorrt_llm/cpp/tensorrt_llm/batch_manager/x.cpp:1)", "step-size"),
    ("[TensorRT-LLM][ERROR] Assertion failed: Chunked context requires context FMHA, paged kv_cache and "
     "paged context FMHA all enabled at the same time. (/src/x.cpp:1)", "kv-reuse"),
    ("[TensorRT-LLM][ERROR] Attention window too large to fit even a single sequence in the KV cache. "
     "Failing fast rather than attempting an adjustment of the window sizes. Old: [9], New: [8]", "attention-window"),
    ("[TensorRT-LLM][ERROR] TrtGptModelInflightBatching requires GPT attention/Mamba Conv 1d plugin with "
     "packed input and paged KV cache.", "not-paged"),
    ("[TensorRT-LLM][ERROR] Assertion failed: Number of device IDs 4 is greater than GPUs per node 2 "
     "(/src/tensorrt_llm/cpp/tensorrt_llm/runtime/worldConfig.cpp:1)", "device-ids"),
    ("[TensorRT-LLM][ERROR] Assertion failed: *std::max_element(mDeviceIds.begin(), mDeviceIds.end()) < "
     "mGpusPerNode (/src/tensorrt_llm/cpp/tensorrt_llm/runtime/worldConfig.cpp:1)", "device-ids"),
    ("[TensorRT-LLM][ERROR] Assertion failed: Expected prompt embedding table to have shape [vocabSize, "
     "hiddenSize] (/src/x.cpp:1)", "prompt-table"),
    ("[TensorRT-LLM][ERROR] Assertion failed: LoRA task 7 not found in cache. Please send LoRA weights "
     "with request (/src/x.cpp:1)", "lora-cache"),
    ("[TensorRT-LLM][ERROR] Assertion failed: !mInputTokenIds.empty() "
     "(/src/tensorrt_llm/cpp/tensorrt_llm/executor/requestImpl.h:1)", "request-empty"),
    ("[TensorRT-LLM][ERROR] Assertion failed: topP param (1.500000) is out of limits (0.000000, 1.000000] "
     "(/src/x.h:1)", "sampling-range"),
    ("n1:1:2 [0] bootstrap.cc:91 NCCL WARN NET/Socket : No usable listening interface found", "nccl-socket"),
    ("n1:1:2 [0] misc/socket.cc:91 NCCL WARN ncclSocketConnect: socket is invalid", "nccl-file"),
    ("n1:1:2 [0] graph/topo.cc:91 NCCL WARN TOPO/NET : Couldn't generate unique busId after 7 tries", "nccl-file"),
    ("n1:1:2 [0] include/alloc.h:91 NCCL WARN Failed to CUDA calloc async 7 bytes", "nccl-gpu-memory"),
    ("n1:1:2 [0] NCCL WARN NCCL library is too old. This application was compiled with NCCL version 2.27, "
     "but is running with NCCL library version 2.18", "nccl-version"),
    ("E0101 1 model_repository_manager.cc:1] Invalid argument: must specify 'input_map' in step 0 of "
     "ensemble 'ensemble'", "model-config"),
    ("E0101 1 x.cc:1] ensemble 'e' allows maximum batch size 8, but it contains model 'm' which only "
     "allows maximum batch size to be 4", "model-config"),
    ("E0101 1 x.cc:1] Invalid argument: model configuration must specify 'name'", "model-config"),
    ("docker-entrypoint.sh: line 3: exec: tritonserver: not found", "command-missing"),
    ("bash: line 1: trtllm-serve: command not found", "command-missing"),
    ("RuntimeError: Can't enable access between nodes 0 and 1", "peer-access"),
    ("docker: Error response from daemon: exec: \"/entrypoint.sh\": permission denied", "program-not-executable"),
    ("/opt/nvidia/nvidia_entrypoint.sh: line 49: exec: --: invalid option", "command-begins-with-option"),
    ("Cannot export model to the model_config. The modelopt-optimized model state_dict is saved", "modelopt-export"),
    ("FileNotFoundError: Could not find: nvinfer_10.dll", "dll-missing"),
    ("build.py: error: unrecognized arguments: --max_prompt_embedding_table_size 2048", "flag"),
    ("ValueError: Weight output_size_per_partition = 100 is not divisible by min_thread_n = 64.", "quant-shape"),
    ("{\"error\":\"Unable to parse 'data': shape does not match true shape of 'data' field\"}", "input-shape"),
    ("unexpected shape for input 'input_ids' for model 'tensorrt_llm'. Expected [-1], got [4,20]", "input-shape"),
    ("request JSON size of 9 bytes exceeds the maximum allowed input size of 8 bytes.", "request-too-large"),
    ("invalid value type for 'sequence_id' parameter, expected int64_param or string_param.", "request-parameter"),
    ("receiving FP16 data via JSON is not supported. Please use the binary data format for input 'x'", "input-type"),
    ("Unable to find shared memory region: 'input_data'", "shared-memory-region"),
    ("Not found: unable to load shared library: b.so: undefined symbol: TRITONSERVER_X", "undefined-triton"),
    ("Arch conditional MMA instruction used without targeting appropriate compute capability.", "arch-conditional"),
    ("Assertion failed: W4A(fp)8 kernel is unsupported on pre-Hopper (sm<90) architectures!", "card-not-supported"),
    ("TritonModelException: An error occurred, the error was 'name 'false' is not defined'", "model-name-undefined"),
]  # fmt: skip


LOGGED = json.loads((Path(__file__).parents[1] / "data" / "failure_logs.json").read_text(encoding="utf-8"))
CASES = LOGGED["cases"]


def first(lines: Iterable[str]) -> Finding:
    found = explain(lines).first
    assert found is not None
    return found


@pytest.mark.parametrize(("log", "words"), LOGS, ids=[log[:30] for log, _ in LOGS])
def test_known_lines_are_explained(log: str, words: str) -> None:
    found = explain(log.splitlines()).findings[0]
    assert words in f"{found.cause} {found.hint}"
    assert found.number == len(log.splitlines())
    assert found.line == log.splitlines()[-1].strip()


@pytest.mark.parametrize(
    ("shape", "case"),
    [
        pytest.param(
            shape, case, id=f"{shape}-{case['id']}-{index}", marks=() if shape == "plain" or index % 8 == 0 else SLOW
        )
        for shape in ("plain", "wrapped", "table", "colors", "compose", "mpi", "buried")
        for index, case in enumerate(CASES)
    ],
)
def test_public_logs_are_explained_in_every_shape(case: dict[str, Any], shape: str) -> None:
    """The first cause is the same however a log reaches us."""
    lines: list[str] = case["log"]
    anchored = {"host-memory-killed", "convert-killed", "bus-error-line", "host-memory-python"}
    if shape == "wrapped" and case["id"] not in anchored:  # a terminal breaks lines within words
        lines = [line[start : start + 37] for line in lines for start in range(0, max(1, len(line)), 37)]
    if shape == "table" and case["id"] not in anchored:
        cells = [line[start : start + 60] for line in lines for start in range(0, max(1, len(line)), 60)]
        rows = [
            f"| {'tensorrt_llm' * (not row):16} | {'1' * (not row):7} | {cell:<60} |"
            for row, cell in enumerate(cells)
        ]
        lines = ["+------------------+---------+------+", *rows, "+------------------+---------+------+"]
    if shape == "colors":
        lines = [f"\x1b[1;31m{line}\x1b[0m" for line in lines]
    if shape == "compose":
        lines = [f"trtllm-1  | {line}" for line in lines]
    if shape == "mpi":
        lines = [f"[1,{rank}]<stderr>:{line}" for rank in (0, 1) for line in lines]
    if shape == "buried":  # an echo after it, noise around it
        noise = ["I0101 00:00:00.000000 1 server.cc:631] +---+", "[TRT-LLM] [I] Set gemm_plugin to bfloat16."] * 3000
        lines = [*noise, *lines, *noise[:50], "error: creating server: Internal - failed to load all models"]
    assert first(lines).id == case["id"]


@pytest.mark.parametrize("step", [4, pytest.param(1, marks=SLOW)])
def test_logs_that_were_unseen_when_they_were_collected(step: int) -> None:
    """Each with the cause that was written down before it was explained; a null names no cause."""
    for case in LOGGED["unseen"][::step]:
        found = explain(case["log"])
        assert (found.first.id if found.first else None) == case["id"], (case["source"], case["expected"])
        if case["id"] is None:
            assert found.telling or found.findings


def test_words_of_the_system_are_no_cause_elsewhere() -> None:
    """`Permission denied` of ssh is no file's, `No space left` of inotify no disk's; a null names no cause."""
    for case in LOGGED["elsewhere"]:
        causes = [finding.id for finding in explain(case["log"]).findings if finding.role == "cause"]
        assert causes[:1] == ([case["cause"]] if case["cause"] else []), case["log"]


@pytest.mark.parametrize(
    ("line", "name"), FORMATS, ids=[f"{name}-{index}" for index, (_, name) in enumerate(FORMATS)]
)
def test_what_the_sources_can_print_is_explained(line: str, name: str) -> None:
    assert first([line]).id == name


def test_an_unknown_log_shows_its_telling_lines() -> None:
    log = """
        [TRT-LLM] [I] Set gemm_plugin to bfloat16.
        Traceback (most recent call last):
          File "x.py", line 3, in <module>
        ZeroDivisionError: division by zero
        [TRT-LLM] [I] bye
    """
    explanation = explain(log.splitlines())
    assert explanation.first is None
    assert explanation.telling == (
        (3, "Traceback (most recent call last):"),
        (5, "ZeroDivisionError: division by zero"),
    )


def test_a_log_of_many_lines_keeps_its_numbers() -> None:
    lines = ["noise"] * 9001 + ["tar: x: No space left on device"] + ["noise"] * 5000 + ["No space left on device"]
    found = first(lines)
    assert (found.id, found.number, found.times) == ("disk", 9002, 2)


def test_patterns_compile_and_name_only_groups_that_they_have() -> None:
    for failure in failures():
        names = set(re.compile(failure.pattern.replace("KEYS", "")).groupindex) | {"place", "rest"}
        names |= {"means", "help", "name"} if failure.table else set()
        names |= {"what"} if failure.line else set()
        assert set(re.findall(r"{(\w+)}", failure.cause + failure.hint)) <= names, failure.id
        assert failure.hint, failure.id
        if not failure.line:  # a class with a space matches none in text without white space
            classes = re.findall(r"\[(?!\^)[^\]]*\]", re.sub(r"\\.", "", failure.pattern))
            assert not any(" " in one for one in classes), failure.id
    ids = [failure.id for failure in failures()]
    assert len(set(ids)) == len(ids)


def test_causes_come_before_what_follows_from_them() -> None:
    log = """
        [TRT-LLM] [W] Provided but not required tensors: {'x'}
        [TRT] [E] Error Code 2: OutOfMemory (Requested size was 5 bytes.)
        [TRT] [E] Error Code 2: OutOfMemory (Requested size was 5 bytes.)
        AssertionError: Engine building failed, please check the error log.
    """
    findings = explain(log.splitlines()).findings
    assert [(finding.number, finding.times) for finding in findings] == [(3, 2), (5, 1), (2, 1)]


def test_the_first_of_several_causes_is_named() -> None:
    log = [
        "[TensorRT-LLM][ERROR] CUDA runtime error in ::cudaMallocAsync(ptr, n, stream): out of memory",
        "mpirun noticed that process rank 1 with PID 0 on node x exited on signal 9 (Killed).",
        "Failed, NCCL error /src/ncclCommunicator.cpp:122 'remote process exited or there was a network error'",
    ]
    assert first(log).id == "gpu-memory-load"
    assert first(log[::-1]).id == "host-memory"


def test_a_hang_is_told_by_the_last_line_alone() -> None:
    hang = "NCCL INFO comm 0x1 rank 3 - Init COMPLETE"
    (finding,) = explain([hang, hang, "", "  "]).findings
    assert (finding.number, finding.times) == (2, 2)
    assert explain([hang, "[I] serving"]).findings == ()


@pytest.mark.parametrize(
    "healthy",
    [
        "[TRT-LLM] [I] Build TensorRT engine Unnamed Network 0",
        "[TRT] [W] Requested amount of GPU memory (33555480576 bytes) could not be allocated. There may be",
        "[TRT-LLM] [I] Engine version 1.2.1 found in the config file, assuming engine(s) built by new builder API.",
        "[TRT-LLM] [I] Total time of building all engines: 00:00:41",
        "n1:42:42 [0] NCCL INFO NET/Plugin : dlerror=libnccl-net.so: cannot open shared object file: No such file or "
        "directory No plugin found (libnccl-net.so), using internal implementation",
        'I0820 06:19:20 1 stub_launcher.cc:385] "Starting Python backend stub:  exec /opt/tritonserver/backends/'
        'python/triton_python_backend_stub /m/1/model.py triton_python_backend_shm_region_4d97 1048576 1048576 2568"',
        "Setting `pad_token_id` to `eos_token_id`:151643 for open-end generation.\nThe attention mask is not set and "
        "cannot be inferred from input because pad token is same as eos token.",
        "2025-05-30T21:19:14.462Z  INFO loader: engine not found, cannot open it yet",
        "Unable to find image 'nvcr.io/nvidia/tritonserver:24.07-trtllm-python-py3' locally",
        "[TRT] [W] IElementWiseLayer with inputs a and b: first input has type Half but second input has type Float.",
        "[rank0]:[W1001 16:06:04.0 ProcessGroupNCCL.cpp:1168] Warning: process group has NOT been destroyed before",
        "E0101 00:00:00 1 CudaDriverHelper: CUDA driver version is insufficient for CUDA runtime version",
    ],
)
def test_a_healthy_log_has_no_findings(healthy: str) -> None:
    assert explain([*healthy.splitlines(), "[TRT-LLM] [I] done"]).findings == ()


HEALTHY = """\
=============================
== Triton Inference Server ==
=============================
NVIDIA Release 26.07 (build 1)
[TRT-LLM] [I] Set fp8_rowwise_gemm_plugin to None.
[TRT-LLM] [I] max_seq_len is not specified, using deduced value 32768
[TRT-LLM] [W] remove_input_padding is enabled, while opt_num_tokens is not set, setting to max_batch_size*max_beam_width.
[TRT-LLM] [W] Specifying a `max_num_tokens` larger than 16384 is usually not recommended, we do not expect perf gain with that
[TRT] [I] Global timing cache in use. Profiling results in this builder pass will be stored.
[TRT] [I] Detected 14 inputs and 1 output network tensors.
[TRT] [I] Engine generation completed in 41.3 seconds. It took too long? See trtexec.
[TensorRT-LLM][WARNING] gpu_device_ids is not specified, will be automatically set
[TensorRT-LLM][WARNING] participant_ids is not specified, will be automatically set
[TensorRT-LLM][WARNING] max_attention_window_size is not specified, will use default
[TensorRT-LLM][WARNING] kv_cache_free_gpu_mem_fraction is not specified, will use default value of 0.9
[TensorRT-LLM][INFO] recv_poll_period_ms is not set, will use busy loop
[TensorRT-LLM][WARNING] Don't setup 'skip_special_tokens' correctly (set value is ${skip_special_tokens}). Set it as True.
[TensorRT-LLM][WARNING] Using an engine plan file across different models of devices is not recommended and is likely to affect performance or even cause errors.
[TensorRT-LLM][INFO] Engine version 1.2.1 found in the config file, assuming engine(s) built by new builder API.
[TensorRT-LLM][INFO] Parameter has_position_embedding cannot be read from json:
[TensorRT-LLM][INFO] [json.exception.out_of_range.403] key 'has_position_embedding' not found
[TensorRT-LLM][INFO] [json.exception.type_error.302] type must be string, but is null
[TensorRT-LLM][WARNING] Attention workspace size is not enough, increase the size from 0 bytes to 67462144 bytes
[TensorRT-LLM][WARNING] [kv cache manager] storeContextBlocks: Can not find sequence for request 2049
[TensorRT-LLM][INFO] Initializing MPI with thread mode 3
[TensorRT-LLM][INFO] Initialized MPI
[TensorRT-LLM][INFO] MPI size: 4, MPI local size: 4, rank: 0
[TensorRT-LLM][INFO] Rank 0 is using GPU 0, which is not the http port 8000 of the engine
[TensorRT-LLM][INFO] TRTGptModel maxNumSequences: 64
[TensorRT-LLM][INFO] TRTGptModel maxInputLen: 8191  = min(maxSequenceLen - 1, maxNumTokens) since context FMHA and usePackedInput are enabled
[TensorRT-LLM][INFO] Max KV cache pages per sequence: 1024
[TensorRT-LLM][INFO] Number of tokens per block: 32.
name: "embedding_bias" allow_ragged_batch: true name: "beam_width" reshape { }
Killed by signal 15.
n1:42:42 [0] NCCL INFO ncclCommInitRank comm 0x1 rank 0 nranks 4 - Init COMPLETE
n1:42:42 [0] NCCL INFO P2P is disabled between connected GPUs 1 and 0.
I0725 09:40:15.126434 1 model_lifecycle.cc:849] "successfully loaded 'tensorrt_llm'"
| tensorrt_llm | 1 | READY |
I0725 09:40:15.500000 1 grpc_server.cc:2560] "Started GRPCInferenceService at 0.0.0.0:8001"
I0725 09:40:15.500001 1 http_server.cc:4755] "Started HTTPService at 0.0.0.0:8000"
I0725 09:40:15.500002 1 http_server.cc:358] "Started Metrics Service at 0.0.0.0:8002"
"""  # noqa: E501


VLLM = """\
INFO 11-01 18:37:07 [__init__.py:244] Automatically detected platform cuda.
WARNING 11-01 18:37:08 [topk_topp_sampler.py:59] FlashInfer is not available. Falling back to the PyTorch-native one
WARNING 11-01 18:37:08 [custom_all_reduce.py:137] Custom allreduce is disabled because your platform lacks GPU P2P.
(VllmWorker rank=1 pid=1) INFO 11-01 18:37:07 [fused_moe.py:709] Using default MoE config. Config file not found at /x
/usr/lib/python3/x.py:1: FutureWarning: The pynvml package is deprecated. Please install nvidia-ml-py instead.
(Worker_TP1 pid=4) INFO 07-08 11:54:09 [gpu_worker.py:907] Free memory on device (93.83/95.01 GiB) on startup
(EngineCore_DP1 pid=2589) `rope_parameters`'s factor field must be a float >= 1, got 16
E external/local_xla/xla/stream_executor/cuda/cuda_fft.cc:477] Unable to register cuFFT factory: already registered
INFO:     127.0.0.1:1 - "GET /favicon.ico HTTP/1.1" 404 Not Found
INFO:     Application startup complete.
"""


def test_pip_goes_on_after_a_conflict() -> None:
    line = "torch-tensorrt 2.3.0a0 requires tensorrt<8.7,>=8.6, but you have tensorrt 10.0.1 which is incompatible."
    assert [(found.id, found.role) for found in explain([line, "Successfully installed tensorrt"]).findings] == [
        ("pip-incompatible", "note")
    ]


def test_a_vllm_that_starts_well_has_nothing_but_notes() -> None:
    assert {finding.role for finding in explain(VLLM.splitlines()).findings} == {"note"}


def test_harmless_lines_make_no_cause_together() -> None:
    """Matches run over lines, so that what is harmless alone has to be so beside anything else."""
    lines, order = [*HEALTHY.splitlines(), *VLLM.splitlines()], random.Random(1)
    for _ in range(5):
        order.shuffle(lines)
        assert explain([*lines, "done"]).first is None


def test_information_is_no_failure() -> None:
    """What a program says on its way is not the first cause of what fails after it."""
    info = "[TensorRT-LLM][INFO] [json.exception.out_of_range.403] key 'quant_algo' not found"
    error = "[TensorRT-LLM][ERROR] Assertion failed: mpiSize == tp * pp (1 != 4)"
    assert explain([info, "[TensorRT-LLM][INFO] serving"]).first is None
    assert first([info, error]).id == first([error]).id
    assert first([info.replace("INFO", "ERROR"), error]).id == "json-key"


def test_a_warning_is_no_cause_for_certain() -> None:
    warning = (
        "W0110 17:49:49.075569 563 pinned_memory_manager.cc:236] Unable to allocate pinned system memory, pinned "
    )
    warning += "memory pool will not be available: CUDA driver version is insufficient for CUDA runtime version"
    error = (
        "error: creating server: Not found - unable to load shared library: libc10.so: cannot open shared object file"
    )
    assert first([warning]).role == "symptom"
    assert (first([warning, error]).id, first([warning, error]).role) == ("library-missing", "cause")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("RuntimeError: CUDA ERROR: 2, error code reference: https://x", "the GPU's memory is exhausted"),
        ("CUDA driver error: cuLaunch returned CUDA_ERROR_CONTEXT_IS_DESTROYED", "the CUDA context"),
        ("Error: cudaErrorMpsServerNotReady at x.cc:1", "MPS"),
        ("CUDNN_STATUS_ALLOC_FAILED in cudnnCreate", "memory is exhausted"),
        ("InferenceServerException: [StatusCode.NOT_FOUND] no such model", "is not there"),
        ("process exited with code 139", "not its own"),
        ("terminate called after throwing an instance of 'std::length_error'", "far too large"),
        (
            "[TensorRT-LLM][ERROR] Assertion failed: n < m (/src/tensorrt_llm/cpp/tensorrt_llm/thop/a.cpp:1)",
            "PyTorch",
        ),
    ],
)
def test_the_members_of_a_kind_are_explained_by_its_table(line: str, words: str) -> None:
    assert words in first([line]).cause


def test_a_python_exception_names_the_part_of_the_program() -> None:
    log = """
        Traceback (most recent call last):
          File "/venv/lib/python3.12/site-packages/vllm/model_executor/model_loader/x.py", line 3, in load
            one()
          File "/venv/lib/python3.12/site-packages/torch/x.py", line 5, in y
        IndexError: list index 7
    """
    found = first(log.splitlines())
    assert found.role == "symptom"
    assert (
        "vLLM, which loads the weights, (vllm/model_executor/model_loader/x.py, load) fails with IndexError"
        in found.cause
    )


def test_a_server_that_starts_well_has_no_findings() -> None:
    """What Triton and TensorRT-LLM print on their way up, warnings that look like failures among it."""
    assert [finding.id for finding in explain(HEALTHY.splitlines()).findings] == []
