#!/usr/bin/env python3
"""What the spectral split leaves of X, W and D of one trained layer: a table, and the figure in README.md.

    make GPU=0 build/cpu/spectrum
    ./train_llama --recipe metis --model 15m --steps 200 --data train.txt --val held_out.txt --out run1
    python3 dev/spectrum.py build/cpu/spectrum run1/step_00000200 --data held_out.txt [--block 2] [-o split.png]

dev/spectrum.cu measures (one held-out batch through the model, gate_up of one block); "before" is the matrix M, "after" what is left
for the 4-bit residual: M less its rounded low-rank part. sigma is over the largest singular value of M, |element| and a block's largest
over the root mean square of M, energy over M's; error is of the operand, |Q - M| over |M|, before without a split. -o needs matplotlib.
"""
import argparse, json, math, os, subprocess, sys

def fail(message):
    print("spectrum.py: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(2)

class Parser(argparse.ArgumentParser):
    def error(self, message): fail(message + "; see --help")

def table(seen):
    """Markdown: a row before and one after for each matrix."""
    k = seen["rank"]
    lines = [["", "energy", "sigma 1", f"sigma {k + 1}", "|element| median", "99.9%", "largest", "block's largest, median", "99%", "become zero", "error"]]
    for operand in seen["operands"]:
        for when in ("before", "after"):
            s = operand[when]
            lines.append([f"{operand['name']} {operand['rows']} x {operand['cols']}, {when}", f"{s['energy']:.3f}", f"{s['sigma'][0]:.3f}", f"{s['sigma'][min(k, len(s['sigma']) - 1)]:.3f}",
                          *(f"{s['values'][i]:.2f}" for i in (2, 5, 6)), *(f"{s['blocks'][i]:.2f}" for i in (2, 4)), f"{100 * s['zero']:.1f}%", f"{s['error']:.4f}"])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    lines.insert(1, ["-" * w for w in widths])
    return "\n".join("| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths)) + " |" for line in lines)

def draw(seen, path):
    try: import matplotlib
    except ImportError: fail("-o needs matplotlib: apt install python3-matplotlib, or pip install matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot
    pyplot.rcParams.update({"font.size": 9.5, "axes.spines.top": False, "axes.spines.right": False, "axes.titleweight": "bold", "axes.titlesize": 10.5})
    color, label = {"before": "#7a8794", "after": "#c8443c"}, {"before": "before the split: M", "after": "after: R, what is left of M for the residual"}
    what = {"X": "X: activations", "W": "W: weights", "D": "D: output gradients"}
    figure, axes = pyplot.subplots(2, 3, figsize=(11, 6.2), sharey="row", layout="constrained")
    edges = [2 ** (-12 + i / 8) for i in range(24 * 8 + 1)]
    for (top, bottom), operand in zip(axes.T, seen["operands"]):
        k = seen["rank"]
        top.axvspan(0.9, k + 0.5, color="#f2e3c9", lw=0)
        for when in ("before", "after"):
            s = operand[when]
            top.plot(range(1, len(s["sigma"]) + 1), s["sigma"], color=color[when], lw=2.2, label=label[when])
            total = sum(s["block_histogram"])
            share = [100 * n / total for n in s["block_histogram"]]
            bottom.stairs(share, edges, fill=True, color=color[when], alpha=0.30)
            bottom.stairs(share, edges, color=color[when], lw=1.6, label=label[when])
            bottom.axvline(s["blocks"][2], color=color[when], lw=1.2, ls=(0, (4, 2)))
        before, after = operand["before"], operand["after"]
        top.set(xscale="log", yscale="log", xlim=(0.9, len(before["sigma"]) * 1.05), ylim=(4e-3, 1.4), xlabel="singular value number")
        top.set_title(f"{what[operand['name']]}, {operand['rows']} x {operand['cols']}")
        top.text(math.sqrt(0.9 * k), 5e-3, f"first {k}", ha="center", va="bottom", color="#8a6d3b")
        top.text(0.97, 0.95, f"energy left\n{100 * after['energy']:.0f}%", transform=top.transAxes, ha="right", va="top")
        bottom.set(xscale="log", xlim=(0.04, 80), xlabel="largest |element| of a block of 16, over M's rms")
        bottom.set_xticks([0.1, 1, 10], ["0.1", "1", "10"])
        bottom.text(0.97, 0.95, f"4-bit error\n{100 * before['error']:.1f}% to {100 * after['error']:.1f}%", transform=bottom.transAxes, ha="right", va="top")
        for a in (top, bottom): a.grid(alpha=0.2, lw=0.6)
    axes[0][0].set_ylabel("singular value, over M's largest")
    axes[1][0].set_ylabel("share of blocks (%)")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False, fontsize=10.5)
    try: figure.savefig(path, dpi=100)
    except (OSError, ValueError) as e: fail(f"cannot write {path}: {e}")

def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("program", help="build/cpu/spectrum")
    parser.add_argument("checkpoint", help="a folder step_* of a run by metis")
    parser.add_argument("--data", required=True, help="held-out data")
    parser.add_argument("--block", type=int, help="default: the middle one")
    parser.add_argument("--threads", type=int)
    parser.add_argument("-o", "--output", help="PNG to write")
    o = parser.parse_args()
    if not os.path.isfile(o.program) or not os.access(o.program, os.X_OK): fail(f"there is no program {o.program}: `make {o.program}` builds it")
    block = [] if o.block is None and o.threads is None else [str(-1 if o.block is None else o.block)]
    ended = subprocess.run([os.path.abspath(o.program), o.checkpoint, o.data, *block, *([str(o.threads)] if o.threads else [])], capture_output=True, text=True)
    if ended.returncode: fail((ended.stderr.strip().splitlines() or [f"the program ended with status {ended.returncode}"])[-1].removeprefix("train_llama: "))
    seen = json.loads(ended.stdout)
    print(f"{seen['model']} after {seen['step']} steps by {seen['recipe']} {seen['set']}".strip() + f", {seen['layer']}, {seen['tokens']} held-out tokens, loss {seen['loss']:.4f}; rank {seen['rank']}\n")
    print(table(seen))
    if o.output:
        draw(seen, o.output)
        print(f"\nfigure: {o.output}")

if __name__ == "__main__": main()
