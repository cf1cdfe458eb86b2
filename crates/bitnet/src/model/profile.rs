//! Where the time of a step goes.

use std::time::{Duration, Instant};

/// A phase of the forward pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Rows of the embedding, angles of RoPE.
    Embed,
    /// rmsnorm and quantisation before q, k, v and before gate, up.
    Norm,
    /// q, k, v projections.
    Qkv,
    /// RoPE and the write to the cache.
    Rope,
    /// Attention over the cache.
    Attention,
    /// Output projection with its sub-norm and the residual sum.
    Output,
    /// Gate projection; with up where that is dense.
    Gate,
    /// The rows of the up projection that are needed.
    Up,
    /// Activation, sub-norm, quantisation.
    Activate,
    /// Down projection and the residual sum.
    Down,
    /// Output head with its norm.
    Head,
}

impl Phase {
    /// All phases, in order.
    pub const ALL: [Self; 11] = [
        Self::Embed,
        Self::Norm,
        Self::Qkv,
        Self::Rope,
        Self::Attention,
        Self::Output,
        Self::Gate,
        Self::Up,
        Self::Activate,
        Self::Down,
        Self::Head,
    ];
}

/// Time and bytes of weights read, by phase, since the last [`Profile::clear`].
#[derive(Clone, Debug)]
pub struct Profile {
    phases: [(Duration, u64); Phase::ALL.len()],
    head: (u64, u64),
    since: Instant,
}

impl Default for Profile {
    fn default() -> Self {
        Self { phases: Default::default(), head: (0, 0), since: Instant::now() }
    }
}

impl Profile {
    /// Forgets everything.
    pub fn clear(&mut self) {
        *self = Self::default();
    }
    /// Time and bytes of a phase.
    pub fn get(&self, phase: Phase) -> (Duration, u64) {
        self.phases[phase as usize]
    }
    /// Tokens whose head was screened, and the rows that had to be computed exactly for them, in all.
    pub fn head(&self) -> (u64, u64) {
        self.head
    }
    pub(crate) fn count_head(&mut self, screened: u64, survivors: u64) {
        self.head.0 += screened;
        self.head.1 += survivors;
    }
    pub(crate) fn begin(&mut self) {
        self.since = Instant::now();
    }
    /// Books the time since the last call to `phase`.
    pub(crate) fn lap(&mut self, phase: Phase, bytes: usize) {
        let now = Instant::now();
        let entry = &mut self.phases[phase as usize];
        entry.0 += now - self.since;
        entry.1 += bytes as u64;
        self.since = now;
    }
}
