//! Loading: the tensors of a file are brought into the engine's layout by all threads, each code checked on the way.

use super::stored::{arm_layout, row_chunk};
use super::weights::{Placed, Planner, Store};
use crate::Error;
use bitnet_gguf::Gguf;
use bitnet_kernels::ternary::{CHUNK, Layout, columns, row_bytes};
use bitnet_kernels::{Bytes, Compute, FloatMatrix, Screen};
use std::sync::{Arc, Mutex, PoisonError};

/// One task of the load: part of a tensor and where it goes.
struct Part<'a, 'b> {
    placed: &'b Placed<'a>,
    /// Offset of `target` in the tensor's place.
    at: usize,
    target: &'b mut [u8],
}

/// Fills the buffer with what the planner placed, and gives the file's mapped pages back. One thread does `beside`.
pub(super) fn fill(
    planner: &Planner<'_>,
    file: &Arc<Gguf>,
    buffer: &mut [u8],
    compute: &Compute,
    beside: &(dyn Fn() + Sync),
) -> Result<(), Error> {
    const PART: usize = 2 << 20;
    let gguf = planner.keys.gguf;
    let mut parts = Vec::new();
    let mut rest = buffer;
    let mut done = 0;
    for placed in &planner.placed {
        let (_, tail) = std::mem::take(&mut rest).split_at_mut(placed.range.start - done);
        let (place, tail) = tail.split_at_mut(placed.range.len());
        (rest, done) = (tail, placed.range.end);
        let part = match placed.store {
            Store::Floats | Store::Blocks(_) | Store::Ternary => PART,
            Store::Rows { columns, layout, .. } => {
                let row = layout.bytes(1, columns);
                row * (PART / row).max(1)
            }
            Store::Columns { rows, .. } => CHUNK * columns::column_bytes(rows),
            Store::Screen { columns, .. } => Screen::bytes(Screen::PART, columns),
        };
        let targets = place.chunks_mut(part).enumerate();
        parts.extend(targets.map(|(i, target)| Mutex::new(Part { placed, at: i * part, target })));
    }
    let failure = Mutex::new(None);
    let fail = |error| {
        failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
    };
    // The two tasks that cannot be cut into parts come first.
    compute.pool().run(parts.len() + 2, |task, _| {
        let task = match task {
            0 => return beside(),
            1 => {
                let wrong = arm_layout(gguf).map(|(tensor, problem)| planner.error(tensor, problem));
                return wrong.map_or((), fail);
            }
            part => part - 2,
        };
        let mut part = parts[task].lock().unwrap_or_else(PoisonError::into_inner);
        let Part { placed, at, target } = &mut *part;
        let (source, offset) = (gguf.tensor_bytes(placed.tensor), placed.tensor.offset);
        let rows_of = |first: usize, count: usize| {
            let row = placed.tensor.byte_len / placed.tensor.dims[1];
            offset + first as u64 * row..offset + (first + count) as u64 * row
        };
        // What of the file is done with.
        let done = match placed.store {
            Store::Floats | Store::Ternary => {
                target.copy_from_slice(&source[*at..*at + target.len()]);
                offset + *at as u64..offset + (*at + target.len()) as u64
            }
            Store::Blocks(format) => {
                // Every part but the last is a whole number of blocks.
                let (block, block_bytes) = format.sizes();
                let mut values = vec![0.0; block];
                let from = source[*at / 2 / block * block_bytes..].chunks_exact(block_bytes);
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
                let (first, rows) = (*at / stored, target.len() / stored);
                for (i, target) in target.chunks_exact_mut(stored).enumerate() {
                    let row = pairs.map_or(first + i, |pairs| pairs.row(first + i));
                    for (chunk, plain) in plain.as_chunks_mut().0.iter_mut().enumerate() {
                        match row_chunk(source, format, columns, row, chunk, placed.scale) {
                            Ok(codes) => *plain = codes,
                            Err(problem) => return fail(planner.error(placed.tensor, problem)),
                        }
                    }
                    if let Some(byte) = code_three(&plain) {
                        return fail(no_weight(planner, placed, row * plain.len() + byte));
                    }
                    match layout {
                        Layout::Base3 => compute.pack_base3(&plain, target),
                        _ => target.copy_from_slice(&plain),
                    }
                }
                if pairs.is_none() { rows_of(first, rows) } else { 0..0 }
            }
            Store::Columns { rows, columns, format } => {
                let chunk = *at / (CHUNK * columns::column_bytes(rows));
                let codes = (0..rows).map(|r| row_chunk(source, format, columns, r, chunk, placed.scale));
                match codes.collect::<Result<Vec<_>, _>>() {
                    Ok(strip) => columns::transpose(strip.as_flattened(), target),
                    Err(problem) => return fail(planner.error(placed.tensor, problem)),
                }
                // The last chunk is done with about last.
                if (chunk + 1) * CHUNK >= columns { placed.tensor.range() } else { 0..0 }
            }
            Store::Screen { rows, columns, ty } => {
                let start = offset as usize;
                let bytes = Bytes::new(file.clone(), start..start + source.len());
                let matrix = FloatMatrix::new(bytes, ty, rows, columns);
                let part = *at / Screen::bytes(Screen::PART, columns);
                compute.screen_part(&matrix, part, target);
                rows_of(part * Screen::PART, target.len() / Screen::bytes(1, columns))
            }
        };
        gguf.advise_dontneed(done);
        if matches!(placed.store, Store::Ternary | Store::Columns { .. })
            && let Some(byte) = code_three(target)
        {
            fail(no_weight(planner, placed, *at + byte));
        }
    });
    // Faults map neighbouring pages too, in parts that were done with.
    gguf.advise_dontneed(gguf.data_offset()..gguf.byte_len());
    failure.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
}

fn no_weight(planner: &Planner<'_>, placed: &Placed<'_>, byte: usize) -> Error {
    planner.error(placed.tensor, format!("code 3 near stored byte {byte}: no ternary weight"))
}

/// The first byte that holds the code 3, which is never written.
fn code_three(bytes: &[u8]) -> Option<usize> {
    // Whole pieces first, without a branch in the loop.
    let bad = |b: &u8| b & (b >> 1) & 0x55;
    let piece = bytes.chunks(4096).position(|piece| piece.iter().map(bad).fold(0, |a, b| a | b) != 0)?;
    bytes[piece * 4096..].iter().position(|b| bad(b) != 0).map(|i| piece * 4096 + i)
}
