//! Choosing the next token: sampler and stop conditions.

mod sampler;
mod stop;

pub use sampler::{SampleError, Sampler, SamplerConfig, SamplerConfigError};
pub use stop::{FinishReason, StopConditions};
