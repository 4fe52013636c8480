#!/usr/bin/env bash
# Serve the bundled model and run benchmark and evaluation clients against it, each unmodified. Prints a table.
# usage: [PYTHON=PROGRAM] [VLLM_PYTHON=PROGRAM] scripts/clients.sh [DIRECTORY]
#   DIRECTORY    the clients are installed into DIRECTORY/venv (default: build/clients)
#   PYTHON       of an environment with trtqwen and Triton (default: .venv/bin/python)
#   VLLM_PYTHON  of an environment with vLLM, whose `bench serve` runs too
set -u
ROOT=$(cd "$(dirname "$0")/.." && pwd)
HOME_=$(mkdir -p "${1:-$ROOT/build/clients}" && cd "${1:-$ROOT/build/clients}" && pwd)
GUIDELLM=0.8.1 AIPERF=0.13.0 LM_EVAL=0.4.13
PINS="guidellm==$GUIDELLM aiperf==$AIPERF lm-eval==$LM_EVAL tenacity"
PYTHON=${PYTHON:-$ROOT/.venv/bin/python}
CLIENT=$HOME_/venv/bin
WORK=$(mktemp -d)
[ -x "$CLIENT/pip" ] || "$PYTHON" -m venv "$HOME_/venv"
"$CLIENT/pip" install --quiet $PINS || exit 1

cp -r "$ROOT/trtqwen/demo/model" "$WORK/model"
cat > "$WORK/clients.yaml" <<'Y'
description: client runs
checkpoint: {dtype: float32}
engine: {backend: torch, max_batch_size: 16, max_num_tokens: 1024, max_seq_len: 1024, tokens_per_block: 16}
serve: {max_tokens_in_paged_kv_cache: 8192, max_queue_size: 256, triton_max_batch_size: 16}
Y
"$PYTHON" -m trtqwen build "$WORK/clients.yaml" --model "$WORK/model" --engines "$WORK/engines" --repo "$WORK/tiny" > "$WORK/build.log" 2>&1 ||
    { tail -3 "$WORK/build.log"; exit 1; }
port() { "$PYTHON" -c "import socket; s = socket.socket(); s.bind(('127.0.0.1', 0)); print(s.getsockname()[1])"; }
GATEWAY=$(port)
"$PYTHON" -m trtqwen serve --repo "$WORK/tiny" --http-port "$(port)" --grpc-port "$(port)" --metrics-port "$(port)" \
    --gateway-port "$GATEWAY" > "$WORK/serve.log" 2>&1 &
SERVER=$!
trap 'kill $SERVER 2>/dev/null; wait $SERVER 2>/dev/null; rm -rf "$WORK"' EXIT
URL=http://127.0.0.1:$GATEWAY
for _ in $(seq 240); do curl -sf -o /dev/null "$URL/ready" && break; sleep 0.5; done
cat > "$WORK/task.yaml" <<Y
task: tiny_choice
dataset_path: json
dataset_kwargs: {data_files: {test: $WORK/task.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: 0
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
Y
cat > "$WORK/task.jsonl" <<'J'
{"question": "The sky is", "choices": [" blue", " loud"]}
{"question": "Two and two are", "choices": [" four", " red"]}
J

FAILED=0
run() { # NAME COMMAND...: prints a line of the table; what the client says goes to a log
    local name=$1 log
    log=$HOME_/$(tr ' /,' '---' <<< "$1").log
    shift
    if timeout 300 "$@" > "$log" 2>&1; then echo "| $name | ok |"; else echo "| $name | failed, see $log |"; FAILED=1; fi
}
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
echo "| client | result |"
echo "| --- | --- |"
run "guidellm $GUIDELLM" "$CLIENT/guidellm" run --backend "kind=openai_http,target=$URL,model=tiny" \
    --profile kind=synchronous --constraint kind=max_requests,count=4 --tokenizer "kind=huggingface_auto,model=$WORK/model" \
    --data kind=synthetic_text,prompt_tokens=32,output_tokens=8 --output "kind=json,path=$WORK/guidellm.json"
for kind in chat completions; do
    # Offline, it takes a tokenizer's directory for the name of a repository.
    run "aiperf $AIPERF, $kind" env -u HF_HUB_OFFLINE "$CLIENT/aiperf" profile --model tiny --url "$URL" --endpoint-type $kind --streaming \
        --request-count 6 --concurrency 2 --tokenizer "$WORK/model" --synthetic-input-tokens-mean 32 \
        --output-tokens-mean 8 --artifact-dir "$WORK/aiperf-$kind" --ui none
done
EVAL="model=tiny,base_url=$URL/v1/completions,num_concurrent=2"
run "lm-eval $LM_EVAL, loglikelihood" "$CLIENT/lm_eval" --model local-completions --tasks tiny_choice \
    --include_path "$WORK" --model_args "$EVAL,tokenizer=$WORK/model"
run "lm-eval $LM_EVAL, remote tokenizer" "$CLIENT/lm_eval" --model local-completions --tasks tiny_choice \
    --include_path "$WORK" --model_args "$EVAL,tokenizer_backend=remote"
if [ -n "${VLLM_PYTHON:-}" ]; then
    version=$("$VLLM_PYTHON" -c "from vllm.version import __version__; print(__version__)")
    # Not the program: in builds for the CPU it does not find its own version.
    cat > "$WORK/bench.py" <<'P'
import argparse
from vllm.benchmarks.serve import add_cli_args, main
if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    add_cli_args(parser)
    main(parser.parse_args())
P
    for backend in vllm:/v1/completions openai-chat:/v1/chat/completions openai-responses:/v1/responses; do
        run "vllm bench serve $version, ${backend%%:*}" "$VLLM_PYTHON" "$WORK/bench.py" --backend "${backend%%:*}" \
            --endpoint "${backend#*:}" --base-url "$URL" --model tiny --tokenizer "$WORK/model" --dataset-name random \
            --random-input-len 32 --random-output-len 8 --num-prompts 8 --ignore-eos
    done
fi
run "500 connections at once" "$PYTHON" "$ROOT/scripts/sse_load.py" "$URL" tiny --concurrency 500 --requests 500 \
    --inputs 16 --outputs 8
exit $FAILED
