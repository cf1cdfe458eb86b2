//! Where the time of a step goes.

use bitnet_kernels::HeadCounts;
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
    /// RoPE.
    Rope,
    /// The write to the cache and attention over it.
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
    head: HeadCounts,
    since: Instant,
}

impl Default for Profile {
    fn default() -> Self {
        Self { phases: Default::default(), head: HeadCounts::default(), since: Instant::now() }
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
    /// What the screen of the output head did.
    pub fn head(&self) -> HeadCounts {
        self.head
    }
    pub(crate) fn count_head(&mut self, counts: HeadCounts) {
        self.head.add(counts);
    }
    pub(crate) fn begin(&mut self) {
        self.since = Instant::now();
    }
    /// Books the time since the last call to `phase`, and returns it.
    pub(crate) fn lap(&mut self, phase: Phase, bytes: usize) -> Duration {
        let now = Instant::now();
        let entry = &mut self.phases[phase as usize];
        let time = now - self.since;
        entry.0 += time;
        entry.1 += bytes as u64;
        self.since = now;
        time
    }
}
