//! The tensors of a model, mapped layer by layer and brought into the engine's layout.

use super::config::{Config, Keys, bad_tensor, require};
use super::fill::{Beside, Piece, check, fill, give_back};
use super::stored::{ExactScales, Pairs, floats, row_format, scale_of};
use crate::Error;
use bitnet_gguf::{Gguf, TensorInfo, TensorType};
use bitnet_kernels::blocks::BlockFormat;
use bitnet_kernels::ternary::blocks::RowFormat;
use bitnet_kernels::ternary::{self, CHUNK, Layout, base3, columns};
use bitnet_kernels::{
    Activation, Bytes, Compute, FloatMatrix, FloatType, Head, HugeBuffer, MemoryPart, PartBytes, Screen,
    TernaryMatrix,
};
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

/// All tensors of a model.
pub struct Weights {
    /// `[vocab_size][hidden_size]`.
    pub embedding: FloatMatrix,
    /// `[vocab_size][hidden_size]`; the embedding itself where the two are tied.
    pub head: Head,
    /// `[hidden_size]`.
    pub output_norm: Vec<f32>,
    /// The blocks in order.
    pub layers: Vec<Layer>,
    /// How they are read.
    pub strategy: Strategy,
    /// What is still read where it lies in the file, in the order in which it gets a place of its own.
    pending: VecDeque<Pending>,
}

/// Tensors on their way into the engine's layout.
struct Pending {
    file: Arc<Gguf>,
    piece: Piece,
    becomes: Becomes,
}

enum Becomes {
    /// The matrices of a layer.
    Layer(usize, Box<[TernaryPlace; 7]>),
    /// The small copy of the head, of so many rows and columns.
    Screen(usize, usize),
}

/// The tensors of one block.
pub struct Layer {
    /// `[hidden_size]`.
    pub attn_norm: Vec<f32>,
    /// `[n_heads * head_dim][hidden_size]`.
    pub attn_q: TernaryMatrix,
    /// `[n_kv_heads * head_dim][hidden_size]`.
    pub attn_k: TernaryMatrix,
    /// `[n_kv_heads * head_dim][hidden_size]`.
    pub attn_v: TernaryMatrix,
    /// `[n_heads * head_dim]`, where the model has it.
    pub attn_sub_norm: Option<Vec<f32>>,
    /// `[hidden_size][n_heads * head_dim]`.
    pub attn_output: TernaryMatrix,
    /// `[hidden_size]`.
    pub ffn_norm: Vec<f32>,
    /// `[intermediate_size][hidden_size]`.
    pub ffn_gate: TernaryMatrix,
    /// `[intermediate_size][hidden_size]`.
    pub ffn_up: TernaryMatrix,
    /// `[intermediate_size]`, where the model has it.
    pub ffn_sub_norm: Option<Vec<f32>>,
    /// `[hidden_size][intermediate_size]`.
    pub ffn_down: TernaryMatrix,
}

impl Layer {
    /// From norms, sub-norms and matrices, each in the order of the fields.
    fn new(
        [attn_norm, ffn_norm]: [Vec<f32>; 2],
        [attn_sub_norm, ffn_sub_norm]: [Option<Vec<f32>>; 2],
        [attn_q, attn_k, attn_v, attn_output, ffn_gate, ffn_up, ffn_down]: [TernaryMatrix; 7],
    ) -> Self {
        Self {
            attn_norm,
            attn_q,
            attn_k,
            attn_v,
            attn_sub_norm,
            attn_output,
            ffn_norm,
            ffn_gate,
            ffn_up,
            ffn_sub_norm,
            ffn_down,
        }
    }

    fn set(&mut self, matrices: [TernaryMatrix; 7]) {
        [
            self.attn_q,
            self.attn_k,
            self.attn_v,
            self.attn_output,
            self.ffn_gate,
            self.ffn_up,
            self.ffn_down,
        ] = matrices;
    }

    /// The ternary matrices.
    pub fn matrices(&self) -> [&TernaryMatrix; 7] {
        [
            &self.attn_q,
            &self.attn_k,
            &self.attn_v,
            &self.attn_output,
            &self.ffn_gate,
            &self.ffn_up,
            &self.ffn_down,
        ]
    }
}

