#!/usr/bin/env python3
"""make compare: recipes on the same data, model and seeds; one table and one plot.

    python3 dev/compare.py build/cpu/train_llama --data train.txt --val held_out.txt [--model tiny] [--steps 500] [--seeds 5]
            [--recipes float,bf16,...] [--out build/compare]

Every (recipe, seed) is a run of its own in --out; finished ones are kept, so the command can be stopped and given again. A seed fixes
initialisation and data order, so recipes are compared in pairs. Per recipe: the final validation loss, its difference to bf16's of
the same seed with a 95% interval (Student's t over seeds), the shadow step's gradient error at the end of training averaged over
seeds, and the median step time over bf16's. Loss differences of small models drown in seed noise: read the interval first. Shadow
errors of two recipes are of two models that each trained itself; dev/shadow.py compares recipes on one.
A recipe may have changes: "metis x.split=no" (then separate recipes by ;).
"""
import argparse, json, math, os, statistics, subprocess, sys

T95 = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131]     # by degrees of freedom

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("program")
parser.add_argument("--data", default="data/stories.txt")
parser.add_argument("--val", default="")
parser.add_argument("--model", default="tiny")
parser.add_argument("--steps", type=int, default=500)
parser.add_argument("--seeds", type=int, default=5)
parser.add_argument("--recipes", default="bf16;float;nvfp4;nvfp4-sr;nvidia;mxfp4;metis")
parser.add_argument("--options", default="", help="more options for every run, in one string")
parser.add_argument("--out", default="build/compare")
o = parser.parse_args()
recipes = [r.strip() for r in o.recipes.replace(",", ";" if ";" not in o.recipes else ",").split(";")]

def one(recipe, seed):
    """The log of a finished run as a list of objects; runs it if need be."""
    name, *changes = recipe.split()
    folder = os.path.join(o.out, f"{o.model}-{o.steps}-{recipe.replace(' ', '+')}-{seed}")
    finished = os.path.join(folder, f"step_{o.steps:08d}")
    if not os.path.isdir(finished):
        command = [o.program, "--data", o.data, "--model", o.model, "--steps", str(o.steps), "--seed", str(seed), "--recipe", name,
                   "--shadow-every", str(max(1, o.steps // 5)), "--sample-tokens", "0", "--eval-every", "0", "--eval-batches", "32", "--save-every", "0",
                   "--keep", "1", "--out", folder, *o.options.split()]
        if o.val: command += ["--val", o.val]
        if changes: command += ["--set", ",".join(changes)]
        if os.path.isdir(folder): subprocess.run(["rm", "-r", folder])
        ended = subprocess.run(command, capture_output=True, text=True)
        if ended.returncode: sys.exit(ended.stderr)
    with open(os.path.join(folder, "log.jsonl")) as f: return [json.loads(line) for line in f]

runs = {}
for seed in range(1, o.seeds + 1):
    for recipe in recipes:
        print(f"{recipe}, seed {seed}", end="\r", file=sys.stderr, flush=True)
        runs[recipe, seed] = one(recipe, seed)

seeds = range(1, o.seeds + 1)
last = lambda recipe, seed, key: [row[key] for row in runs[recipe, seed] if key in row][-1]
time = lambda recipe: statistics.median(row["ms"] for seed in seeds for row in runs[recipe, seed] if "ms" in row)
base = "bf16" if "bf16" in recipes else recipes[0]
lines = [["recipe", "val loss", f"minus {base}'s", "95% interval", "gradient error", "cosine", f"step time / {base}'s"]]
for recipe in recipes:
    losses = [last(recipe, s, "val_loss") for s in seeds]
    gaps = [a - last(base, s, "val_loss") for a, s in zip(losses, seeds)]
    half = T95[min(len(gaps) - 2, len(T95) - 1)] * statistics.stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else float("nan")
    mean = statistics.mean(gaps)
    shadow = [statistics.mean(last(recipe, s, key) for s in seeds) for key in ("shadow_grad_rel_err", "shadow_grad_cos")]
    lines.append([recipe, f"{statistics.mean(losses):.4f}", f"{mean:+.4f}", f"{mean - half:+.4f} to {mean + half:+.4f}" if recipe != base else "",
                  f"{shadow[0]:.3f}", f"{shadow[1]:.3f}", f"{time(recipe) / time(base):.2f}"])
print(f"{o.model}, {o.steps} steps, {o.seeds} seeds, {o.data}" + " " * 20)
widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
for n, line in enumerate(lines):
    print("| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths)) + " |")
    if n == 0: print("|" + "|".join("-" * (w + 2) for w in widths) + "|")

try: import matplotlib
except ImportError: sys.exit("no plot: matplotlib is not installed")
matplotlib.use("Agg")
import matplotlib.pyplot as plt
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True)
for recipe in recipes:
    gaps = [[row["loss"] for row in runs[recipe, s] if "loss" in row] for s in seeds]
    zero = [[row["loss"] for row in runs[base, s] if "loss" in row] for s in seeds]
    n = min(map(len, gaps + zero))
    width = max(1, n // 20)
    curve = [statistics.mean(g[i] - z[i] for g, z in zip(gaps, zero)) for i in range(n)]
    smooth = [statistics.mean(curve[max(0, i - width):i + 1]) for i in range(n)]
    if recipe != base: left.plot(range(1, n + 1), smooth, label=recipe)
    steps = [row["step"] for row in runs[recipe, 1] if "shadow_grad_rel_err" in row]
    errors = [[row["shadow_grad_rel_err"] for row in runs[recipe, s] if "shadow_grad_rel_err" in row] for s in seeds]
    right.plot(steps, [statistics.mean(e) for e in zip(*errors)], marker="o", label=recipe)
left.axhline(0, color="black", linewidth=0.5)
left.set(xlabel="step", ylabel=f"training loss minus {base}'s, mean over seeds (smoothed)"), left.legend()
right.set(xlabel="step", ylabel="gradient error against bf16 on the same batch", yscale="log"), right.legend()
path = os.path.join(o.out, f"{o.model}-{o.steps}.png")
figure.savefig(path, dpi=130)
print(f"plot: {path}")
