//! Text in and out: tokenizer and streaming decoder.
