#!/usr/bin/env python3
"""Writes fuzz/seeds/gguf: tiny GGUF files, good ones and damaged ones. Written against the format's description, not
with the project's own writer, so that the two check each other."""

import pathlib
import struct

U8, I8, U16, I16, U32, I32, F32, BOOL, STR, ARRAY, U64, I64, F64 = range(13)
CODES = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "?", U64: "Q", I64: "q", F64: "d"}


def string(s):
    s = s.encode() if isinstance(s, str) else s
    return struct.pack("<Q", len(s)) + s


def value(ty, x):
    if ty == STR:
        return string(x)
    if ty == ARRAY:
        element, items = x
        return struct.pack("<IQ", element, len(items)) + b"".join(value(element, i) for i in items)
    return struct.pack("<" + CODES[ty], x)


def gguf(keys=(), tensors=(), version=3, alignment=32):
    """keys: (name, type, value); tensors: (name, dims, type id, offset, bytes of data)."""
    out = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(keys))
    for name, ty, x in keys:
        out += string(name) + struct.pack("<I", ty) + value(ty, x)
    for name, dims, ty, offset, _ in tensors:
        out += string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, ty, offset)
    out += bytes(-len(out) % alignment)
    data = bytearray()
    for _, _, _, offset, size in tensors:
        data.extend(bytes(max(0, offset + size - len(data))))
    return out + bytes(data)


KEYS = [
    ("general.architecture", STR, "bitnet-b1.58"),
    ("general.file_type", U32, 40),
    ("bitnet-b1.58.attention.layer_norm_rms_epsilon", F32, 1e-5),
    ("tokenizer.ggml.add_bos_token", BOOL, True),
    ("tokenizer.ggml.tokens", ARRAY, (STR, ["a", "Ġthe", "<|eot_id|>"])),
    ("tokenizer.ggml.scores", ARRAY, (F32, [0.0, -1.0, 2.0])),
    ("tokenizer.ggml.token_type", ARRAY, (I32, [1, 1, 3])),
]
TENSORS = [("output_norm.weight", [8], 0, 0, 32), ("blk.0.attn_q.weight", [128, 2], 36, 32, 96)]

model = gguf(KEYS, TENSORS)
SEEDS = {
    "model": model,
    "empty": gguf(),
    "version2": gguf(KEYS[:2], TENSORS[:1], version=2),
    "scalars": gguf([(f"k{ty}", ty, 1) for ty in CODES]),
    "nested": gguf([("n", ARRAY, (ARRAY, [(ARRAY, [(U8, [1, 2]), (BOOL, [True])]), (STR, ["x"])]))]),
    "aligned64": gguf([("general.alignment", U32, 64)], [("t", [2, 2, 2, 1], 1, 64, 16)], alignment=64),
    "types": gguf(
        tensors=[
            ("tq1", [256], 34, 0, 54),
            ("tq2", [256], 35, 64, 66),
            ("iq1bn", [64], 134, 160, 15),
            ("iq2bn", [64], 135, 192, 20),
            ("q6k", [256], 14, 224, 210),
        ]
    ),
    "lookup_tables": gguf(tensors=[("tl1", [256, 2], 38, 0, 64), ("tl2", [256], 39, 64, 10)]),
    "bad_truncated": model[:-1],
    "bad_cut_in_keys": model[:150],
    "bad_big_endian": model[:4] + b"\0\0\0\3" + model[8:],
    "bad_key_count": model[:16] + b"\xff" * 8 + model[24:],
    "bad_duplicate_key": gguf([KEYS[0], KEYS[0]]),
    "bad_utf8": gguf([("k", STR, b"\xc3(")]),
    "bad_alignment": gguf([("general.alignment", U32, 3)]),
    "bad_deep": gguf([("k", ARRAY, (ARRAY, [(ARRAY, [(ARRAY, [(ARRAY, [(U8, [1])])])])]))]),
    "bad_overlap": gguf(tensors=[("a", [16], 0, 0, 64), ("b", [8], 0, 32, 32)]),
    "bad_misaligned": gguf(tensors=[("a", [8], 0, 8, 32)]),
    "bad_dims": gguf(tensors=[("a", [1 << 63, 4], 0, 0, 32)]),
    "bad_type": gguf(tensors=[("a", [8], 77, 0, 32)]),
}

folder = pathlib.Path(__file__).parent.parent / "fuzz/seeds/gguf"
folder.mkdir(parents=True, exist_ok=True)
for name, data in SEEDS.items():
    (folder / name).write_bytes(data)
