//! The forward pass of BitNet b1.58 (arXiv:2402.17764; the shapes are those of Hugging Face's `BitNetForCausalLM`, or of
//! `LlamaForCausalLM`, which has no sub-norms).

use super::cost::SparseCost;
use super::{Model, Phase, Profile};
use bitnet_kernels::ternary::Layout;
use bitnet_kernels::{Aligned, Compute, HeadScratch, KvStore, Logits, QuantizedRows, Workspace};
use std::sync::atomic::{AtomicBool, Ordering};

/// One token of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    /// Its id, below the vocabulary size.
    pub token: u32,
    /// Which of the step's sequences it belongs to.
    pub sequence: u32,
    /// Its place in that sequence, from 0.
    pub position: u32,
    /// Whether its logits are wanted.
    pub wants_logits: bool,
    /// For the caller: what this row answers to.
    pub tag: u32,
}

/// Why a step gave no logits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unfinished {
    /// The embedding of this row's token is not finite.
    BadEmbedding(usize),
    /// Someone raised the flag.
    Cancelled,
}

/// The buffers of a step of up to a fixed number of rows. Nothing is allocated while a step runs.
pub struct Scratch {
    ids: Vec<u32>,
    /// The residual stream, `[rows][hidden_size]`.
    x: Aligned<f32>,
    /// `[rows][n_heads * head_dim]`, and what attention makes of it.
    q: Aligned<f32>,
    attended: Aligned<f32>,
    /// `[rows][n_kv_heads * head_dim]`.
    k: Aligned<f32>,
    v: Aligned<f32>,
    /// `[rows][intermediate_size]`.
    gate: Aligned<f32>,
    up: Aligned<f32>,
    /// `[rows][hidden_size]`: what a block adds to the residual stream.
    delta: Aligned<f32>,
    codes: QuantizedRows,
    /// Rows of the up projection that squared ReLU leaves alive.
    live: Vec<u32>,
    /// What reading them costs, in steps of 1, 2 and 3 rows.
    up_costs: [SparseCost; Model::SPARSE_ROWS],
    /// The same of columns of the down projection, in steps of many rows.
    down_cost: SparseCost,
    work: Workspace,
    head: HeadScratch,
    profile: Profile,
    /// `[rows][rope_dim / 2]`.
    cos: Aligned<f32>,
    sin: Aligned<f32>,
}

impl Scratch {
    /// Buffers for steps of up to `max_rows` rows of `model` on `compute`.
    pub fn new(model: &Model, compute: &Compute, max_rows: usize) -> Self {
        let config = model.config();
        let floats = |width: usize| Aligned::zeroed(max_rows * width);
        let widest = config.hidden_size.max(config.q_width()).max(config.intermediate_size);
        Self {
            ids: Vec::with_capacity(max_rows),
            x: floats(config.hidden_size),
            q: floats(config.q_width()),
            attended: floats(config.q_width()),
            k: floats(config.kv_width()),
            v: floats(config.kv_width()),
            gate: floats(config.intermediate_size),
            up: floats(config.intermediate_size),
            delta: floats(config.hidden_size),
            codes: QuantizedRows::new(max_rows, widest),
            live: Vec::with_capacity(config.intermediate_size.next_multiple_of(64)),
            up_costs: Default::default(),
            down_cost: SparseCost::default(),
            work: Workspace::new(widest, compute.pool().threads()),
            head: HeadScratch::new(config.vocab_size, config.hidden_size, compute.pool().threads()),
            profile: Profile::default(),
            cos: floats(config.rope_dim / 2),
            sin: floats(config.rope_dim / 2),
        }
    }

    /// Where the time went.
    pub fn profile(&mut self) -> &mut Profile {
        &mut self.profile
    }