/// Where a tensor of the file goes in the buffer of its piece.
pub(super) struct Placed {
    pub(super) tensor: TensorInfo,
    pub(super) store: Store,
    pub(super) range: Range<usize>,
    /// Of a ternary tensor, as its rows have it.
    pub(super) scale: f32,
}

/// How a tensor is brought into the engine's layout.
#[derive(Clone, Copy)]
pub(super) enum Store {
    /// Floats, as they are.
    Floats,
    /// Blocks of floats, to be F16: their own scales have no more digits.
    Blocks(BlockFormat),
    /// I2_S whose rows are whole chunks, as it is.
    Ternary,
    /// I2_S whose rows must be padded, packed or put in another order, or rows of another type.
    Rows { columns: usize, layout: Layout, format: Option<RowFormat>, pairs: Option<Pairs> },
    /// I2_S or rows of another type, to be stored by columns.
    Columns { rows: usize, columns: usize, format: Option<RowFormat> },
    /// The small copy of the head.
    Screen { rows: usize, columns: usize, ty: FloatType },
}

/// The encoding of a float matrix that is not one number after the other.
fn block_format(ty: TensorType) -> Option<BlockFormat> {
    match ty {
        TensorType::Q8_0 => Some(BlockFormat::Q8_0),
        TensorType::Q6_K => Some(BlockFormat::Q6_K),
        _ => None,
    }
}

/// Checks tensors against the configuration and assigns them places.
struct Planner<'a> {
    keys: Keys<'a>,
    exact: ExactScales<'a>,
    /// Where the tensors of each buffer go.
    pieces: Vec<Vec<Placed>>,
}

/// A place in the buffer of a layer, shape and scale, to become a matrix when the buffer is filled.
struct TernaryPlace {
    range: Range<usize>,
    layout: Layout,
    rows: usize,
    columns: usize,
    scale: f32,
    /// Where the file has it as [`Layout::Rows`], if it has.
    stored: Option<Range<usize>>,
}

impl TernaryPlace {
    fn matrix(&self, buffer: &Arc<HugeBuffer>) -> TernaryMatrix {
        let bytes = Bytes::new(buffer.clone(), self.range.clone());
        TernaryMatrix::new(bytes, self.layout, self.rows, self.columns, self.scale)
    }
}

/// Where a float matrix is: in the buffer, or still in the file.
enum FloatPlace {
    Buffer(Range<usize>, FloatType),
    File(Range<usize>, FloatType),
}

struct LayerPlan {
    norms: [Vec<f32>; 2],
    sub_norms: [Option<Vec<f32>>; 2],
    matrices: [TernaryPlace; 7],
}

/// How the weights are kept and what a decoded token reads of them. The logits are the same to the bit.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Strategy {
    /// No weight that is multiplied with zero is read, and of the output head only what can still be chosen.
    pub sparse: bool,
    /// How matrices are stored of which all rows are read: [`Layout::Rows`] or [`Layout::Base3`].
    pub rows: Layout,
}

impl Default for Strategy {
    fn default() -> Self {
        Self::SPARSE
    }
}

impl Strategy {
    /// Only what can matter.
    pub const SPARSE: Self = Self { sparse: true, rows: Layout::Rows };
    /// Every weight.
    pub const DENSE: Self = Self { sparse: false, ..Self::SPARSE };

    /// Smallest vocabulary whose head is screened.
    const SCREENED_VOCABULARY: usize = 1024;

    fn screens(self, vocab_size: usize) -> bool {
        self.sparse && vocab_size >= Self::SCREENED_VOCABULARY
    }

    /// Of the matrices of a layer, in their order. Squared ReLU leaves most inputs of the last, the down projection, zero, and
    /// by columns those weights are never read.
    fn layouts(self, config: &Config) -> [Layout; 7] {
        let mut layouts = [self.rows; 7];
        let fits = config.intermediate_size <= columns::MAX_COLUMNS;
        if self.sparse && config.activation == Activation::Relu2 && fits {
            layouts[6] = Layout::Columns;
        }
        layouts
    }
}

/// Where every tensor of a model goes: the layers into a piece each, then the small copy of the head or what floats are copied.
pub(crate) struct WeightPlan<'a> {
    planner: Planner<'a>,
    embedding: FloatPlace,
    head: Option<FloatPlace>,
    screens: bool,
    output_norm: Vec<f32>,
    layers: Vec<LayerPlan>,
    strategy: Strategy,
}

