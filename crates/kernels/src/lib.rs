//! The numeric kernels of BitNet-Rust: everything that is fast and everything that must be exact.
//!
//! [`Compute`] runs the phases of a forward pass on a [`Pool`] with one set of [`Kernels`]. All kernels compute the same
//! definition to the bit; the scalar one is the specification. This crate knows no model.

#[cfg(not(all(target_endian = "little", target_pointer_width = "64")))]
compile_error!(
    "BitNet-Rust needs a little-endian 64-bit target: the kernels read weights in place as little-endian words and index whole models by usize"
);

mod attention;
pub mod blocks;
mod compute;
pub mod half;
mod head;
mod isa;
mod kv;
pub mod math;
mod memory;
mod ops;
mod pool;
mod race;
mod screen;
mod table;
pub mod ternary;

pub use compute::{Activation, Compute, FloatMatrix, QuantizedRows, Reader, TernaryMatrix, Workspace};
pub use head::{Head, HeadCounts, HeadScratch, Logits};
pub use kv::{KvShape, KvStore, KvType};
pub use memory::{Aligned, Bytes, Counted, HugeBuffer, MemoryPart, PartBytes, Plain, memory_use};
pub use ops::{FloatType, PAGE};
pub use pool::{Pool, allowed_threads};
pub use race::RowRace;
pub use screen::Screen;
pub use table::{Kernels, best, supported};
