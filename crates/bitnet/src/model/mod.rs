//! A model: configuration, weights, and the forward pass over them.

pub mod config;
mod cost;
mod fill;
mod forward;
mod identity;
mod load;
mod profile;
mod rope;
pub(crate) mod stored;
mod weights;

pub use config::{Config, Repair};
pub use forward::{Row, Scratch, Unfinished};
pub use identity::identity;
pub use load::{Model, ModelInfo, SpecialTokens};
pub use profile::{Phase, Profile};
pub use weights::{Layer, Strategy, Weights};
