#!/usr/bin/env python3
"""Do the tests of FP4, Metis and AdamW notice a mistake? One rule of fp4.cuh, recipes.cuh, metis.cuh, subspace.cuh, llama.cuh or device.cuh is changed at a
time, in a copy; the tests are built against the copy and must turn red.

    python3 test/mutate.py [-j N] [WORD ...]       N at a time (2); only mutations whose name has one of the WORDs
    python3 test/mutate.py --lines                 do all find their lines in the source? (part of `make test`)

A line each, then `N caught, M missed`; status 1 if one was missed, does not compile, or no longer finds its line in the source: then
give it the line's new form. Ten to fifteen minutes on two cores; not part of `make test`. The first failing test ends a mutation, so what
it prints is one witness, not all. Plain loops at -O1, without oneDNN: the rules are the same and it compiles in half the time.
"""
import concurrent.futures
import os
import re
import shutil
import subprocess
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
FLAGS = "-O1 -std=c++17 -fopenmp -march=native -ffp-contract=off -fno-math-errno -fno-trapping-math -w -I.".split()
TESTS = ("test_fp4", "test_quantise", "test_linear")

# name, file, what is there (exactly once), what takes its place
MUTATIONS = [
    # rounding
    ("ties go up", "fp4.cuh", "return with_sign((a + c) - c, x);", "return with_sign((float_of(bits_of(a) + 1) + c) - c, x);"),
    ("nearest does not saturate", "fp4.cuh", "float a = smaller(magnitude(x), f.max);\n    float c =", "float a = magnitude(x);\n    float c ="),
    ("subnormals in steps of their own size", "fp4.cuh", "(bits_of(larger(a, f.min_normal)) &", "(bits_of(larger(a, f.min_normal / 2)) &"),
    ("a zero loses its sign", "fp4.cuh", "return float_of(bits_of(q) | (bits_of(x) & 0x80000000u));",
     "return q == 0 ? q : float_of(bits_of(q) | (bits_of(x) & 0x80000000u));"),
    ("stochastic: no half", "fp4.cuh", " + (1u << (f.drop - 17));", ";"),
    ("stochastic: 15 random bits", "fp4.cuh", "(r << (f.drop - 16))", "((r & ~1u) << (f.drop - 16))"),
    ("stochastic: subnormals not lifted", "fp4.cuh", "float lift = a < f.min_normal ? f.min_normal : 0.f;\n    uint32_t u",
     "float lift = 0.f;\n    uint32_t u"),
    # scales
    ("tensor scale: other order of products", "fp4.cuh", "            float base = s.amax[u] * per_amax;\n            base =",
     "            float base = s.amax[u] * S_enc * job.rule.inverse_top;\n            base ="),
    ("block scale: division instead of a product", "fp4.cuh", "round_nearest(base, e4m3), enc = 1.f / (s * S_dec);", "round_nearest(base, e4m3), enc = 1.f / s / S_dec;"),
    ("blocks that vanish keep codes", "fp4.cuh", "return {s == 0 ? 0.f : enc, s};", "return {enc, s};"),
    ("four_six: cap 448", "fp4.cuh", "cap = c.scale == Scale::four_six ? 256.f : 448.f;", "cap = 448.f;"),
    ("no headroom", "fp4.cuh", "float top = room ? 96.f / 17.f : 6.f", "float top = 6.f"),
    ("headroom for four_six when rounding to nearest", "fp4.cuh", "(c.scale == Scale::four_six && c.rounding == Rounding::stochastic)",
     "c.scale == Scale::four_six"),
    ("four_six: 4 where both are as good", "fp4.cuh", "bool four = s.err4[u] < s.err6[u];", "bool four = s.err4[u] <= s.err6[u];"),
    ("four_six: sums in another order", "device.cuh", "op(value(first + i, j), value(first + i, j + 8));",
     "op(value(first + i, 2 * j), value(first + i, 2 * j + 1));"),
    ("MX: ceil rounds to nearest", "fp4.cuh", "up = (u + 0x7fffff) >> 23;", "up = (u + 0x3fffff) >> 23;"),
    ("MX: floor is one too large", "fp4.cuh", "low = field > emax ? field - emax : 0;", "low = field + 1 > emax ? field + 1 - emax : 0;"),
    ("MX: the smallest scale is forgotten", "fp4.cuh", "    up = u <= 0x400000 ? 0 : up;", "    "),
    ("MX: blocks of 16", "fp4.cuh", "    if (wide) {\n", "    if (false) {\n"),
    ("amax passes over NaN", "fp4.cuh", "return float_of(u < infinity_bits ? u : infinity_bits);",
     "return float_of(u < 0x7f800001u ? u : 0u);"),
    ("S_dec of an infinity is a number", "fp4.cuh", "scale[1] = is_finite(amax) ? 1.f / enc : float_of(quiet_nan_bits);",
     "scale[1] = 1.f / enc;"),
    ("amax of a transformed operand before its Hadamard", "fp4.cuh", "hadamard(g, t, s.v, cell.hadamard, s.sign, ahead);\n            }\n            acc_t m",
     "}\n            acc_t m"),
    # power-of-two scales, carried by FP8
    ("po2: the nearest power", "fp4.cuh", "(bits_of(base) + 0x7fffff) & infinity_bits", "(bits_of(base) + 0x400000) & infinity_bits"),
    ("po2: seventeen binades", "fp4.cuh", "most * 0x1p-17f", "most * 0x1p-16f"),
    ("carrier: E4M3 one binade higher", "fp4.cuh", "c.carrier == Carrier::e4m3 ? 6 :", "c.carrier == Carrier::e4m3 ? 7 :"),
    ("carrier: values not rounded to it", "fp4.cuh", "    if (is_carried(job.call.cell)) {", "    if (false) {"),
    ("carrier: nothing is ever lost", "fp4.cuh", "(held != exact ? 1.f : 0.f)", "0.f"),
    ("carrier: one MX rule for all tensor scales", "fp4.cuh", "int e = (int)(ceil ? e8m0_ceil(amax, e2m1) : e8m0_floor(amax, e2m1))", "int e = (int)e8m0_ceil(amax, e2m1)"),
    ("carrier: packed in blocks of 32", "fp4.cuh", "has_scale_bytes(c) ? block_length(c.format) : 16", "block_length(c.format)"),
    ("carrier: tensor scales taken over between MX rules", "metis.cuh", "a.scale == b.scale && a.carrier", "a.carrier"),
    ("carrier: tensor scales taken over between carriers", "metis.cuh", " && a.carrier == b.carrier && scale_rule(a)", " && scale_rule(a)"),
    ("fp8 rows: scales that saturate", "fp4.cuh", "uint32_t e = e8m0_ceil(amax, f);\n    return decode_e8m0(e ? e : 1);", "uint32_t e = e8m0_floor(amax, f);\n    return decode_e8m0(e ? e : 1);"),
    ("fp8 rows: a tile's first row for all", "fp4.cuh", "r0 + (16 * u >> t.shift)", "r0"),
    ("fp8 rows: D serves twice", "metis.cuh", " && !has_row_scales(c) && !c.hadamard && !c.split &&", " && !c.hadamard && !c.split &&"),
    ("one pass: the second amax in the first's place", "metis.cuh", "(scaled || place < 2)", "true"),
    ("one pass: one tile shape too low", "fp4.cuh", "height = std::max(height, tile_height(j.call.cell, j.call.axis))", "height = height ? height : tile_height(j.call.cell, j.call.axis)"),
    # Hadamard
    ("Hadamard: one fixed sign", "fp4.cuh", "const uint32_t fixed = 0xd7e8;", "const uint32_t fixed = 0xd7ec;"),
    ("Hadamard: random signs read backwards", "fp4.cuh", "random.w[i / 32] >> (i & 31)", "random.w[i / 32] >> (31 - (i & 31))"),
    ("Hadamard: 64 over 16", "fp4.cuh", "n == 64 ? 0.125f", "n == 64 ? 0.25f"),
    ("Hadamard: no levels across 16 elements", "fp4.cuh", "for (int h = 1; h < n; h *= 2) {",
     "for (int h = 1; h < (n < 16 ? n : 16); h *= 2) {"),
    # draws
    ("draws: halves of a word exchanged", "fp4.cuh", "w.w[p / 2] >> 16 * (p % 2)", "w.w[p / 2] >> 16 * (1 - p % 2)"),
    ("draws: groups of a row counted wrong", "fp4.cuh", "int64_t groups = (t.cols + 127) / 128;", "int64_t groups = t.cols / 128 + 1;"),
    ("draws: micro-batches beyond 256 alike", "device.cuh", "(key.micro & 0xffff) << 16", "(key.micro & 0xff) << 16"),
    ("draws: the layer has no part", "metis.cuh", "ctx.micro, lin.id, (uint32_t)(again", "ctx.micro, 0, (uint32_t)(again"),
    ("draws: the step has no part", "metis.cuh", "RandomKey key = {ctx.seed, ctx.step, ctx.micro, lin.id, (uint32_t)(again",
     "RandomKey key = {ctx.seed, 0, ctx.micro, lin.id, (uint32_t)(again"),
    ("draws: both operands of a GEMM share them", "metis.cuh", "(again ? made_before[which] : which)",
     "(again ? made_before[which] : which / 2 * 2)"),
    ("draws: signs of each operand its own", "metis.cuh", "sign_key.operand = (uint32_t)which / 2,", "sign_key.operand = (uint32_t)which,"),
    ("draws: evaluation rounds stochastically", "metis.cuh", "        cell.rounding = Rounding::nearest;\n", ""),
    # packing
    ("packing: nibbles exchanged", "fp4.cuh", "code = (uint8_t)(code | encode(s.v[next], holder) << 4);",
     "code = (uint8_t)(code << 4 | encode(s.v[next], holder));"),
    ("packing: tiled scales by other strides", "fp4.cuh", "r % 32 * 16 + r % 128 / 32 * 4 + b % 4;",
     "r % 32 * 16 + b % 4 * 4 + r % 128 / 32;"),
    # the layer
    ("wgrad_x in blocks along its rows", "metis.cuh", "QuantCall call = {cell, blocks, rows", "QuantCall call = {cell, which == wgrad_x ? Axis::row : blocks, rows"),
    ("dgrad_w in blocks along its rows", "metis.cuh", "QuantCall call = {cell, blocks, rows", "QuantCall call = {cell, which == dgrad_w ? Axis::row : blocks, rows"),
    ("D with blocks serves twice", "metis.cuh", "return !has_blocks(c.format) && !has_row_scales(c)", "return !has_row_scales(c)"),
    ("D rounded stochastically serves twice", "metis.cuh", " && !c.split && c.rounding == Rounding::nearest;", " && !c.split;"),
    ("D serves wgrad whatever its cell", "metis.cuh", "return r.cell[dgrad_d] == r.cell[wgrad_d] && ", "return r.cell[dgrad_d].format == r.cell[wgrad_d].format && "),
    ("tensor scales taken over in spite of a Hadamard", "metis.cuh", "!a.hadamard && !b.hadamard && alike", "alike"),
    ("tensor scales taken over between rules", "metis.cuh", " && scale_rule(a).full == scale_rule(b).full;", ";"),
    ("dW is overwritten", "metis.cuh", "product(ctx, s, lin.wgrad, lin.dw, lin.in, turned, q, lin.out, lin.in, rows, 1,",
     "product(ctx, s, lin.wgrad, lin.dw, lin.in, turned, q, lin.out, lin.in, rows, 0,"),
    ("a tensor scale is not multiplied in", "matmul.cuh", "acc_t(a.scale ? *a.scale : 1.f) * acc_t(b.scale ? *b.scale : 1.f);",
     "acc_t(b.scale ? *b.scale : 1.f);"),
    ("the tally counts padding", "fp4.cuh", "bool inside = r0 + (k >> t.shift) < t.rows && c0 + (k & (t.C - 1)) < t.cols;", "bool inside = true;"),
    # refusals
    ("a Hadamard on one side only is allowed", "recipes.cuh", "if (c.hadamard != other.hadamard || ", "if ("),
    ("MX scales on nvfp4 are allowed", "recipes.cuh", "if (c.format == Format::nvfp4 && c.scale >= Scale::floor)", "if (false)"),
]

