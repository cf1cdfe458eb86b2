//! What tells one model file from another.

use bitnet_gguf::Gguf;
use bitnet_kernels::Compute;
use sha2::{Digest, Sha256};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use xxhash_rust::xxh3::xxh3_128;

/// Bytes that are hashed at a time.
const BLOCK: usize = 1 << 16;

/// A SHA-256 over the length of the file and the XXH3 (128 bits) of every 64 KiB of it, which all threads compute: with two, a
/// quarter of a second for 1.2 GB that the system holds in memory.
///
/// A file that differs in any byte has another identity, unless somebody made it to have the same: XXH3 is no cryptographic hash.
pub fn identity(gguf: &Gguf, compute: &Compute) -> [u8; 32] {
    let len = gguf.byte_len();
    let blocks = len.div_ceil(BLOCK as u64) as usize;
    let hashes: Vec<[AtomicU64; 2]> = (0..blocks).map(|_| Default::default()).collect();
    compute.pool().run(blocks, |block, _| {
        let (start, mut bytes) = ((block * BLOCK) as u64, [0; BLOCK]);
        let bytes = &mut bytes[..(len - start).min(BLOCK as u64) as usize];
        // A file that cannot be read is refused where it is loaded.
        let hash = gguf.read_at(start, bytes).map_or(0, |()| xxh3_128(bytes));
        hashes[block][0].store(hash as u64, Relaxed);
        hashes[block][1].store((hash >> 64) as u64, Relaxed);
    });
    let mut all = Sha256::new_with_prefix(len.to_le_bytes());
    hashes.as_flattened().iter().for_each(|half| all.update(half.load(Relaxed).to_le_bytes()));
    all.finalize().into()
}
