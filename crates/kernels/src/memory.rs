//! Large buffers on huge pages, and weight bytes that may live in one or in the model file itself.

use std::marker::PhantomData;
use std::ops::{Deref, DerefMut, Range};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

/// What memory is taken for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemoryPart {
    /// Ternary matrices, and an embedding or head that was copied.
    Weights,
    /// The four-bit copy of the head.
    HeadCopy,
    /// Keys and values.
    Cache,
    /// What a step computes in.
    Scratch,
    /// Tables of a tokenizer.
    Vocabulary,
}

impl MemoryPart {
    /// All, in the order of their discriminants.
    pub const ALL: [Self; 5] = [Self::Weights, Self::HeadCopy, Self::Cache, Self::Scratch, Self::Vocabulary];

    /// What it is, for a person.
    pub const fn name(self) -> &'static str {
        ["weights", "head copy", "cache", "scratch", "vocabulary"][self as usize]
    }
}

/// Bytes for each part, in the order of [`MemoryPart::ALL`].
pub type PartBytes = [usize; MemoryPart::ALL.len()];

static LIVE: [AtomicUsize; MemoryPart::ALL.len()] = [const { AtomicUsize::new(0) }; MemoryPart::ALL.len()];
static ALL: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

/// What the process holds now, and the most that it ever held in all: every buffer of this crate, and whatever else was
/// [`Counted`]. Memory that was taken but never written to is counted though the system may not have given it yet.
pub fn memory_use() -> (PartBytes, usize) {
    (LIVE.each_ref().map(|part| part.load(Relaxed)), PEAK.load(Relaxed))
}

/// Bytes that count as held in [`memory_use`] for as long as this lives.
#[derive(Debug, Default)]
pub struct Counted(PartBytes);

impl Counted {
    /// `bytes` for `part`.
    pub fn new(part: MemoryPart, bytes: usize) -> Self {
        let mut counted = Self::default();
        counted.add(part, bytes);
        counted
    }
    /// So many bytes more.
    pub fn add(&mut self, part: MemoryPart, bytes: usize) {
        self.0[part as usize] += bytes;
        LIVE[part as usize].fetch_add(bytes, Relaxed);
        PEAK.fetch_max(ALL.fetch_add(bytes, Relaxed) + bytes, Relaxed);
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        for (live, bytes) in LIVE.iter().zip(self.0) {
            live.fetch_sub(bytes, Relaxed);
            ALL.fetch_sub(bytes, Relaxed);
        }
    }
}

/// The bytes that a list has taken.
pub(crate) fn taken<T>(list: &Vec<T>) -> usize {
    list.capacity() * size_of::<T>()
}

/// A zeroed buffer aligned to 2 MiB, on huge pages where the system has them. Pages are taken from the system as they
/// are first written.
pub struct HugeBuffer {
    ptr: *mut u8,
    len: usize,
    /// What it is taken for.
    pub counted: Counted,
    #[cfg(unix)]
    map: (*mut libc::c_void, usize),
}

// SAFETY: the buffer owns its memory, as a Vec does.
unsafe impl Send for HugeBuffer {}
// SAFETY: as above; shared access is read-only.
unsafe impl Sync for HugeBuffer {}

const ALIGN: usize = 2 << 20;

impl HugeBuffer {
    /// A buffer of `len` zero bytes for `part`, or None where the system has no room for it.
    #[cfg(unix)]
    pub fn new(part: MemoryPart, len: usize) -> Option<Self> {
        let size = len.checked_next_multiple_of(ALIGN)?.checked_add(ALIGN)?;
        let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: a new private mapping, no fixed address: nothing existing is touched.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), size, prot, flags, -1, 0) };
        if base == libc::MAP_FAILED {
            return None;
        }
        let ptr = base.cast::<u8>().wrapping_add(base.cast::<u8>().align_offset(ALIGN));
        // Even where huge pages come slowly: a virtual machine whose host took free memory back waits 4 ms for each (0.2 ms
        // otherwise; small ones for the same bytes 0.7 ms), a second in all for a model of 1 GB. But decoding from small
        // pages is a fifth slower, so that a start with them has lost its lead after a hundred tokens. What does not fill one is on
        // small pages.
        #[cfg(target_os = "linux")]
        // SAFETY: the range lies in the mapping just made. A refusal only means small pages.
        unsafe {
            libc::madvise(ptr.cast(), len / ALIGN * ALIGN, libc::MADV_HUGEPAGE);
        }
        Some(Self { ptr, len, counted: Counted::new(part, len), map: (base, size) })
    }

    /// A buffer of `len` zero bytes for `part`, or None where the system has no room for it.
    #[cfg(not(unix))]
    pub fn new(part: MemoryPart, len: usize) -> Option<Self> {
        let layout = std::alloc::Layout::from_size_align(len.max(1), ALIGN).ok()?;
        // SAFETY: the size is not zero.
        let ptr = unsafe { std::alloc::alloc_zeroed(layout) };
        (!ptr.is_null()).then(|| Self { ptr, len, counted: Counted::new(part, len) })
    }
}

