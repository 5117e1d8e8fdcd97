#!/usr/bin/env python3
"""tokenize.py: text files -> token shards in llm.c's .bin format, which train_llama reads with --data.

    pip install tiktoken
    python3 data/tokenize.py --tokenizer gpt2 --out data/books book1.txt book2.txt
    python3 data/tokenize.py --tokenizer llama3 --model tokenizer.model --split '' --out data/st data/stories.txt
    ./train_llama --data 'data/books_*.bin'

Writes OUT_000000.bin, OUT_000001.bin, ... of --shard-tokens tokens each, the last one shorter. All of them get their names at the
very end, so that a run that fails or is stopped leaves nothing that looks like a data set.

A shard is a header of 256 int32 (magic, version, number of tokens, zeros: 1 KiB), then the tokens, all little-endian:

    gpt2     magic 20240520, version 1, uint16     <|endoftext|> (50256) before each document
    llama3   magic 20240801, version 7, uint32     <|begin_of_text|> (128000) before, <|end_of_text|> (128001) after each document

GPT-2 has one special token, which opens a document and thereby closes the one before. LLaMA-3 was trained with a pair, and a model
must have seen the closing one to know when to stop.

A file is a document, unless --split LINE is given: then every line that equals LINE ends a document and is dropped ('' is an empty
line, right for stories.txt). Text that looks like a special token is encoded as the ordinary text it is.

--model is a tiktoken ranks file (a line a token: base64 of its bytes, a space, its rank), the same that --tokenizer of train_llama
takes. LLaMA-3 needs it; for GPT-2, tiktoken fetches its vocabulary once from the network if there is no --model.
"""
import os
import sys

# Python looks for modules beside the script first, and there this file would pass for the standard library's tokenize.
sys.path = [p for p in sys.path if os.path.realpath(p or ".") != os.path.dirname(os.path.realpath(__file__))]

import argparse
import base64
import glob
import struct
from array import array

