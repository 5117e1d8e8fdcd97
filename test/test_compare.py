#!/usr/bin/env python3
"""The scripts that the evidence rests on: dev/compare.py, dev/shadow.py and dev/plot.py on a tiny model, their numbers against the logs.

    test/test_compare.py PROGRAM REFERENCE        `ok NAME` or `FAIL NAME: why` a line, `done` at the end; status 1 on a FAIL

dev/spectrum.py, too, where its program was built (make GPU=0 build/cpu/spectrum).
Every number of a table is computed again here from log.jsonl, by formulas written out for the two seeds at hand, and must be what is
printed to its last digit. Nothing depends on matplotlib: a stand-in that cannot be imported hides it, except where a figure is asked
for and it is there. Helpers and the model are test_cli.py's.
"""
import importlib.util
import json
import math
import operator
import os
import re
import shlex
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile

sys.dont_write_bytecode = True
import test_cli as cli
from test_cli import case, checkpoints, content, log_rows, note, run, untouched, words

DEV = os.path.join(cli.HERE, "..", "dev")
sys.path.insert(0, DEV)
import compare
import plot

STEPS = 8
MODEL = {**cli.MICRO, "--recipe": None, "--layers": 1, "--batch": 2, "--threads": 1}
OPTIONS = " ".join(words({k: v for k, v in MODEL.items() if k not in ("--model", "--data", "--sample-tokens")}))
RECIPES = ["bf16", "metis x.split=no"]
NULLS = ['{"shadow_loss_gap":null,"shadow_grad_rel_err":null,"shadow_grad_cos":0.25}', '{"quant":{"fprop_x":{"error":null}}}',
         '{"shadow_loss_gap":0.5,"shadow_grad_rel_err":0.5,"shadow_grad_cos":0.75}']


def script(name, *arguments, status=0, hide=True):
    """Runs dev/NAME; status 2: it must refuse by one line. hide: as if there were no matplotlib."""
    env = {**os.environ, **({"PYTHONPATH": "hidden"} if hide else {})}
    p = subprocess.run([sys.executable, os.path.join(DEV, name), *map(str, arguments)], stdin=subprocess.DEVNULL, capture_output=True, text=True, env=env,
                       timeout=cli.TIMEOUT)
    assert p.returncode == status, f"exit status {p.returncode}, not {status}: {p.stderr.strip()[-300:]}"
    if status == 2:
        assert p.stderr.count("\n") == 1 and re.match(r"(\w+\.py|train_llama): .{20}", p.stderr), f"stderr is {p.stderr[:300]!r}"
    return p


def comparison(*more, status=0, hide=True, steps=STEPS, seeds=2, recipes=RECIPES, data="text.txt", options=OPTIONS, out="cmp", program=None):
    return script("compare.py", program or cli.PROGRAM, "--data", data, "--steps", steps, "--seeds", seeds, "--recipes", ";".join(recipes), "--options", options,
                  "--out", out, *more, status=status, hide=hide)


def cells(text):
    """{recipe: [cells]} of a printed table."""
    rows = [[c.strip() for c in line.strip("|\n").split("|")] for line in text.splitlines() if line.startswith("|")]
    assert rows[0][0] == "recipe" and set("".join(rows[1])) == {"-"}, rows[:2]
    return {row[0]: row[1:] for row in rows[2:]}


def folder(recipe, seed, out="cmp", steps=STEPS):
    return f"{out}/tiny-{steps}-{recipe.replace(' ', '+')}-{seed}"


def last(recipe, seed, key):
    return [float(row[key]) for row in log_rows(folder(recipe, seed)) if key in row][-1]


def all_ms(recipe):
    return [json.loads(line)["ms"] for seed in (1, 2) for line in open(folder(recipe, seed) + "/log.jsonl") if '"ms"' in line]


