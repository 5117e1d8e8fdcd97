#!/usr/bin/env python3
"""Metis from outside: bases and trained factors in checkpoints, resuming between refreshes, what must not move a bit, what is refused.

    test/test_metis.py PROGRAM REFERENCE        `ok NAME` or `FAIL NAME: why` a line, `done` at the end; status 1 on a FAIL

Everything is compared exactly: bases belong to the state that threads, recomputation, evaluations, shadow steps and resuming must
leave alone. Refreshes are due every 8 steps, each layer at its own, and checkpoints fall between them: a basis that was not saved, or
not kept, shows in the next loss. Helpers and the model are test_cli.py's. Standard library only. The same for four steps of every
recipe: test_recipes.py.
"""
import json
import os
import re
import shutil
import signal
import sys
import tempfile

sys.dont_write_bytecode = True
import test_cli as cli
from test_cli import case, checkpoints, content, floats, log_rows, printed_losses, run, same_run, start, finish, step_rows, untouched

# 4 x 32 tokens, of which 96 are sampled; matrices 64 to 256 wide, rank 16. Of 12 steps every layer refreshes in the first and at
# least one more: o in the sixth, qkv in the seventh, down in the third and the eleventh, gate_up in the fourth and the twelfth.
METIS = {**cli.MICRO, "--layers": 1, "--recipe": "metis", "--steps": 12, "--eval-every": 0, "--eval-batches": 1, "--stats-every": 0, "--save-every": 5,
         "--threads": 1}
ALONE = {**METIS, "--save-every": None}                # for runs that leave nothing behind


def same(out, other):
    same_run(out, other)
    last = checkpoints(other)[-1]
    for file in ("bases.safetensors", "factors.safetensors"):
        assert os.path.exists(f"{out}/{last}/{file}") == os.path.exists(f"{other}/{last}/{file}"), f"only one run has {file}"
        assert not os.path.exists(f"{out}/{last}/{file}") or content(f"{out}/{last}/{file}") == content(f"{other}/{last}/{file}"), f"{file} differs"


def bases_of(options, name):
    run({**METIS, "--save-every": 0, **options, "--out": name})
    return content(f"{name}/{checkpoints(name)[-1]}/bases.safetensors")


def whole():
    """An unbroken run with checkpoints at 5, 10 and 12, which nobody may change."""
    if not os.path.exists("whole"):
        run({**METIS, "--keep": 9, "--out": "whole"})
        assert checkpoints("whole") == [f"step_{s:08}" for s in (5, 10, 12)], checkpoints("whole")
    return "whole"


