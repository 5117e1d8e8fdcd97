#!/usr/bin/env python3
"""make compare: recipes on the same data, model and seeds; one table and one plot.

    python3 dev/compare.py build/cpu/train_llama --data train.txt --val held_out.txt [--model tiny] [--steps 500] [--seeds 5]
            [--recipes "bf16;nvfp4;metis x.split=no"] [--ablation] [--options "--lr 1e-3"] [--no-timing] [--out build/compare]

Every (recipe, seed) is a run of its own in --out. Finished ones are kept and interrupted ones resumed, so the command can be stopped
and given again; a run with other options than this comparison's is an error. A seed fixes initialisation and data order, so recipes
are compared in pairs. Per recipe: the final validation loss, its difference to bf16's of the same seed with a 95% interval (Student's t
over seeds), the shadow step's gradient error at the end of training averaged over seeds, and the time of a step over bf16's, from a
pass of its own after the runs: the first steps of every recipe in turn, several rounds (its median and its extremes over the rounds).
Loss differences of small models drown in seed noise: read the interval first. Shadow errors of two recipes are of two models that each
trained itself; dev/shadow.py compares recipes on one.
A recipe may have changes for --set and options: "metis x.split=no", "nvidia --bf16-last 0" (then separate recipes by ;).
The table is also in --out as MODEL-STEPS.md, with every number in MODEL-STEPS.json; the plot needs matplotlib.
"""
import argparse, json, math, os, shlex, statistics, subprocess, sys, tempfile, time

DEFAULT = "float;bf16;nvfp4;nvfp4-sr;nvidia;mxfp4;metis-code;metis"
ABLATION = ["metis x.split=no", "metis w.split=no", "metis d.split=no"]                # the paper's: without X, without W, without D
# What a log may have otherwise than this comparison: nothing in the table depends on it.
FREE = {"recompute", "stats-every", "tokenizer", "eval-every", "sample-every", "sample-tokens", "prompt", "temperature", "top-k", "top-p", "save-every", "keep"}
TIMED, DROPPED = 12, 2                                                                # steps of a timing run; those that warm up

def fail(message, name="compare.py: "):
    print(name + " ".join(message.split()), file=sys.stderr)
    sys.exit(2)

class Parser(argparse.ArgumentParser):
    def error(self, message): fail(message + "; see --help")

def whole(text):
    if not text.isascii() or not text.isdigit() or int(text) < 1: raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return int(text)

def arguments():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("program")
    parser.add_argument("--data", default="data/stories.txt")
    parser.add_argument("--val", default="")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--steps", type=whole, default=500)
    parser.add_argument("--seeds", type=whole, default=5)
    parser.add_argument("--recipes", default=DEFAULT)
    parser.add_argument("--ablation", action="store_true", help="also metis without the split of X, of W and of D")
    parser.add_argument("--options", default="", help="more options for every run, in one string: --options='--lr 1e-3'")
    parser.add_argument("--rounds", type=whole, default=3, help="of the timing pass")
    parser.add_argument("--no-timing", action="store_true", help="step times as the runs logged them, whatever else the machine did then")
    parser.add_argument("--out", default="build/compare")
    o = parser.parse_args()
    o.recipes = [" ".join(r.split()) for r in o.recipes.split(";" if ";" in o.recipes else ",") if r.strip()] + ABLATION * o.ablation
    o.recipes = list(dict.fromkeys(o.recipes))
    if not o.recipes: fail("--recipes names no recipe")
    try: o.options = shlex.split(o.options)
    except ValueError as e: fail(f"--options {o.options}: {e}")
    if not os.path.isfile(o.program) or not os.access(o.program, os.X_OK): fail(f"there is no program {o.program}: `make` builds it")
    o.program = os.path.abspath(o.program)
    o.base = "bf16" if "bf16" in o.recipes else o.recipes[0]
    o.name = f"{o.model.strip('/').replace('/', '_')}-{o.steps}"
    return o

# ---------------------------------------------------------------------------------------------------------------------------
# Runs