impl<'a> Planner<'a> {
    fn shaped(&self, name: &str, dims: &[usize]) -> Result<&'a TensorInfo, Error> {
        let tensor = require(&self.keys, name)?;
        if !tensor.dims.iter().copied().eq(dims.iter().map(|&d| d as u64)) {
            let problem = format!("expected dimensions {dims:?} from the metadata, found {:?}", tensor.dims);
            return Err(self.error(tensor, problem));
        }
        Ok(tensor)
    }

    fn error(&self, tensor: &TensorInfo, problem: impl Into<String>) -> Error {
        bad_tensor(self.keys.gguf, tensor, problem)
    }

    fn place(&mut self, tensor: &'a TensorInfo, bytes: usize, store: Store, scale: f32) -> Range<usize> {
        let piece = self.pieces.last_mut().expect("a piece was begun");
        let start = piece.last().map_or(0, |placed| placed.range.end.next_multiple_of(64));
        piece.push(Placed { tensor: tensor.clone(), store, range: start..start + bytes, scale });
        start..start + bytes
    }

    fn norm(&self, name: &str, width: usize) -> Result<Vec<f32>, Error> {
        let tensor = self.shaped(name, &[width])?;
        if tensor.ty != TensorType::F32 {
            return Err(self.error(tensor, format!("expected type F32, found {}", tensor.ty.name())));
        }
        let norm: Vec<f32> = floats(self.keys.gguf, tensor).collect();
        match norm.iter().position(|x| !x.is_finite()) {
            Some(i) => {
                Err(self.error(tensor, format!("element {i} is {}, expected a finite number", norm[i])))
            }
            None => Ok(norm),
        }
    }

    fn float(&self, name: &str, columns: usize, rows: usize) -> Result<(&'a TensorInfo, FloatType), Error> {
        let tensor = self.shaped(name, &[columns, rows])?;
        let ty = match tensor.ty {
            TensorType::F32 => FloatType::F32,
            TensorType::BF16 => FloatType::BF16,
            ty if ty == TensorType::F16 || block_format(ty).is_some() => FloatType::F16,
            other => {
                let problem = format!("expected type F16, BF16, F32, Q8_0 or Q6_K, found {}", other.name());
                return Err(self.error(tensor, problem));
            }
        };
        Ok((tensor, ty))
    }

    /// Copies the matrix to the buffer.
    fn copied(&mut self, (tensor, ty): (&'a TensorInfo, FloatType)) -> FloatPlace {
        let (bytes, store) = match block_format(tensor.ty) {
            Some(format) => (2 * tensor.n_elements() as usize, Store::Blocks(format)),
            None => (tensor.byte_len as usize, Store::Floats),
        };
        FloatPlace::Buffer(self.place(tensor, bytes, store, 1.0), ty)
    }

    /// Leaves the matrix in the file.
    fn mapped((tensor, ty): (&'a TensorInfo, FloatType)) -> FloatPlace {
        let start = tensor.offset as usize;
        FloatPlace::File(start..start + tensor.byte_len as usize, ty)
    }

    fn ternary(
        &mut self,
        name: &str,
        layout: Layout,
        pairs: Option<Pairs>,
        columns: usize,
        rows: usize,
    ) -> Result<TernaryPlace, Error> {
        let tensor = self.shaped(name, &[columns, rows])?;
        let format = row_format(tensor.ty);
        if format.is_none() && tensor.ty != TensorType::I2S {
            let name = tensor.ty.name();
            let problem = match tensor.ty {
                TensorType::TL1 | TensorType::TL2 => {
                    format!("{name} needs tables that are not in the file; convert the model to I2_S")
                }
                _ => format!(
                    "expected ternary weights (I2_S, TQ1_0, TQ2_0, IQ1_BN, IQ2_BN or floats), found {name}"
                ),
            };
            return Err(self.error(tensor, problem));
        }
        let scale = scale_of(self.keys.gguf, tensor, &self.exact);
        let scale = scale.map_err(|problem| self.error(tensor, problem))?.unwrap_or(1.0);
        let as_stored = columns.is_multiple_of(CHUNK) && format.is_none() && pairs.is_none();
        let store = match layout {
            Layout::Columns => Store::Columns { rows, columns, format },
            Layout::Rows if as_stored => Store::Ternary,
            _ => Store::Rows { columns, layout, format, pairs },
        };
        let start = tensor.offset as usize;
        Ok(TernaryPlace {
            range: self.place(tensor, layout.bytes(rows, columns), store, scale),
            layout,
            rows,
            columns,
            scale: scale * self.extra_scale(name)?,
            stored: as_stored.then(|| start..start + Layout::Rows.bytes(rows, columns)),
        })
    }

    /// What llama.cpp multiplies the product with: the one element of a tensor beside the weights; 1 where there is none.
    fn extra_scale(&self, name: &str) -> Result<f32, Error> {
        let name = name.replace(".weight", ".scale");
        Ok(if self.keys.gguf.tensor(&name).is_some() { self.norm(&name, 1)?[0] } else { 1.0 })
    }

    /// Refuses tensors that change what a model computes and that the forward pass does not know.
    fn refuse_unknown(&self) -> Result<(), Error> {
        let unknown = |name: &str| name.ends_with(".bias") || name.starts_with("rope_factors");
        match self.keys.gguf.tensors().iter().find(|tensor| unknown(&tensor.name)) {
            Some(tensor) => Err(self.error(tensor, "expected no biases and no RoPE factors but rope_freqs")),
            None => Ok(()),
        }
    }
}

impl<'a> WeightPlan<'a> {
    /// Checks every tensor against the configuration.
    pub(crate) fn new(gguf: &'a Gguf, config: &Config, strategy: Strategy) -> Result<Self, Error> {
        let keys = Keys { gguf, arch: config.architecture.clone() };
        let exact = ExactScales::read(gguf);
        let mut planner = Planner { keys, exact, pieces: Vec::new() };
        let (hidden, ff) = (config.hidden_size, config.intermediate_size);
        let (q, kv) = (config.q_width(), config.kv_width());
        planner.refuse_unknown()?;
        let pairs = Pairs::of(config);
        let (rows, down) = (strategy.rows, strategy.layouts(config)[6]);
        let mut layers = Vec::new();
        for i in 0..config.n_layers {
            let name = |part: &str| format!("blk.{i}.{part}.weight");
            planner.pieces.push(Vec::new());
            layers.push(LayerPlan {
                norms: [planner.norm(&name("attn_norm"), hidden)?, planner.norm(&name("ffn_norm"), hidden)?],
                sub_norms: [
                    config.sub_norms.then(|| planner.norm(&name("attn_sub_norm"), q)).transpose()?,
                    config.sub_norms.then(|| planner.norm(&name("ffn_sub_norm"), ff)).transpose()?,
                ],
                matrices: [
                    planner.ternary(&name("attn_q"), rows, pairs, hidden, q)?,
                    planner.ternary(&name("attn_k"), rows, pairs, hidden, kv)?,
                    planner.ternary(&name("attn_v"), rows, None, hidden, kv)?,
                    planner.ternary(&name("attn_output"), rows, None, q, hidden)?,
                    planner.ternary(&name("ffn_gate"), rows, None, hidden, ff)?,
                    planner.ternary(&name("ffn_up"), rows, None, hidden, ff)?,
                    planner.ternary(&name("ffn_down"), down, None, ff, hidden)?,
                ],
            });
        }
        let embedding = planner.float("token_embd.weight", hidden, config.vocab_size)?;
        // bitnet-25 files carry a copy of the embedding as output.weight that the model does not use.
        let tied = config.architecture == "bitnet-25" || gguf.tensor("output.weight").is_none();
        let output =
            if tied { None } else { Some(planner.float("output.weight", hidden, config.vocab_size)?) };
        // Blocks are decoded into the buffer, where the file has nothing to screen.
        let plain = |(tensor, _): &(&TensorInfo, FloatType)| block_format(tensor.ty).is_none();
        let screens =
            strategy.screens(config.vocab_size) && plain(&embedding) && output.as_ref().is_none_or(plain);
        planner.pieces.push(Vec::new());
        if screens {
            let (tensor, ty) = output.unwrap_or(embedding);
            let (rows, columns) = (config.vocab_size, hidden);
            planner.place(tensor, Screen::bytes(rows, columns), Store::Screen { rows, columns, ty }, 1.0);
        }
        let mut place = |matrix| if screens { Planner::mapped(matrix) } else { planner.copied(matrix) };
        let (embedding, head) = (place(embedding), output.map(place));
        let output_norm = planner.norm("output_norm.weight", hidden)?;
        Ok(Self { planner, embedding, head, screens, output_norm, layers, strategy })
    }

    /// What each piece counts for: the last one is of the head.
    fn part(&self, piece: usize) -> MemoryPart {
        let last = piece + 1 == self.planner.pieces.len();
        if last && self.screens { MemoryPart::HeadCopy } else { MemoryPart::Weights }
    }

    /// Bytes that the weights take in memory.
    pub(crate) fn bytes(&self) -> PartBytes {
        let mut bytes = PartBytes::default();
        for (i, placed) in self.planner.pieces.iter().enumerate() {
            bytes[self.part(i) as usize] += Piece::bytes(placed);
        }
        bytes
    }

    /// Checks every code with all threads of `compute`, and brings the weights into the engine's layout where the file does not have
    /// them in a form that can be used as it is; where it does, [`Weights::settle`] does that later. The threads do what is `beside`
    /// meanwhile.
    pub(crate) fn load(
        self,
        config: &Config,
        file: &Arc<Gguf>,
        compute: &Compute,
        beside: &dyn Beside,
    ) -> Result<Weights, Error> {
        let parts: Vec<_> = (0..self.planner.pieces.len()).map(|piece| self.part(piece)).collect();
        let Self { planner, embedding, head, screens, output_norm, layers, strategy } = self;
        let pieces = planner.pieces.into_iter().zip(parts);
        let pieces = pieces.map(|(placed, part)| {
            let buffer = buffer(part, Piece::bytes(&placed))?;
            Ok(Piece::new(placed, buffer))
        });
        let mut pieces = pieces.collect::<Result<Vec<_>, Error>>()?;
        let stored = layers.iter().flat_map(|layer| &layer.matrices).all(|place| place.stored.is_some());
        let later = screens && stored;
        match later {
            true => check(&pieces, file, compute, beside)?,
            false => fill(&mut pieces, file, compute, beside)?,
        }
        let (vocab, hidden) = (config.vocab_size, config.hidden_size);
        let mut pieces = VecDeque::from(pieces);
        // That of the head is done first: it saves the most.
        let last = pieces.pop_back().expect("the piece of the head");
        let mut pending = VecDeque::new();
        let mut all = Vec::new();
        for (i, (plan, piece)) in layers.into_iter().zip(pieces).enumerate() {
            let LayerPlan { norms, sub_norms, matrices } = plan;
            if later {
                let view = matrices.each_ref().map(|place| {
                    let bytes = Bytes::new(file.clone(), place.stored.clone().unwrap_or_default());
                    TernaryMatrix::new(bytes, Layout::Rows, place.rows, place.columns, place.scale)
                });
                all.push(Layer::new(norms, sub_norms, view));
                let (file, becomes) = (file.clone(), Becomes::Layer(i, Box::new(matrices)));
                pending.push_back(Pending { file, piece, becomes });
            } else {
                let buffer = Arc::new(piece.buffer);
                let matrices = matrices.each_ref().map(|place| place.matrix(&buffer));
                all.push(Layer::new(norms, sub_norms, matrices));
            }
        }
        let mut screen = None;
        let mut copied = None;
        match (screens, later) {
            (true, true) => {
                let (file, becomes) = (file.clone(), Becomes::Screen(vocab, hidden));
                pending.push_front(Pending { file, piece: last, becomes });
            }
            (true, false) => screen = Some(Screen::new(whole(last.buffer), vocab, hidden)),
            (false, _) => copied = Some(Arc::new(last.buffer)),
        }
        let float = |place| {
            let (bytes, ty) = match (place, &copied) {
                (FloatPlace::Buffer(range, ty), Some(buffer)) => (Bytes::new(buffer.clone(), range), ty),
                (FloatPlace::Buffer(..), None) => unreachable!("nothing is copied beside a screen"),
                (FloatPlace::File(range, ty), _) => {
                    let (start, file) = (range.start as u64, file.clone());
                    let bytes = Bytes::new(file.clone(), range);
                    let read = move |at: usize, row: &mut [u8]| file.read_at(start + at as u64, row).is_ok();
                    return FloatMatrix::new(bytes, ty, vocab, hidden).with_reader(Arc::new(read));
                }
            };
            FloatMatrix::new(bytes, ty, vocab, hidden)
        };
        let embedding = float(embedding);
        let head = Head { matrix: head.map_or_else(|| embedding.clone(), float), screen };
        Ok(Weights { embedding, head, output_norm, layers: all, strategy, pending })
    }
}

/// All bytes of a buffer.
fn whole(buffer: HugeBuffer) -> Bytes {
    let len = buffer.len();
    Bytes::new(Arc::new(buffer), 0..len)
}

impl Weights {
    /// Brings what is still read where it lies in the file into the engine's layout, with all threads of `compute`, until all is or
    /// `enough`, which is asked again after every few megabytes. Results stay the same to the bit; steps become faster.
    pub(super) fn settle(&mut self, compute: &Compute, enough: impl Fn() -> bool) {
        while let Some(Pending { file, piece, .. }) = self.pending.front_mut()
            && !enough()
        {
            if piece.fill_some(file, SLICE * compute.pool().threads(), compute).is_err() {
                // Somebody has written to the file since its codes were checked: what is used of it stays as it is.
                return self.pending.clear();
            }
            if !piece.is_full() {
                continue;
            }
            let Some(Pending { file, piece, becomes }) = self.pending.pop_front() else { return };
            piece.give_back(&file);
            match becomes {
                Becomes::Layer(i, places) => {
                    let buffer = Arc::new(piece.buffer);
                    self.layers[i].set(places.each_ref().map(|place| place.matrix(&buffer)));
                }
                Becomes::Screen(rows, columns) => {
                    self.head.screen = Some(Screen::new(whole(piece.buffer), rows, columns));
                }
            }
            if self.pending.is_empty() {
                give_back(&file);
            }
        }
    }

    /// Whether [`Self::settle`] has nothing left to do.
    pub fn is_settled(&self) -> bool {
        self.pending.is_empty()
    }

    /// Rows and columns of the matrices of a layer, in their order.
    fn shapes(config: &Config) -> [(usize, usize); 7] {
        let (hidden, ff) = (config.hidden_size, config.intermediate_size);
        let (q, kv) = (config.q_width(), config.kv_width());
        [(q, hidden), (kv, hidden), (kv, hidden), (hidden, q), (ff, hidden), (ff, hidden), (hidden, ff)]
    }

    /// Bytes that [`Self::random`] takes.
    pub(crate) fn random_bytes(config: &Config, strategy: Strategy) -> PartBytes {
        let (vocab, hidden) = (config.vocab_size, config.hidden_size);
        let sizes = Self::shapes(config).into_iter().zip(strategy.layouts(config));
        let layer: usize = sizes.map(|((rows, columns), layout)| layout.bytes(rows, columns)).sum();
        let mut bytes = PartBytes::default();
        bytes[MemoryPart::Weights as usize] = vocab * hidden * 2 + layer * config.n_layers;
        if strategy.screens(vocab) {
            bytes[MemoryPart::HeadCopy as usize] = Screen::bytes(vocab, hidden);
        }
        bytes
    }

    /// Random weights of the shape of `config`, with an F16 head tied to the embedding: for measuring speed without a file.
    /// Half of the weights are zero.
    pub fn random(config: &Config, compute: &Compute, strategy: Strategy) -> Result<Self, Error> {
        let (hidden, ff, q) = (config.hidden_size, config.intermediate_size, config.q_width());
        let (shapes, layouts) = (Self::shapes(config), strategy.layouts(config));
        let size = |index: usize| layouts[index].bytes(shapes[index].0, shapes[index].1);
        let head = config.vocab_size * hidden * 2;
        let mut buffer =
            buffer(MemoryPart::Weights, Self::random_bytes(config, strategy)[MemoryPart::Weights as usize])?;
        let (head_bytes, mut rest) = buffer.split_at_mut(head);
        random_words(compute, head_bytes, |r| {
            // Halves of either sign between 2^-6 and 2^-5.
            r & 0x83ff_83ff_83ff_83ff | 0x2400_2400_2400_2400
        });
        // Two random bits added up make a code of 0, 1, 1 or 2.
        let codes = |r: u64| (r & 0x5555_5555_5555_5555) + (r >> 1 & 0x5555_5555_5555_5555);
        for index in (0..config.n_layers).flat_map(|_| 0..shapes.len()) {
            let (matrix, after) = rest.split_at_mut(size(index));
            rest = after;
            match layouts[index] {
                Layout::Base3 => random_base3(compute, matrix, shapes[index].1, codes),
                _ => random_words(compute, matrix, codes),
            }
        }
        let buffer = Arc::new(buffer);
        let mut end = head;
        let layers = (0..config.n_layers).map(|_| {
            let matrices = std::array::from_fn(|index| {
                let ((rows, columns), start) = (shapes[index], end);
                end += size(index);
                let bytes = Bytes::new(buffer.clone(), start..end);
                TernaryMatrix::new(bytes, layouts[index], rows, columns, (2.0 / columns as f32).sqrt())
            });
            let sub_norms = [q, ff].map(|width| config.sub_norms.then(|| vec![1.0; width]));
            Layer::new([vec![1.0; hidden], vec![1.0; hidden]], sub_norms, matrices)
        });
        let layers = layers.collect();
        let vocab = config.vocab_size;
        let embedding = FloatMatrix::new(Bytes::new(buffer, 0..head), FloatType::F16, vocab, hidden);
        let screen = strategy.screens(vocab).then(|| random_screen(&embedding, vocab, hidden, compute));
        let head = Head { matrix: embedding.clone(), screen: screen.transpose()? };
        let output_norm = vec![1.0; hidden];
        Ok(Self { head, embedding, output_norm, layers, strategy, pending: VecDeque::new() })
    }
}

/// Parts that a thread fills between two looks at the time.
const SLICE: usize = 4;

fn buffer(part: MemoryPart, bytes: usize) -> Result<HugeBuffer, Error> {
    HugeBuffer::new(part, bytes).ok_or(Error::NoMemory { what: "weights", bytes })
}

fn random_screen(
    matrix: &FloatMatrix,
    rows: usize,
    columns: usize,
    compute: &Compute,
) -> Result<Screen, Error> {
    let bytes = Screen::bytes(rows, columns);
    let mut buffer = buffer(MemoryPart::HeadCopy, bytes)?;
    in_parts(compute, &mut buffer, Screen::bytes(Screen::PART, columns), |part, out| {
        compute.screen_part(matrix, part, out);
    });
    Ok(Screen::new(whole(buffer), rows, columns))
}

/// Lets all threads `work` on parts of so many bytes, which are numbered.
fn in_parts(compute: &Compute, bytes: &mut [u8], len: usize, work: impl Fn(usize, &mut [u8]) + Sync) {
    let parts: Vec<_> = bytes.chunks_mut(len).map(Mutex::new).collect();
    compute.pool().run(parts.len(), |part, _| {
        work(part, &mut parts[part].lock().unwrap_or_else(PoisonError::into_inner));
    });
}

/// Fills `bytes` with `f` of random words, the same for any number of threads.
fn random_words(compute: &Compute, bytes: &mut [u8], f: impl Fn(u64) -> u64 + Sync) {
    in_parts(compute, bytes, 1 << 20, |part, bytes| fill_random(bytes, &mut (part as u64 + 1), &f));
}

/// As [`random_words`], for rows in two bits that are then packed.
fn random_base3(compute: &Compute, bytes: &mut [u8], columns: usize, f: impl Fn(u64) -> u64 + Sync) {
    let row_bytes = base3::row_bytes(columns);
    in_parts(compute, bytes, row_bytes << 10, |part, bytes| {
        let (mut state, mut plain) = (part as u64 + 1, vec![0; ternary::row_bytes(columns)]);
        for row in bytes.chunks_exact_mut(row_bytes) {
            fill_random(&mut plain, &mut state, &f);
            compute.pack_base3(&plain, row);
        }
    });
}

fn fill_random(bytes: &mut [u8], state: &mut u64, f: impl Fn(u64) -> u64) {
    for word in bytes.chunks_mut(8) {
        // xorshift64* (Vigna 2016); its high bits are good enough to look like weights.
        *state ^= *state >> 12;
        *state ^= *state << 25;
        *state ^= *state >> 27;
        let r = state.wrapping_mul(0x2545_f491_4f6c_dd1d);
        word.copy_from_slice(&f(r ^ r >> 32).to_le_bytes()[..word.len()]);
    }
}