# How text is cut into chunks before byte pairs are merged, as OpenAI (GPT-2) and Meta (LLaMA-3) published them.
GPT2_SPLIT = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
LLAMA3_SPLIT = (r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"""
                r"""|\s*[\r\n]+|\s+(?!\S)|\s+""")

# name -> magic, version, array type code, ordinary tokens, split, tokens before and after a document
KINDS = {"gpt2": (20240520, 1, "H", 50256, GPT2_SPLIT, [50256], []),
         "llama3": (20240801, 7, "I", 128000, LLAMA3_SPLIT, [128000], [128001])}

PIECE = 1 << 20     # characters encoded at once; a document may be gigabytes


def fail(message):
    print(f"tokenize.py: {message}", file=sys.stderr)
    sys.exit(2)


def read_ranks(path, count):
    """bytes -> rank, complete and without repetition."""
    ranks = {}
    try:
        with open(path, "rb") as f:
            for number, line in enumerate(f, 1):
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
    except OSError as e:
        fail(f"cannot read {path}: {e.strerror}")
    except ValueError:          # from split, int, and (as binascii.Error) b64decode
        fail(f"{path}, line {number}, is not \"base64 rank\": --model takes a tiktoken ranks file")
    if sorted(ranks.values()) != list(range(count)):
        fail(f"{path} does not hold the ranks 0 to {count - 1} once each ({len(ranks)} tokens): is it this --tokenizer's file?")
    if any(bytes([b]) not in ranks for b in range(256)):
        fail(f"{path} does not hold all 256 single bytes: fetch it again")
    return ranks


def load_encoding(kind, model):
    try:
        import tiktoken
    except ImportError:
        fail("needs tiktoken: pip install tiktoken")
    _, _, _, count, split, before, after = KINDS[kind]
    if model:
        special = {f"<|special_{i}|>": i for i in before + after}       # never matched: encode_ordinary knows no special tokens
        return tiktoken.Encoding(kind, pat_str=split, mergeable_ranks=read_ranks(model, count), special_tokens=special)
    if kind == "llama3":
        fail("--tokenizer llama3 needs --model: original/tokenizer.model of a LLaMA-3 checkpoint")
    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as e:      # whatever the network, a proxy or the cache came up with: the remedy is the same
        fail(f"cannot fetch GPT-2's vocabulary ({type(e).__name__}): connect to the network once, or give a --model")


def documents(path, split):
    """Yields the documents of a file, each as an iterator over pieces of its text.

    Pieces end where a line break stands between two characters that are no white space: no chunk of either split pattern reaches
    across such a place, so encoding the pieces gives the same tokens as encoding the document at once.
    """
    with open(path, encoding="utf-8", newline="") as f:
        line = f.readline()

        def pieces():
            nonlocal line
            held, size = [], 0
            while line and (split is None or line.rstrip("\r\n") != split):
                held.append(line)
                size += len(line)
                previous, line = line, f.readline()
                if size > PIECE and not line[:1].isspace() and previous.endswith("\n") and not previous[-2:-1].isspace():
                    yield "".join(held)
                    held, size = [], 0
            yield "".join(held)

        while line:
            if split is not None and line.rstrip("\r\n") == split:      # the marker, or several in a row
                line = f.readline()
            else:
                yield pieces()


class Shards:
    """Takes tokens, writes shards under temporary names; finish() gives them their own."""

    def __init__(self, out, kind, size):
        self.out, self.size = out, size
        self.magic, self.version, self.code = KINDS[kind][:3]
        self.counts, self.file = [], None

    def name(self, i):
        return f"{self.out}_{i:06d}.bin"

    def write(self, tokens):
        at = 0
        while at < len(tokens):
            if self.file is None:
                self.counts.append(0)
                self.file = open(self.name(len(self.counts) - 1) + ".tmp", "wb")
                self.file.write(bytes(1024))                            # the header is known when the shard is full
            part = array(self.code, tokens[at:at + self.size - self.counts[-1]])
            if sys.byteorder == "big":
                part.byteswap()
            part.tofile(self.file)
            self.counts[-1] += len(part)
            at += len(part)
            if self.counts[-1] == self.size:
                self.close()

    def close(self):
        if self.file is None:
            return
        self.file.seek(0)
        self.file.write(struct.pack("<3i", self.magic, self.version, self.counts[-1]))
        self.file.close()
        self.file = None

    def finish(self):
        self.close()
        for i in range(len(self.counts)):
            os.rename(self.name(i) + ".tmp", self.name(i))

    def discard(self):
        if self.file is not None:
            self.file.close()
        for i in range(len(self.counts)):
            if os.path.exists(self.name(i) + ".tmp"):
                os.remove(self.name(i) + ".tmp")


class Parser(argparse.ArgumentParser):
    def error(self, message):           # one line, like every other error of this project
        fail(f"{message}; try --help")


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--tokenizer", required=True, choices=KINDS)
    parser.add_argument("--model", metavar="FILE", help="tiktoken ranks file")
    parser.add_argument("--shard-tokens", type=int, default=100_000_000, metavar="N")
    parser.add_argument("--split", metavar="LINE", help="a line that separates documents")
    parser.add_argument("--out", required=True, metavar="data/NAME")
    parser.add_argument("input", nargs="+", metavar="input.txt")
    args = parser.parse_args()
    if not 1 <= args.shard_tokens < 2**31:
        fail(f"--shard-tokens {args.shard_tokens}: from 1 to {2**31 - 1}")
    if old := sorted(glob.glob(glob.escape(args.out) + "_*.bin")):      # would be read together with the new ones
        fail(f"{old[0]} is there already: remove {args.out}_*.bin, or choose another --out")
    if not os.path.isdir(os.path.dirname(args.out) or "."):
        fail(f"there is no folder {os.path.dirname(args.out)}: make it first")

    encoding = load_encoding(args.tokenizer, args.model)
    before, after = KINDS[args.tokenizer][5:]
    shards = Shards(args.out, args.tokenizer, args.shard_tokens)
    texts = size = 0
    path = None
    try:
        for path in args.input:
            for document in documents(path, args.split):
                shards.write(before)
                for piece in document:
                    shards.write(encoding.encode_ordinary(piece))
                    size += len(piece.encode())
                shards.write(after)
                texts += 1
        if not texts:
            fail("no text in " + ", ".join(args.input))
        shards.finish()
    except UnicodeDecodeError as e:
        fail(f"{path} is not UTF-8 (byte {e.object[e.start]:#04x}): convert it first, for example with iconv")
    except OSError as e:
        fail(f"{e.filename or path}: {e.strerror}")
    except KeyboardInterrupt:
        fail("stopped; nothing was kept")
    finally:
        shards.discard()                                                # nothing, if they have their names

    for i, count in enumerate(shards.counts):
        print(f"{shards.name(i)}: {count:,} tokens")
    total = sum(shards.counts)
    print(f"{texts:,} documents, {size:,} bytes, {total:,} tokens: {size / total:.2f} bytes per token")


if __name__ == "__main__":
    main()
