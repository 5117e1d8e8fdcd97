#!/usr/bin/env python3
"""Everything that only a GPU can tell, in one command and about 25 minutes: tests, sanitizers, speeds, a short training comparison.

    python3 dev/gpu.py [--out build/gpu] [--minutes 25] [--data my.txt] [--only build,tests,...]

Needs a GPU, CUDA 12.9 or newer, and what README.md's apt line names. Parts, in this order: build; tests (kernels and model, in C++); kernels
(speeds, and the ladders of dev/); steps; graphs; profile; train; checks (the program's own tests and compute-sanitizer, all at once, for they are
not timed). Each has its share of the time and is ended when that is used up; what it printed lies in OUT as PART.log, the table of all in
OUT/table.md, a row as soon as it is known, so that a machine that goes away leaves what was done; with --only, rows are added to the table that is there.
A command that fails is run once more with CUDA_LAUNCH_BLOCKING=1, for its log: then an error is reported by the launch that made it.
Steps are those of `llama3.2-1b`, and of four layers of `llama3-8b` (its layer shapes, a small vocabulary), on random weights:
milliseconds, tokens/s, the share of the measured bf16 matmul peak, and the ratio to bf16's tokens/s. Then small models with --graphs and without.
The last line counts what was ok, failed, ran out of time or was left out; the exit status is 1 unless all of it was ok.
"""
import argparse, collections, concurrent.futures, os, re, statistics, subprocess, sys, time
sys.dont_write_bytecode = True

PARTS = "build,tests,kernels,steps,graphs,profile,train,checks"
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--out", default="build/gpu")
parser.add_argument("--minutes", type=float, default=25)
parser.add_argument("--data", default="data/stories.txt")
parser.add_argument("--only", default=PARTS)
o = parser.parse_args()
wanted = o.only.split(",")
if unknown := set(wanted) - set(PARTS.split(",")):
    print(f"gpu.py: --only has no part {', '.join(sorted(unknown))}: name some of {PARTS}", file=sys.stderr)
    sys.exit(2)
os.makedirs(o.out, exist_ok=True)
begin, ended = time.time(), collections.Counter()
recipes = ["bf16", "fp8", "fp8-rows", "nvfp4", "nvfp4-sr", "nvidia", "mxfp4", "mxfp4-fp8", "nvfp4-fp8", "metis"]

def left(): return 60 * o.minutes - (time.time() - begin)

def shell(part, command, seconds):
    """(exit status, output) of a command, both also in OUT/part.log; 124 if its time ran out."""
    seconds = max(1, int(min(seconds, left())))
    path = os.path.join(o.out, part + ".log")
    with open(path, "a") as log:
        log.write(f"$ {command}\n")
        log.flush()
        start, since = log.tell(), time.time()
        def run(seconds, **more):
            return subprocess.run(["timeout", "-k", "5", str(seconds), "bash", "-c", command], stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **more}).returncode
        status = run(seconds)
        end = os.fstat(log.fileno()).st_size
        if status in (137, -9) and time.time() - since > seconds: status = 124      # it had to be killed
        if status not in (0, 124) and part != "build" and left() > 240:
            log.write("$ the same with CUDA_LAUNCH_BLOCKING=1\n")
            log.flush()
            run(min(seconds, 120), CUDA_LAUNCH_BLOCKING="1")
    with open(path, "rb") as log:
        log.seek(start)
        return status, log.read(end - start).decode(errors="replace")

def verdict(status, found=True):
    """The cell that says how a command ended, counted. found: what it had to print is there; status None: it was not run."""
    kind = "left out" if status is None else "out of time" if status == 124 else "ok" if status == 0 and found else "failed"
    ended[kind] += 1
    return kind if kind != "failed" else f"failed (status {status})" if status else "failed (no result printed)"

def row(*cells):
    cells = [str(c).replace("|", "/") for c in cells] + [""] * (6 - len(cells))
    add("| " + " | ".join(cells) + " |")

def add(line):
    with open(os.path.join(o.out, "table.md"), "a") as table: table.write(line + "\n")
    print(line, flush=True)

