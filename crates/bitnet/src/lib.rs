//! BitNet b1.58 inference.
#![forbid(unsafe_code)]

pub mod generate;
pub mod text;
