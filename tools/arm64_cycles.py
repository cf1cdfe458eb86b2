#!/usr/bin/env python3
"""Cycles that the hot loops of the arm64 kernels take on several cores, as llvm-mca reckons them.

    tools/arm64.sh python3 tools/arm64_cycles.py [--mca llvm-mca-19]

Compiles the kernels to assembly, takes the innermost loop of each kernel, has llvm-mca simulate it, and prints the
table of docs/arm64.md. The loops are simulated with all data in the first-level cache, so a row read from memory is slower.
The scalar kernel stands there twice: as it is shipped, for any arm64 CPU, and compiled for the one core.
"""

import argparse
import collections
import os
import pathlib
import re
import subprocess
import sys
import tempfile

TARGET = "aarch64-unknown-linux-gnu"
CORES = {"apple-m1": "dotprod", "neoverse-n1": "dotprod", "neoverse-v2": "i8mm", "cortex-a72": "base"}
# What is measured: its name and the function that holds its loop.
OPERATIONS = {
    "rows, one token": "gemv_rows",
    "panel, several tokens": "matmul",
    "columns, one token": "add_columns",
    "four-bit head, one token": "screen_logits",
    "attention, q8, four queries": "attend",
}
ITERATIONS = 4000


def assembly(cpu):
    """The kernels' assembly, for any arm64 CPU or for one core."""
    with tempfile.TemporaryDirectory() as folder:
        env = dict(os.environ, CARGO_PROFILE_RELEASE_LTO="off", CARGO_PROFILE_RELEASE_DEBUG="0",
                   CARGO_PROFILE_RELEASE_CODEGEN_UNITS="1", CARGO_TARGET_DIR=folder)
        if cpu:
            env["RUSTFLAGS"] = f"-C target-cpu={cpu}"
        command = ["cargo", "rustc", "--release", "--target", TARGET, "-p", "bitnet-kernels", "--lib", "--", "--emit", "asm"]
        subprocess.run(command, check=True, env=env, stderr=subprocess.DEVNULL)
        (path,) = pathlib.Path(folder).glob(f"{TARGET}/release/deps/bitnet_kernels-*.s")
        return path.read_text()


def innermost_loops(text, table, function):
    """The innermost loops of one function of one table of kernels, as lists of instructions."""
    pattern = rf"^(_ZN\w*5table\d+{table}\d+{function}17h\w+):\n(.*?)\.cfi_endproc"
    body = re.search(pattern, text, re.M | re.S).group(2).split("\n")
    labels, ends = {}, {}
    for i, line in enumerate(body):
        if label := re.match(r"(\.L\w+):", line):
            labels[label.group(1)] = i
        branch = re.match(r"\s+(?:b|b\.\w+|cbn?z|tbn?z)\s+(?:.*,\s*)?(\.L\w+)$", line)
        if branch and branch.group(1) in labels:
            ends[labels[branch.group(1)]] = i
    spans = list(ends.items())
    inner = [(a, b) for a, b in spans if not any((c, d) != (a, b) and a <= c and d <= b for c, d in spans)]
    return [[line.strip() for line in body[a + 1 : b + 1] if re.match(r"\t[a-z]", line)] for a, b in inner]


def counts(loop):
    return collections.Counter(line.split()[0] for line in loop)


def products(loop):
    """Products of an int8 code and a ternary weight in one turn of a loop."""
    total = 0
    for line in loop:
        name, lanes = line.split()[0], re.match(r"\w+\s+v\d+\.(4s|8h),", line)
        if name in ("sdot", "usdot"):
            total += 16
        elif name == "smmla":
            total += 32
        elif lanes and re.match("(smull|smlal|mla|mul)", name):
            total += {"4s": 4, "8h": 8}[lanes.group(1)]
        elif not lanes and name in ("madd", "mul") and counts(loop)["madd"] >= 7:
            total += 1  # the scalar columns: eight products of one output
    return total


def row_tokens(loop):
    """Tokens that share the codes of a row: products for each instruction that takes out sixteen codes."""
    n = counts(loop)
    return (n["sdot"] + n["smlal"]) / max(n["and"] + n["ushr"], 1)