def command(o, recipe, seed, folder):
    name, *words = recipe.split()
    changes = [w for w in words if "=" in w and not w.startswith("--")]
    return [o.program, "--data", o.data, *(["--val", o.val] if o.val else []), "--model", o.model, "--steps", str(o.steps), "--seed", str(seed),
            "--recipe", name, *(["--set", ",".join(changes)] if changes else []), *[w for w in words if w not in changes],
            "--shadow-every", str(max(1, o.steps // 5)), "--sample-tokens", "0", "--eval-every", "0", "--eval-batches", "32", "--save-every", "0",
            "--keep", "1", "--out", folder, *o.options]

def read_log(folder):
    """The objects of folder/log.jsonl, none if there is no such file; a line that was being written when its run ended is left out."""
    path = os.path.join(folder, "log.jsonl")
    try:
        with open(path, encoding="utf-8") as f: rows = [json.loads(line) for line in f.read().split("\n")[:-1]]
    except FileNotFoundError: return []
    except (OSError, ValueError) as e: fail(f"cannot read {path}: {e}")
    if rows and not (isinstance(rows[0], dict) and isinstance(rows[0].get("options"), dict)): fail(f"{path} does not begin with the options of a run")
    return rows

def check(status, err, what):
    """Ends as the program ended: by its line."""
    if status == 2 and err.strip(): fail(err.strip().splitlines()[-1], "")
    if status: fail(f"{what}: the program ended with status {status}")

def beginning(o, recipe, steps):
    """The log of a run's first steps (0: its first line alone): a run of its own that is ended as soon as it has them. What it says of
    itself is what this command's options mean to this program, defaults of presets included."""
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(command(o, recipe, 1, folder + "/run"), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        try:
            while True:
                ended = process.poll() is not None                # asked first: then the log is read after its last line
                rows = read_log(folder + "/run")
                if ended or (rows and sum("loss" in row for row in rows) >= steps): break
                time.sleep(0.02)
        finally: process.kill()
        err = process.communicate()[1]
        if ended: check(process.returncode, err, recipe)
        return rows

def run(o, recipe, seed, expected):
    """The log of this run, which is made, or resumed, if need be."""
    folder = os.path.join(o.out, f"{o.name}-{recipe.replace(' ', '+').replace('/', '_')}-{seed}")
    finished = os.path.join(folder, f"step_{o.steps:08d}")
    rows = read_log(folder)
    if rows:
        other = [f"--{k} {v or 'none'} where this comparison has {expected[k] or 'none'}" for k, v in rows[0]["options"].items()
                 if k not in FREE and k in expected and v != (str(seed) if k == "seed" else expected[k])]
        if other: fail(f"{folder} is a run with {'; '.join(other)}: name another --out, or remove that folder")
    if not os.path.isdir(finished):
        print(f"{recipe}, seed {seed}", file=sys.stderr, flush=True)
        ended = subprocess.run(command(o, recipe, seed, folder) + ["--resume"] * bool(rows), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        check(ended.returncode, ended.stderr, f"{recipe}, seed {seed}")
        rows = read_log(folder)
        if not os.path.isdir(finished): fail(f"{recipe}, seed {seed} was stopped on its way: give the same command again to go on")
    if not any(row.get("step") == o.steps and "val_loss" in row for row in rows): fail(f"{folder}/log.jsonl lacks the last validation loss: remove that folder")
    return rows

# ---------------------------------------------------------------------------------------------------------------------------
# Numbers. JSON's null is the program's word for what is not finite.

def values(rows, key): return [math.nan if row[key] is None else row[key] for row in rows if key in row]

def finite(x):
    """x with null for NaN, as JSON wants it."""
    if isinstance(x, dict): return {k: finite(v) for k, v in x.items()}
    if isinstance(x, list): return [finite(v) for v in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x

def student(n):
    """The 97.5% point of Student's t with n degrees of freedom: exact values, then the expansion in 1/n (Abramowitz and Stegun 26.7.5)."""
    exact = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228]
    if n <= len(exact): return exact[n - 1]
    z = 1.959964
    return z + (z**3 + z) / (4 * n) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2) + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)

def deviation(x): return statistics.stdev(x) if all(map(math.isfinite, x)) else math.nan          # stdev() raises on a NaN

def time_steps(o):
    """{recipe: [its step time over the base's, a round]}, and the base's ms. All recipes within a round, so that a load that comes
    and goes meets them all."""
    ms = {recipe: [] for recipe in o.recipes}
    for n in range(o.rounds):
        for recipe in o.recipes:
            print(f"timing, round {n + 1} of {o.rounds}: {recipe}", file=sys.stderr, flush=True)
            steps = values(beginning(o, recipe, TIMED), "ms")[:TIMED]
            ms[recipe].append(statistics.median(steps[DROPPED:] or steps))
    return {recipe: [a / b for a, b in zip(ms[recipe], ms[o.base])] for recipe in o.recipes}, statistics.median(ms[o.base])

def results(o, runs, times):
    seeds = range(1, o.seeds + 1)
    logged = lambda recipe: statistics.median(v for s in seeds for v in values(runs[recipe, s], "ms"))
    rows = []
    for recipe in o.recipes:
        losses, zero = ([values(runs[r, s], "val_loss")[-1] for s in seeds] for r in (recipe, o.base))
        gaps = [a - b for a, b in zip(losses, zero)]
        row = {"recipe": recipe, "val_loss": losses, "val_loss_mean": statistics.mean(losses), "gap": gaps, "gap_mean": statistics.mean(gaps),
               "gap_half_width_95": None if o.seeds == 1 else student(o.seeds - 1) * deviation(gaps) / math.sqrt(o.seeds)}
        for key in ("shadow_grad_rel_err", "shadow_grad_cos"):
            found = [values(runs[recipe, s], key)[-1:] for s in seeds]
            row[key] = statistics.mean(v[0] for v in found) if all(found) else None
        row["step_time"] = times[recipe] if times else [logged(recipe) / logged(o.base)]
        rows.append(row)
    return rows

def table(o, rows):
    lines = [["recipe", "val loss", f"minus {o.base}'s", "95% interval", "gradient error", "cosine", f"step time / {o.base}'s{', as logged' if o.no_timing else ''}"]]
    for row in rows:
        mean, half, times = row["gap_mean"], row["gap_half_width_95"], row["step_time"]
        spread = f" ({min(times):.2f} to {max(times):.2f})" if len(times) > 1 and row["recipe"] != o.base else ""
        number = lambda v, digits: "-" if v is None else f"{v:.{digits}f}"
        lines.append([row["recipe"], number(row["val_loss_mean"], 4), f"{mean:+.4f}" if row["recipe"] != o.base else "",
                      "" if row["recipe"] == o.base else "-" if half is None else f"{mean - half:+.4f} to {mean + half:+.4f}",
                      number(row["shadow_grad_rel_err"], 3), number(row["shadow_grad_cos"], 3), f"{statistics.median(times):.2f}{spread}"])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    lines.insert(1, ["-" * w for w in widths])
    return "".join("| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths)) + " |\n" for line in lines)

# ---------------------------------------------------------------------------------------------------------------------------

def plot(o, runs, path):
    try: import matplotlib
    except ImportError: return "no plot: it needs matplotlib (apt install python3-matplotlib, or pip install matplotlib); runs are kept, so give the command again"
    matplotlib.use("Agg")
    from matplotlib import pyplot
    seeds = range(1, o.seeds + 1)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for i, recipe in enumerate(o.recipes):
        color, losses, zero = f"C{i % 10}", *([values(runs[r, s], "loss") for s in seeds] for r in (recipe, o.base))
        width = max(1, o.steps // 20)
        curve = [statistics.mean(a - b for a, b in zip(at, base)) for at, base in zip(zip(*losses), zip(*zero))]
        smooth = [statistics.mean(curve[max(0, n - width):n + 1]) for n in range(len(curve))]
        if recipe != o.base: left.plot(range(1, len(smooth) + 1), smooth, color=color, label=recipe)
        steps = [row["step"] for row in runs[recipe, 1] if "shadow_grad_rel_err" in row]
        errors = [statistics.mean(e) for e in zip(*(values(runs[recipe, s], "shadow_grad_rel_err") for s in seeds))]
        if any(e > 0 for e in errors): right.plot(steps[:len(errors)], errors, color=color, marker="o", label=recipe)      # bf16 has none
    left.axhline(0, color="black", linewidth=0.5)
    left.set(xlabel="step", ylabel=f"training loss minus {o.base}'s, mean over seeds (smoothed)")
    right.set(xlabel="step", ylabel="gradient error against bf16 on the same batch", yscale="log")
    for axes in left, right:
        axes.grid(alpha=0.25)
        if axes.get_legend_handles_labels()[0]: axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)
    return f"plot: {path}"

def main():
    o = arguments()
    expected = {recipe: beginning(o, recipe, 0)[0]["options"] for recipe in o.recipes}      # also: a recipe that does not exist is found now
    runs = {(recipe, seed): run(o, recipe, seed, expected[recipe]) for seed in range(1, o.seeds + 1) for recipe in o.recipes}
    times, ms = (None, None) if o.no_timing else time_steps(o)
    rows = results(o, runs, times)
    builds = sorted({str(r[0].get("build")) for r in runs.values()})
    given = shlex.join(["python3", *sys.argv])
    text = f"`{given}`\n\n{o.model}, {o.steps} steps, {o.seeds} seed{'s' * (o.seeds > 1)}, {o.data}; {'; '.join(builds)}"
    if times: text += f"; a step by {o.base}: {ms:.0f} ms"
    text += "\n\n" + table(o, rows)
    path = os.path.join(o.out, o.name)
    try:
        with open(path + ".md", "w", encoding="utf-8") as f: f.write(text)
        with open(path + ".json", "w", encoding="utf-8") as f:
            json.dump(finite({"command": given, "model": o.model, "steps": o.steps, "seeds": o.seeds, "data": o.data, "val": o.val, "options": o.options,
                              "builds": builds, "base": o.base, "timed": not o.no_timing, "base_step_ms": ms, "rows": rows}), f, indent=1)
            f.write("\n")
        print(text + "\n" + plot(o, runs, path + ".png"))
    except OSError as e: fail(f"cannot write {e.filename}: {e.strerror}")

if __name__ == "__main__":
    try: main()
    except KeyboardInterrupt:
        print("stopped: give the same command again to go on", file=sys.stderr)
        sys.exit(130)