impl HugeBuffer {
    /// The buffer as float32.
    pub fn floats(&self) -> &[f32] {
        // SAFETY: aligned to 2 MiB, and any bits are a float.
        unsafe { std::slice::from_raw_parts(self.ptr.cast(), self.len / 4) }
    }
}

impl Drop for HugeBuffer {
    fn drop(&mut self) {
        #[cfg(unix)]
        // SAFETY: the mapping made in `new`, given back once.
        unsafe {
            libc::munmap(self.map.0, self.map.1);
        }
        #[cfg(not(unix))]
        if let Ok(layout) = std::alloc::Layout::from_size_align(self.len.max(1), ALIGN) {
            // SAFETY: allocated in `new` with this layout.
            unsafe { std::alloc::dealloc(self.ptr, layout) }
        }
    }
}

impl Deref for HugeBuffer {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: `ptr` is to `len` initialised bytes that live as long as `self`.
        unsafe { std::slice::from_raw_parts(self.ptr, self.len) }
    }
}

impl DerefMut for HugeBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `self` is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.ptr, self.len) }
    }
}

impl AsRef<[u8]> for HugeBuffer {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

/// Numbers whose every bit pattern is valid, zero bits being zero.
pub trait Plain: Copy + sealed::Sealed {}
mod sealed {
    pub trait Sealed {}
}
macro_rules! plain {
    ($($number:ty),+) => { $(impl Plain for $number {} impl sealed::Sealed for $number {})+ };
}
plain!(f32, i8, u8, i16, u16, i32, u64);

/// Bytes as numbers in the machine's own order.
///
/// # Panics
/// If the bytes are not aligned to the numbers, or end inside of one.
#[inline(always)]
pub(crate) fn cast<T: Plain>(bytes: &[u8]) -> &[T] {
    assert!(bytes.as_ptr().cast::<T>().is_aligned() && bytes.len().is_multiple_of(size_of::<T>()));
    // SAFETY: aligned and within the bytes as just checked, and any bits are a `Plain`.
    unsafe { std::slice::from_raw_parts(bytes.as_ptr().cast(), bytes.len() / size_of::<T>()) }
}

/// As [`cast`].
#[inline(always)]
pub(crate) fn cast_mut<T: Plain>(bytes: &mut [u8]) -> &mut [T] {
    assert!(bytes.as_ptr().cast::<T>().is_aligned() && bytes.len().is_multiple_of(size_of::<T>()));
    // SAFETY: as above, and the bytes are borrowed exclusively.
    unsafe { std::slice::from_raw_parts_mut(bytes.as_mut_ptr().cast(), bytes.len() / size_of::<T>()) }
}

/// Bytes of a cache line.
const LINE: usize = 64;

/// A zeroed slice that begins on a cache line, so that no vector load from it touches two lines where it need not. Its memory is
/// taken as it is written to. It counts as [`MemoryPart::Scratch`].
pub struct Aligned<T> {
    /// A line more than is needed. Zeros of a type without an alignment of its own come from the system as they are.
    memory: Vec<u64>,
    /// Where it begins.
    first: usize,
    len: usize,
    _counted: Counted,
    of: PhantomData<T>,
}

impl<T: Plain> Aligned<T> {
    /// `len` zeros.
    ///
    /// # Panics
    /// If no memory could hold them.
    pub fn zeroed(len: usize) -> Self {
        let bytes = len.checked_mul(size_of::<T>()).expect("a length that memory can hold");
        let memory = vec![0u64; (bytes.div_ceil(LINE) + 1) * (LINE / 8)];
        let first = memory.as_ptr().align_offset(LINE);
        Self {
            len,
            _counted: Counted::new(MemoryPart::Scratch, taken(&memory)),
            memory,
            first,
            of: PhantomData,
        }
    }
}

impl<T: Plain> Deref for Aligned<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        // SAFETY: from `first` on there are `len` elements, aligned to more than they need, and any bits are a `Plain`.
        unsafe { std::slice::from_raw_parts(self.memory[self.first..].as_ptr().cast(), self.len) }
    }
}

impl<T: Plain> DerefMut for Aligned<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as above, and `self` is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.memory[self.first..].as_mut_ptr().cast(), self.len) }
    }
}

/// A shared range of bytes: part of a [`HugeBuffer`], of a mapped file, or of anything else that gives bytes.
#[derive(Clone)]
pub struct Bytes {
    owner: Arc<dyn AsRef<[u8]> + Send + Sync>,
    range: Range<usize>,
}

impl Bytes {
    /// The bytes of `owner` in `range`.
    ///
    /// # Panics
    /// If the range is not inside.
    pub fn new(owner: Arc<dyn AsRef<[u8]> + Send + Sync>, range: Range<usize>) -> Self {
        assert!((*owner).as_ref().get(range.clone()).is_some(), "range outside of its owner");
        Self { owner, range }
    }

    /// Those in `range` of these.
    ///
    /// # Panics
    /// If the range is not inside.
    pub fn part(&self, range: Range<usize>) -> Self {
        assert!(self.get(range.clone()).is_some(), "range outside of its bytes");
        Self {
            owner: self.owner.clone(),
            range: self.range.start + range.start..self.range.start + range.end,
        }
    }
}

impl Deref for Bytes {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &(*self.owner).as_ref()[self.range.clone()]
    }
}
