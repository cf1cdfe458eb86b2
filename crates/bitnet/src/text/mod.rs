//! Text in and out: tokenizer and streaming decoder.

mod bpe;
mod classes;
mod hf;
mod split;
mod stream;
mod tokenizer;

pub use hf::HfVocab;
pub use stream::{StopStrings, Stopped, TextStream};
pub use tokenizer::{Specials, Tokenizer, TokenizerError, Vocab};
