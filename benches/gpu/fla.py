# Times flash-linear-attention's operators: forward, and forward and backward, median of CUDA events, in one table.
# python3 -c THIS '[[B, T, H, D], ...]' WORDS_IN_THE_LINES
import json
import sys

import torch
import triton
from fla.ops.gla import chunk_gla
from fla.ops.linear_attn import chunk_linear_attn
from fla.ops.simple_gla import chunk_simple_gla


def operators(b, t, h, d):
    def gate(*shape, dtype):
        return torch.randn(*shape, device="cuda").abs().mul(-0.05).to(dtype).requires_grad_()

    yield "linear_attn", None, lambda q, k, v, g: chunk_linear_attn(q, k, v, normalize=False)[0]
    scalar = gate(b, t, h, dtype=torch.float32)
    yield "simple_gla", scalar, lambda q, k, v, g: chunk_simple_gla(q, k, v, g=g)[0]
    vector = gate(b, t, h, d, dtype=torch.bfloat16)
    yield "gla", vector, lambda q, k, v, g: chunk_gla(q, k, v, g=g)[0]


def milliseconds(f):
    return triton.testing.do_bench(f, return_mode="median")


print()
print("| flash-linear-attention | B, T, H, D | dtype | forward, ms | forward and backward, ms |")
print("| --- | --- | --- | --- | --- |")
shapes, only = json.loads(sys.argv[1]), sys.argv[2]
for b, t, h, d in shapes:
    q, k, v = (torch.randn(b, t, h, d, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    do = torch.randn_like(v)
    for name, g, op in operators(b, t, h, d):
        line = f"| {name} | {b}, {t}, {h}, {d} | bf16 |"
        if only not in line:
            continue
        with torch.no_grad():
            forward = milliseconds(lambda: op(q, k, v, g))
        try:
            both = f"{milliseconds(lambda: op(q, k, v, g).backward(do)):.3f}"
        except Exception as error:  # its gated backward passes refuse some pairs of GPU and Triton
            both = str(error).splitlines()[0][:60]
        print(f"{line} {forward:.3f} | {both} |", flush=True)
