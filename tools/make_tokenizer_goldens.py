"""Writes the tokenizer's reference data, with Hugging Face `tokenizers` as the reference:

  demo-tokenizer.json   the demo model's tokenizer.json without white space
  demo-cases.json       texts and the demo tokenizer's ids for them
  llama3-extract.json   the part of the LLaMA-3 vocabulary that the texts can touch: every token that occurs in a
                        piece of a text, under its real id, and the merges that lead to these tokens in their real
                        order; and the texts with the ids that the whole vocabulary gives
  falcon-cases.json     pre-tokenizers as Falcon has them, and the ids that the demo vocabulary gives with them for every second
                        of the texts
  classes.in            with --classes: the Unicode classes of the reference's regex engine, and punctuation.in

usage: make_tokenizer_goldens.py --tokenizer-json demo-model/tokenizer.json --llama3 llama3/tokenizer.model
                                 --out crates/bitnet/tests/fixtures/tokenizer [--classes crates/bitnet/src/text]
needs: tokenizers (0.23 wrote the committed files)
"""
import argparse, base64, json, os, random, re
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
           r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")

def texts():
    """Fixed texts for every alternative of the split and many scripts, then seeded noise."""
    out = ["", " ", "   ", "\n", "a", "'", "\0", "\0\0 \0a\x01\x1b[0m\x7f\x80\x9f", "\ufeffBOM first", "mid\ufeffdle \ufeff",
        "Once upon a time there was a king who had three daughters, and they lived in a castle by the sea.",
        "I'm you're he's she'll we've they'd don't I'M YOU'RE HE'S SHE'LL WE'VE THEY'D DON'T i'Ll 'tis 'TWAS 'stop 'sunk 'deed 'more",
        "can'\u017f 'ſ 'ſs 'Reel 'VEx 'lL 'lx 'r 'l 'v '' ''s ’s ʼs 'ſt 'ﬆ 'ﬀ 'K 'ŉ",
        "café naïve Ångström Straße ﬁne ǅ İstanbul ıi ß ſ ĳ", "cafe\u0301 nai\u0308ve A\u030angstro\u0308m \u0301lone e\u0301\u0301\u0301\u0320",
        "Привет, мир! Как дела? Ёлка", "Γειά σου Κόσμε ΐ ς σ", "Zażółć gęślą jaźń. Příliš žluťoučký kůň. Ő ű",
        "你好,世界!今天天气怎么样?我喜欢吃苹果。", "日本語のテキスト、カタカナとひらがな。ヷﾊﾝｶｸ々〆ヶ", "안녕하세요 세계! 한국어 텍스트 ㄱㄴㄷ 각",
        "สวัสดีชาวโลก ภาษาไทยไม่มีช่องว่าง น้ำ ๑๒๓๔", "مرحبا بالعالم، كيف حالك؟ ١٢٣٤٥ ـــ لله مُحَمَّد", "שלום עולם שָׁלוֹם",
        "नमस्ते दुनिया, क्षत्रिय १२३४५ ॐ श्री", "বাংলা ভাষা ১২৩", "தமிழ் மொழி ௧௨௩", "ქართული ენა", "Հայերեն լեզու", "አማርኛ ቋንቋ", "ខ្មែរ", "བོད་ཡིག",
        "𝕳𝖊𝖑𝖑𝖔 𐌰𐌱𐌲 𒀀𒀁 𓀀 🄰 𠀀𪛖 𞤀", "👋🏽 👨‍👩‍👧‍👦 🏳️‍🌈 🇩🇪🇫🇷 🇩 ❤️ ☺︎ 👩🏿‍🚀 1️⃣ #️⃣ 🏴󠁧󠁢󠁥󠁮󠁧󠁿 \u200d \ufe0f 🏽",
        "1 12 123 1234 12345 123456 1234567 3.14159265358979 1,000,000 -5 1e-10 0xDEADBEEF 2024-12-31T23:59:60Z", "9" * 100,
        "x² y³ H₂O ½ ¾ ⅓ Ⅷ ⅷ ↂ ①②③ ⓪ ㊿ 〇一二三 ٣ ߁߂ 𝟙𝟚 𐄇 ৴ ² ²²²² 1²3",
        "a b  c   d    e\tf\t\tg \t h\t i", "\t", "\t\t\tx", " \t \t", "a \n b \n\n c\n", "\r\n", "a\r\n\r\nb\r\rc\n\r d\r\n \r\n  \r\n   e", "  \n  \n  x", "\n\n\n   ",
        "end   ", "   start", "\u00a0nbsp\u00a0\u00a0x \u00a0y\u00a0 ", "\u3000全角\u3000\u3000空白 \u3000x", "a\u2003b\u2009\u200ac\u202fd\u205fe\u1680f",
        "a\u2028b\u2029c\u0085d\x0be\x0cf\u0085\u0085 \u0085x", "a\u200bb \u200b c\u200c\u200d\u2060d\u180ee \u180e", "a\x1cb\x1dc\x1ed\x1fe \x1c \x1f",
        "fn main() {\n    println!(\"{}\", x[0] != y && z->w);\n}\n", "def f(x):\n\treturn {k: v**2 for k, v in x.items() if k}  # done\n",
        "<html>\n  <body class=\"a\">&nbsp;</body>\n</html>", "SELECT * FROM t WHERE a='it''s' -- x\n", "https://example.com/a?b=c&d=%20#e user@host.org C:\\dir\\f.txt",
        "{\"a\": [1, 2.5, null], \"b\": \"\\u00e9\"}", "$$\\int_0^\\infty e^{-x^2}\\,dx = \\frac{\\sqrt{\\pi}}{2}$$", "!!!???...---===***###   !!!\n\n!!! \n!",
        "\"unclosed (paren [bracket {brace «guillemet “quote ‘single", "‎rtl ‏mark ‪‬ \u00ad\u034f\u061c", "\ufffd\ufffe\uffff\U0010ffff\ue000\U000f0000 \ufdd0",
        "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft",
        "pneumonoultramicroscopicsilicovolcanoconiosis antidisestablishmentarianism", "ThisIsCamelCase and_this_is_snake_case ANDTHISISLOUD", "ABC'DEF'S'LL'x",
        "<|begin_of_text|>Hello<|eot_id|>", "<|eot_id|>", "<|eot_id|><|eot_id|> <|eot_id|>\n", "User: <|eot_id|>Assistant: ", "a<|end_of_text|>  b  <|start_header_id|>user<|end_header_id|>\n\nHi",
        "<|eot_id|", "<|eot_id |>", "<<|eot_id|>>", "<|<|eot_id|>|>", "<|EOT_ID|>", "it<|eot_id|>'s  <|eot_id|>  x", "<|reserved_special_token_0|><|reserved_special_token_2|>"]
    rng = random.Random(158)
    ascii_, spaces = [chr(c) for c in range(128)], list(" \t\n\r\u00a0\u3000\u0085\u200b\u2028")
    blocks = [(0x80, 0x250), (0x300, 0x370), (0x370, 0x600), (0x600, 0x780), (0x900, 0xe80), (0x1e00, 0x2100), (0x2150, 0x2190), (0x2460, 0x2500),
              (0x3000, 0x3200), (0x4e00, 0x5200), (0xac00, 0xb000), (0xfb00, 0xfb50), (0x10000, 0x10200), (0x1d400, 0x1d800), (0x1f300, 0x1f700), (0, 0xd800), (0xe000, 0x110000)]
    for _ in range(48):
        picks = rng.sample(blocks, 2)
        s = ""
        for _ in range(rng.randrange(4, 40)):
            kind = rng.random()
            if kind < .3: s += rng.choice(ascii_)
            elif kind < .5: s += rng.choice(spaces)
            elif kind < .55: s += rng.choice(["'s", "'LL", "'ſ", "'re", "12345", "\r\n", "  \n", "  "])
            else: s += chr(rng.randrange(*rng.choice(picks)))
        out.append(s)
    return out

