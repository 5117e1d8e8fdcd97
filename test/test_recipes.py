#!/usr/bin/env python3
"""Recipes as their users meet them: the same bits, the options that change them, what the log says of them.

    test/test_recipes.py PROGRAM REFERENCE        `ok NAME` or `FAIL NAME: why` a line, `done` at the end; status 1 on a FAIL

Everything is compared exactly: threads, recomputation, resuming, evaluating and shadow steps promise not to move a bit, and two
ways to ask for the same recipe must give the same losses. Helpers and the model are test_cli.py's. Standard library only.
"""
import os
import re
import subprocess
import sys
import tempfile

sys.dont_write_bytecode = True
import test_cli as cli
from test_cli import case, log_rows, printed_losses, run, same_run, step_rows

HERE = os.path.dirname(os.path.abspath(__file__))

# 6 x 112 tokens, 160 wide: multiples of 32 for the Hadamard, of no tile; 2 blocks, so that nvidia's last 15% is none of them.
BASE = {**cli.MICRO, "--batch": 6, "--seq": 112, "--ffn": 160, "--steps": 4, "--eval-batches": 1, "--eval-every": 2}


def table(*options):
    """--list-recipes as {recipe: [its cells]}."""
    lines = [line.split("|")[1:-1] for line in run(["--list-recipes", *options]).out.split("\n\n")[0].splitlines()]
    return {cells[0].strip(): [c.strip() for c in cells[1:]] for cells in lines[2:]}


def losses(**options):
    return printed_losses(run({**BASE, **{"--" + k.replace("_", "-"): v for k, v in options.items()}}).out)


def refuse(name, options, word):
    with case(f"refuses {name}"):
        err = run({**BASE, **options}, status=2).err
        assert re.search(word, err), f"the message does not mention {word!r}: {err}"


def same_bits():
    seen = {}
    for recipe in table():
        if recipe in ("float", "bf16"):
            continue                                                            # test_cli.py
        base, first = {**BASE, "--recipe": recipe}, f"bits_{recipe}"
        run({**base, "--threads": 1, "--out": first, "--save-every": 3})
        seen[recipe] = tuple(printed_losses(run({**base, "--threads": 2}).out))
        with case(f"{recipe}: the log of one thread, stdout of two"):
            assert list(seen[recipe]) == [(row["step"], row["loss"]) for row in step_rows(first)]
        for threads, recompute in ((3, "norms"), (2, "block")):
            with case(f"{recipe}: {threads} threads, --recompute {recompute}, same bits"):
                run({**base, "--threads": threads, "--recompute": recompute, "--out": f"{first}_{recompute}", "--save-every": 3})
                same_run(f"{first}_{recompute}", first)
        with case(f"{recipe}: resumed at step 3, same bits"):
            run({"--resume": f"{first}/step_00000003", "--threads": 2})
            same_run(first, f"{first}_block")
        with case(f"{recipe}: evaluations and shadow steps leave training alone"):
            assert printed_losses(run({**base, "--eval-every": 0, "--shadow-every": 1, "--stats-every": 1}).out) == list(seen[recipe])
    with case("no two recipes give the same losses, but those that differ where numbers lie 15 binades apart"):
        alike = [(a, b) for a in seen for b in seen if a < b and seen[a] == seen[b]]
        assert set(alike) <= {("mxfp4", "mxfp4-fp8"), ("fp8-rows", "mxfp8")}, f"alike: {alike}"


