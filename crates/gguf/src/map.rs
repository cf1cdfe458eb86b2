//! The bytes of a file: the only unsafe code of this crate.

use crate::Error;
use memmap2::Mmap;
use std::{fs, ops::Range, path::Path};

pub(crate) enum Bytes {
    Map(Mmap),
    Static(&'static [u8]),
    Owned(Vec<u8>),
}

impl Bytes {
    pub(crate) fn map(path: &Path) -> Result<Self, Error> {
        let io = |action| {
            let file = path.display().to_string();
            move |error| Error::Io { file, action, error }
        };
        // Asked before opening, for opening a pipe waits for its writer.
        let kind = fs::metadata(path).map_err(io("open"))?;
        if !kind.is_file() {
            return Err(io("map")(std::io::Error::other("not a regular file")));
        }
        let file = fs::File::open(path).map_err(io("open"))?;
        // SAFETY: the map is read-only and lives as long as the slices given out. That no other process rewrites
        // or shortens the file meanwhile is the documented duty of the caller of `Gguf::open`; nothing read from the
        // map is trusted to stay what it was: offsets and lengths are kept apart or checked again at each use.
        let map = unsafe { Mmap::map(&file) }.map_err(io("map"))?;
        Ok(Self::Map(map))
    }

    pub(crate) fn as_slice(&self) -> &[u8] {
        match self {
            Self::Map(map) => map,
            Self::Static(bytes) => bytes,
            Self::Owned(bytes) => bytes,
        }
    }

    /// Lets the system drop the whole pages within the range; the next access reads them from the file again.
    pub(crate) fn advise_dontneed(&self, range: Range<u64>) {
        #[cfg(unix)]
        if let Self::Map(map) = self {
            const PAGE: u64 = 65_536; // a multiple of every page size in use
            let start = range.start.min(map.len() as u64).next_multiple_of(PAGE);
            let end = range.end.min(map.len() as u64) / PAGE * PAGE;
            if start < end {
                // SAFETY: start..end lies in the map; the map is a shared one of a file and never written to, so
                // dropping a page changes no byte that a slice shows. A refusal is harmless: it is only advice.
                let _ = unsafe {
                    map.unchecked_advise_range(
                        memmap2::UncheckedAdvice::DontNeed,
                        start as usize,
                        (end - start) as usize,
                    )
                };
            }
        }
        #[cfg(not(unix))]
        let _ = (self, range);
    }
}
