#!/usr/bin/env python3
"""Makes the golden files: what PyTorch and transformers compute for two tiny Llama-3.x models, for the C++ tests to compare with.

    python3 test/golden/make_golden.py [--out test/golden]       needs torch, transformers and safetensors; 5 seconds, CPU

Each model is computed twice: by transformers' LlamaForCausalLM in float32 (eager attention, one thread), and by `forward`
below in double, written from the formulas alone. They must agree to rounding, so each checks the other. What is kept is the double
result, since a test against a float32 result would have to forgive the errors of both sides, and beside it how far
transformers' float32 was off: the unit in which a float program's own deviation can be judged. transformers cannot give the
double result itself: its norms, softmax and RoPE compute in float32 whatever the model's type.

    untied/  2 layers, own output head, RoPE scaling of Llama-3.1 (factor 8)
    tied/    1 layer, head = embedding (its gradient has two contributions), as Llama-3.2 is (factor 32)

Files in each:
    config.json         keys as published Llama-3.1 checkpoints have them (rope_theta and rope_scaling at top level)
    model.safetensors   the weights, F32, Hugging Face names; no lm_head.weight in tied/
    golden.safetensors
        tokens, targets         [B,T]    I32
        logits                  [B,T,V]  F32, the double result rounded (relative error 6e-8), as are:
        grad.NAME               of the mean loss, before clipping, for every parameter
        after.NAME              parameters after the ten steps: norms and layer 0's k_proj only, since the files are committed
        err.logits, err.grad.NAME, err.after.NAME   [2] F64: largest and rms |transformers float32 - double|
        loss      [1]  F32      mean cross entropy in nats, transformers float32;    loss64    [1]  F64  the same, double
        losses    [10] F32      loss before each of ten AdamW steps on this batch;   losses64  [10] F64
        norms     [10] F32      gradient norm of each step, before clipping;         norms64   [10] F64
    Made again elsewhere, only what comes from transformers' float32 should move (not tried: one CPU kind so far).
    An AdamW step: lr 1e-3, betas 0.9 and 0.95, eps 1e-8, decay 0.1 on 2-D weights (the embedding too), after scaling all
    gradients by min(1, 1 / (norm + 1e-6)), which is torch.nn.utils.clip_grad_norm_(params, 1.0).
"""
import argparse, json, math, os
import safetensors, torch, transformers
from safetensors.torch import save_file
from torch.nn import functional as F

SEED, B, T, STEPS = 20250904, 3, 40, 10
MODELS = {  # sizes differ from each other wherever they can, so that a swapped pair shows; 48 is not a power of two
    "untied": dict(tie=False, vocab=96, hidden=48, layers=2, heads=6, kv_heads=2, ffn=80, factor=8.0),
    "tied":   dict(tie=True,  vocab=80, hidden=48, layers=1, heads=6, kv_heads=2, ffn=32, factor=32.0),
}

def config_json(m):
    # original_max_position_embeddings 256 puts the four wavelengths (6, 167, 4443, 118143 positions) into all three branches
    # of the scaling: below 256/4 kept, above 256/1 divided by the factor, the one between interpolated.
    return {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 0,
        "eos_token_id": 1, "head_dim": 8, "hidden_act": "silu", "hidden_size": m["hidden"], "initializer_range": 0.02,
        "intermediate_size": m["ffn"], "max_position_embeddings": 2048, "mlp_bias": False, "model_type": "llama",
        "num_attention_heads": m["heads"], "num_hidden_layers": m["layers"], "num_key_value_heads": m["kv_heads"],
        "pretraining_tp": 1, "rms_norm_eps": 1e-05,
        "rope_scaling": {"factor": m["factor"], "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                         "original_max_position_embeddings": 256, "rope_type": "llama3"},
        "rope_theta": 500000.0, "tie_word_embeddings": m["tie"], "torch_dtype": "float32", "use_cache": True,
        "vocab_size": m["vocab"],
    }

def make_weights(c, gen):
    """Wider than any initialisation, so that every path moves the loss: norm weights from 0.3 to 1.7, scores of +-3 before
    the softmax (it is neither flat nor one-hot), SwiGLU gates well off the linear part of the sigmoid. The tied model's last
    norm is a third of that, which makes its gradient norm cross 1 at the fifth step: both sides of the clipping are seen."""
    C, kv, Fd = c["hidden_size"], c["num_key_value_heads"] * c["head_dim"], c["intermediate_size"]
    normal = lambda rows, cols, std: torch.randn(rows, cols, generator=gen) * std
    norm = lambda: 0.3 + 1.4 * torch.rand(C, generator=gen)
    w = {"model.embed_tokens.weight": normal(c["vocab_size"], C, 0.25 if c["tie_word_embeddings"] else 1.0)}
    for l in range(c["num_hidden_layers"]):
        for name, value in {
            "input_layernorm": norm(),
            "self_attn.q_proj": normal(C, C, 0.22), "self_attn.k_proj": normal(kv, C, 0.22),
            "self_attn.v_proj": normal(kv, C, 0.15), "self_attn.o_proj": normal(C, C, 0.15),
            "post_attention_layernorm": norm(),
            "mlp.gate_proj": normal(Fd, C, 0.25), "mlp.up_proj": normal(Fd, C, 0.15), "mlp.down_proj": normal(C, Fd, 0.12),
        }.items(): w[f"model.layers.{l}.{name}.weight"] = value
    w["model.norm.weight"] = norm() * (0.33 if c["tie_word_embeddings"] else 1.0)
    if not c["tie_word_embeddings"]: w["lm_head.weight"] = normal(c["vocab_size"], C, 0.15)
    return w

def rope_frequencies(c):
    """[hs/2] in double, and the branch of each: Llama-3.1's scaling of RoPE."""
    s, frequencies, branches = c["rope_scaling"], [], []
    for i in range(0, c["head_dim"], 2):
        f = c["rope_theta"] ** (-i / c["head_dim"])
        turns = s["original_max_position_embeddings"] * f / (2 * math.pi)     # rotations within the original context
        smooth = (turns - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])
        smooth = min(max(smooth, 0.0), 1.0)                                   # 1: keep, 0: divide by the factor
        frequencies.append(f * (smooth + (1 - smooth) / s["factor"]))
        branches.append("high" if smooth == 1 else "low" if smooth == 0 else "medium")
    return torch.tensor(frequencies, dtype=torch.float64), branches

