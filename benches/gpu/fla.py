# Times an operator of flash-linear-attention: forward, and forward and backward, medians of CUDA events in milliseconds.
# python3 -c THIS OPERATOR '[B, T, H, K, V]' bf16|f16|f32 prints {"forward": .., "both": ..}, null for what it does not do.
import json
import sys

import fla  # that there is none at all is an error, that it has no operator of some name is not
import torch
import torch.nn.functional as F
import triton


def operator(name, b, t, h, k_dim, v_dim, dtype):
    """A function of q, k and v, as the bench in Rust gives the same operator its inputs."""

    def gate(*shape, dtype=dtype):
        return torch.randn(*shape, device="cuda").abs().mul(-0.05).to(dtype).requires_grad_()

    def beta():
        return torch.rand(b, t, h, device="cuda", dtype=dtype).requires_grad_()

    if name == "linear_attn":
        from fla.ops.linear_attn import chunk_linear_attn

        return lambda q, k, v: chunk_linear_attn(q, k, v, normalize=False)[0]
    if name == "simple_gla":
        from fla.ops.simple_gla import chunk_simple_gla

        g = gate(b, t, h, dtype=torch.float32)
        return lambda q, k, v: chunk_simple_gla(q, k, v, g=g)[0]
    if name == "gla":
        from fla.ops.gla import chunk_gla

        g = gate(b, t, h, k_dim)
        return lambda q, k, v: chunk_gla(q, k, v, g=g)[0]
    if name == "delta_rule":
        from fla.ops.delta_rule import chunk_delta_rule

        x = beta()
        return lambda q, k, v: chunk_delta_rule(q, k, v, x)[0]
    if name == "gated_delta_rule":
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule

        g, x = gate(b, t, h, dtype=torch.float32), beta()
        return lambda q, k, v: chunk_gated_delta_rule(q, k, v, g=g, beta=x)[0]
    if name == "kda":
        from fla.ops.kda import chunk_kda

        g, x = gate(b, t, h, k_dim), beta()
        return lambda q, k, v: chunk_kda(q, k, v, g=g, beta=x)[0]
    return None


def milliseconds(f):
    return triton.testing.do_bench(f, return_mode="median")


name, (b, t, h, k_dim, v_dim) = sys.argv[1], json.loads(sys.argv[2])
dtype = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}[sys.argv[3]]
found = {"forward": None, "both": None}
try:
    op = operator(name, b, t, h, k_dim, v_dim, dtype)
    if op is not None:
        k = torch.randn(b, t, h, k_dim, device="cuda")
        if name in ("delta_rule", "gated_delta_rule", "kda"):
            k = F.normalize(k, dim=-1)
        q, v = torch.randn_like(k), torch.randn(b, t, h, v_dim, device="cuda")
        q, k, v = (x.to(dtype).requires_grad_() for x in (q, k, v))
        do = torch.randn_like(v)
        with torch.no_grad():
            found["forward"] = milliseconds(lambda: op(q, k, v))
        found["both"] = milliseconds(lambda: op(q, k, v).backward(do))
except Exception as error:  # its gated backward passes refuse some pairs of GPU and Triton
    print(f"fla: {name}: {str(error).splitlines()[0][:200]}", file=sys.stderr)
print(json.dumps(found))