def cells():
    with case("where FP8 loses nothing, mxfp4-fp8 trains bit for bit as mxfp4"):
        os.environ["METIS_NATIVE"] = "0"                    # FP8 units of a GPU add in another way
        carried, own = losses(recipe="mxfp4-fp8"), losses(recipe="mxfp4")
        del os.environ["METIS_NATIVE"]
        assert carried == own
        run({**BASE, "--recipe": "mxfp4-fp8", "--stats-every": 4, "--out": "carried"})
        rows = [r["quant"] for r in log_rows("carried") if "quant" in r]
        assert rows and all(float(operand["lost"]) == 0 for row in rows for operand in row.values()), rows
    with case("test/mutate.py: every planted mistake finds its line in the source"):
        found = subprocess.run([sys.executable, os.path.join(HERE, "mutate.py"), "--lines"], capture_output=True, text=True)
        assert found.returncode == 0, found.stdout
    with case("--set on one row is another row"):
        assert losses(recipe="nvfp4", set="dgrad_d.rounding=stochastic,wgrad_d.rounding=stochastic") == losses(recipe="nvfp4-sr")
        assert losses(recipe="nvfp4", set="d.rounding=stochastic") == losses(recipe="nvfp4-sr")
        assert losses(recipe="nvfp4", set="all.format=mxfp4") == losses(recipe="mxfp4")
        assert losses(recipe="metis", set="all.split=no") == losses(recipe="nvfp4-sr")
        assert losses(recipe="nvidia", set="all.format=bf16") == losses(recipe="bf16")
    with case("--set: every key of every operand changes its own cell of --list-recipes and no other"):
        plain = table()["nvfp4"]
        for i, operand in enumerate(("fprop_x", "fprop_w", "dgrad_d", "dgrad_w", "wgrad_d", "wgrad_x")):
            for change in ("format=fp8", "block=square", "rounding=stochastic", "scale=headroom", "scale=four_six", "hadamard=64", "split=yes"):
                changed = table("--set", f"{operand}.{change}")["nvfp4"]
                assert [j for j in range(7) if plain[j] != changed[j]] == [i], f"{operand}.{change}: {plain} became {changed}"
    with case("every recipe and cell trains another way"):
        ways = ["d.rounding=stochastic", "x.rounding=stochastic", "all.scale=headroom", "all.scale=four_six", "w.block=square", "wgrad.hadamard=16",
                "wgrad.hadamard=32", "wgrad_d.hadamard=16,wgrad_x.hadamard=16,wgrad.signs=random", "wgrad.hadamard=16,wgrad.signs=plus", "fprop.format=mxfp4",
                "fprop.format=mxfp4,fprop.scale=floor", "x.split=yes", "w.split=yes", "d.split=yes", "d.split=yes,d.residual=exact", "d.split=yes,d.factors=exact",
                "d.split=yes,d.factors=stochastic", "all.split=yes,split.rank=40", "all.split=yes,split.refresh=1", "all.split=yes,split.sample=50"]
        seen = {way: tuple(losses(recipe="nvfp4", set=way)) for way in ways}
        alike = [(a, b) for a in ways for b in ways if a < b and seen[a] == seen[b]]
        assert not alike, f"alike: {alike}"
    with case("draws depend on the seed alone: --set all.rounding=stochastic"):
        a, b, c = (losses(recipe="nvfp4", set="all.rounding=stochastic", seed=s) for s in (1, 1, 2))
        assert a == b != c
    for name, change, word in (
            ("a --set without a key", "x=1", "WHICH.KEY=VALUE"), ("a --set of no operand", "y.rounding=nearest", "names no operand"),
            ("a --set of no key", "x.round=nearest", "there is no round"), ("a --set of no value", "x.rounding=up", "nearest, stochastic"),
            ("a Hadamard on one operand", "wgrad_d.hadamard=16", "both operands"), ("Hadamards that differ", "wgrad_d.hadamard=16,wgrad_x.hadamard=32", "both operands"),
            ("a Hadamard smaller than the block", "all.format=mxfp4,wgrad.hadamard=16", "whole blocks"), ("a square block with a Hadamard", "dgrad.hadamard=16,w.block=square", "square"),
            ("an NVFP4 scale rule on MX", "x.format=mxfp4,x.scale=te", "floor or ceil"), ("an MX scale rule on NVFP4", "x.scale=ceil", "te, headroom"),
            ("a block for FP8", "x.format=fp8,x.block=square", "have blocks"), ("scales of rows for NVFP4", "x.block=row", "whole rows"),
            ("scales of rows with a Hadamard", "wgrad.format=fp8,wgrad.block=row,wgrad.hadamard=16", "no hadamard"), ("a rounding for bf16", "x.format=bf16,x.rounding=stochastic", "bf16"),
            ("float against FP4", "fprop_x.format=f32", "f32 and e2m1 meet only"), ("a split with a Hadamard", "wgrad.hadamard=16,wgrad.split=yes", "hadamard"),
            ("an impossible split number", "split.rank=0", "between"), ("an unknown split number", "split.size=3", "there is no split.size"),
            ("half a refresh", "split.refresh=1.5", "whole number")):
        refuse(name, {"--recipe": "nvfp4", "--set": change}, word)
    refuse("a Hadamard of 64 on 672 tokens", {"--recipe": "nvfp4", "--set": "wgrad.hadamard=64"}, "multiple of 64, and --batch x --seq is 672")
    refuse("a Hadamard of 64 on 160 wide", {"--recipe": "nvfp4", "--set": "fprop.hadamard=64"}, "multiple of 64, and --ffn is 160")
    refuse("a split wider than the model", {"--recipe": "metis", "--set": "split.rank=101"}, "between|wide")
    refuse("an unknown --eval-recipe", {"--eval-recipe": "fp3"}, "--list-recipes")
    refuse("an --eval-recipe with bases that the run lacks", {"--recipe": "nvfp4", "--eval-recipe": "metis"}, "needs bases")
    refuse("an unknown layer class", {"--recipe": "nvfp4", "--bf16-layers": "qkv,up"}, "qkv, o, gate_up, down")
    refuse("--bf16-end-gemms alone", {"--recipe": "nvfp4", "--bf16-end-gemms": "all"}, "--bf16-end")
    refuse("--bf16-end-gemms of no kind", {"--recipe": "nvfp4", "--bf16-end": "0.5", "--bf16-end-gemms": "wgrad"}, "fprop, all")


