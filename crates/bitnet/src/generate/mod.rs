//! Choosing the next token: sampler, stop conditions and speculation; conversations; many generations at once.

mod batch;
mod chat;
mod constraint;
mod generation;
mod run;
mod sampler;
mod speculate;
mod stop;

pub use batch::{Batch, BatchCounts, Ended, Event, Request, RequestId};
pub use chat::{Answer, Chat};
pub use constraint::{Constraint, ConstraintError, Guide};
pub use run::{Generated, generate};
pub use sampler::{SampleError, Sampler, SamplerConfig, SamplerConfigError};
pub(crate) use speculate::MOST as MOST_PROPOSED;
pub use speculate::Speculation;
pub use stop::{FinishReason, StopConditions};