def numbers():
    first = comparison("--no-timing")
    with case("compare.py: a run for each recipe and seed, with the options asked for"):
        assert first.stderr.splitlines() == [f"{r}, seed {s}" for s in (1, 2) for r in RECIPES], first.stderr
        for recipe in RECIPES:
            for seed in (1, 2):
                options = json.loads(content(folder(recipe, seed) + "/log.jsonl").split(b"\n")[0])["options"]
                name, _, changes = recipe.partition(" ")
                want = {"recipe": name, "set": changes, "seed": str(seed), "steps": str(STEPS), "dim": "64", "layers": "1", "eval-batches": "32",
                        "data": os.path.abspath("text.txt")}
                assert {k: options[k] for k in want} == want, f"{options}"
                assert checkpoints(folder(recipe, seed)) == [f"step_{STEPS:08}"], checkpoints(folder(recipe, seed))
    with case("compare.py: every number of the table is the logs'"):
        seen = cells(first.stdout)
        assert list(seen) == RECIPES, list(seen)
        for recipe in RECIPES:
            gaps = [last(recipe, s, "val_loss") - last("bf16", s, "val_loss") for s in (1, 2)]
            mean, half = sum(gaps) / 2, 12.706 * abs(gaps[0] - gaps[1]) / 2                    # t of one degree of freedom; s / sqrt(2) of two numbers
            average = lambda key: (last(recipe, 1, key) + last(recipe, 2, key)) / 2
            want = [f"{average('val_loss'):.4f}", f"{mean:+.4f}", f"{mean - half:+.4f} to {mean + half:+.4f}", f"{average('shadow_grad_rel_err'):.3f}",
                    f"{average('shadow_grad_cos'):.3f}", f"{statistics.median(all_ms(recipe)) / statistics.median(all_ms('bf16')):.2f}"]
            if recipe == "bf16":
                want[1:3] = ["", ""]
            assert seen[recipe] == want, f"{recipe}: {seen[recipe]}, the logs say {want}"
        assert last(RECIPES[1], 1, "shadow_grad_rel_err") > 0.01 and last("bf16", 1, "shadow_grad_rel_err") == 0
        assert last(RECIPES[1], 1, "val_loss") != last("bf16", 1, "val_loss") != last("bf16", 2, "val_loss")
    with case("compare.py: the same table as markdown, the numbers as JSON, above them the command"):
        text, whole = open(f"cmp/tiny-{STEPS}.md").read(), json.load(open(f"cmp/tiny-{STEPS}.json"))
        assert first.stdout.startswith(text) and "step time / bf16's, as logged" in text, text
        assert shlex.split(text.split("\n")[0].strip("`")) == ["python3", *map(str, first.args[1:])] == shlex.split(whole["command"]), text.split("\n")[0]
        row = whole["rows"][1]
        assert row["recipe"] == RECIPES[1] and row["val_loss"] == [last(RECIPES[1], s, "val_loss") for s in (1, 2)], row
        assert (whole["base"], whole["seeds"], whole["timed"]) == ("bf16", 2, False) and whole["builds"][0] in text, whole
    with case("compare.py: Student's t, to three digits, from 1 to 1000 degrees of freedom"):
        for n, t in ((1, 12.706), (2, 4.303), (9, 2.262), (10, 2.228), (11, 2.201), (12, 2.179), (15, 2.131), (16, 2.120), (20, 2.086), (30, 2.042), (120, 1.980),
                     (1000, 1.962)):
            assert abs(compare.student(n) - t) < 6e-4, f"{n}: {compare.student(n)}"
    with case("compare.py: what is not finite is said, not hidden, and no JSON number"):
        assert math.isnan(compare.values([{"val_loss": None}], "val_loss")[0]) and math.isnan(compare.deviation([1.0, math.nan]))
        assert compare.finite({"a": [1.5, math.nan]}) == {"a": [1.5, None]}