    /// Bytes of the buffers for `max_rows` rows on `threads` threads.
    pub fn bytes(config: &super::Config, max_rows: usize, threads: usize) -> usize {
        let widest = config.hidden_size.max(config.q_width()).max(config.intermediate_size);
        let row = 2 * config.hidden_size
            + 2 * config.q_width()
            + 2 * config.kv_width()
            + 2 * config.intermediate_size
            + config.rope_dim;
        // Every buffer begins on a cache line and has one more.
        const ALIGNMENT: usize = 32 * 128;
        4 * row * max_rows
            + QuantizedRows::bytes(max_rows, widest)
            + Workspace::bytes(widest, threads)
            + HeadScratch::bytes(config.vocab_size, config.hidden_size, threads)
            + ALIGNMENT
    }
}

impl Model {
    /// Most tokens of a step for which up rows are left out: of more, hardly a row is needed by none.
    const SPARSE_ROWS: usize = 3;

    /// Runs one step: every row through every block, its keys and values into `kv`. `pages(s)` are the pages of
    /// sequence s, which must reach the positions of its rows. The logits of the rows that want them, those that `choice`
    /// asks for, are written to `logits` (`[wanted rows][vocab_size]`), in order.
    ///
    /// Rows of one sequence must stand in order of position, and follow what `kv` already holds of it. Another thread may
    /// raise `cancel`, which ends the step before its next block.
    ///
    /// # Errors
    /// [`Unfinished`] says why.
    pub fn step<'a>(
        &self,
        compute: &Compute,
        kv: &mut KvStore,
        rows: &[Row],
        pages: impl Fn(u32) -> &'a [u32] + Sync,
        choice: impl Fn(&Row) -> Logits<'a>,
        scratch: &mut Scratch,
        logits: &mut [f32],
        cancel: &AtomicBool,
    ) -> Result<(), Unfinished> {
        let (config, weights, n) = (self.config(), self.weights(), rows.len());
        let eps = config.rms_norm_eps;
        let x = &mut scratch.x[..n * config.hidden_size];
        let q = &mut scratch.q[..n * config.q_width()];
        let attended = &mut scratch.attended[..n * config.q_width()];
        let (k, v) = (&mut scratch.k[..n * config.kv_width()], &mut scratch.v[..n * config.kv_width()]);
        let gate = &mut scratch.gate[..n * config.intermediate_size];
        let up = &mut scratch.up[..n * config.intermediate_size];
        let delta = &mut scratch.delta[..n * config.hidden_size];
        let half = config.rope_dim / 2;
        let (cos, sin) = (&mut scratch.cos[..n * half], &mut scratch.sin[..n * half]);
        let Scratch { ids, codes, live, up_costs, down_cost, work, head, profile, .. } = scratch;

        profile.begin();
        ids.clear();
        ids.extend(rows.iter().map(|row| row.token));
        compute.embed(&weights.embedding, ids, x).map_err(Unfinished::BadEmbedding)?;
        for (i, row) in rows.iter().enumerate() {
            let range = i * half..(i + 1) * half;
            self.rope_angles(row.position as usize, &mut cos[range.clone()], &mut sin[range]);
        }
        profile.lap(Phase::Embed, 0);
        for (index, layer) in weights.layers.iter().enumerate() {
            // A step of a long prompt takes seconds.
            if cancel.load(Ordering::Relaxed) {
                return Err(Unfinished::Cancelled);
            }
            compute.norm_quantize(x, &layer.attn_norm, eps, Layout::Rows, work, codes);
            profile.lap(Phase::Norm, 0);
            compute.soon([&layer.attn_output]);
            compute.linear(
                codes,
                work,
                [(&layer.attn_q, &mut *q), (&layer.attn_k, &mut *k), (&layer.attn_v, &mut *v)],
            );
            let bytes = layer.attn_q.byte_len() + layer.attn_k.byte_len() + layer.attn_v.byte_len();
            profile.lap(Phase::Qkv, bytes);
            compute.rope(q, config.head_dim, cos, sin, n);
            compute.rope(k, config.head_dim, cos, sin, n);
            profile.lap(Phase::Rope, 0);
            let sees = |row: usize| (pages(rows[row].sequence), rows[row].position as usize + 1);
            compute.attention(kv, index, q, Some([k, v]), sees, attended);
            profile.lap(Phase::Attention, 0);
            match &layer.attn_sub_norm {
                Some(norm) => compute.norm_quantize(attended, norm, eps, Layout::Rows, work, codes),
                None => compute.quantize(attended, config.q_width(), Layout::Rows, work, codes),
            }
            compute.soon([&layer.ffn_gate]);
            compute.linear(codes, work, [(&layer.attn_output, &mut *delta)]);
            compute.add(x, delta);
            profile.lap(Phase::Output, layer.attn_output.byte_len());

            compute.norm_quantize(x, &layer.ffn_norm, eps, Layout::Rows, work, codes);
            profile.lap(Phase::Norm, 0);
            let layout = layer.ffn_down.layout();
            if n <= Self::SPARSE_ROWS && layout == Layout::Columns {
                compute.linear_positive(codes, work, &layer.ffn_gate, gate, live);
                profile.lap(Phase::Gate, layer.ffn_gate.byte_len());
                let mut read = live.len();
                let listed = up_costs[n - 1].lists(read, config.intermediate_size);
                if listed {
                    compute.linear_listed(codes, work, &layer.ffn_up, live, up);
                } else {
                    compute.linear(codes, work, [(&layer.ffn_up, &mut *up)]);
                    read = config.intermediate_size;
                }
                let bytes = layer.ffn_up.byte_len() / config.intermediate_size * read;
                up_costs[n - 1].learn(listed, read, profile.lap(Phase::Up, bytes));
            } else {
                compute.linear(codes, work, [(&layer.ffn_gate, &mut *gate), (&layer.ffn_up, &mut *up)]);
                profile.lap(Phase::Gate, layer.ffn_gate.byte_len() + layer.ffn_up.byte_len());
            }
            let width = config.intermediate_size;
            let norm = layer.ffn_sub_norm.as_deref().map(|norm| (norm, eps));
            compute.activate_quantize(config.activation, gate, up, width, norm, layout, work, codes);
            profile.lap(Phase::Activate, 0);
            match weights.layers.get(index + 1) {
                Some(next) => compute.soon([&next.attn_q, &next.attn_k, &next.attn_v]),
                None => compute.head_soon(&weights.head),
            }
            let (either, all) = (codes.reads_all_columns(), n * width);
            if either && down_cost.lists(codes.live_codes(), all) {
                codes.leave_out_zeros();
            }
            compute.linear(codes, work, [(&layer.ffn_down, &mut *delta)]);
            compute.add(x, delta);
            let sparse = codes.leaves_out_zeros();
            let read = if sparse { codes.live_codes() } else { all };
            let time = profile.lap(Phase::Down, layer.ffn_down.byte_len() / width * read / n);
            if either {
                down_cost.learn(sparse, read, time);
            }
        }
        let mut wanted = 0;
        for (i, _) in rows.iter().enumerate().filter(|(_, row)| row.wants_logits) {
            let range = |i: usize| i * config.hidden_size..(i + 1) * config.hidden_size;
            compute.rmsnorm(&x[range(i)], &weights.output_norm, eps, &mut delta[range(wanted)]);
            // The ids have been looked up: their place is free for the rows that want logits.
            ids[wanted] = i as u32;
            wanted += 1;
        }
        let (delta, logits) =
            (&delta[..wanted * config.hidden_size], &mut logits[..wanted * config.vocab_size]);
        if let Some(first) = weights.layers.first() {
            compute.soon([&first.attn_q, &first.attn_k, &first.attn_v]);
        }
        compute.head(&weights.head, delta, |i| choice(&rows[ids[i] as usize]), head, logits);
        let counts = head.take_counts();
        profile.count_head(counts);
        let matrix = weights.head.matrix.byte_len();
        let mut bytes = if wanted as u64 > counts.tokens + counts.listed { matrix } else { 0 };
        if let Some(screen) = weights.head.screen.as_ref().filter(|_| counts.tokens > 0) {
            let (pass, row) = screen.pass_bytes();
            bytes += pass + row * counts.open as usize;
        }
        bytes += matrix / config.vocab_size * counts.exact as usize;
        profile.lap(Phase::Head, bytes);
        Ok(())
    }
}