def byte_alphabet():
    printable = [*range(0x21, 0x7f), *range(0xa1, 0xad), *range(0xae, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + n) for n, b in enumerate(others)}

def llama3(path):
    """(tokens by id in the byte alphabet, merges, special tokens, the reference's tokenizer)"""
    alphabet = byte_alphabet()
    text = lambda token: "".join(alphabet[b] for b in token)
    ranks = {}
    for line in open(path, "rb"):
        if line.strip():
            token, rank = line.split()
            ranks[base64.b64decode(token)] = int(rank)
    tokens = sorted(ranks, key=ranks.get)
    merges = []
    for token in tokens:  # all the ways to split it into two tokens
        pairs = sorted((ranks[token[:i]], ranks[token[i:]]) for i in range(1, len(token)) if token[:i] in ranks and token[i:] in ranks)
        merges += [(text(tokens[left]), text(tokens[right])) for left, right in pairs]
    named = {0: "begin_of_text", 1: "end_of_text", 6: "start_header_id", 7: "end_header_id", 9: "eot_id"}
    reserved = iter(range(256))
    special = [f"<|{named[i] if i in named else f'reserved_special_token_{next(reserved)}'}|>" for i in range(256)]
    tokenizer = Tokenizer(models.BPE(vocab={text(t): r for t, r in ranks.items()}, merges=merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PATTERN), "isolated", False), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(s, normalized=False, special=True) for s in special])
    assert tokenizer.token_to_id("<|eot_id|>") == 128009
    return [text(t) for t in tokens], merges, special, tokenizer