def high_precision():
    bf16, nvfp4 = losses(recipe="bf16"), losses(recipe="nvfp4")
    with case("--bf16-first, -last and -layers of everything are bf16"):
        for options in ({"bf16_first": 2}, {"bf16_last": 2}, {"bf16_first": 1, "bf16_last": 1}, {"bf16_layers": "qkv,o,gate_up,down"}, {"bf16_end": 1, "bf16_end_gemms": "all"}):
            assert losses(recipe="nvfp4", **options) == bf16, options
    with case("parts of it are neither, and differ"):
        ways = [{"bf16_first": 1}, {"bf16_last": 1}, {"bf16_layers": "qkv"}, {"bf16_layers": "o"}, {"bf16_layers": "gate_up"}, {"bf16_layers": "down"},
                {"bf16_end": 1}, {"bf16_end": 0.5}, {"bf16_end": 0.5, "bf16_end_gemms": "all"}]
        seen = [tuple(losses(recipe="nvfp4", **w)) for w in ways] + [tuple(bf16), tuple(nvfp4)]
        assert len(set(seen)) == len(seen), "two of them gave the same losses"
    with case("--bf16-end 0.5: the first half of the steps is nvfp4's, to the bit"):
        late = losses(recipe="nvfp4", bf16_end=0.5)
        assert late[:2] == nvfp4[:2] and late[2] != nvfp4[2], f"{late} {nvfp4}"
    with case("--eval-recipe: another validation loss, the same training"):
        out = [run({**BASE, "--recipe": "nvfp4", "--eval-recipe": r}).out for r in ("nvfp4", "bf16")]
        values = [re.findall(r"val loss (\S+)", text) for text in out]
        assert printed_losses(out[0]) == printed_losses(out[1]) == nvfp4
        assert values[0] == re.findall(r"val loss (\S+)", run({**BASE, "--recipe": "nvfp4"}).out) and values[0] != values[1], values
    with case("the report: formats, blocks in bf16, the share of FLOPs in 4 bits"):
        # Per token: 4 linear layers of 2 blocks, 6 FLOPs a weight; of all, also the head and causal attention (flops_per_token).
        weights = 2 * (64 * (64 + 2 * 32) + 64 * 64 + 64 * 320 + 64 * 160)
        every = 6 * (weights + 64 * 256) + 6 * 2 * 64 * 113
        text = run({**BASE, "--recipe": "nvfp4"}).out
        assert f"{100 * 6 * weights / every:.1f}% of the model's FLOPs in 4 bits" in text, re.findall(r".*FLOPs in 4.*", text)
        assert "bf16: the head\n" in text and "fprop: X nvfp4, W nvfp4; emulated" in text, text
        text = run({**BASE, "--recipe": "nvidia", "--layers": 7, "--steps": 1}).out
        assert "4 of 28 linear layers, of the last 1 block" in text, text
        assert "0.0% of the model's FLOPs in 4 bits" in run({**BASE, "--recipe": "fp8"}).out