def forward(w, c, tokens, frequencies):
    """LLaMA from its formulas, in the type of w (double). tokens [B,T] -> logits [B,T,V]."""
    NH, KVH, hs, eps = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"], c["rms_norm_eps"]
    rmsnorm = lambda x, name: x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * w[name]
    angle = torch.arange(tokens.shape[1])[:, None] * frequencies              # [T, hs/2]
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]                     # [T, 1, hs/2]: the same for every head
    def rope(x):                                                              # [B,T,heads,hs]: pairs are (i, i + hs/2)
        a, b = x[..., :hs // 2], x[..., hs // 2:]
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    future = torch.ones(tokens.shape[1], tokens.shape[1]).triu(1).bool()
    x = w["model.embed_tokens.weight"][tokens]                                # [B,T,C]
    for l in range(c["num_hidden_layers"]):
        linear = lambda x, name: x @ w[f"model.layers.{l}.{name}.weight"].T
        h = rmsnorm(x, f"model.layers.{l}.input_layernorm.weight")
        q = rope(linear(h, "self_attn.q_proj").unflatten(-1, (NH, hs)))
        k = rope(linear(h, "self_attn.k_proj").unflatten(-1, (KVH, hs))).repeat_interleave(NH // KVH, 2)
        v = linear(h, "self_attn.v_proj").unflatten(-1, (KVH, hs)).repeat_interleave(NH // KVH, 2)
        scores = torch.einsum("bthd,bshd->bhts", q, k) / math.sqrt(hs)
        attention = scores.masked_fill(future, -math.inf).softmax(-1)
        x = x + linear(torch.einsum("bhts,bshd->bthd", attention, v).flatten(2), "self_attn.o_proj")
        h = rmsnorm(x, f"model.layers.{l}.post_attention_layernorm.weight")
        gate = linear(h, "mlp.gate_proj")
        x = x + linear(gate * gate.sigmoid() * linear(h, "mlp.up_proj"), "mlp.down_proj")
    return rmsnorm(x, "model.norm.weight") @ w.get("lm_head.weight", w["model.embed_tokens.weight"]).T

def train(params, logits_of, targets):
    """Ten AdamW steps on one batch, in place. Returns the first step's logits and gradients, and each step's loss and norm."""
    groups = [{"params": [p for p in params.values() if p.dim() == 2], "weight_decay": 0.1},
              {"params": [p for p in params.values() if p.dim() == 1], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, foreach=False, fused=False)
    first, losses, norms = None, [], []
    for _ in range(STEPS):
        optimizer.zero_grad(set_to_none=True)
        logits = logits_of()
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
        if first is None: first = {"logits": logits.detach().clone(), **{"grad." + n: p.grad.clone() for n, p in params.items()}}
        norms.append(torch.nn.utils.clip_grad_norm_(params.values(), 1.0, error_if_nonfinite=True).item())
        losses.append(loss.item())
        optimizer.step()
    return first, losses, norms

def make(name, out):
    os.makedirs(out, exist_ok=True)
    c = config_json(MODELS[name])
    gen = torch.Generator().manual_seed(SEED + list(MODELS).index(name))
    weights = make_weights(c, gen)
    # Ids 1 to 7 stay unused, so that their embedding rows get no gradient (exactly 0 when untied) and AdamW only decays them.
    tokens = torch.randint(0, c["vocab_size"], (B, T + 1), generator=gen)
    tokens[(tokens > 0) & (tokens < 8)] = c["vocab_size"] - 1
    tokens, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    with open(f"{out}/config.json", "w") as f: f.write(json.dumps(c, indent=2, sort_keys=True) + "\n")
    save_file(weights, f"{out}/model.safetensors", {"format": "pt"})

    # transformers reads the very files that the C++ program will read.
    model = transformers.LlamaForCausalLM.from_pretrained(out, dtype=torch.float32, attn_implementation="eager").train()
    params32 = dict(model.named_parameters())
    assert params32.keys() == weights.keys() and all(torch.equal(params32[n], weights[n]) for n in weights)
    first32, losses32, norms32 = train(params32, lambda: model(input_ids=tokens, use_cache=False).logits, targets)

    frequencies, branches = rope_frequencies(c)
    assert set(branches) == {"high", "medium", "low"}, branches
    params64 = {n: v.double().requires_grad_() for n, v in weights.items()}
    first64, losses64, norms64 = train(params64, lambda: forward(params64, c, tokens, frequencies), targets)

    golden = {"tokens": tokens.int(), "targets": targets.int()}
    for key, value in {"losses": (losses32, losses64), "norms": (norms32, norms64)}.items():
        golden[key], golden[key + "64"] = torch.tensor(value[0]), torch.tensor(value[1], dtype=torch.float64)
    golden["loss"], golden["loss64"] = golden["losses"][:1].clone(), golden["losses64"][:1].clone()
    kept = [n for n in weights if weights[n].dim() == 1 or "layers.0.self_attn.k_proj" in n]
    pairs = {key: (first32[key], first64[key]) for key in first64}
    pairs |= {"after." + n: (params32[n].detach(), params64[n].detach()) for n in kept}
    worst = {}
    for key, (single, double) in pairs.items():
        diff = (single.double() - double).abs()
        golden[key] = double.float()
        golden["err." + key] = torch.stack((diff.max(), diff.square().mean().sqrt()))
        kind, scale = key.split(".")[0], double.abs().max()
        worst[kind] = max(worst.get(kind, (0, 0, "")), ((diff.max() / scale).item(), diff.max().item(), key))
        # Rounding gives 1e-6 to 1e-5 of the largest element; more than 1e-4 would be a different formula.
        assert diff.max() <= 1e-4 * scale, (key, diff.max(), scale)

    # The golden logits must notice a wrong RoPE: leave each scaled frequency as it was without scaling.
    with torch.no_grad():
        fresh = {n: v.double() for n, v in weights.items()}
        for i, branch in enumerate(branches):
            wrong = frequencies.clone()
            wrong[i] = c["rope_theta"] ** (-2 * i / c["head_dim"])
            moved = (forward(fresh, c, tokens, wrong) - first64["logits"]).abs().max().item()
            assert branch == "high" or moved > 100 * worst["logits"][1], (branch, moved)
            print(f"  rope pair {i}: {branch:6} logits move by {moved:.1e} when unscaled")
    made = {"by": "test/golden/make_golden.py", "seed": SEED, "threads": 1, "attention": "eager", "clip_eps": 1e-6,
            "adamw": "lr 1e-3, betas 0.9 0.95, eps 1e-8, decay 0.1 on 2-D, clip 1.0",
            **{m.__name__: str(m.__version__) for m in (torch, transformers, safetensors)}}
    metadata = {"made": json.dumps(made)}         # one key: safetensors writes several in a different order every time
    save_file({k: v.contiguous() for k, v in golden.items()}, f"{out}/golden.safetensors", metadata)
    for key, single, double in (("losses", losses32, losses64), ("norms", norms32, norms64)):
        off = max(abs(a - b) for a, b in zip(single, double))
        print(f"  {key:6} {double[0]:.6f} .. {double[-1]:.6f}, float32 off by at most {off:.1e}")
    for kind, (relative, absolute, key) in worst.items():
        print(f"  {kind:6} largest error {absolute:.1e} = {relative:.1e} of the largest element, in {key}")
    for f in sorted(os.listdir(out)):
        os.chmod(f"{out}/{f}", 0o644)             # safetensors makes its files private
        print(f"  {os.path.getsize(f'{out}/{f}'):7} {name}/{f}")

if __name__ == "__main__":
    p = argparse.ArgumentParser(description="make the golden files", allow_abbrev=False)
    p.add_argument("--out", default=os.path.dirname(os.path.abspath(__file__)))
    o = p.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    transformers.utils.logging.disable_progress_bar()
    for name in MODELS:
        print(name)
        make(name, f"{o.out}/{name}")