def cases(tokenizer):
    """ids: special tokens as text; parsed: recognised, where that differs."""
    out = []
    for text in texts():
        tokenizer.encode_special_tokens = True
        case = {"text": text, "ids": tokenizer.encode(text, add_special_tokens=False).ids}
        tokenizer.encode_special_tokens = False
        parsed = tokenizer.encode(text, add_special_tokens=False).ids
        out.append(case | ({"parsed": parsed} if parsed != case["ids"] else {}))
    return out

def extract(tokens, merges, special, tokenizer):
    parts = set(byte_alphabet().values())
    between = re.compile("|".join(map(re.escape, special)))
    for text in {part for text in texts() for part in [text, *between.split(text)]}:
        for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text):
            parts |= {piece[i:j] for i in range(len(piece)) for j in range(i + 1, min(len(piece), i + 128) + 1)}
    assert max(map(len, tokens)) <= 128
    ids = [id for id, token in enumerate(tokens) if token in parts]
    kept = {tokens[id] for id in ids}
    seen = " ".join(texts())
    special_ids = [len(tokens) + i for i, s in enumerate(special) if s in seen]
    return {"n_vocab": len(tokens) + len(special), "ids": ids, "tokens": [tokens[id] for id in ids],
        "special_ids": special_ids, "specials": [special[id - len(tokens)] for id in special_ids],
        "merges": [f"{left} {right}" for left, right in merges if left + right in kept], "cases": cases(tokenizer)}

def falcon(path):
    split = lambda regex: {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    digits = lambda each: {"type": "Digits", "individual_digits": each}
    first = [{"type": "Punctuation", "behavior": "Contiguous"},
             {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}]
    out = []
    for n, rest in enumerate([[digits(False), split("[0-9][0-9][0-9]")], [split("[0-9]")], [digits(True)], [split("[0-9][0-9][0-9]")]]):
        file = json.load(open(path))
        file["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": first + rest}
        file["model"]["ignore_merges"] = False
        tokenizer = Tokenizer.from_str(json.dumps(file))
        tokenizer.encode_special_tokens = True
        ids = [[text, tokenizer.encode(text, add_special_tokens=False).ids] for text in texts()[n % 2::2]]
        out.append({"pre_tokenizer": file["pre_tokenizer"], "cases": ids})
    return out

def classes():
    """Asks the regex engine for the class of every code point."""
    points = [c for c in range(0x110000) if not 0xd800 <= c < 0xe000]
    everything = "".join(map(chr, points))
    table = bytearray(0x110000)
    for number, pattern in (1, r"\p{L}"), (2, r"\p{N}"), (3, r"\s"):
        hits = bytearray(b"\1" * len(points))
        for _, (start, end) in pre_tokenizers.Split(Regex(pattern), "removed").pre_tokenize_str(everything):
            hits[start:end] = bytes(end - start)
        for point, hit in zip(points, hits):
            if hit: table[point] = number
    table[0xd800:0xe000] = bytes([table[0xd7ff]]) * 0x800  # never asked for
    bounds = [c << 2 | table[c] for c in range(0x110000) if c == 0 or table[c] != table[c - 1]]
    rows = lambda numbers: "[\n" + "".join(f"{row}\n" for row in re.findall(r".{1,105}(?:,|$)", ",".join(map(hex, numbers)) + ",")) + "]\n"
    marks = pre_tokenizers.Punctuation("contiguous")
    mark = lambda c: not 0xd800 <= c < 0xe000 and len(marks.pre_tokenize_str(f"a{chr(c)}a")) == 3
    turns = [c for c in range(1, 0x110000) if mark(c) != mark(c - 1)]
    return rows(bounds), rows(turns)

def write_json(path, value):
    with open(path, "w") as f:
        json.dump(value, f, ensure_ascii=True, separators=(",", ":"))
        f.write("\n")

if __name__ == "__main__":
    ap = argparse.ArgumentParser()
    ap.add_argument("--tokenizer-json", required=True); ap.add_argument("--llama3", required=True)
    ap.add_argument("--out", required=True); ap.add_argument("--classes")
    a = ap.parse_args()
    os.makedirs(a.out, exist_ok=True)
    write_json(f"{a.out}/demo-tokenizer.json", json.load(open(a.tokenizer_json)))
    write_json(f"{a.out}/demo-cases.json", cases(Tokenizer.from_file(a.tokenizer_json)))
    write_json(f"{a.out}/falcon-cases.json", falcon(a.tokenizer_json))
    write_json(f"{a.out}/llama3-extract.json", extract(*llama3(a.llama3)))
    if a.classes:
        for name, table in zip(["classes.in", "punctuation.in"], classes()): open(f"{a.classes}/{name}", "w").write(table)
