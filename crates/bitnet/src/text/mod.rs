//! Text in and out: tokenizer, chat templates and streaming decoder.

mod bpe;
mod hf;
mod jinja;
mod jinja_guard;
mod sentencepiece;
mod split;
mod stream;
mod template;
mod tokenizer;
mod words;

pub use hf::HfVocab;
pub(crate) use split::{AT_SPACES, Key, NUMERALS, PREFIX};
pub use split::{Numerals, Prefix, Split};
pub use stream::{StopStrings, TextStream};
pub use template::{ChatTemplate, Message, Role, TemplateError, TemplateModel};
pub(crate) use tokenizer::Building;
pub use tokenizer::{Specials, Tokenizer, TokenizerError, Vocab};