def same_bits():
    for threads, recompute in ((2, "none"), (1, "norms"), (3, "block")):
        with case(f"{threads} threads, --recompute {recompute}: the same log, weights and bases"):
            run({**METIS, "--threads": threads, "--recompute": recompute, "--out": f"bits_{recompute}"})
            same(f"bits_{recompute}", whole())
    with case("evaluations, shadow steps and statistics change neither losses nor bases"):
        watched = run({**METIS, "--eval-every": 1, "--shadow-every": 1, "--stats-every": 1, "--out": "watched"}).out
        assert printed_losses(watched) == [(row["step"], row["loss"]) for row in step_rows(whole())]
        for file in ("model.safetensors", "optimizer.safetensors", "bases.safetensors"):
            assert content(f"watched/step_00000012/{file}") == content(f"{whole()}/step_00000012/{file}"), file
    with case("bases: three a linear layer, of rank 16, refreshed when they are due"):
        data = content(f"{whole()}/step_00000012/bases.safetensors")
        header = json.loads(data[8:8 + int.from_bytes(data[:8], "little")])
        shapes = {name: t["shape"] for name, t in header.items() if name != "__metadata__"}
        assert len(shapes) == 4 * 3 and all(s[0] == 16 for s in shapes.values()), shapes
        assert shapes["layers.0.qkv.basis_x"] == [16, 64] and shapes["layers.0.qkv.basis_d"] == [16, 128] and shapes["layers.0.down.basis_w"] == [16, 128], shapes
        values = floats(f"{whole()}/step_00000012/bases.safetensors")
        rows = [sum(v * v for v in values[i:i + 64]) for i in range(0, 16 * 64, 64)]                   # of the first basis, 64 wide
        assert all(abs(r - 1) < 2e-5 for r in rows), f"rows of length^2 {rows}"                        # test_metis.cu's bound for 16 + 8
        a, b, c = (floats(f"{whole()}/step_{s:08}/bases.safetensors") for s in (5, 10, 12))
        at = {name: sum(t["data_offsets"]) // 8 for name, t in header.items() if name != "__metadata__"}       # a number in its middle
        for kind, first, then in (("qkv", True, False), ("o", True, False), ("gate_up", False, True), ("down", False, True)):
            for m in "xwd":
                n = at[f"layers.0.{kind}.basis_{m}"]
                assert ((a[n] != b[n]), (b[n] != c[n])) == (first, then), f"{kind}.basis_{m}: refreshed {a[n] != b[n]} and {b[n] != c[n]}"
    with case("the reference build: the same bits for 1 and 2 threads"):
        one, two = (printed_losses(run({**ALONE, "--threads": t}, binary=cli.REFERENCE).out) for t in (1, 2))
        assert one == two and len(set(one)) == 12, f"{one} {two}"


def accumulation():
    base = {**METIS, "--accum": 2, "--steps": 10, "--save-every": 3}
    run({**base, "--out": "accum"})
    with case("--accum 2: 2 threads, --recompute block, the same bits; resumed at step 3, too"):
        run({**base, "--threads": 2, "--recompute": "block", "--keep": 9, "--out": "accum_block"})
        same("accum_block", "accum")
        run({"--resume": "accum_block/step_00000003", "--recompute": "none"})
        same("accum_block", "accum")
    with case("a step's first micro-batch alone refreshes: the bases of step 1 are those without accumulation"):
        # Its first micro-batch is the same; its gradients are half as large, which is exact from end to end and no basis sees.
        one, two, other = (bases_of({"--steps": 1, **o}, f"first_{i}") for i, o in enumerate(({}, {"--accum": 2}, {"--batch": 8})))
        assert one == two, "the second micro-batch changed the bases"
        assert one != other, "other tokens, but the same bases: this test sees nothing"
    with case("split.refresh=0 refreshes at every micro-batch"):
        assert bases_of({"--steps": 1, "--set": "split.refresh=0"}, "every_1") != bases_of({"--steps": 1, "--set": "split.refresh=0", "--accum": 2}, "every_2")


def resume():
    for step in (5, 10):
        with case(f"resumed after step {step}, between refreshes: the unbroken run's losses, weights and bases"):
            shutil.copytree(whole(), f"from_{step}")
            run({"--resume": f"from_{step}/step_{step:08}", "--threads": 2})
            same(f"from_{step}", whole())
    with case("killed between checkpoints, resumed with more threads and recomputation"):
        p = start({**METIS, "--steps": 56, "--out": "killed"}, 8)         # more steps than fit into its pipe
        p.kill()
        assert finish(p).status == -signal.SIGKILL
        run({"--resume": "killed", "--threads": 2, "--recompute": "block"})
        run({**METIS, "--steps": 56, "--out": "unbroken"})
        same("killed", "unbroken")
    for name, options in (("rank 32, refreshed every third step", {"--set": "split.rank=50,split.refresh=3"}), ("without the split of X in fprop", {"--set": "fprop_x.split=no"}),
                          ("the second half with fprop in bf16: other operands are the first of X and W", {"--bf16-end": 0.5})):
        with case(f"resumed: {name}"):
            out = "set_" + re.sub(r"\W", "_", "".join(str(v) for v in options.values()))
            run({**METIS, **options, "--steps": 7, "--out": out})
            shutil.copytree(out, out + "_unbroken")
            run({"--resume": f"{out}/step_00000005", "--threads": 2, "--recompute": "block"})
            same(out, out + "_unbroken")
            assert [row["loss"] for row in step_rows(out)] != [row["loss"] for row in step_rows(whole())][:7], "the options changed nothing"
    with case("--eval-only of a checkpoint: the value that training logged, whatever the threads"):
        logged = [row["val_loss"] for row in log_rows(whole()) if "val_loss" in row][-1]
        with untouched(whole()):
            seen = re.search(r"val loss (\S+)", run({"--resume": whole(), "--eval-only": True, "--threads": 3}).out)[1]
        assert seen == logged, f"{seen}, the log has {logged}"


TRAINED = {**METIS, "--set": "split.trained=1"}


def tensors(path):
    """{name: (shape, numbers)} of a float32 safetensors file."""
    data, values = content(path), floats(path)
    header = json.loads(data[8:8 + int.from_bytes(data[:8], "little")])
    return {name: (t["shape"], values[t["data_offsets"][0] // 4:t["data_offsets"][1] // 4]) for name, t in header.items() if name != "__metadata__"}


def val_loss(options):
    return re.search(r"val loss (\S+)", run(options).out)[1]


def trained():
    """split.trained=1: W_R, U, s and V are the parameters."""
    run({**TRAINED, "--keep": 9, "--out": "trained"})
    with case("trained factors: 3 threads, --recompute block, watched at every step: the same bits"):
        run({**TRAINED, "--threads": 3, "--recompute": "block", "--keep": 9, "--out": "trained_block"})
        same("trained_block", "trained")
        watched = run({**TRAINED, "--eval-every": 1, "--shadow-every": 1, "--stats-every": 1, "--out": "trained_watched"}).out
        assert printed_losses(watched) == [(row["step"], row["loss"]) for row in step_rows("trained")]
        for file in ("model", "optimizer", "bases", "factors"):
            assert content(f"trained_watched/step_00000012/{file}.safetensors") == content(f"trained/step_00000012/{file}.safetensors"), file
    with case("trained factors: resumed after steps 5 and 10, the unbroken run's losses, weights, moments and factors"):
        for step in (5, 10):
            shutil.copytree("trained", f"trained_from_{step}")
            run({"--resume": f"trained_from_{step}/step_{step:08}", "--threads": 2})
            same(f"trained_from_{step}", "trained")
    for name, options in (("--accum 2", {"--accum": 2}), ("the second half with fprop in bf16", {"--bf16-end": 0.5}),
                          ("the second half in bf16", {"--bf16-end": 0.5, "--bf16-end-gemms": "all"}), ("gate_up in bf16", {"--bf16-layers": "gate_up"}),
                          ("evaluated in bf16", {"--eval-recipe": "bf16"}), ("moments in bf16", {"--moments": "bf16"})):
        with case(f"trained factors: resumed with threads and recomputation, {name}"):
            out = "trained_" + re.sub(r"\W", "_", name)
            run({**TRAINED, **options, "--steps": 7, "--eval-every": 4, "--out": out})
            shutil.copytree(out, out + "_unbroken")
            run({"--resume": f"{out}/step_00000005", "--threads": 2, "--recompute": "block"})
            same(out, out + "_unbroken")
            factors = {n.split(".")[2] for n in tensors(f"{out}/step_00000007/factors.safetensors")}
            assert factors == {"qkv", "o", "down"} | ({"gate_up"} if "gate_up" not in name else set()), factors
    with case("trained factors: the loss falls, from where weights split on the fly begin, and every factor moves"):
        rows, other = step_rows("trained"), step_rows(whole())
        assert float(rows[-1]["loss"]) < float(rows[0]["loss"]) - 1, rows
        assert abs(float(rows[0]["loss"]) - float(other[0]["loss"])) < 0.02, f"{rows[0]} {other[0]}"
        early, late = (tensors(f"trained/step_{s:08}/factors.safetensors") for s in (5, 12))
        for name, (shape, values) in early.items():
            assert sum(a != b for a, b in zip(values, late[name][1])) > 0.9 * len(values), f"{name} hardly moved"
    with case("trained factors: model.safetensors holds W_R + U diag(s) V under the usual names; factors and moments have theirs"):
        factors, model = tensors("trained/step_00000012/factors.safetensors"), tensors("trained/step_00000012/model.safetensors")
        moments = tensors("trained/step_00000012/optimizer.safetensors")
        assert set(model) == set(tensors(f"{whole()}/step_00000012/model.safetensors")), sorted(model)
        extra = {f"{n}{m}" for n in factors if not n.endswith(".w_r") for m in (".exp_avg", ".exp_avg_sq")}
        assert set(moments) == {f"{n}{m}" for n in model for m in (".exp_avg", ".exp_avg_sq")} | extra, sorted(moments)
        for ours, parts in (("qkv", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")), ("o", ("self_attn.o_proj",)),
                            ("gate_up", ("mlp.gate_proj", "mlp.up_proj")), ("down", ("mlp.down_proj",))):
            stored = [v for p in parts for v in model[f"model.layers.0.{p}.weight"][1]]
            (shape, w_r), (_, u), (ks, s), (_, v) = (factors[f"layers.0.{ours}.{f}"] for f in ("w_r", "u", "s", "v"))
            (n, m), k = shape, 16
            assert ks == [k] and len(stored) == n * m, f"{ks}, {len(stored)} numbers"
            for i in range(n):
                for j in range(m):
                    terms = [w_r[i * m + j]] + [u[i * k + t] * s[t] * v[t * m + j] for t in range(k)]
                    error = abs(sum(terms) - stored[i * m + j])        # k products and sums, each rounded
                    assert error <= (k + 4) * 2**-24 * sum(map(abs, terms)), f"{ours}[{i}][{j}] is off by {error}"
    with case("trained factors: --eval-only takes the factors; the exported folder is the same model to other rows, and starts a run"):
        folder, logged = "trained/step_00000012", [row["val_loss"] for row in log_rows("trained") if "val_loss" in row][-1]
        with untouched("trained"):
            assert val_loss({"--resume": "trained", "--eval-only": True, "--threads": 3}) == logged
            bf16 = val_loss({"--resume": "trained", "--eval-only": True, "--eval-recipe": "bf16"})
            alone = {k: v for k, v in METIS.items() if k in ("--data", "--batch", "--seq", "--eval-batches", "--threads", "--sample-tokens")}
            assert val_loss({**alone, "--model": folder, "--recipe": "bf16", "--eval-only": True}) == bf16
            assert bf16 != logged and abs(float(bf16) - float(logged)) < 0.05, f"{bf16} in bf16, {logged} by its own row"
            run({"--resume": "trained", "--sample-only": True, "--sample-tokens": 3})
        first = [float(printed_losses(run({**alone, "--model": folder, "--steps": 1, **o}).out)[0][1]) for o in ({"--recipe": "bf16"}, {"--recipe": "metis", "--set": "split.trained=1"})]
        assert abs(first[0] - first[1]) < 0.05 and max(first) < 5, first
    with case("trained factors: --dry-run counts them in memory and on disk"):
        plan = {"--model": "125m", "--data": "text.txt", "--recipe": "metis", "--dry-run": True}
        text = [run({**plan, **o}).out for o in ({}, {"--set": "split.trained=1"})]
        amount = [{what: float(re.search(rf"^  {what} +([\d.]+) ", t, re.M)[1]) for what in ("parameters", "gradients", "optimiser", "checkpoint")} for t in text]
        out_in = ((1536, 1024), (1024, 1024), (5120, 1024), (1024, 2560))
        factors, w_r = 12 * sum(16 * (n + 1 + m) for n, m in out_in), 12 * sum(n * m for n, m in out_in)
        for what, numbers in (("parameters", factors), ("gradients", factors), ("optimiser", 2 * factors), ("checkpoint", w_r + 3 * factors)):
            more = amount[1][what] - amount[0][what]
            assert abs(more - 4e-9 * numbers) < 2e-3, f"{what}: {more} GB more, {4e-9 * numbers} expected"
    with case("refuses a checkpoint without its factors"):
        os.remove("trained_block/step_00000012/factors.safetensors")
        err = run({"--resume": "trained_block", "--eval-only": True}, status=2).err
        assert "factors.safetensors" in err and "step_00000010" in err, err
    for name, options, word in (
            ("trained factors of a W that is not split", {"--set": "split.trained=1,w.split=no"}, "fprop_w .*needs W split"),
            ("trained factors of a W that is split in one GEMM", {"--set": "split.trained=1,dgrad_w.split=no"}, "dgrad_w .*needs W split"),
            ("trained factors by a row without a split", {"--recipe": "bf16"}, "needs W split"), ("by metis-code", {"--recipe": "metis-code"}, "needs W split"),
            ("half a training", {"--set": "split.trained=0.5"}, "whole number"),
            ("a run of the other kind", {"--resume": whole(), "--set": "split.trained=1"}, "contradicts"), ("and the reverse", {"--resume": "trained", "--set": "x.split=yes"}, "contradicts")):
        with case(f"refuses {name}"):
            err = run(options if "--resume" in options else {**ALONE, **TRAINED, "--save-every": None, **options}, status=2).err
            assert re.search(word, err), err


def damage():
    """A checkpoint whose bases are not what was saved is refused in one line that names the file, and stays as it is."""
    def cut(f):
        f.truncate(5000)

    def flip(f):
        f.seek(-100, 2)
        byte = f.read(1)
        f.seek(-1, 1), f.write(bytes([byte[0] ^ 1]))

    for name, change in (("missing", None), ("cut short", cut), ("one bit off", flip)):
        with case(f"refuses bases that are {name}"):
            out = "broken_" + name.replace(" ", "_")
            shutil.copytree(whole(), out)
            path = f"{out}/step_00000012/bases.safetensors"
            if not change:
                os.remove(path)
            else:
                with open(path, "r+b") as f:
                    change(f)
            with untouched(out):
                for options in ({}, {"--eval-only": True}):
                    err = run({"--resume": out, **options}, status=2).err
                    assert "bases.safetensors" in err and "step_00000010" in err, err           # which file, and which checkpoint is whole


def refuses():
    for name, options, word in (
            ("a rank beyond --ffn", {"--ffn": 48, "--set": "split.rank=100"}, "rank 64 .*--ffn is 48"),
            ("a rank beyond a narrow model", {"--dim": 8, "--heads": 2, "--ffn": 64}, "rank 16 .*--dim is 8"),
            ("a rank given outright", {"--set": "split.k=112"}, "rank 112 .*--dim is 64"),
            ("a split in evaluation alone", {"--recipe": "bf16", "--eval-recipe": "metis", "--dim": 8, "--heads": 2}, "needs bases"),
            ("split numbers out of range", {"--set": "split.sample=0"}, "between"), ("another --set on resuming", {"--resume": whole(), "--set": "x.split=no"}, "contradicts")):
        with case(f"refuses {name}"):
            err = run(options if "--resume" in options else {**ALONE, **options}, status=2).err
            assert re.search(word, err), err
    with case("matrices of 16 columns are wide enough; tokens may be fewer than the rank"):
        small = {**ALONE, "--dim": 16, "--heads": 1, "--ffn": 16, "--batch": 1, "--seq": 8}
        one, two = (printed_losses(run({**small, "--threads": t}).out) for t in (1, 2))
        assert one == two and len({loss for _, loss in one}) == 12, f"{one} {two}"


def guard():
    """test_cli.py's wild run: a learning rate of 1000 with a decay of 10 leaves the floats within ten steps."""
    wild = {**cli.SMALL, "--recipe": "metis", "--steps": 60, "--lr": 1000, "--decay": 10, "--clip": 0, "--warmup": 0, "--schedule": "constant", "--eval-every": 0,
            "--eval-batches": 1, "--save-every": 1, "--keep": 12, "--out": "wild"}
    with case("guard: ten steps that are not finite end the run with one line; weights, optimiser and bases stay finite"):
        err = run(wild, status=2).err
        assert "not finite 10 steps in a row" in err and "--lr" in err, err
        last = checkpoints("wild")[-1]
        for file in ("model.safetensors", "optimizer.safetensors", "bases.safetensors"):
            assert all(x - x == 0 for x in floats(f"wild/{last}/{file}")), f"{file} of {last} is not finite"
    with case("guard: a resumed run counts on, and ends in the same line"):
        before, name = log_rows("wild"), checkpoints("wild")[-5]
        err = run({"--resume": f"wild/{name}", "--threads": 2}, status=2).err
        assert "not finite 10 steps in a row" in err and log_rows("wild") == before, err


if __name__ == "__main__":
    cli.PROGRAM, cli.REFERENCE = (os.path.abspath(p) for p in sys.argv[1:3])
    with tempfile.TemporaryDirectory(prefix="test_metis_") as folder:
        os.chdir(folder)
        cli.make_data()
        for group in (same_bits, accumulation, resume, trained, damage, refuses, guard):
            with case(f"{group.__name__}: ran to its end"):
                group()
        print("done")
    sys.exit(1 if cli.failed else 0)