# the same for bases and split operands, by tests of their own
SPLIT_TESTS = ("test_subspace", "test_metis")
SPLIT_MUTATIONS = [
    # bases
    ("basis: rows orthonormalised once", "subspace.cuh", "pass < 3; pass++", "pass < 1; pass++"),
    ("basis: no power iterations", "subspace.cuh", "int powers = warm ? plan.warm : plan.cold;", "int powers = 0;"),
    ("basis: rows' side not orthonormalised between", "subspace.cuh", "if (n >= q) orthonormalise(ctx, s.y, q, n, s, key.step);", ";"),
    ("basis: smallest directions first", "subspace.cuh", "h[j * q + j] > h[i * q + i] ||", "h[j * q + j] < h[i * q + i] ||"),
    ("basis: directions not sorted", "subspace.cuh", "v + (int64_t)state[i] * q;", "v + (int64_t)i * q;"),
    ("basis: Jacobi stops early", "subspace.cuh", "off > 1e-18 * trace * trace", "off > 1e-3 * trace * trace"),
    ("basis: warm starts forget", "subspace.cuh", "int kept = warm ? k : 0;", "int kept = 0;"),
    ("basis: the first rows are the sample", "subspace.cuh", "int64_t row = all ? r :", "int64_t row = true ? r :"),
    ("basis: the sample is of half the rows", "subspace.cuh", "* (uint64_t)rows) >> 32", "* (uint64_t)(rows / 2)) >> 32"),
    ("basis: made of what is not finite", "subspace.cuh", "        state[q] = finite;", "        state[q] = 1;"),
    # when
    ("refresh: at every micro-batch", "metis.cuh", "(ctx.micro == 0 && (ctx.step", "((ctx.step"),
    ("refresh: all layers at once", "metis.cuh", "(ctx.step + lin.id) % every", "ctx.step % every"),
    ("refresh: W sampled", "metis.cuh", "matrix_of[which] == matrix_w ? rows : sampled_rows", "sampled_rows"),
    ("refresh: always cold", "metis.cuh", "ctx.step > 0 && !plan.restart", "false"),
    ("refresh: in recomputation", "metis.cuh", "if (s.refresh && refresh_due(ctx, lin))", "if (refresh_due(ctx, lin))"),
    # the operands
    ("split: L of the first 256 rows", "metis.cuh", "for (int64_t i = 0; i < chunks; i++) sum += partial", "for (int64_t i = 0; i < 1; i++) sum += partial"),
    ("split: A not of unit length", "metis.cuh", "t[r * k + j] / l[j] : l[j];", "t[r * k + j] : l[j];"),
    ("split: L squared", "metis.cuh", "l[j] = std::sqrt(sum);", "l[j] = sum;"),
    ("split: A in blocks along its rows", "metis.cuh", "a.cols = k, a.key.operand", "a.axis = Axis::row, a.cols = k, a.key.operand"),
    ("split: B in blocks along its rows", "metis.cuh", "b.rows = k, b.key.operand", "b.axis = Axis::row, b.rows = k, b.key.operand"),
    ("split: factors never stochastic", "metis.cuh", "cell.factors == Factors::stochastic ? Rounding::stochastic : Rounding::nearest", "Rounding::nearest"),
    ("split: evaluation rounds factors stochastically", "metis.cuh", "if (cell.factors != Factors::exact) cell.factors = Factors::nearest;", ""),
    ("split: B's scale not in the residual", "metis.cuh", "acc_t scale = (sa ? *sa : 1.f) * (sb ? *sb : 1.f);", "acc_t scale = (sa ? *sa : 1.f);"),
    ("split: residual against the unrounded basis", "metis.cuh", "low_b[r * cols + j] = half ?", "low_b[r * cols + j] = true ? basis[r * cols + j] : half ?"),
    ("split: residual=exact does nothing", "metis.cuh", "if (cell.residual == Residual::exact) {", "if (false) {"),
    ("split: the second operand of a matrix is never its first", "metis.cuh",
     "const bool first = made_before[which] == operand_count || !recipe.cell[made_before[which]].split;", "const bool first = made_before[which] == operand_count;"),
    ("split: tensor scales taken over whatever the factors", "metis.cuh", "(!a.split || (a.factors == b.factors && a.residual == b.residual));", "true;"),
    ("split: tensor scales never taken over", "metis.cuh", "call.scaled = scaled;", "call.scaled = false;"),
    # trained factors
    ("trained: few power iterations", "metis.cuh", "plan.cold = 30;", "plan.cold = 3;"),
    ("trained: merged without s", "metis.cuh", "acc_t a = sign * u[r * k + j] * s[j];", "acc_t a = sign * u[r * k + j];"),
    ("trained: a residual taken once more", "metis.cuh", "    if (trained) return;", ""),
    ("trained: rows without a split see W_R", "metis.cuh", "lin.splits.factors.u && !cell.split)", "false)"),
    ("trained: dU without s", "metis.cuh", "du[r * k + j] *= s[j];", ";"),
    ("trained: dV without s", "metis.cuh", "[=](acc_t& o) { o *= s[j]; }", "[=](acc_t& o) { o *= 1; }"),
    ("trained: ds of what dV has become", "metis.cuh", "ds[j] = sum;", "ds[j] = sum * s[j];"),
    # the product
    ("product: no term of both low-rank parts", "metis.cuh", "v += code(i) * (s_own * own_l[i]) * inner[j * k + i];", ";"),
    ("product: inner transposed", "metis.cuh", "inner[j * k + i]", "inner[i * k + j]"),
    ("product: without the other factor's scale", "metis.cuh", "v = v * (other_l[j] * s_other) /", "v = v * other_l[j] /"),
    ("product: thin factors under the residuals' scales", "metis.cuh", "v = v * (other_l[j] * s_other) / s_own_r / s_other_r;", "v = v * (other_l[j] * s_other);"),
    ("product: thin factors not rounded to bf16", "metis.cuh", "if (half) store(&rounded", "if (false) store(&rounded"),
    ("product: halves of a thin factor exchanged", "metis.cuh", "own_column = second && both ? k : 0, other_column = !second && both ? k : 0", "own_column = both ? k : 0, other_column = 0"),
]

