#!/usr/bin/env python3
"""Plots training logs: loss on the left (thin raw, thick smoothed, dots for validation), gradient norm and learning rate on the
right, or the shadow measures where a log has them (--shadow-every).

    python3 dev/plot.py out1 out2/log.jsonl -o loss.png         a directory means DIR/log.jsonl; needs matplotlib

Works on the log of a run that is still writing: a torn last line is ignored. Curves are named by the options that differ.
"""
import argparse, json, math, os, sys

def fail(message):
    print("plot.py: " + message, file=sys.stderr)
    sys.exit(2)

def read_log(path):
    """Returns (options, {field: ([step], [value])}): what a step, an evaluation or a shadow step wrote, field by field."""
    if os.path.isdir(path): path = os.path.join(path, "log.jsonl")
    try:
        with open(path, encoding="utf-8", errors="replace") as f: lines = f.read().split("\n")
    except OSError as e: fail(f"cannot read {path}: {e.strerror}")
    options, fields = {}, {}
    for number, line in enumerate(lines, 1):
        if number == len(lines): break            # what follows the last newline: nothing, or a line still being written
        if not line.strip(): continue
        try: row = json.loads(line)
        except ValueError: row = None
        if not isinstance(row, dict):
            if not any(map(str.strip, lines[number:])): break                 # torn by a crash, newline and all
            fail(f"{path} line {number} is not a JSON object; is it a log.jsonl?")
        options |= row.get("options") or {}
        if not isinstance(row.get("step"), int): continue
        for name, value in row.items():
            if name == "step" or not isinstance(value, (int, float)) or not math.isfinite(value): continue
            steps, values = fields.setdefault(name, ([], []))
            steps.append(row["step"]), values.append(value)
    if "loss" not in fields: fail(f"{path} has no steps yet")
    return options, fields

def labels(paths, options):
    """Recipe, model and seed where they differ; then any other option that does; then the directory."""
    def differing(keys):
        keys = [k for k in keys if len({json.dumps(o.get(k)) for o in options}) > 1]
        return [", ".join(str(o[k]) if k in ("recipe", "model") else f"{k} {o[k]}" for k in keys if o.get(k) not in (None, ""))
                for o in options]
    folder = lambda p: os.path.abspath(p) if os.path.isdir(p) else os.path.dirname(os.path.abspath(p))
    of_path = [os.path.basename(folder(p)) for p in paths]
    if len(paths) == 1: return [", ".join(str(options[0][k]) for k in ("model", "recipe") if options[0].get(k)) or of_path[0]]
    names = differing(("recipe", "model", "seed"))
    if len(set(names)) < len(names):
        others = {k for o in options for k in o} - {"recipe", "model", "seed", "out"}
        names = differing(["recipe", "model", "seed"] + sorted(others))
    return names if len(set(names)) == len(names) else [f"{n}, {p}" if n else p for n, p in zip(names, of_path)]

def smooth(values):
    """Centred mean over 4% of the run, which does not lag behind the curve as a running average does. It shrinks towards the steep
    start; at the end it only loses its right half, so that the last point is still a mean and not the last step's noise."""
    total, half = [0.0], max(1, len(values) // 50)
    for v in values: total.append(total[-1] + v)
    def mean(i):
        first, last = max(0, i - half), min(len(values), i + min(half, i) + 1)
        return (total[last] - total[first]) / (last - first)
    return [mean(i) for i in range(len(values))]

def main():
    p = argparse.ArgumentParser(description="plot training logs", allow_abbrev=False)
    p.add_argument("logs", nargs="+", help="log.jsonl files, or the --out directories that hold them")
    p.add_argument("-o", "--output", default="loss.png", help="PNG to write; default loss.png")
    o = p.parse_args()
    try: import matplotlib
    except ImportError: fail("needs matplotlib: apt install python3-matplotlib, or pip install matplotlib")
    matplotlib.use("Agg")                                                     # no display needed
    from matplotlib import pyplot
    options, runs = zip(*map(read_log, o.logs))
    names = labels(o.logs, options)

    figure, axes = pyplot.subplot_mosaic([["loss", "top"], ["loss", "bottom"]], figsize=(12, 5.5), layout="constrained",
                                         gridspec_kw={"width_ratios": (3, 2)})
    shadow = any("shadow_loss_gap" in r or "shadow_grad_rel_err" in r for r in runs)
    panels = {"top": ("grad_norm", "gradient norm"), "bottom": ("lr", "learning rate")}
    if shadow: panels = {"top": ("shadow_loss_gap", "shadow loss gap (nats)"),
                         "bottom": ("shadow_grad_rel_err", "shadow gradient: relative error, 1 - cosine (dashed)")}
    for i, (name, run) in enumerate(zip(names, runs)):
        color = f"C{i % 10}"
        axes["loss"].plot(*run["loss"], color=color, lw=0.6, alpha=0.35)
        axes["loss"].plot(run["loss"][0], smooth(run["loss"][1]), color=color, lw=1.6, label=name)
        if "val_loss" in run:
            axes["loss"].plot(*run["val_loss"], "o", color=color, ms=4.5, mec="black", mew=0.6,
                              label=f"{name}: validation {run['val_loss'][1][-1]:.4f}")
        for panel, (field, _) in panels.items():
            if field in run: axes[panel].plot(*run[field], color=color, lw=1, marker="." if shadow else "")
        if shadow and "shadow_grad_cos" in run:
            steps, cosines = run["shadow_grad_cos"]
            axes["bottom"].plot(steps, [1 - c for c in cosines], "--", color=color, lw=1)
    # Early losses are far above the rest: fit the axis to what follows the first tenth, but keep at least some of the descent.
    later = [v for r in runs for v in r["loss"][1][len(r["loss"][1]) // 10:]] + [v for r in runs for v in r.get("val_loss", ([], []))[1]]
    low, high = min(later), max(later)
    axes["loss"].set_ylim(low - 0.05 * (high - low) - 1e-3, high + 0.25 * (high - low) + 1e-3)
    axes["loss"].set(title="loss (nats per token)", xlabel="step")
    axes["loss"].legend(fontsize=8)
    for panel, (field, title) in panels.items(): axes[panel].set_title(title, fontsize=10)
    if shadow: axes["top"].axhline(0, color="gray", lw=0.6)
    else: axes["top"].set_yscale("log")
    axes["bottom"].set_xlabel("step")
    for a in axes.values(): a.grid(alpha=0.25)
    try: figure.savefig(o.output, dpi=120)
    except (OSError, ValueError) as e: fail(f"cannot write {o.output}: {e}")
    print(f"{o.output}: " + "; ".join(f"{n}: {len(r['loss'][0])} steps, last loss {r['loss'][1][-1]:.4f}" for n, r in zip(names, runs)))

if __name__ == "__main__": main()