def integer_loop(text, table, function, tokens=1):
    """The loop of one function that does most with an instruction: the largest tile."""
    loops = innermost_loops(text, table, function)
    if function in ("gemv_rows", "screen_logits") and table != "scalar":
        loops = [loop for loop in loops if row_tokens(loop) == tokens]
    best = max(loops, key=lambda loop: products(loop) / len(loop))
    return best, products(best)


def attention_loop(text, table):
    """The loop of attention over a cache of float32 with four queries: a product and a sum at a time."""
    for loop in innermost_loops(text, table, "attend"):
        n = counts(loop)
        lanes = sum(4 for line in loop if re.match(r"fmul\s+v\d+\.4s,", line))
        if lanes >= 64 and n["fmul"] == n["fadd"] and not n["fcvtl"]:
            return loop, lanes
    sys.exit(f"no loop of attention in {table}")


def head_loop(text, table):
    """The loop of one row and one token of a half-precision head: sixteen products a turn.

    With SVE the compiler widens in a loop of its own, four numbers a turn of 128 bits. Then that stands for the whole, products left out.
    """
    loops = innermost_loops(text, table, "head_rows")
    for loop in loops:
        n = counts(loop)
        if n["fadd"] == 4 and n["fcvtl"] + n["ucvtf"] > 0:
            return loop, 16
    for loop in loops:
        n = counts(loop)
        if n["ucvtf"] == n["incw"] == 1:
            return loop, 4
    sys.exit(f"no loop of a half-precision head in {table}")


def simulate(mca, core, loop):
    """Cycles of one turn of a loop in a long run of them."""
    code = "\n".join(line for line in loop if not line.startswith("prfm"))
    command = [mca, "-mtriple=aarch64", f"-mcpu={core}", f"-iterations={ITERATIONS}", "-mattr=+dotprod,+i8mm"]
    out = subprocess.run(command, input=code, check=True, capture_output=True, text=True).stdout
    return int(re.search(r"Total Cycles:\s+(\d+)", out).group(1)) / ITERATIONS


def main():
    os.chdir(pathlib.Path(__file__).parent.parent)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mca", default="llvm-mca-19", help="the llvm-mca to run")
    mca = parser.parse_args().mca
    shipped = assembly(None)
    own = {core: assembly(core) for core in CORES}
    rows = []
    for what, function in OPERATIONS.items():
        for table in ("scalar", "neon", "neondotprod", "neoni8mm"):
            if table != "neoni8mm" or function in ("matmul", "add_columns"):  # else that of neondotprod
                rows.append((f"{what}: {table}", lambda _, t=table, f=function: integer_loop(shipped, t, f), table))
        if function == "gemv_rows":
            four = lambda _: integer_loop(shipped, "neondotprod", "gemv_rows", 4)  # noqa: E731
            rows.append(("rows, four tokens: neondotprod", four, "neondotprod"))
        own_loop = lambda core, f=function: integer_loop(own[core], "scalar", f)  # noqa: E731
        rows.append((f"{what}: scalar, built for the core", own_loop, "scalar"))
    for what, find in {"half-precision head, one token": head_loop, "attention, f32, four queries": attention_loop}.items():
        for table in ("scalar", "neon"):
            rows.append((f"{what}: {table}", lambda _, t=table, f=find: f(shipped, t), table))
        rows.append((f"{what}: scalar, built for the core", lambda core, f=find: f(own[core], "scalar"), "scalar"))

    print("| loop | instructions | " + " | ".join(CORES) + " |")
    print("| --- |" + " ---: |" * (len(CORES) + 1))
    for name, find, table in rows:
        cells, instructions = [], set()
        for core, best in CORES.items():
            loop, size = find(core)
            instructions.add(f"{len(loop) * 64 / size:.1f}")
            runs = {"neoni8mm": best == "i8mm", "neondotprod": best != "base"}.get(table, True)
            cells.append(f"{simulate(mca, core, loop) * 64 / size:.2f}" if runs else "–")
        print(f"| {name} | {' / '.join(sorted(instructions))} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
