//! How much memory a model and its engine take, before any of it is taken.

use crate::EngineOptions;
use crate::model::{Config, Strategy, Weights};
use bitnet_kernels::{KvType, MemoryPart, PAGE, PartBytes};

/// Bytes by what they are for, as [`memory_use`](crate::kernels::memory_use) counts what was really taken. Pages of the
/// model file are not in it: the system takes them back when memory is short.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryPlan(pub PartBytes);

impl MemoryPlan {
    /// The plan of a model of [random weights](crate::model::Model::random) with an engine.
    pub fn random(config: &Config, strategy: Strategy, options: &EngineOptions, threads: usize) -> Self {
        Self(Weights::random_bytes(config, strategy)).and(options.bytes(config, threads))
    }

    /// With these bytes too.
    pub fn and(mut self, bytes: PartBytes) -> Self {
        for (all, more) in self.0.iter_mut().zip(bytes) {
            *all = all.saturating_add(more);
        }
        self
    }

    /// Bytes of a part.
    pub fn of(&self, part: MemoryPart) -> usize {
        self.0[part as usize]
    }

    /// Bytes in all.
    pub fn total(&self) -> usize {
        self.0.iter().fold(0, |sum, part| sum.saturating_add(*part))
    }
}

impl EngineOptions {
    /// Rows of a step where memory is short: a prompt takes somewhat longer, and all results are the same.
    const FEW_ROWS: usize = 128;

    /// The options that are changed least so that `plan`, in bytes, stays within `budget`. First steps get fewer rows; then
    /// the cache may be of one of `types`, in their order, then the context shorter, but not below `least`. None where
    /// nothing helps.
    pub fn fit(
        self,
        budget: usize,
        least: usize,
        types: &[KvType],
        plan: impl Fn(&Self) -> usize,
    ) -> Option<Self> {
        let fits = |options: &Self| plan(options) <= budget;
        let mut options = self;
        for &cache_type in [self.cache_type].iter().chain(types) {
            for max_rows in [self.max_rows, self.max_rows.min(Self::FEW_ROWS)] {
                options = Self { max_rows, cache_type, ..self };
                if fits(&options) {
                    return Some(options);
                }
            }
        }
        while options.context > least {
            // The cache is taken in whole pages.
            options.context = ((options.context - 1) / PAGE * PAGE).max(least);
            if fits(&options) {
                return Some(options);
            }
        }
        None
    }
}