# the same for AdamW's moments
MOMENT_TESTS = ("test_kernels",)
MOMENT_MUTATIONS = [
    ("moments: rounded to nearest", "device.cuh", "(a < 0x7f7f0000 ? r : 0)", "(a < 0x7f7f0000 ? 0x8000 : 0)"),
    ("moments: half a bit too much", "device.cuh", "(a < 0x7f7f0000 ? r : 0)", "(a < 0x7f7f0000 ? r + 1 : 0)"),
    ("moments: the largest becomes infinite", "device.cuh", "a < 0x7f7f0000 ? r : 0", "a < 0x7f800000 ? r : 0"),
    ("moments: a NaN of low bits becomes infinite", "device.cuh", " | (a > infinity_bits ? 0x400000 : 0));\n}\n\n// v as an act_t", ");\n}\n\n// v as an act_t"),
    ("moments: m and v share their bits", "llama.cuh", "as_moment<S>(vi, random >> 16)", "as_moment<S>(vi, random & 0xffff)"),
    ("moments: m stored to nearest", "llama.cuh", "mi = as_moment<S>(mi, random & 0xffff), vi", "vi"),
    ("moments: the weights move by what is stored", "llama.cuh", "vi = o.beta2 * vi + (1 - o.beta2) * gi * gi;", "vi = as_moment<S>(o.beta2 * vi + (1 - o.beta2) * gi * gi, random >> 16);"),
    ("moments: every piece draws the same", "llama.cuh", "(uint64_t)(i / 4 + 16 * k)", "(uint64_t)(16 * k)"),
    ("moments: the tensor has no part", "llama.cuh", "{ctx.seed, ctx.step, 0, id, 0, Purpose::moments}", "{ctx.seed, ctx.step, 0, 0, 0, Purpose::moments}"),
    ("moments: the step has no part", "llama.cuh", "{ctx.seed, ctx.step, 0, id, 0, Purpose::moments}", "{ctx.seed, 0, 0, id, 0, Purpose::moments}"),
    ("adamw: decay of the moved weight", "llama.cuh", "wi = wi * keep - step * mi / (std::sqrt(vi) * root + o.eps);", "wi = (wi - step * mi / (std::sqrt(vi) * root + o.eps)) * keep;"),
]


