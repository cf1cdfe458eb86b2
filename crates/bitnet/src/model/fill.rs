//! The tensors of a file are checked, and brought into the engine's layout, by all threads: at once, or piece by piece later.

use super::config::bad_tensor;
use super::stored::{arm_layout, row_chunk};
use super::weights::{Placed, Store};
use crate::Error;
use bitnet_gguf::{Gguf, TensorType};
use bitnet_kernels::ternary::{CHUNK, Layout, columns, row_bytes};
use bitnet_kernels::{Bytes, Compute, FloatMatrix, HugeBuffer, Screen};
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

/// Tensors that are brought into the engine's layout together, and where they go.
pub(super) struct Piece {
    placed: Vec<Placed>,
    pub(super) buffer: HugeBuffer,
    /// Parts that are filled, and all.
    filled: usize,
    parts: usize,
}

/// What one thread fills at a time: part of a tensor.
struct Part<'a> {
    placed: &'a Placed,
    /// Offset of `target` in the tensor's place.
    at: usize,
    target: &'a mut [u8],
}

/// Bytes of a part, where nothing speaks for another size.
const PART: usize = 2 << 20;

impl Placed {
    fn is_i2s(&self) -> bool {
        self.tensor.ty == TensorType::I2S
    }

    /// Bytes of a part of it.
    fn part_bytes(&self) -> usize {
        match self.store {
            Store::Floats | Store::Blocks(_) | Store::Ternary => PART,
            Store::Rows { columns, layout, .. } => {
                let row = layout.bytes(1, columns);
                row * (PART / row).max(1)
            }
            Store::Columns { rows, .. } => CHUNK * columns::column_bytes(rows),
            Store::Screen { columns, .. } => Screen::bytes(Screen::PART, columns),
        }
    }
}

impl Piece {
    /// Bytes that tensors take in a buffer of their own.
    pub(super) fn bytes(placed: &[Placed]) -> usize {
        placed.last().map_or(0, |placed| placed.range.end)
    }

    /// Tensors and the memory for them, of which nothing is written to yet.
    pub(super) fn new(placed: Vec<Placed>, buffer: HugeBuffer) -> Self {
        let parts = placed.iter().map(|placed| placed.range.len().div_ceil(placed.part_bytes())).sum();
        Self { placed, buffer, filled: 0, parts }
    }

    /// Whether all is filled.
    pub(super) fn is_full(&self) -> bool {
        self.filled == self.parts
    }

    /// Gives the mapped pages of its tensors back.
    pub(super) fn give_back(&self, file: &Gguf) {
        self.placed.iter().for_each(|placed| file.advise_dontneed(placed.tensor.range()));
    }

    /// Fills the next parts, at most so many. The mapped pages that they are made of stay.
    pub(super) fn fill_some(
        &mut self,
        file: &Arc<Gguf>,
        most: usize,
        compute: &Compute,
    ) -> Result<(), Error> {
        let parts = self.take(most);
        together(compute, parts.len(), |part| fill_part(&parts[part], file, compute).map(drop))
    }

    /// The next parts to be filled, at most so many.
    fn take(&mut self, most: usize) -> Vec<Mutex<Part<'_>>> {
        let first = self.filled;
        self.filled = self.parts.min(first.saturating_add(most));
        let (mut rest, mut done, mut parts) = (&mut self.buffer[..], 0, Vec::new());
        for placed in &self.placed {
            let (_, tail) = std::mem::take(&mut rest).split_at_mut(placed.range.start - done);
            let (place, tail) = tail.split_at_mut(placed.range.len());
            (rest, done) = (tail, placed.range.end);
            let part = placed.part_bytes();
            let targets = place.chunks_mut(part).enumerate();
            parts.extend(targets.map(|(i, target)| Part { placed, at: i * part, target }));
        }
        parts.into_iter().skip(first).take(most).map(Mutex::new).collect()
    }
}

