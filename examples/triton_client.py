"""Stream an answer from Triton over gRPC: `pip install 'tritonclient[grpc]' 'numpy<2'`.

The tensors are those of upstream's in-flight-batching repository, so clients written for it work unchanged.
"""

import queue

import numpy as np
import tritonclient.grpc as grpc

PROMPT = "<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\n"


def tensor(name: str, value: np.ndarray, dtype: str) -> grpc.InferInput:
    """Make an input tensor [1, 1]."""
    result = grpc.InferInput(name, value.shape, dtype)
    result.set_data_from_numpy(value)
    return result


inputs = [
    tensor("text_input", np.array([[PROMPT.encode()]], np.object_), "BYTES"),
    tensor("max_tokens", np.array([[64]], np.int32), "INT32"),
    tensor("stream", np.array([[True]]), "BOOL"),
]
replies: queue.Queue = queue.Queue()
with grpc.InferenceServerClient("127.0.0.1:8001") as client:
    client.start_stream(lambda result, error: replies.put(error or result))
    client.async_stream_infer("ensemble", inputs, enable_empty_final_response=True)
    while True:
        reply = replies.get(timeout=60)
        if isinstance(reply, Exception):
            raise reply
        if reply.get_response().parameters["triton_final_response"].bool_param:
            break
        print(reply.as_numpy("text_output").reshape(-1)[0].decode(), end="", flush=True)
print()
