#!/usr/bin/env python3
"""The PyTorch peer of `make bench`: one training step of the same LLaMA in eager PyTorch on the CPU.

    python3 dev/bench_torch.py                       the `15m` preset at every thread count from 1 to the usable cores
    python3 dev/bench_torch.py --threads 2 --bf16    one thread count, autocast to bf16

A step is zero_grad, forward, cross entropy, backward, clipping at norm 1 and AdamW: what train_llama does for `--recipe float`.
It prints one JSON line: the median ms of a step at the best thread count, and tokens/s from it. Needs torch 2.5 or newer.

The peer is meant to be as fast as a careful user gets eager PyTorch to be, since beating a slow one shows nothing: qkv and
gate/up are fused, attention is SDPA's flash kernel with grouped queries, AdamW is the fused one, freed memory is kept. Tried on
2 Sapphire Rapids cores, where a float step takes 706 ms at best and runs differ by 3%: freed memory not kept +6 to +13%; foreach
AdamW +0 to +6%; k and v repeated instead of enable_gqa +2 to +6%; RoPE with roll instead of halves +3%; separate gate and up, RMSNorm
written out, RoPE in complex numbers, huge pages: no difference to be seen. (--compile, no longer eager: 639 ms.)
"""
import argparse, ctypes, json, os, statistics, sys, time
try:
    import torch
    from torch import nn
    from torch.nn import functional as F
except ImportError:
    print("bench_torch.py: needs PyTorch: pip install torch", file=sys.stderr)
    sys.exit(2)

class Block(nn.Module):
    def __init__(self, o):
        super().__init__()
        C, self.NH, self.KVH, self.hs = o.dim, o.heads, o.kv_heads, o.dim // o.heads
        self.norm1, self.norm2 = nn.RMSNorm(C, eps=1e-5), nn.RMSNorm(C, eps=1e-5)
        self.qkv = nn.Linear(C, (o.heads + 2 * o.kv_heads) * self.hs, bias=False)
        self.out = nn.Linear(C, C, bias=False)
        self.gate_up = nn.Linear(C, 2 * o.ffn, bias=False)
        self.down = nn.Linear(o.ffn, C, bias=False)

    def forward(self, x, cos, sin):                                      # x [B,T,C]; cos, sin [T,1,hs/2]
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (-1, self.hs))       # [B,T,NH+2KVH,hs]
        qk, v = qkv.split((self.NH + self.KVH, self.KVH), dim=2)
        a, b = qk.chunk(2, -1)                                           # q and k are rotated in one go
        qk = torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(v.dtype)
        q, k = qk.split((self.NH, self.KVH), dim=2)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        gate, up = self.gate_up(self.norm2(x)).chunk(2, -1)              # [B,T,F] each
        return x + self.down(F.silu(gate) * up)

class Llama(nn.Module):
    def __init__(self, o):
        super().__init__()
        self.embed = nn.Embedding(o.vocab, o.dim)
        self.blocks = nn.ModuleList(Block(o) for _ in range(o.layers))
        self.norm = nn.RMSNorm(o.dim, eps=1e-5)
        self.head = nn.Linear(o.dim, o.vocab, bias=False)
        hs = o.dim // o.heads
        angle = torch.arange(o.seq)[:, None, None] * 500000.0 ** (-torch.arange(0, hs, 2) / hs)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)
        for p in self.parameters():
            if p.dim() == 2: nn.init.normal_(p, std=0.02)

    def forward(self, tokens, targets):                                  # [B,T] both; the mean loss in nats
        x = self.embed(tokens)
        for block in self.blocks: x = block(x, self.cos, self.sin)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), targets.flatten())

def make_adamw(model):
    params = list(model.parameters())
    groups = [{"params": [p for p in params if p.dim() == 2], "weight_decay": 0.1},
              {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0}]
    try: return torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), fused=True)
    except RuntimeError: return torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), foreach=True)

def keep_memory():
    """glibc returns every large activation to the kernel when it is freed, and faults its pages in again at the next step.
    Telling malloc to keep them is what PyTorch's tuning guide reaches with tcmalloc or jemalloc. Other libcs: no change."""
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
    try:
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, 1 << 30), mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)
    except (AttributeError, OSError): pass

def main():
    p = argparse.ArgumentParser(description="time a training step of eager PyTorch on the CPU", allow_abbrev=False)
    preset = dict(layers=5, dim=512, heads=8, kv_heads=2, ffn=1536, vocab=256, batch=8, seq=256)      # `15m`
    for name, value in preset.items(): p.add_argument("--" + name.replace("_", "-"), type=int, default=value, help=f"default {value}")
    p.add_argument("--steps", type=int, default=10, help="timed steps for each thread count, after 2 untimed ones; default 10")
    p.add_argument("--threads", type=int, help="default: try 1 to the usable cores, report the best")
    p.add_argument("--bf16", action="store_true", help="autocast: bf16 matmuls and attention, float weights")
    p.add_argument("--compile", action="store_true", help="torch.compile the model (then it is no longer eager)")
    p.add_argument("--plain-malloc", action="store_true", help="leave malloc as it comes, as most users do")
    o = p.parse_args()
    if min(*(getattr(o, name) for name in preset), o.steps, 1 if o.threads is None else o.threads) < 1: p.error("sizes must be at least 1")
    if o.dim % (2 * o.heads) or o.heads % o.kv_heads: p.error("--dim must be a multiple of 2 x --heads, --heads of --kv-heads")

    if not o.plain_malloc: keep_memory()
    torch.manual_seed(1)
    model = Llama(o)
    optimizer = make_adamw(model)
    forward = torch.compile(model) if o.compile else model
    tokens = torch.randint(o.vocab, (o.batch, o.seq + 1))
    x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def step():
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=o.bf16): loss = forward(x, y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    counts = [o.threads] if o.threads else sorted({max(1, cores * i // 16) for i in range(1, 17)} | {1})   # all up to 16 cores
    ms = {}
    for threads in counts:
        torch.set_num_threads(threads)
        times = []
        for _ in range(2 + o.steps):
            start = time.perf_counter()
            loss = step()
            times.append(1e3 * (time.perf_counter() - start))
        ms[threads] = times[2:]
        if not loss == loss: sys.exit("bench_torch.py: the loss is not a number")
    median = {threads: statistics.median(times) for threads, times in ms.items()}
    best = min(median, key=median.get)
    print(json.dumps({
        "peer": "torch " + torch.__version__, "type": "bf16" if o.bf16 else "float", "compile": o.compile, "plain_malloc": o.plain_malloc,
        **{name: getattr(o, name) for name in preset}, "steps": o.steps, "threads": best,
        "ms": round(median[best], 2), "ms_least": round(min(ms[best]), 2),
        "tokens_per_s": round(1e3 * o.batch * o.seq / median[best], 1),
        "ms_by_threads": {threads: round(value, 2) for threads, value in median.items()}}))

if __name__ == "__main__": main()
