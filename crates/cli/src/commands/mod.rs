//! One file a command.

pub mod bench;
pub mod chat;
pub mod completions;
pub mod convert;
pub mod detokenize;
pub mod inspect;
pub mod logits;
pub mod man;
pub mod perplexity;
pub mod run;
pub mod tokenize;