def log():
    with case("shadow steps: three numbers and every tensor's two; bf16's are zero and one"):
        for recipe in ("bf16", "nvfp4", "metis"):
            run({**BASE, "--recipe": recipe, "--shadow-every": 2, "--stats-every": 2, "--out": f"shadow_{recipe}"})
            rows = [row for row in log_rows(f"shadow_{recipe}") if "shadow_grad_rel_err" in row]
            assert [int(row["step"]) for row in rows] == [2, 4], rows
            for row in rows:
                error, cosine, tensors = float(row["shadow_grad_rel_err"]), float(row["shadow_grad_cos"]), row["shadow_tensors"]
                assert len(tensors) == 2 + 6 * 2, tensors.keys()
                if recipe == "bf16":
                    assert error == 0 and abs(cosine - 1) < 1e-6 and float(row["shadow_loss_gap"]) == 0, row
                    assert all(float(e) == 0 for e, _ in tensors.values()), row
                else:
                    assert 0.001 < error < 1 and 0.5 < cosine < 1 and float(row["shadow_loss_gap"]) != 0, row
                    assert all(float(e) > 0 for name, (e, _) in tensors.items()), row
    with case("quant rows: plausible errors of all six operands; none for bf16"):
        assert not [row for row in log_rows("shadow_bf16") if "quant" in row]
        for recipe in ("nvfp4", "metis"):
            rows = [row["quant"] for row in log_rows(f"shadow_{recipe}") if "quant" in row]
            assert len(rows) == 2 and all(len(row) == 6 for row in rows), rows
            for row in rows:
                for operand, value in row.items():
                    # Nearest E2M1 under a block scale: half a step of 1/6 or so of the block's largest; Gaussian data give 0.095.
                    assert 0.01 < float(value["error"]) < 0.25, (operand, value)
                    assert 0 <= float(value["zero"]) < 0.6 and 0 <= float(value["saturated"]) < 0.1, (operand, value)
    with case("--eval-only by a split recipe needs a run's bases"):
        run({**BASE, "--recipe": "bf16", "--out": "plain"})
        err = run({"--model": "plain/step_00000004", "--data": "text.txt", "--seq": 32, "--recipe": "metis", "--eval-only": True}, status=2).err
        assert "needs bases" in err, err
    with case("an --eval-recipe whose bases the run lacks is refused, matrix by matrix"):
        run({**BASE, "--recipe": "metis-code", "--eval-recipe": "metis"}, status=2)
        for gone, word in (("w.split=no", "bases of W"), ("x.split=no", "bases of X")):
            assert word in run({**BASE, "--recipe": "metis", "--set": gone, "--eval-recipe": "metis"}, status=2).err
        run({**BASE, "--steps": 1, "--recipe": "metis", "--set": "d.split=no", "--eval-recipe": "metis"})
    with case("random signs: a checkpoint is evaluated as its run was"):
        run({**BASE, "--recipe": "nvfp4", "--set": "fprop.hadamard=16,fprop.signs=random", "--out": "signs"})
        seen = [r["val_loss"] for r in log_rows("signs") if "val_loss" in r][-1]
        assert f"val loss {float(seen):.9g}" in run({"--resume": "signs", "--eval-only": True}).out
    with case("quant rows do not depend on --recompute"):
        for how in ("none", "block"):
            run({**BASE, "--recipe": "nvfp4", "--stats-every": 1, "--recompute": how, "--out": f"again_{how}"})
        assert log_rows("again_none") == log_rows("again_block")
    with case("plot.py's and the log's first line know the recipe and the changes"):
        run({**BASE, "--recipe": "nvfp4", "--set": "d.rounding=stochastic", "--out": "first"})
        with open("first/log.jsonl") as f:
            text = f.readline()
        assert '"recipe":"nvfp4"' in text and '"set":"d.rounding=stochastic"' in text, text
    with case("resuming with another --set, --recipe or --bf16-last is refused"):
        for options in ({"--set": "x.rounding=stochastic"}, {"--recipe": "mxfp4"}, {"--bf16-last": 1}):
            err = run({"--resume": "first", **options}, status=2).err
            assert "contradicts" in err, err


if __name__ == "__main__":
    cli.PROGRAM = os.path.abspath(sys.argv[1])
    with tempfile.TemporaryDirectory(prefix="test_recipes_") as folder:
        os.chdir(folder)
        cli.make_data()
        for group in (same_bits, cells, high_precision, log):
            with case(f"{group.__name__}: ran to its end"):
                group()
        print("done")
    sys.exit(1 if cli.failed else 0)
