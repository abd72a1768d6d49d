#!/usr/bin/env python3
"""How fast a model of Qwen3.5-0.8B's configuration runs here and in transformers, on the same machine in the same minutes.

    pip install torch transformers             # anywhere; a folder for PYTHONPATH will do
    scripts/qwen35-speed.py --folder DIR [--rounds 3] [--prompt 512 4096] [--new 16]
    scripts/qwen35-speed.py --folder DIR --cuda [--speed PROGRAM]

Writes random weights (752M parameters, bf16, tied) in the Hub's naming into the folder unless they are there, and then
runs `cargo run --release --example speed` and transformers in turn, so that a busy machine is busy for both: medians over
the rounds, and ratios to transformers' bf16 in the same round. With --cuda both run on a GPU; transformers takes what
kernels of flash-linear-attention and causal-conv1d are installed, and says which are not. --speed names the example where it
has been built elsewhere.
"""

import argparse
import os
import pathlib
import re
import statistics
import subprocess
import sys

CONFIG = dict(
    hidden_size=1024, intermediate_size=3584, num_hidden_layers=24, num_attention_heads=8, num_key_value_heads=2,
    head_dim=256, linear_num_key_heads=16, linear_num_value_heads=16, linear_key_head_dim=128,
    linear_value_head_dim=128, vocab_size=248320, tie_word_embeddings=True,
)
OURS = {
    "ours, bf16 weights": [],
    "ours, q8_0": ["--quantize", "q8_0"],
    "ours, q4_k": ["--quantize", "q4_k"],
}
OURS_ON_CUDA = {"ours, bf16": []}
THEIRS = {"transformers, bf16": "bfloat16", "transformers, f32": "float32"}
THEIRS_ON_CUDA = {"transformers, bf16": "bfloat16"}
BASE = "transformers, bf16"
REPEATS = 2
ROOT = pathlib.Path(__file__).resolve().parent.parent


def write_weights(folder):
    import torch
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    Qwen3_5ForCausalLM(Qwen3_5TextConfig(**CONFIG)).save_pretrained(folder)


def measure_theirs(folder, dtype, device, prompt, new):
    """Runs in a process of its own and prints tokens a second, twice, and the peak of memory. The first time does not count: it
    compiles."""
    import resource
    import time

    import torch
    from transformers import Qwen3_5ForCausalLM

    torch.set_num_threads(os.cpu_count())
    model = Qwen3_5ForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).to(device).eval()
    ids = (torch.arange(prompt)[None] * 7919 % CONFIG["vocab_size"]).to(device)
    prefill, decode = [], []
    with torch.inference_mode():
        for _ in range(REPEATS + 1):
            started = time.perf_counter()
            out = model(ids, use_cache=True, logits_to_keep=1)
            token = out.logits[:, -1:].argmax(-1)
            token.tolist()  # waits for a GPU
            prefill.append(time.perf_counter() - started)
            past = out.past_key_values
            for _ in range(new):
                started = time.perf_counter()
                token = model(token, past_key_values=past, use_cache=True).logits[:, -1:].argmax(-1)
                token.tolist()
                decode.append(time.perf_counter() - started)
    prefill, decode = prefill[1:], decode[new:]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    print(f"prompt: {prompt / statistics.median(prefill):.1f} decode: {1 / statistics.median(decode):.2f} memory: {peak:.0f}")


def run(command):
    """Tokens of the prompt and tokens written a second, and megabytes."""
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode != 0:
        sys.exit(done.stderr)
    number = lambda name: float(re.search(name + r": ([\d.]+)", done.stdout).group(1))
    return number("prompt"), number("decode"), number("memory")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=pathlib.Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt", type=int, nargs="+", default=[512])
    parser.add_argument("--new", type=int, default=16)
    parser.add_argument("--cuda", action="store_true")
    parser.add_argument("--speed", type=pathlib.Path)
    parser.add_argument("--theirs", help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = "cuda" if args.cuda else "cpu"
    if args.theirs:
        return measure_theirs(args.folder, args.theirs, device, args.prompt[0], args.new)

    if not (args.folder / "model.safetensors").exists():
        write_weights(args.folder)
    example = ["--release", "--example", "speed"] + (["--features", "cuda"] if args.cuda else [])
    if args.speed:
        speed = [args.speed.resolve()]
    else:
        subprocess.run(["cargo", "build"] + example, cwd=ROOT, check=True)
        speed = ["cargo", "run", "--quiet"] + example + ["--"]
    speed += ["--model", args.folder.resolve(), "--repeats", REPEATS + 1] + ([] if args.cuda else ["--cpu"])
    theirs = [sys.executable, __file__, "--folder", args.folder.resolve()] + (["--cuda"] if args.cuda else [])

    print("| | prompt | prompt, tokens/s | times | decode, tokens/s | times | peak memory, MB |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for prompt in args.prompt:
        sizes = ["--prompt", prompt, "--new", args.new]
        commands = {
            name: theirs + sizes + ["--theirs", dtype]
            for name, dtype in (THEIRS_ON_CUDA if args.cuda else THEIRS).items()
        }
        sizes = ["--prompt-tokens", prompt, "--new-tokens", args.new]
        commands |= {name: speed + sizes + more for name, more in (OURS_ON_CUDA if args.cuda else OURS).items()}
        rounds = []
        for _ in range(args.rounds):
            rounds.append({name: run([str(part) for part in command]) for name, command in commands.items()})
            print(rounds[-1], file=sys.stderr)
        for name in commands:
            median = lambda of: statistics.median(of(found) for found in rounds)
            cells = [median(lambda found: found[name][i]) for i in range(3)]
            ratios = [median(lambda found: found[name][i] / found[BASE][i]) for i in range(2)]
            # On a GPU it is not the process's memory that counts.
            memory = "" if args.cuda else f"{cells[2]:.0f}"
            print(
                f"| {name} | {prompt} | {cells[0]:.0f} | {ratios[0]:.2f} | {cells[1]:.2f} | {ratios[1]:.2f} | {memory} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
