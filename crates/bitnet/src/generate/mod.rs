//! Choosing the next token: sampler and stop conditions; conversations.

mod chat;
mod run;
mod sampler;
mod stop;

pub use chat::{Answer, Chat};
pub use run::{Generated, generate};
pub use sampler::{SampleError, Sampler, SamplerConfig, SamplerConfigError};
pub use stop::{FinishReason, StopConditions};
