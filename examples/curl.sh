#!/usr/bin/env bash
# Chat, stream, complete and read metrics of a running server. GATEWAY is its address.
set -euo pipefail
GATEWAY=${GATEWAY:-http://127.0.0.1:8080}
MODEL=$(curl -sSf "$GATEWAY/v1/models" | python3 -c 'import json, sys; print(json.load(sys.stdin)["data"][0]["id"])')

echo "== a chat answer"
curl -sSf "$GATEWAY/v1/chat/completions" -H 'Content-Type: application/json' -d @- <<JSON
{"model": "$MODEL", "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 32}
JSON

echo; echo "== the same as a stream of server-sent events"
curl -sSfN "$GATEWAY/v1/chat/completions" -H 'Content-Type: application/json' -d @- <<JSON
{"model": "$MODEL", "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 8, "stream": true}
JSON

echo "== readiness and two metrics"
curl -sSf "$GATEWAY/ready"; echo
METRICS=$(curl -sSf "$GATEWAY/metrics")
grep -E '^trtqwen_gateway_(in_flight|queued) ' <<<"$METRICS"
