//! BitNet b1.58 inference: ternary weights, 8-bit activations, the same bits on every machine.
//!
//! A [`Model`](model::Model) is loaded from a GGUF file and put into an [`Engine`], which continues sequences of tokens and
//! gives logits. [`text`] makes tokens of text and text of tokens; [`generate`] chooses the next token; `grammar` makes it follow a
//! JSON schema or a grammar; [`convert`] makes the
//! file from a Hugging Face checkpoint; `hub` downloads models.
#![forbid(unsafe_code)]

pub mod convert;
pub mod engine;
mod error;
pub mod generate;
#[cfg(feature = "grammar")]
pub mod grammar;
#[cfg(feature = "hub")]
pub mod hub;
mod memory;
pub mod model;
pub mod text;

pub use bitnet_gguf as gguf;
pub use bitnet_kernels as kernels;
pub use engine::{Engine, EngineOptions, Feed, SavedError, SequenceId, Wanted};
pub use error::Error;
pub use memory::MemoryPlan;