def run(command, tree):
    """A command in a tree -> whether it ended well, and what it printed."""
    try:
        done = subprocess.run(command, cwd=tree, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", timeout=600)
        return done.returncode == 0, done.stdout
    except subprocess.TimeoutExpired:
        return False, "FAIL: ran for ten minutes"


def first_red(tree, order):
    """The first failing test of a tree in a few words, "" if all are green; None if one does not compile."""
    for test in order:
        built, text = run([os.environ.get("CXX", "g++"), *FLAGS, "-x", "c++", f"test/{test}.cu", "-o", test], tree)
        if not built:
            return None
        green, text = run([f"./{test}"], tree)
        if not green:
            red = re.findall(r"^(?:FAIL|.*error:) *(.*)$", text, re.M) or (text.strip().splitlines() or ["died"])[-1:]
            return f"{test}: {red[0]}"[:140]
    return ""


def copy():
    tree = tempfile.mkdtemp(prefix="mutant.")
    for name in os.listdir(ROOT):
        if name.endswith((".cuh", ".h")):
            shutil.copy(os.path.join(ROOT, name), tree)
    shutil.copytree(os.path.join(ROOT, "test"), os.path.join(tree, "test"))
    return tree


def tests_of(mutation):
    """In the order in which they are likely to see it."""
    tests = SPLIT_TESTS if mutation in SPLIT_MUTATIONS else MOMENT_TESTS if mutation in MOMENT_MUTATIONS else TESTS
    return tests[::-1] if mutation[1] in ("metis.cuh", "recipes.cuh", "matmul.cuh") else tests


def mutate(mutation):
    """-> (caught, line)"""
    name, file, old, new = mutation
    tree = copy()
    try:
        path = os.path.join(tree, file)
        source = open(path).read()
        if source.count(old) != 1:
            return False, f"MISSED {name}: its line is in {file} {source.count(old)} times"
        open(path, "w").write(source.replace(old, new))
        red = first_red(tree, tests_of(mutation))
        if red is None:
            return False, f"MISSED {name}: does not compile"
        return bool(red), f"caught {name} | {red}" if red else f"MISSED {name}"
    finally:
        shutil.rmtree(tree)


def main():
    words, jobs = sys.argv[1:], 2
    if words == ["--lines"]:
        everything = MUTATIONS + SPLIT_MUTATIONS + MOMENT_MUTATIONS
        lost = [m for m in everything if open(os.path.join(ROOT, m[1])).read().count(m[2]) != 1]
        print("".join(f"FAIL {m[0]}: its line is no longer in {m[1]}\n" for m in lost) + f"ok {len(everything) - len(lost)} mutations find their lines")
        sys.exit(bool(lost))
    if words[:1] == ["-j"] and len(words) > 1 and words[1].isdigit():
        jobs, words = int(words[1]), words[2:]
    if any(word.startswith("-") for word in words):
        sys.exit(__doc__)
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    tree = copy()
    chosen = [m for m in MUTATIONS + SPLIT_MUTATIONS + MOMENT_MUTATIONS if not words or any(word in m[0] for word in words)]
    red = first_red(tree, sorted({test for m in chosen for test in tests_of(m)}))
    shutil.rmtree(tree)
    if red != "":
        sys.exit(f"the tests are not green without a mutation: {red or 'they do not compile'}")
    caught = missed = 0
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        for ok, line in pool.map(mutate, chosen):
            caught, missed = caught + ok, missed + (not ok)
            print(line, flush=True)
    print(f"{caught} caught, {missed} missed")
    sys.exit(missed > 0)


if __name__ == "__main__":
    main()
