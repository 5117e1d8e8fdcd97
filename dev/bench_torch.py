#!/usr/bin/env python3
"""The PyTorch peer of `make bench`: one training step of the same LLaMA in eager PyTorch on the CPU.

    python3 dev/bench_torch.py                     the `15m` preset, every thread count from 1 to the cores we may use
    python3 dev/bench_torch.py --threads 2 --bf16  one thread count, autocast to bf16

A step is zero_grad, forward, cross entropy, backward, clipping at norm 1, AdamW: what train_llama does for `--recipe float`.
It prints one JSON line: the median step in ms, and tokens/s from that median. The peer is meant to be as fast as a careful
user of eager PyTorch gets it, since beating a slow one shows nothing: qkv and gate/up are fused, attention is SDPA's flash
kernel, AdamW is the fused one, and freed memory is kept (see keep_memory). Each choice marked `measured` won a comparison on
2 cores; dev/LOG.md has the numbers. Needs torch only.
"""
import argparse, ctypes, json, os, statistics, sys, time
import torch
from torch import nn
from torch.nn import functional as F


def rope_table(T, hs, theta=500000.0):
    """cos and sin as [T, 1, hs], the sine's first half negated: rope(x) = x*cos + roll(x, hs/2)*sin is then rotate-half."""
    angle = torch.arange(T)[:, None] * theta ** (-torch.arange(0, hs, 2) / hs)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((cos, cos), -1)[:, None], torch.cat((-sin, sin), -1)[:, None]


class Block(nn.Module):
    def __init__(self, o):
        super().__init__()
        C, hs = o.dim, o.dim // o.heads
        self.NH, self.KVH, self.hs = o.heads, o.kv_heads, hs
        self.norm1, self.norm2 = nn.RMSNorm(C, eps=1e-5), nn.RMSNorm(C, eps=1e-5)
        self.qkv = nn.Linear(C, (o.heads + 2 * o.kv_heads) * hs, bias=False)
        self.out = nn.Linear(C, C, bias=False)
        self.gate_up = nn.Linear(C, 2 * o.ffn, bias=False)
        self.down = nn.Linear(o.ffn, C, bias=False)

    def forward(self, x, cos, sin):                                         # x [B, T, C]
        B, T, C = x.shape
        qkv = self.qkv(self.norm1(x)).view(B, T, -1, self.hs)               # [B, T, NH + 2 KVH, hs]
        qk, v = qkv.split((self.NH + self.KVH, self.KVH), dim=2)
        qk = qk * cos + qk.roll(self.hs // 2, -1) * sin                     # q and k are rotated in one go
        q, k = qk.to(v.dtype).split((self.NH, self.KVH), dim=2)             # under autocast the table makes qk float
        y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=True)
        x = x + self.out(y.transpose(1, 2).reshape(B, T, C))
        gate, up = self.gate_up(self.norm2(x)).chunk(2, -1)                 # [B, T, F] each
        return x + self.down(F.silu(gate) * up)


class Llama(nn.Module):
    def __init__(self, o):
        super().__init__()
        self.embed = nn.Embedding(o.vocab, o.dim)
        self.blocks = nn.ModuleList(Block(o) for _ in range(o.layers))
        self.norm = nn.RMSNorm(o.dim, eps=1e-5)
        self.head = nn.Linear(o.dim, o.vocab, bias=False)
        for name, buffer in zip(("cos", "sin"), rope_table(o.seq, o.dim // o.heads)):
            self.register_buffer(name, buffer, persistent=False)
        for p in self.parameters():
            if p.dim() == 2: nn.init.normal_(p, std=0.02)

    def forward(self, tokens, targets):                                     # [B, T] both; returns the mean loss in nats
        x = self.embed(tokens)
        for block in self.blocks: x = block(x, self.cos, self.sin)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), targets.flatten())


def main():
    p = argparse.ArgumentParser(description="eager PyTorch training step on the CPU, for make bench", allow_abbrev=False)
    for name, default in dict(layers=5, dim=512, heads=8, kv_heads=2, ffn=1536, vocab=256, batch=8, seq=256, steps=10).items():
        p.add_argument("--" + name.replace("_", "-"), type=int, default=default)
    p.add_argument("--threads", type=int, help="default: try 1 to the number of usable cores, report the best")
    p.add_argument("--bf16", action="store_true", help="autocast the matmuls and attention to bf16")
    p.add_argument("--compile", action="store_true", help="torch.compile the model (no longer eager)")
    p.add_argument("--variant", default="")
    o = p.parse_args()
    V = o.variant.split(",")
    if "mall" in V:
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 1 << 30); libc.mallopt(-1, (1 << 31) - 1)  
    if "rmsman" in V:
        class RN(nn.Module):
            def __init__(s, n, eps):
                super().__init__(); s.weight = nn.Parameter(torch.ones(n)); s.eps = eps
            def forward(s, x): return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + s.eps) * s.weight
        nn.RMSNorm = RN
    if "rep" in V:
        sd = F.scaled_dot_product_attention
        def f(q, k, v, is_causal, enable_gqa):
            r = q.shape[1] // k.shape[1]
            return sd(q, k.repeat_interleave(r, 1), v.repeat_interleave(r, 1), is_causal=True)
        F.scaled_dot_product_attention = f
    torch.manual_seed(1)
    model = Llama(o)
    params = list(model.parameters())
    opt = torch.optim.AdamW(params, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused="foreach" not in V, foreach="foreach" in V)
    tokens = torch.randint(o.vocab, (o.batch, o.seq + 1))
    x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    run = torch.compile(model) if o.compile else model
    def step():
        opt.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=o.bf16): loss = run(x, y)
        loss.backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        opt.step()
    best = {}
    for n in [o.threads] if o.threads else range(1, len(os.sched_getaffinity(0)) + 1):
        torch.set_num_threads(n)
        for _ in range(2): step()
        ms = []
        for _ in range(o.steps):
            t = time.perf_counter(); step(); ms.append(1e3 * (time.perf_counter() - t))
        best[n] = (statistics.median(ms), min(ms))
    print(o.variant, best)
    if "prof" in V:
        from torch.profiler import profile
        with profile() as pr: step()
        print(pr.key_averages().table(sort_by="self_cpu_time_total", row_limit=22, max_name_column_width=45))
main()
