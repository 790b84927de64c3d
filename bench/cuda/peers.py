"""Decode attention of fp16 keys and values by torch: cuDNN's and FlashAttention's kernels, for bench/cuda_bench.

32 query heads over 8 key heads of 128, one query token. The four query heads of a key head go as four query rows of
one head, which is the same and lets the kernels read keys once. Medians of 31, nothing in the second-level cache.
"""
import statistics
import sys

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

other = torch.ones(192 << 20, dtype=torch.uint8, device="cuda")


def time_of(call):
    times = []
    for i in range(34):
        other.view(torch.int32).sum()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        end.synchronize()
        if i >= 3:
            times.append(begin.elapsed_time(end) * 1000)
    return statistics.median(times)


def graphed(call):
    """The call without what Python takes."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


print(torch.cuda.get_device_name(), "torch", torch.__version__)
print(f"{'backend':10} {'B':>3} {'N':>7} {'us':>9}")
for batch, tokens in [(1, 4096), (1, 32768), (8, 8192), (1, 131072), (8, 32768)]:
    q = torch.randn(batch, 8, 4, 128, dtype=torch.float16, device="cuda")
    k = torch.randn(batch, 8, tokens, 128, dtype=torch.float16, device="cuda")
    v = torch.randn(batch, 8, tokens, 128, dtype=torch.float16, device="cuda")
    for name, backend in [("cuDNN", SDPBackend.CUDNN_ATTENTION), ("Flash", SDPBackend.FLASH_ATTENTION)]:
        try:
            with sdpa_kernel(backend):
                call = graphed(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v))
                print(f"{name:10} {batch:3} {tokens:7} {time_of(call):9.1f}", flush=True)
        except RuntimeError as error:
            print(name, batch, tokens, "failed:", str(error).splitlines()[0], file=sys.stderr)
    del q, k, v
