#!/usr/bin/env python3
"""Puts the program's own words into README.md: --help between its markers, --list-recipes into its block.

    python3 dev/readme.py build/cpu/train_llama          rewrites README.md
"""
import os, re, subprocess, sys

if len(sys.argv) != 2: sys.exit(__doc__)
program = os.path.abspath(sys.argv[1])
os.chdir(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

def says(option):
    return subprocess.run([program, option], capture_output=True, text=True, check=True).stdout.rstrip("\n")

with open("README.md") as f: text = f.read()
text = re.sub(r"(<!-- help -->\n```\n).*?(\n```\n<!-- /help -->)", lambda m: m[1] + says("--help") + m[2], text, flags=re.S)
text = re.sub(r"(<!-- recipes -->\n).*?(\n<!-- /recipes -->)", lambda m: m[1] + says("--list-recipes") + m[2], text, flags=re.S)
with open("README.md", "w") as f: f.write(text)