def build():
    # The program's own tests need the CPU's reference build and three tests of its own beside the GPU's.
    status, text = shell("build", "make GPU=1 -j\"$(nproc)\" all data/stories.txt build/stories build/ref/train_llama "
                                  "$(make GPU=1 -s print-gpu-tests) $(make GPU=1 -s print-host-tests)", 480)
    row("build", f"{time.time() - begin:.0f} s", verdict(status))

def tests():
    status, text = shell("tests", "test/run --only $(make GPU=1 -s print-gpu-tests | tr ' ' '\\n' | grep /test_)", 240)
    found = re.findall(r"^\d+ passed, \d+ failed$", text, re.M)
    row("kernels, layers, the model", found[-1] if found else "", verdict(status, found))

def checks():
    """The program as its users meet it, a process a file, four for the longest; and the sanitizers."""
    with open("test/test_cli.py") as f: groups = re.search(r"^GROUPS = \((.*?)\)", f.read(), re.M | re.S)[1].replace(",", " ").split()
    program = f"{folder}/train_llama build/ref/train_llama"
    jobs = {f"test_cli.py {n + 1} of 4": f"python3 test/test_cli.py {program} {' '.join(groups[n::4])}" for n in range(4)}
    jobs |= {f"{name}.py": f"python3 test/{name}.py {program}" for name in ("test_recipes", "test_metis", "test_compare")}
    # A test starts itself again to set OpenMP's variables, unless they are set; racecheck knows nothing of the barriers in cuBLASLt's kernels.
    for tool, names in {"memcheck": ("test_quantise", "test_kernels", "test_matmul"), "racecheck": ("test_quantise", "test_kernels", "ladder_attention")}.items():
        jobs |= {f"{tool} {name}": f"OMP_WAIT_POLICY=passive compute-sanitizer --target-processes all --tool {tool} --error-exitcode 9 {folder}/{name} --checks"
                 for name in names}
    def run(name): return name, *shell(re.sub(r"\W+", "-", name), jobs[name], left())
    with concurrent.futures.ThreadPoolExecutor(len(jobs)) as pool:
        for done in concurrent.futures.as_completed([pool.submit(run, name) for name in jobs]):
            name, status, text = done.result()
            ok, bad = len(re.findall("^ok ", text, re.M)), len(re.findall("^FAIL ", text, re.M))
            found = re.findall(r"(?:ERROR SUMMARY|RACECHECK SUMMARY): (.*)", text)
            if "check " in name: row(name, found[-1] if found else "no summary", verdict(status, found))
            else: row(name, f"{ok} passed, {bad} failed", verdict(status, ok and not bad and re.search("^done$", text, re.M)))

def kernels():
    status, text = shell("kernels", f"{folder}/bench_kernels", 120)
    row("row kernels, quantisers, FP4 GEMMs", "kernels.log", verdict(status, "GB/s" in text))
    for ladder in "ladder_quantise", "ladder_attention":
        status, text = shell("kernels", f"{folder}/{ladder}", 60)
        ok, bad = len(re.findall("^ok ", text, re.M)), len(re.findall("^FAIL ", text, re.M))
        row(ladder, f"{ok} ok, {bad} failed", verdict(status, ok and not bad))
        of = "a copy" if ladder == "ladder_quantise" else "a GEMM"
        for name, ms, rest in re.findall(r"^([1-9] \S.{18}) +([\d.]+) +([\d. ]+)$", text, re.M): row(name.strip(), f"{ms} ms", f"{rest.split()[-1]}% of {of}")

# What llmq publishes (github.com/IST-DASLab/llmq, README, 2025): Qwen2.5 of 1.5B and 7B on one H100, sequences of 1024; the last column
# is the ideal time of its matmuls at the data sheet's peak over what it takes. Whole models, so tokens/s compare with 1B's, not with 8B layers'.
peers = [("published: llmq 1.5B, H100", "bf16", "", "59k", "1.00", "57%"), ("published: llmq 1.5B, H100", "fp8", "", "73k", "1.24", "41%"),
         ("published: llmq 7B, H100", "bf16", "", "14k", "1.00", "60%"), ("published: llmq 7B, H100", "fp8", "", "19k", "1.38", "45%")]

shapes = [("1B", "--model llama3.2-1b --vocab 8192 --batch 4 --seq 2048"),
          ("8B layers x 4", "--model llama3-8b --layers 4 --vocab 8192 --batch 4 --seq 4096")]