/// Lets all threads do `tasks` and returns the first error.
fn together(
    compute: &Compute,
    tasks: usize,
    work: impl Fn(usize) -> Result<(), Error> + Sync,
) -> Result<(), Error> {
    let failure = Mutex::new(None);
    compute.pool().run(tasks, |task, _| {
        if let Err(error) = work(task) {
            failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
        }
    });
    failure.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
}

/// What is done beside the parts of a file.
pub(super) trait Beside: Sync {
    /// What one thread does, from the beginning on.
    fn begin(&self);
    /// Takes part in that on another, as far as it can be done by now, or with `wait` as soon as it can.
    fn help(&self, wait: bool);
}

/// The same of the parts of a file; one thread begins with what is done beside them, all help with that, and one refuses the I2_S layout of
/// ARM builds.
fn load_together(
    file: &Gguf,
    compute: &Compute,
    beside: &dyn Beside,
    parts: usize,
    work: impl Fn(usize) -> Result<(), Error> + Sync,
) -> Result<(), Error> {
    // The two tasks that cannot be cut into parts come first, and last those of threads that have nothing else left.
    together(compute, 2 + parts + compute.pool().threads() - 1, |task| match task {
        0 => {
            beside.begin();
            Ok(())
        }
        1 => arm_layout(file).map_or(Ok(()), |(tensor, problem)| Err(bad_tensor(file, tensor, problem))),
        task => {
            let part = task - 2;
            beside.help(part >= parts);
            if part < parts { work(part) } else { Ok(()) }
        }
    })
}

/// Checks every code of tensors in I2_S, and has the pages of the head mapped, with something `beside`.
pub(super) fn check(
    pieces: &[Piece],
    file: &Gguf,
    compute: &Compute,
    beside: &dyn Beside,
) -> Result<(), Error> {
    let placed = pieces.iter().flat_map(|piece| &piece.placed);
    let parts = placed.flat_map(|placed| {
        let bytes = file.tensor_bytes(&placed.tensor);
        let all = if placed.is_i2s() { placed.tensor.n_elements() as usize / 4 } else { bytes.len() };
        bytes[..all].chunks(PART).enumerate().map(move |(i, part)| (placed, i * PART, part))
    });
    let parts: Vec<_> = parts.collect();
    load_together(file, compute, beside, parts.len(), |part| {
        let (placed, at, bytes) = parts[part];
        if placed.is_i2s() {
            return code_three(bytes).map_or(Ok(()), |byte| Err(no_weight(file, placed, at + byte)));
        }
        bytes.iter().step_by(4096).for_each(|byte| _ = std::hint::black_box(*byte));
        Ok(())
    })
}

/// Fills pieces whole, giving the file's mapped pages back on the way, with something `beside`.
pub(super) fn fill(
    pieces: &mut [Piece],
    file: &Arc<Gguf>,
    compute: &Compute,
    beside: &dyn Beside,
) -> Result<(), Error> {
    let parts: Vec<_> = pieces.iter_mut().flat_map(|piece| piece.take(usize::MAX)).collect();
    load_together(file, compute, beside, parts.len(), |part| {
        file.advise_dontneed(fill_part(&parts[part], file, compute)?);
        Ok(())
    })?;
    give_back(file);
    Ok(())
}

/// Gives all of the file's mapped pages back: faults map neighbouring pages too, in parts that were done with.
pub(super) fn give_back(file: &Gguf) {
    file.advise_dontneed(file.data_offset()..file.byte_len());
}

