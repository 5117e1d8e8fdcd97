#!/usr/bin/env python3
"""make bench: the speeds that matter, as ratios of things measured in turn in one run.

    python3 dev/bench.py build/cpu/train_llama [--rounds 5]

1. Row kernels and quantisers against a copy of as many bytes, FP4 GEMMs against float ones (dev/bench_kernels.cu).
2. A float training step of `15m` at 256 tokens against the same model in eager PyTorch (dev/bench_torch.py, if torch is there),
   rounds interleaved, medians; and model FLOPs against the measured matmul peak.
3. Anonymous memory of that run against what --dry-run says.
4. A step of `15m` on 4096 tokens by recipe, as a ratio to float; again without the CPU's bf16 units, where oneDNN can hide them.
Nothing else should run on the machine meanwhile. Exit status 0 whatever the ratios are: a table, not a test; 2 if something did not run.
"""
import argparse, json, os, re, statistics, subprocess, sys, tempfile

# Not mxfp8 and nvfp4-fp8, which take the time of mxfp4 and mxfp4-fp8; nor metis-code, which exists for its losses, not for its speed.
RECIPES = ["float", "bf16", "fp8", "fp8-rows", "nvfp4", "nvfp4-sr", "nvidia", "mxfp4", "mxfp4-fp8", "four-over-six", "metis"]

def fail(message):
    print(message, file=sys.stderr)
    sys.exit(2)

def run(command):
    """Its stdout; if it fails, the last line of what it said instead."""
    ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode: failed(command, ended.returncode, ended.stderr)
    return ended.stdout

def failed(command, status, said):
    fail(said.strip().splitlines()[-1] if said.strip() else f"bench.py: {command[0]} ended with status {status}")

def ours(program, data, recipe, steps=10, batch=8, env=None):
    """ms of a step (median without the first two), its share of the matmul peak in %, and the peak of anonymous memory in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        command = [program, "--data", data, "--model", "15m", "--recipe", recipe, "--batch", str(batch), "--steps", str(steps),
                   "--sample-tokens", "0", "--eval-batches", "1", "--out", folder + "/run", "--save-every", "0"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **(env or {})})
        anonymous, peak = 0, 0
        for line in process.stdout:
            if found := re.search(r"matmul peak (\d+) GFLOP/s", line): peak = float(found[1])
            if found := re.search(r"([\d.]+) GFLOP a step", line): flops = float(found[1])
            try:
                with open(f"/proc/{process.pid}/status") as status:
                    anonymous = max(anonymous, int(re.search(r"RssAnon:\s+(\d+)", status.read())[1]) * 1024)
            except (OSError, TypeError): pass
        if process.wait(): failed(command, process.returncode, process.stderr.read())
        with open(folder + "/run/log.jsonl") as log:
            ms = [json.loads(line)["ms"] for line in log if '"ms"' in line][2:]
    ms = statistics.median(ms)
    return ms, 100 * flops / (ms * 1e-3) / peak, anonymous

def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("program")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--data", default="data/stories.txt")
    o = parser.parse_args()
    kernels = os.path.join(os.path.dirname(o.program), "bench_kernels")
    for program in o.program, kernels:
        if not os.access(program, os.X_OK) or os.path.isdir(program): fail(f"bench.py: there is no program {program}: `make bench` builds it")
    print("row kernels, GB/s read and written")
    print(run([kernels]), end="")

    torch = subprocess.run([sys.executable, "-c", "import torch"], capture_output=True).returncode == 0
    if not torch: print("PyTorch is not installed: no peer (pip install torch, or PYTHON=path/to/python make bench)")
    mine, half, peer, tuned, share, memory = [], [], [], [], [], 0
    for _ in range(o.rounds):
        ms, percent, anonymous = ours(o.program, o.data, "float")
        mine.append(ms), share.append(percent)
        memory = max(memory, anonymous)
        half.append(ours(o.program, o.data, "bf16")[0])
        if torch:
            for times, options in (peer, ["--plain-malloc"]), (tuned, []):
                said = run([sys.executable, os.path.join(os.path.dirname(__file__), "bench_torch.py"), "--steps", "8", *options])
                times.append(json.loads(said.splitlines()[-1])["ms"])
    spread = lambda v: f"{statistics.median(v):.0f} ms ({min(v):.0f} to {max(v):.0f})"
    print(f"15m, 8 x 256 tokens, a training step, median of {o.rounds} rounds (least to most)")
    print(f"  float                 {spread(mine)}, {statistics.median(share):.0f}% of the measured float matmul peak in model FLOPs")
    print(f"  bf16                  {spread(half)}, {statistics.median(mine) / statistics.median(half):.2f}x as fast as float")
    if torch:
        ratio = lambda v: f"ours is {statistics.median(v) / statistics.median(mine):.2f}x as fast"
        print(f"  eager PyTorch, float  {spread(peer)}: {ratio(peer)}")
        print(f"  with malloc tuned     {spread(tuned)}: {ratio(tuned)}")
    plan = run([o.program, "--data", o.data, "--model", "15m", "--recipe", "float", "--dry-run"])
    planned = float(re.search(r"total\s+([\d.]+) GB", plan)[1]) * 1e9
    print(f"  anonymous memory      {memory * 1e-9:.3f} GB, --dry-run says {planned * 1e-9:.3f} GB: ratio {memory / planned:.2f}")

    for env, title in ({}, ""), ({"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}, ", bf16 units hidden (ONEDNN_MAX_CPU_ISA=AVX512_CORE)"):
        times = {r: [] for r in RECIPES}
        for _ in range(max(1, o.rounds * 3 // 5)):
            for r in RECIPES: times[r].append(ours(o.program, o.data, r, 8, 16, env)[0])
        print(f"15m, 16 x 256 tokens, a training step{title}: ms, and the time of a float step over it")
        for r in RECIPES: print(f"  {r:21} {statistics.median(times[r]):6.0f} ms  {statistics.median(times['float']) / statistics.median(times[r]):.2f}")

main()
