"""Plan, build, serve and ask from Python: `python examples/python_api.py path/to/Qwen2.5-0.5B-Instruct`."""

import sys
from pathlib import Path

from trtqwen import TritonServer, load_recipe, plan_build, plan_recipe, run_build, stream

model = Path(sys.argv[1])
recipe = load_recipe("qwen2-tiny-cpu", ["engine.max_batch_size=8"])
print("fits:", plan_recipe(recipe, model).fits)

plan = plan_build(recipe, model, Path("engines/mine"), Path("triton_repo/mine"))
for result in run_build(plan):
    print(f"{result.stage}: {result.seconds:.2f} s")

server = TritonServer(plan.repository.directory)
try:
    server.start()
    server.wait_until_ready()
    for piece in stream(server.grpc_url, "Hello!", max_tokens=32):
        print(piece.text, end="", flush=True)
    print()
finally:
    server.stop()