def steps():
    row("shape", "recipe", "ms a step", "tokens/s", "of bf16's", "% of peak")
    for peer in peers: row(*peer)
    for name, options in shapes:
        base = None
        for recipe in recipes:
            if left() < 60: row(name, recipe, verdict(None)); continue
            status, text = shell("steps", f"{folder}/train_llama --data {o.data} {options} --recipe {recipe} --steps 12 --eval-every 0 --eval-batches 1 "
                                          "--sample-tokens 0 --recompute norms", 120)
            seen = re.findall(r"\| (\d+) ms \| (\d+) tok/s \| (\S+) of peak", text)[3:]
            ended_as = verdict(status, seen)
            if ended_as != "ok": row(name, recipe, ended_as); continue
            ms, rate = statistics.median(int(s[0]) for s in seen), statistics.median(int(s[1]) for s in seen)
            if recipe == "bf16": base = rate
            row(name, recipe, ms, rate, f"{rate / base:.2f}" if base else "no bf16", seen[-1][2])

def graphs():
    """Small models, whose launches a CPU may not make fast enough: made one by one, and replayed. The losses must be the same."""
    for model in "tiny", "125m":
        for recipe in "bf16", "metis":
            rates, losses = [], []
            for way in "", " --graphs":
                status, text = shell("graphs", f"{folder}/train_llama --data {o.data} --model {model} --recipe {recipe} --steps 40 --eval-every 0 --eval-batches 1 "
                                               f"--sample-tokens 0 --stats-every 0{way}", 60)
                seen = re.findall(r"loss (\S+) .*\| (\d+) tok/s", text)
                losses.append([loss for loss, _ in seen])
                same = losses[0] == losses[-1]
                if len(seen) < 40 or not same: seen = []
                rates.append(statistics.median(int(rate) for _, rate in seen[10:]) if seen else 0)
                row(f"{model}{way}", recipe, f"{rates[-1]} tokens/s" if same else "losses differ", f"{rates[-1] / rates[0]:.2f}" if rates[0] else "",
                    verdict(status, seen))

def profile():
    for recipe in "bf16", "nvfp4", "metis":
        status, text = shell("profile", f"{folder}/train_llama --data {o.data} --model llama3.2-1b --vocab 8192 --recipe {recipe} --steps 12 --profile 6 "
                                        "--recompute norms", 90)
        found = re.search(r"profile of.*", text)
        row("profile", recipe, found[0] if found else "", verdict(status, found))

def train():
    seconds = left() / 6                                                       # half of what is left is for checks
    for recipe in "bf16", "nvfp4-sr", "metis":
        status, text = shell("train", f"{folder}/train_llama --data {o.data} --model 125m --recipe {recipe} --steps 400 --eval-every 100 --sample-tokens 0 "
                                      "--shadow-every 100", seconds)
        losses = re.findall(r"eval (\d+)/\d+ \| val loss (\S+)", text)
        shadows = re.findall(r"gradient error (\S+),", text)
        row("125m, 400 steps", recipe, f"val loss {losses[-1][1]} after {losses[-1][0]} steps" if losses else "",
            f"gradient error {shadows[-1]}" if shadows else "", verdict(status, losses and shadows))

folder = subprocess.run(["make", "GPU=1", "-s", "print-dir"], capture_output=True, text=True).stdout.strip()
table = os.path.join(o.out, "table.md")
if o.only == PARTS and os.path.exists(table): os.remove(table)
if not os.path.exists(table): add("| what | result |" + " |" * 4), add("|" + "---|" * 6)
for part in build, tests, kernels, steps, graphs, profile, train, checks:
    if part.__name__ not in wanted: continue
    if left() < 30 or part is not build and "build" in wanted and not built: row(part.__name__, verdict(None))
    else: part()
    if part is build: built = ended["ok"] == 1                            # old programs, if there are any, are not what was asked about
print(f"logs and table.md in {o.out}")
row("in all", ", ".join(f"{ended[kind]} {kind}" for kind in ("ok", "failed", "out of time", "left out")), f"{time.time() - begin:.0f} s")
sys.exit(sum(ended.values()) > ended["ok"])
