//! What tells one model file from another, in milliseconds.

use bitnet_gguf::Gguf;
use sha2::{Digest, Sha256};

/// Bytes that are read at a place, and places in a tensor.
const PIECE: u64 = 4096;
const PIECES: u64 = 8;

/// A SHA-256 over the length of the file, all metadata, the names, types, shapes and places of all tensors, and of each
/// tensor eight pieces of 4 KiB, evenly from its first byte to its last (the whole of a small one, such as a norm; the end
/// of an I2_S matrix, where its scale is).
///
/// Another training step, another quantisation or another vocabulary give another identity. It is no proof: somebody who
/// changes single weights between the pieces is not found out, nor is damage there (`bitnet verify` reads everything).
pub fn identity(gguf: &Gguf) -> [u8; 32] {
    let all: &[u8] = gguf.as_ref();
    let mut hash = Sha256::new();
    hash.update(gguf.byte_len().to_le_bytes());
    let mut piece = vec![0; PIECE as usize];
    let mut read = |start: u64, end: u64| {
        let mut at = start;
        while at < end {
            let part = &mut piece[..PIECE.min(end - at) as usize];
            match gguf.read_at(at, part) {
                Ok(()) => hash.update(&*part),
                Err(_) => hash.update(b"unreadable"),
            }
            at += PIECE;
        }
    };
    read(0, gguf.data_offset().min(all.len() as u64));
    for tensor in gguf.tensors() {
        let (start, len) = (tensor.offset, tensor.byte_len);
        if len <= PIECE * PIECES {
            read(start, start + len);
            continue;
        }
        for i in 0..PIECES {
            let at = start + (len - PIECE) / (PIECES - 1) * i;
            let at = if i == PIECES - 1 { start + len - PIECE } else { at };
            read(at, at + PIECE);
        }
    }
    hash.finalize().into()
}
