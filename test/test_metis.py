#!/usr/bin/env python3
"""Metis from outside: bases in checkpoints, resuming between refreshes, what must not move a bit, what is refused.

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
    assert content(f"{out}/{last}/bases.safetensors") == content(f"{other}/{last}/bases.safetensors"), "bases.safetensors differs"


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
            ("a rank given outright", {"--set": "split.k=100"}, "rank 112 .*--dim is 64"),
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
        for group in (same_bits, accumulation, resume, damage, refuses, guard):
            with case(f"{group.__name__}: ran to its end"):
                group()
        print("done")
    sys.exit(1 if cli.failed else 0)
