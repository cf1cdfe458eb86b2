#!/usr/bin/env python3
"""Writes the reference fixtures of SentencePiece's byte-pair encoding with the sentencepiece library.

    python tools/make_sentencepiece_goldens.py TEXT crates/bitnet/tests/fixtures/tokenizer

    sentencepiece.model   a small model with the settings of LLaMA-2's, trained on TEXT (fixtures/models/demo/tale.txt)
    sentencepiece.json    [text, ids] for many texts
    sentencepiece-tokenizer.json   the same vocabulary as Hugging Face's tokenizer.json, which gives the same ids
    metaspace-cases.json   its newer pre-tokenizers, and [text, ids, ids with special tokens recognised] for some of the texts

needs: sentencepiece (0.2.3 wrote the committed files), tokenizers (0.23)
"""

import json
import random
import sys
from pathlib import Path

import sentencepiece
from tokenizers import Tokenizer

text, out = Path(sys.argv[1]), Path(sys.argv[2])
sentencepiece.SentencePieceTrainer.train(
    input=str(text), model_prefix=str(out / "sentencepiece"), model_type="bpe", vocab_size=600, byte_fallback=True,
    character_coverage=0.999, normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True,
    allow_whitespace_only_pieces=True, minloglevel=2,
)
(out / "sentencepiece.vocab").unlink()
model = sentencepiece.SentencePieceProcessor(model_file=str(out / "sentencepiece.model"))

tale = text.read_text()
texts = ["", " ", "  ", "a", "Once upon a time", " leading", "trailing ", "two  spaces   three    four     five", "\n\n\ttabs\t\n",
         "Привет, мир! 日本語 👩‍🚀 naïve", "1234567 8", "<s> </s> <unk> <0x0A>", "▁ itself ▁▁", "aaaaaaaaaaaaaaaa", "\u00a0\u3000\u200b", "x" * 100, " " * 40]
generator = random.Random(1)
for _ in range(60):
    at, n = generator.randrange(len(tale)), generator.randrange(1, 80)
    texts.append(tale[at : at + n])
    texts.append("".join(generator.choice("the and of,. \n 12é") for _ in range(n)))
with open(out / "sentencepiece.json", "w", encoding="utf-8") as file:
    rows = [json.dumps([text, model.encode(text)], ensure_ascii=False, separators=(",", ":")) for text in texts]
    file.write("[\n" + ",\n".join(rows) + "\n]\n")

pieces = [model.id_to_piece(id) for id in range(model.vocab_size())]
vocab = {piece: id for id, piece in enumerate(pieces)}
special = [id for id in range(len(pieces)) if model.is_control(id) or model.is_unknown(id)]
scores = {piece: model.get_score(id) for piece, id in vocab.items() if id not in special and not model.is_byte(id)}
ways = [(piece[:i], piece[i:], score) for piece, score in scores.items() for i in range(1, len(piece))]
ways = [way for way in ways if way[0] in scores and way[1] in scores]
# As transformers.convert_slow_tokenizer orders them.
ways.sort(key=lambda way: (way[2], len(way[0]), len(way[1])), reverse=True)
flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
tokenizer = {
    "version": "1.0", "truncation": None, "padding": None, "added_tokens": [{"id": id, "content": pieces[id]} | flags for id in special],
    "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
    "pre_tokenizer": None, "post_processor": None,
    "decoder": {"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
                {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
    "model": {"type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None, "end_of_word_suffix": None,
              "fuse_unk": True, "byte_fallback": True, "ignore_merges": False, "vocab": vocab, "merges": [way[:2] for way in ways]},
}
text = json.dumps(tokenizer, separators=(",", ":"))
(out / "sentencepiece-tokenizer.json").write_text(text + "\n")
reference = Tokenizer.from_str(text)
reference.encode_special_tokens = True
assert all(reference.encode(text, add_special_tokens=False).ids == model.encode(text) for text in texts)

texts += ["<s>a b</s>b c", " <s> a</s>", "▁a<s>▁b", "</s>", "a</s>"]
variants = []
for n, (scheme, split) in enumerate((scheme, split) for scheme in ("always", "first", "never") for split in (False, True)):
    tokenizer |= {"normalizer": None, "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": split}}
    reference, cases = Tokenizer.from_str(json.dumps(tokenizer)), []
    for text in texts[n % 3 : -5 : 3] + texts[-5:]:
        case = [text]
        for as_text in (True, False):
            reference.encode_special_tokens = as_text
            case.append(reference.encode(text, add_special_tokens=False).ids)
        cases.append(case)
    variants.append({"pre_tokenizer": tokenizer["pre_tokenizer"], "cases": cases})
with open(out / "metaspace-cases.json", "w", encoding="utf-8") as file:
    json.dump(variants, file, ensure_ascii=False, separators=(",", ":"))
    file.write("\n")
