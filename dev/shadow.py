#!/usr/bin/env python3
"""How far each recipe's gradient is from bf16's, on one trained model and the same batches: the measure that seed noise does not drown.

    python3 dev/shadow.py build/cpu/train_llama run1/step_00001500 --data held_out.txt
    python3 dev/shadow.py build/cpu/train_llama run1/step_00001500 --data held_out.txt nvfp4 "nvfp4-sr all.scale=headroom" "nvidia --bf16-last 0"

A variant is a recipe's name, then changes for --set, then options. Each is run from the same weights for --batches steps with a
learning rate that moves nothing, a shadow step each; printed are means over the batches, with the standard error of the gradient's;
nan where a batch had no finite number.
"""
import argparse, json, math, os, statistics, subprocess, sys, tempfile

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("program")
parser.add_argument("model")
parser.add_argument("variants", nargs="*", default=["fp8", "mxfp8", "nvfp4", "nvfp4-sr", "nvidia", "nvidia --bf16-last 0",
                    "four-over-six --bf16-last 0", "mxfp4", "mxfp4-fp8", "nvfp4-fp8", "metis"])
parser.add_argument("--data", required=True)
parser.add_argument("--batches", type=int, default=4)
parser.add_argument("--batch", default="8")
parser.add_argument("--seq", default="256")
parser.add_argument("--seed", default="1")
o = parser.parse_intermixed_args()
if not os.access(o.program, os.X_OK):
    print(f"shadow.py: there is no program {o.program}: `make` builds it", file=sys.stderr)
    sys.exit(2)

plain = lambda row: {key: math.nan if value is None else value for key, value in row.items()}       # JSON has no NaN: the log says null
print(f"{'recipe':44} loss gap   gradient error      cosine   x err   w err   d err")
for variant in o.variants:
    words = variant.split()
    options = ["--recipe", words[0]]
    changes = [w for w in words[1:] if "=" in w and not w.startswith("--")]
    if changes: options += ["--set", ",".join(changes)]
    options += [w for w in words[1:] if w not in changes]
    with tempfile.TemporaryDirectory() as folder:
        command = [o.program, "--model", o.model, "--data", o.data, "--batch", o.batch, "--seq", o.seq, "--seed", o.seed, "--steps", str(o.batches),
                   "--lr", "1e-12", "--warmup", "0", "--decay", "0", "--schedule", "constant", "--shadow-every", "1", "--stats-every", "1",
                   "--eval-every", "0", "--eval-batches", "1", "--sample-tokens", "0", "--save-every", "0", "--out", folder + "/run", *options]
        ended = subprocess.run(command, capture_output=True, text=True)
        if ended.returncode:
            print(ended.stderr.strip().splitlines()[-1] if ended.stderr.strip() else f"shadow.py: the program ended with status {ended.returncode}", file=sys.stderr)
            sys.exit(2)
        with open(folder + "/run/log.jsonl") as log: lines = [json.loads(line, object_hook=plain) for line in log]
    shadow = [line for line in lines if "shadow_grad_rel_err" in line]
    quant = [line["quant"] for line in lines if "quant" in line]
    mean = lambda key: statistics.mean(line[key] for line in shadow)
    errors = [line["shadow_grad_rel_err"] for line in shadow]
    spread = math.nan if math.isnan(sum(errors)) else statistics.stdev(errors) / len(errors) ** 0.5 if len(errors) > 1 else 0
    operand = lambda name: f"{statistics.mean(q[name]['error'] for q in quant):.4f}" if quant and name in quant[0] else "   -  "
    print(f"{variant:44} {mean('shadow_loss_gap'):+.4f}   {statistics.mean(errors):.4f} +- {spread:.4f}   {mean('shadow_grad_cos'):.4f}   "
          f"{operand('fprop_x')}  {operand('fprop_w')}  {operand('dgrad_d')}", flush=True)