def again():
    with case("compare.py given again: starts no run, touches none, prints the same"):
        before = open(f"cmp/tiny-{STEPS}.md").read()
        with untouched(folder("bf16", 1)), untouched(folder(RECIPES[1], 2)):
            p = comparison("--no-timing")
        assert p.stderr == "" and p.stdout.startswith(before), p.stderr + p.stdout
    with case("compare.py: the timing pass runs each recipe once a round and leaves the runs alone"):
        with untouched(folder("bf16", 1)), untouched(folder(RECIPES[1], 2)):
            p = comparison("--rounds", 2)
        assert p.stderr.splitlines() == [f"timing, round {n} of 2: {r}" for n in (1, 2) for r in RECIPES], p.stderr
        seen, whole = cells(p.stdout), json.load(open(f"cmp/tiny-{STEPS}.json"))
        times = whole["rows"][1]["step_time"]
        assert seen["bf16"][-1] == "1.00" and whole["rows"][0]["step_time"] == [1, 1] and whole["base_step_ms"] > 0, p.stdout
        spread = f"{statistics.median(times):.2f} ({min(times):.2f} to {max(times):.2f})"
        assert len(times) == 2 and min(times) > 0 and seen[RECIPES[1]][-1] == spread, f"{times} {p.stdout}"
        assert "as logged" not in p.stdout and "a step by bf16:" in p.stdout, p.stdout
    one = folder(RECIPES[1], 1)
    want = log_rows(one)
    with case("compare.py: a run killed before its first checkpoint is done again"):
        log = content(one + "/log.jsonl")
        shutil.rmtree(f"{one}/step_{STEPS:08}")
        with open(one + "/log.jsonl", "wb") as f:
            f.write(log[:len(log) // 2])
        p = comparison("--no-timing")
        assert p.stderr == f"{RECIPES[1]}, seed 1\n" and log_rows(one) == want, p.stderr
    with case("compare.py: a run that was stopped goes on from its checkpoint"):
        shutil.rmtree(one)
        run({**MODEL, "--recipe": "metis", "--set": "x.split=no", "--seed": 1, "--steps": STEPS, "--shadow-every": 1, "--eval-every": 0, "--eval-batches": 32,
             "--save-every": 6, "--keep": 9, "--out": one})
        shutil.rmtree(f"{one}/step_{STEPS:08}")
        lines = content(one + "/log.jsonl").split(b"\n")                          # with times: what is not run again keeps them
        p = comparison("--no-timing")
        assert p.stderr == f"{RECIPES[1]}, seed 1\n" and log_rows(one) == want, p.stderr
        sixth = next(i for i, line in enumerate(lines) if line.startswith(b'{"step":7'))
        assert content(one + "/log.jsonl").split(b"\n")[:sixth] == lines[:sixth], "steps before the checkpoint were run again"


def variants():
    with case("compare.py: one seed has no interval; options of a recipe; without bf16 the first is the base"):
        p = comparison("--no-timing", seeds=1, steps=2, recipes=["nvfp4", "nvfp4 --bf16-last 1"], out="one")
        seen = cells(p.stdout)
        assert seen["nvfp4"][1:3] == ["", ""] and seen["nvfp4 --bf16-last 1"][2] == "-" and "nan" not in p.stdout, p.stdout
        assert "minus nvfp4's" in p.stdout and "1 seed," in p.stdout and seen["nvfp4 --bf16-last 1"][3] == "0.000", p.stdout
    with case("compare.py --ablation: metis without each split"):
        p = comparison("--no-timing", "--ablation", seeds=1, steps=1, recipes=["bf16"], out="one")
        assert list(cells(p.stdout)) == ["bf16", "metis x.split=no", "metis w.split=no", "metis d.split=no"], p.stdout
    with case("compare.py without matplotlib: status 0, and how to get the plot"):
        assert re.search(r"^no plot: .*pip install matplotlib", p.stdout, re.M) and not os.path.exists("one/tiny-1.png"), p.stdout
    if importlib.util.find_spec("matplotlib"):
        with case("compare.py and plot.py: figures"):
            p = comparison("--no-timing", hide=False)
            assert p.stdout.endswith(f"plot: cmp/tiny-{STEPS}.png\n") and content(f"cmp/tiny-{STEPS}.png")[:8] == b"\x89PNG\r\n\x1a\n", p.stdout
            p = script("plot.py", folder("bf16", 1), folder(RECIPES[1], 1), "-o", "loss.png", hide=False)
            want = "; ".join(f"{r.split()[0]}: {STEPS} steps, last loss {last(r, 1, 'loss'):.4f}" for r in RECIPES)
            assert p.stdout == f"loss.png: {want}\n" and content("loss.png")[:4] == b"\x89PNG", p.stdout
    else:
        note("matplotlib is not installed: no figure was drawn")


def refuses():
    for name, word, arguments in (
            ("a program that is not there", "there is no program nowhere", {"program": "nowhere"}),
            ("data that are not there", "cannot open .*nowhere.txt", {"data": "nowhere.txt"}),
            ("an unknown recipe, before any run", "--recipe nvfp5 is not in the table", {"recipes": ["bf16", "nvfp5"]}),
            ("a change that is none", "there is no colour", {"recipes": ["metis x.colour=red"]}),
            ("an option of the program's that is none", "--nonsense", {"options": "--nonsense 1"}),
            ("no step", "0 is not a whole number above 0", {"steps": 0}),
            ("half a seed", "0.5 is not a whole number above 0", {"seeds": 0.5}),
            ("no recipe", "names no recipe", {"recipes": [" "]})):
        with case(f"compare.py refuses {name}"):
            p = comparison(status=2, **{"out": "refused", **arguments})
            assert re.search(word, p.stderr) and p.stdout == "" and not os.path.exists("refused"), p.stderr
    with open("other.txt", "wb") as f:
        f.write(content("text.txt")[1000:])
    for name, word, arguments in (
            ("runs with another learning rate", r"tiny-8-bf16-1 is a run with --lr 0.003 where this comparison has 0.01;", {"options": OPTIONS + " --lr 0.01"}),
            ("runs on other data", r"--data \S+text.txt where this comparison has \S+other.txt: name another --out", {"data": "other.txt"})):
        with case(f"compare.py takes no {name} for its own"):
            with untouched(folder("bf16", 1)), untouched(folder(RECIPES[1], 2)):
                assert re.search(word, comparison(status=2, **arguments).stderr)
    with case("compare.py names a log that is none"):
        os.makedirs(folder("bf16", 1, "broken"))
        with open(folder("bf16", 1, "broken") + "/log.jsonl", "w") as f:
            f.write("[1]\n")
        assert "does not begin with the options" in comparison(out="broken", status=2).stderr
    with case("shadow.py and plot.py refuse in one line"):
        checkpoint = f"{folder('bf16', 1)}/step_{STEPS:08}"
        assert "nvfp5" in script("shadow.py", cli.PROGRAM, checkpoint, "nvfp5", "--data", "text.txt", status=2).stderr
        assert "no program" in script("shadow.py", "nowhere", checkpoint, "--data", "text.txt", status=2).stderr
        assert "matplotlib" in script("plot.py", folder("bf16", 1), status=2).stderr
    with case("bench.py, gpu.py, the PyTorch peer and make_vectors.py refuse in one line that says what mends it"):
        assert "`make bench` builds it" in script("bench.py", "nowhere/train_llama", status=2).stderr
        assert "--only has no part step: " in script("gpu.py", "--only", "tests,step", status=2).stderr
        assert "pip install torch" in script("bench_torch.py", status=2).stderr
        assert "pip install 'numpy>=2' ml_dtypes" in script("../test/make_vectors.py", "--check", status=2).stderr


def others():
    checkpoint = f"{folder('bf16', 1)}/step_{STEPS:08}"
    with case("shadow.py: means and standard errors of a run's shadow steps, on one model"):
        p = script("shadow.py", cli.PROGRAM, checkpoint, "nvfp4", "metis x.split=no", "--data", "text.txt", "--batches", 3, "--batch", 2, "--seq", 32)
        lines = p.stdout.splitlines()
        assert len(lines) == 3, p.stdout
        for line, recipe, changes in zip(lines[1:], ("nvfp4", "metis"), (None, "x.split=no")):
            out = f"shadow_{recipe}"
            run({"--model": checkpoint, "--data": "text.txt", "--recipe": recipe, "--set": changes, "--batch": 2, "--seq": 32, "--steps": 3, "--lr": 1e-12, "--warmup": 0,
                 "--decay": 0, "--schedule": "constant", "--shadow-every": 1, "--stats-every": 1, "--eval-batches": 1, "--sample-tokens": 0, "--save-every": 0,
                 "--out": out})
            rows = [{k: float(v) for k, v in row.items() if isinstance(v, str)} for row in log_rows(out) if "shadow_loss_gap" in row]
            quant = [row["quant"] for row in log_rows(out) if "quant" in row]
            errors = [row["shadow_grad_rel_err"] for row in rows]
            mean = sum(errors) / 3
            spread = math.sqrt(sum((e - mean) ** 2 for e in errors) / 2 / 3)
            want = [f"{sum(row['shadow_loss_gap'] for row in rows) / 3:+.4f}", f"{mean:.4f}", f"{spread:.4f}", f"{sum(row['shadow_grad_cos'] for row in rows) / 3:.4f}",
                    *(f"{sum(float(q[o]['error']) for q in quant) / 3:.4f}" for o in ("fprop_x", "fprop_w", "dgrad_d"))]
            assert line[:44].strip() == f"{recipe} {changes or ''}".strip() and line[44:].replace("+-", " ").split() == want, f"{line!r}, the log says {want}"
    with case("shadow.py: nan where the log has null"):
        with open("nulls", "w") as stub:
            stub.write(f"#!{sys.executable}\nimport os, sys\nout = sys.argv[sys.argv.index('--out') + 1]\nos.mkdir(out)\n"
                       f"print(*{NULLS!r}, sep='\\n', file=open(out + '/log.jsonl', 'w'))\n")
        os.chmod("nulls", 0o755)
        p = script("shadow.py", "./nulls", checkpoint, "nvfp4", "--data", "text.txt")
        assert p.stdout.splitlines()[1].replace("+-", " ").split() == ["nvfp4", "+nan", "nan", "nan", "0.5000", "nan", "-", "-"], p.stdout
    with case("plot.py reads a log: every field by step, a torn last line left out"):
        shutil.copy(folder("bf16", 1) + "/log.jsonl", "torn.jsonl")
        with open("torn.jsonl", "a") as f:
            f.write('{"step":9,"loss":1.')
        options, fields = plot.read_log("torn.jsonl")
        rows = [row for row in log_rows(folder("bf16", 1)) if "loss" in row]
        assert options["recipe"] == "bf16" and fields["loss"] == ([int(r["step"]) for r in rows], [float(r["loss"]) for r in rows]), fields["loss"]
        assert fields["val_loss"] == ([STEPS], [last("bf16", 1, "val_loss")]) and len(fields["shadow_grad_cos"][0]) == STEPS, fields
    with case("plot.py: smoothing keeps a straight line, and names curves by what differs"):
        line = plot.smooth([3 + 0.5 * i for i in range(200)])
        assert all(abs(v - 3 - 0.5 * i) < 1e-9 for i, v in enumerate(line[:196])), line
        paths = [folder(r, s) for r in RECIPES for s in (1, 2)]
        assert plot.labels(paths, [plot.read_log(p)[0] for p in paths]) == ["bf16, seed 1", "bf16, seed 2", "metis, seed 1", "metis, seed 2"]


def spectrum():
    """Its program is not built by `make test`; its residual, scales and rounding are training's own functions."""
    program = os.path.join(os.path.dirname(cli.PROGRAM), "spectrum")
    if not os.access(program, os.X_OK):
        return note("spectrum is not built: nothing looked at its numbers")
    with open("held.txt", "wb") as f:
        f.write(content("text.txt")[-20000:])
    run({**MODEL, "--recipe": "metis", "--steps": STEPS, "--val": "held.txt", "--eval-batches": 1, "--out": "split"})
    checkpoint = f"split/step_{STEPS:08}"
    seen = json.loads(subprocess.run([program, checkpoint, "held.txt", "0", "1"], capture_output=True, text=True, check=True).stdout)
    x, w, d = seen["operands"]
    with case("spectrum: its batch has the loss that --eval-only finds, to six digits"):
        loss = re.search(r"val loss (\S+)", run({"--resume": checkpoint, "--eval-only": True}).out)[1]
        assert f"{seen['loss']:.6g}" == f"{float(loss):.6g}", f"{seen['loss']}, --eval-only says {loss}"
    with case("spectrum: singular values of W from the checkpoint, the low-rank part takes the largest"):
        data = content(checkpoint + "/model.safetensors")
        begin = 8 + int.from_bytes(data[:8], "little")
        header, rows = json.loads(data[8:begin]), []
        for part in ("gate", "up"):
            first, end = header[f"model.layers.0.mlp.{part}_proj.weight"]["data_offsets"]
            v = struct.unpack(f"<{(end - first) // 4}f", data[begin + first:begin + end])
            rows += [v[i:i + 64] for i in range(0, len(v), 64)]
        energy, v = sum(a * a for row in rows for a in row), [1.0] * 64
        for _ in range(300):                                                                                  # power iteration on W^T W
            y = [sum(map(operator.mul, row, v)) for row in rows]
            v = [sum(map(operator.mul, column, y)) for column in zip(*rows)]
            length = math.sqrt(sum(a * a for a in v))
            v = [a / length for a in v]
        assert (w["rows"], w["cols"], len(w["before"]["sigma"])) == (256, 64, 64) and w["before"]["sigma"][0] == 1
        assert abs(sum(s * s for s in w["before"]["sigma"]) * length / energy - 1) < 1e-4, f"sigma_1^2 {length}, energy {energy}"
        assert abs(w["before"]["values"][-1] / (max(abs(a) for row in rows for a in row) / math.sqrt(energy / 256 / 64)) - 1) < 1e-6
    with case("spectrum: what is after the split is smaller, and rounds better"):
        for o in (x, w, d):
            a, b = o["before"], o["after"]
            assert b["energy"] < a["energy"] == 1 and b["sigma"][0] < 1 and 0 < b["error"] < a["error"] < 0.3, f"{o['name']}: {b['energy']} {a['error']} {b['error']}"
            n = o["rows"] * o["cols"]
            assert sum(a["histogram"]) == sum(b["histogram"]) == n and sum(b["block_histogram"]) == n / 16
            assert a["values"] == sorted(a["values"]) and a["blocks"][-1] == a["values"][-1]
    with case("spectrum.py: a row for each matrix before and after; refusals"):
        p = script("spectrum.py", program, checkpoint, "--data", "held.txt", "--block", 0, "--threads", 1)
        shown = [line.strip("| ").split("|") for line in p.stdout.splitlines() if line.startswith("|")][2:]
        assert [row[0].strip() for row in shown] == [f"{o['name']} {o['rows']} x {o['cols']}, {when}" for o in (x, w, d) for when in ("before", "after")], p.stdout
        assert [float(row[-1]) for row in shown] == [round(o[when]["error"], 4) for o in (x, w, d) for when in ("before", "after")], p.stdout
        assert "no block 7" in script("spectrum.py", program, checkpoint, "--data", "held.txt", "--block", 7, status=2).stderr
        assert "does not split" in script("spectrum.py", program, f"{folder('bf16', 1)}/step_{STEPS:08}", "--data", "held.txt", status=2).stderr
        assert "matplotlib" in script("spectrum.py", program, checkpoint, "--data", "held.txt", "-o", "split.png", status=2).stderr


if __name__ == "__main__":
    cli.PROGRAM, cli.REFERENCE = (os.path.abspath(p) for p in sys.argv[1:3])
    with tempfile.TemporaryDirectory(prefix="test_compare_") as temporary:
        os.chdir(temporary)
        cli.make_data()
        os.mkdir("hidden")
        for package in "matplotlib", "torch", "numpy":
            with open(f"hidden/{package}.py", "w") as hidden:
                hidden.write("raise ImportError('hidden')\n")
        for group in (numbers, again, variants, refuses, others, spectrum):
            with case(f"{group.__name__}: ran to its end"):
                group()
        print("done")
    sys.exit(1 if cli.failed else 0)
