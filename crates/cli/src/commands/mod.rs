//! One file a command.

pub mod batch;
pub mod bench;
pub mod chat;
pub mod completions;
pub mod convert;
pub mod detokenize;
pub mod doctor;
pub mod inspect;
pub mod list;
pub mod logits;
pub mod man;
pub mod perplexity;
pub mod pull;
pub mod rm;
pub mod run;
pub mod tokenize;
pub mod verify;
