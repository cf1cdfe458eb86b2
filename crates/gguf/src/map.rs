//! The bytes of a file: the only unsafe code of this crate.

use crate::Error;
use memmap2::Mmap;
use std::{fs, ops::Range, path::Path};

pub(crate) enum Bytes {
    Map(Mmap, fs::File),
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
        Ok(Self::Map(map, file))
    }

    pub(crate) fn as_slice(&self) -> &[u8] {
        match self {
            Self::Map(map, _) => map,
            Self::Static(bytes) => bytes,
            Self::Owned(bytes) => bytes,
        }
    }

    /// Copies bytes from `offset` on; of a mapped file through a read, which maps nothing and may fail.
    pub(crate) fn read_at(&self, offset: u64, out: &mut [u8]) -> std::io::Result<()> {
        #[cfg(unix)]
        if let Self::Map(_, file) = self {
            return std::os::unix::fs::FileExt::read_exact_at(file, out, offset);
        }
        let bytes = usize::try_from(offset).ok().and_then(|at| self.as_slice().get(at..)?.get(..out.len()));
        out.copy_from_slice(bytes.ok_or(std::io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    /// Lets the system drop the whole pages within the range; the next access reads them from the file again.
    pub(crate) fn advise_dontneed(&self, range: Range<u64>) {
        #[cfg(unix)]
        if let Self::Map(map, _) = self {
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
