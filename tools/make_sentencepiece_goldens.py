#!/usr/bin/env python3
"""Writes the reference fixtures of SentencePiece's byte-pair encoding with the sentencepiece library.

    python tools/make_sentencepiece_goldens.py TEXT crates/bitnet/tests/fixtures/tokenizer

    sentencepiece.model   a small model with the settings of LLaMA-2's, trained on TEXT (fixtures/models/demo/tale.txt)
    sentencepiece.json    [text, ids] for many texts

needs: sentencepiece (0.2.3 wrote the committed files)
"""

import json
import random
import sys
from pathlib import Path

import sentencepiece

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