/// Fills a part. Returns what of the file is done with then.
fn fill_part(part: &Mutex<Part<'_>>, file: &Arc<Gguf>, compute: &Compute) -> Result<Range<u64>, Error> {
    let mut part = part.lock().unwrap_or_else(PoisonError::into_inner);
    let &mut Part { placed, at, ref mut target } = &mut *part;
    let (source, offset) = (file.tensor_bytes(&placed.tensor), placed.tensor.offset);
    let rows_of = |first: usize, count: usize| {
        let row = placed.tensor.byte_len / placed.tensor.dims[1];
        offset + first as u64 * row..offset + (first + count) as u64 * row
    };
    // What of the file is done with.
    let done = match placed.store {
        Store::Floats | Store::Ternary => {
            target.copy_from_slice(&source[at..at + target.len()]);
            offset + at as u64..offset + (at + target.len()) as u64
        }
        Store::Blocks(format) => {
            // Every part but the last is a whole number of blocks.
            let (block, block_bytes) = format.sizes();
            let mut values = vec![0.0; block];
            let from = source[at / 2 / block * block_bytes..].chunks_exact(block_bytes);
            for (bytes, target) in from.zip(target.chunks_exact_mut(2 * block)) {
                format.decode(bytes, &mut values);
                for (target, &value) in target.as_chunks_mut().0.iter_mut().zip(&values) {
                    *target = bitnet_kernels::half::f32_to_f16(value).to_le_bytes();
                }
            }
            0..0
        }
        Store::Rows { columns, layout, format, pairs } => {
            let (stored, mut plain) = (layout.bytes(1, columns), vec![0; row_bytes(columns)]);
            let (first, rows) = (at / stored, target.len() / stored);
            for (i, target) in target.chunks_exact_mut(stored).enumerate() {
                let row = pairs.map_or(first + i, |pairs| pairs.row(first + i));
                for (chunk, plain) in plain.as_chunks_mut().0.iter_mut().enumerate() {
                    match row_chunk(source, format, columns, row, chunk, placed.scale) {
                        Ok(codes) => *plain = codes,
                        Err(problem) => return Err(bad_tensor(file, &placed.tensor, problem)),
                    }
                }
                if let Some(byte) = code_three(&plain) {
                    return Err(no_weight(file, placed, row * plain.len() + byte));
                }
                match layout {
                    Layout::Base3 => compute.pack_base3(&plain, target),
                    _ => target.copy_from_slice(&plain),
                }
            }
            if pairs.is_none() { rows_of(first, rows) } else { 0..0 }
        }
        Store::Columns { rows, columns, format } => {
            let chunk = at / (CHUNK * columns::column_bytes(rows));
            let codes = (0..rows).map(|r| row_chunk(source, format, columns, r, chunk, placed.scale));
            match codes.collect::<Result<Vec<_>, _>>() {
                Ok(strip) => columns::transpose(strip.as_flattened(), target),
                Err(problem) => return Err(bad_tensor(file, &placed.tensor, problem)),
            }
            // The last chunk is done with about last.
            if (chunk + 1) * CHUNK >= columns { placed.tensor.range() } else { 0..0 }
        }
        Store::Screen { rows, columns, ty } => {
            let start = offset as usize;
            let bytes = Bytes::new(file.clone(), start..start + source.len());
            let matrix = FloatMatrix::new(bytes, ty, rows, columns);
            let part = at / Screen::bytes(Screen::PART, columns);
            compute.screen_part(&matrix, part, target);
            rows_of(part * Screen::PART, target.len() / Screen::bytes(1, columns))
        }
    };
    if matches!(placed.store, Store::Ternary | Store::Columns { .. })
        && let Some(byte) = code_three(target)
    {
        return Err(no_weight(file, placed, at + byte));
    }
    Ok(done)
}

fn no_weight(file: &Gguf, placed: &Placed, byte: usize) -> Error {
    bad_tensor(file, &placed.tensor, format!("code 3 near stored byte {byte}: no ternary weight"))
}

/// The first byte that holds the code 3, which is never written.
fn code_three(bytes: &[u8]) -> Option<usize> {
    const ONES: u64 = 0x5555_5555_5555_5555;
    let bad = |word: u64| word & (word >> 1) & ONES;
    let bad_byte = |&byte: &u8| bad(u64::from(byte)) != 0;
    // Whole pieces first, without a branch in the loop.
    let bad_piece = |piece: &[u8]| {
        let (words, rest) = piece.as_chunks();
        let found = words.iter().fold(0, |found, &word| found | bad(u64::from_le_bytes(word)));
        found != 0 || rest.iter().any(bad_byte)
    };
    let piece = bytes.chunks(4096).position(bad_piece)?;
    bytes[piece * 4096..].iter().position(bad_byte).map(|i| piece * 4096 + i)
}
