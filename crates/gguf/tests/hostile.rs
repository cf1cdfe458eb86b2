//! Files that lie: each lie has its own error, and none costs a panic or much memory.

#![allow(clippy::unwrap_used, reason = "a test helper fails by panicking")]

mod touch;

use bitnet_gguf::{Error, Fault, Gguf, TensorType, Value, ValueType, Writer};
use proptest::prelude::*;
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use touch::touch;

/// Remembers the bytes that the current thread has allocated since a reset.
struct Counting;

thread_local!(static ALLOCATED: Cell<usize> = const { Cell::new(0) });

// SAFETY: all calls go to the system's allocator unchanged; the counter neither allocates nor has a destructor.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATED.set(ALLOCATED.get().saturating_add(layout.size()));
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: the caller's promises are passed on.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// A file by hand, without any of the writer's checks.
struct Raw {
    keys: Vec<u8>,
    n_keys: u64,
    tensors: Vec<u8>,
    n_tensors: u64,
    data: usize,
}

const U32: u32 = 4;
const BOOL: u32 = 7;
const STR: u32 = 8;
const ARRAY: u32 = 9;

fn raw() -> Raw {
    Raw { keys: vec![], n_keys: 0, tensors: vec![], n_tensors: 0, data: 0 }
}

fn str(s: impl AsRef<[u8]>) -> Vec<u8> {
    let s = s.as_ref();
    [&(s.len() as u64).to_le_bytes(), s].concat()
}

impl Raw {
    fn key(mut self, name: impl AsRef<[u8]>, ty: u32, value: impl AsRef<[u8]>) -> Self {
        self.keys.extend([&str(name), &ty.to_le_bytes()[..], value.as_ref()].concat());
        self.n_keys += 1;
        self
    }

    fn tensor(mut self, name: impl AsRef<[u8]>, dims: &[u64], ty: u32, offset: u64) -> Self {
        self.tensors.extend([str(name), (dims.len() as u32).to_le_bytes().to_vec()].concat());
        self.tensors.extend(dims.iter().flat_map(|d| d.to_le_bytes()));
        self.tensors.extend(ty.to_le_bytes());
        self.tensors.extend(offset.to_le_bytes());
        self.n_tensors += 1;
        self
    }

    fn data(mut self, len: usize) -> Self {
        self.data = len;
        self
    }

    fn bytes(&self) -> Vec<u8> {
        let counts = [self.n_tensors, self.n_keys].map(u64::to_le_bytes).concat();
        let mut out = [b"GGUF\x03\0\0\0", &counts[..], &self.keys, &self.tensors].concat();
        out.resize(out.len().next_multiple_of(32) + self.data, 0);
        out
    }

    fn fault(&self) -> (String, Fault) {
        fault(self.bytes())
    }
}

/// The error of bytes that must not parse: thing and fault. Also checks the message's form.
fn fault(bytes: Vec<u8>) -> (String, Fault) {
    let len = bytes.len() as u64;
    let error = Gguf::from_vec("bad.gguf", bytes).expect_err("must not parse");
    let message = error.to_string();
    let Error::Malformed { file, thing, offset, fault } = error else { panic!("unexpected {message}") };
    assert_eq!(file, "bad.gguf");
    assert!(offset <= len, "{message}");
    assert_eq!(message, format!("bad.gguf: {thing} at byte {offset}: {fault}"));
    assert!(!message.contains(char::is_control) && message.len() < 500, "{message}");
    (thing, fault)
}

/// One or two of everything.
fn sample() -> Vec<u8> {
    let mut w = Writer::new("sample.gguf".as_ref());
    w.meta("general.architecture", Value::Str("bitnet-b1.58")).unwrap();
    w.meta("general.alignment", Value::U32(64)).unwrap();
    w.meta("flag", Value::Bool(true)).unwrap();
    w.meta("eps", Value::F32(1e-5)).unwrap();
    w.meta_array("tokens", ValueType::Str, ["a", "Ġthe", ""].map(Value::Str)).unwrap();
    w.meta_array("types", ValueType::I32, [1, -1, 3].map(Value::I32)).unwrap();
    w.meta_array("flags", ValueType::Bool, [true, false].map(Value::Bool)).unwrap();
    let copy = Gguf::from_vec("nested", raw().key("x", ARRAY, nested(3)).bytes()).unwrap();
    w.meta("nested", copy.get("x").unwrap()).unwrap();
    w.tensor("norm", &[5], TensorType::F32).unwrap();
    w.tensor("w", &[128, 2], TensorType::I2S).unwrap();
    w.tensor("v", &[64, 3], TensorType::IQ2BN).unwrap();
    let mut data = w.write_to(Vec::new()).unwrap();
    data.tensor("norm", &[1; 20]).unwrap();
    data.tensor("w", &[2; 96]).unwrap();
    data.tensor("v", &[3; 60]).unwrap();
    data.end().unwrap()
}

/// The value of an array that nests `levels` deep.
fn nested(levels: usize) -> Vec<u8> {
    let one = 1u64.to_le_bytes();
    let mut out = Vec::new();
    for _ in 1..levels {
        out.extend([&ARRAY.to_le_bytes()[..], &one].concat());
    }
    [&out[..], &U32.to_le_bytes(), &one, &[7, 0, 0, 0]].concat()
}

#[test]
fn header() {
    let with = |at: usize, bytes: &[u8]| {
        let mut out = sample();
        out[at..at + bytes.len()].copy_from_slice(bytes);
        fault(out)
    };
    assert_eq!(with(0, b"\x7fELF"), ("header".into(), Fault::Magic { found: *b"\x7fELF" }));
    assert_eq!(with(4, &[1, 0, 0, 0]).1, Fault::Version { found: 1 });
    assert_eq!(with(4, &[4, 0, 0, 0]).1, Fault::Version { found: 4 });
    assert_eq!(with(4, &[0; 4]).1, Fault::Version { found: 0 });
    assert_eq!(with(4, &[0, 0, 0, 3]).1, Fault::BigEndian { version: 3 });
    for at in [8, 16] {
        for count in [100_000, 1 << 40, u64::MAX] {
            assert!(matches!(with(at, &count.to_le_bytes()).1, Fault::Count { count: c, .. } if c == count));
        }
    }
    assert!(matches!(fault(vec![]).1, Fault::Short { needed: 4, left: 0 }));
}

#[test]
fn more_entries_than_accepted() {
    let mut bytes = raw().data(4 << 20).bytes();
    bytes[16..24].copy_from_slice(&65_537u64.to_le_bytes());
    assert!(matches!(fault(bytes).1, Fault::Limit { what: "keys", found: 65_537, .. }));
}

#[test]
fn keys() {
    let twice = raw().key("k", U32, [0; 4]).key("j", U32, [0; 4]).key("k", BOOL, [0]);
    assert_eq!(twice.fault(), ("key \"k\"".into(), Fault::Duplicate { first: 24 }));
    assert_eq!(raw().key("k", 13, [0; 8]).fault().1, Fault::ValueType { id: 13 });
    assert_eq!(raw().key("k", BOOL, [2]).fault().1, Fault::Bool { found: 2 });
    assert_eq!(raw().key(b"k\xff", U32, [0; 4]).fault(), ("name of key 0".into(), Fault::Utf8 { valid: 1 }));
    assert_eq!(raw().key("k", STR, str(b"ab\xc3")).fault(), ("key \"k\"".into(), Fault::Utf8 { valid: 2 }));
    assert!(matches!(
        raw().key(vec![b'k'; 65_536], U32, [0; 4]).fault().1,
        Fault::Limit { found: 65_536, .. }
    ));
    assert!(matches!(raw().key("k", STR, u64::MAX.to_le_bytes()).fault().1, Fault::Short { .. }));
    let hostile = raw().key("a\nb\u{1b}[2J".repeat(40), STR, u64::MAX.to_le_bytes()).fault().0;
    assert!(hostile.contains("\\n") && hostile.ends_with("..."), "{hostile}"); // see fault() for the rest
}

#[test]
fn arrays() {
    let array = |ty: u32, len: u64, elements: &[u8]| {
        let value = [&ty.to_le_bytes()[..], &len.to_le_bytes(), elements].concat();
        raw().key("k", ARRAY, value).data(64)
    };
    assert!(matches!(array(STR, 100, &[]).fault().1, Fault::Count { count: 100, each: 8, .. }));
    assert!(matches!(array(U32, u64::MAX, &[]).fault().1, Fault::Count { each: 4, .. }));
    assert!(matches!(array(ARRAY, 1 << 60, &[]).fault().1, Fault::Count { each: 12, .. }));
    assert_eq!(array(13, 0, &[]).fault().1, Fault::ValueType { id: 13 });
    assert_eq!(array(BOOL, 2, &[1, 3]).fault().1, Fault::Bool { found: 3 });
    assert_eq!(array(STR, 1, &str([0x80])).fault().1, Fault::Utf8 { valid: 0 });
    assert!(Gguf::from_vec("ok", raw().key("k", ARRAY, nested(4)).bytes()).is_ok());
    let deep = raw().key("k", ARRAY, nested(5)).fault().1;
    assert!(matches!(deep, Fault::Limit { what: "levels of arrays", found: 5, limit: 4 }));
    assert!(matches!(raw().key("k", ARRAY, nested(100_000)).fault().1, Fault::Limit { .. }));
}

#[test]
fn alignment() {
    for bad in [0, 1, 3, 4, 48, 1 << 21, 1 << 31, u32::MAX] {
        let file = raw().key("general.alignment", U32, bad.to_le_bytes());
        assert_eq!(file.fault().1, Fault::Alignment { found: bad.to_string() });
    }
    let text = raw().key("general.alignment", STR, str("32"));
    assert_eq!(text.fault(), ("key \"general.alignment\"".into(), Fault::Alignment { found: "str".into() }));
    for good in [8u32, 64, 1 << 20] {
        let file = raw().key("general.alignment", U32, good.to_le_bytes()).bytes();
        assert_eq!(Gguf::from_vec("ok", file).unwrap().alignment(), good as usize);
    }
}

#[test]
fn shapes() {
    let shape = |dims: &[u64], ty: TensorType| raw().tensor("t", dims, ty.id(), 0).data(64).fault();
    for (dims, ty, problem) in [
        (&[][..], TensorType::F32, "expected 1 to 4 of them"),
        (&[0], TensorType::F32, "expected none to be zero"),
        (&[8, 0, 2], TensorType::F16, "expected none to be zero"),
        (&[u64::MAX, 2], TensorType::F32, "expected at most 2^44 elements"),
        (&[1 << 32, 1 << 32, 1 << 32], TensorType::TL1, "expected at most 2^44 elements"),
        (&[255], TensorType::TQ1_0, "expected whole blocks of elements"),
        (&[3, 3], TensorType::I2S, "expected whole blocks of elements"),
    ] {
        assert_eq!(shape(dims, ty).1, Fault::Shape { dims: dims.to_vec(), ty, problem });
    }
    assert!(matches!(shape(&[1; 5], TensorType::F32).1, Fault::Limit { what: "dimensions", found: 5, .. }));
    let unknown = raw().tensor("t", &[1], 77, 0).data(64).fault();
    assert_eq!(unknown, ("tensor \"t\"".into(), Fault::TensorType { id: 77 }));
}

#[test]
fn places() {
    let f32_at = |offset: u64| raw().tensor("a", &[8], 0, 32).tensor("b", &[9], 0, offset).data(128);
    assert!(Gguf::from_vec("ok", f32_at(64).bytes()).is_ok());
    assert!(matches!(f32_at(8).fault().1, Fault::Misaligned { found: 8, alignment: 32 }));
    assert!(
        matches!(f32_at(96).fault().1, Fault::Truncated { start, end, len } if end == start + 36 && end == len + 4)
    );
    for offset in [160, 1 << 40, u64::MAX - 31] {
        assert!(matches!(f32_at(offset).fault().1, Fault::Truncated { .. }));
    }
    for (offset, later) in [(32, "b"), (0, "a")] {
        let (thing, fault) = f32_at(offset).fault();
        assert_eq!(thing, format!("tensor {later:?}"));
        assert!(matches!(fault, Fault::Overlap { other, .. } if other != thing));
    }
    let twice = raw().tensor("a", &[8], 0, 0).tensor("a", &[8], 0, 32).data(64).fault();
    assert_eq!(twice, ("tensor \"a\"".into(), Fault::Duplicate { first: 24 }));
    assert!(matches!(raw().tensor(b"\xff", &[8], 0, 0).data(64).fault().1, Fault::Utf8 { valid: 0 }));
}

#[test]
fn tensors_without_a_known_size_reach_to_the_next() {
    let tl = |a: u64, b: u64| raw().tensor("b", &[256], 39, b).tensor("a", &[256], 38, a).data(100);
    let file = Gguf::from_vec("ok", tl(0, 64).bytes()).unwrap();
    assert_eq!(file.tensor("a").map(|t| t.byte_len), Some(64));
    assert_eq!(file.tensor("b").map(|t| t.byte_len), Some(36));
    touch(&file);
    assert!(matches!(tl(32, 32).fault().1, Fault::Overlap { .. }));
    assert!(matches!(tl(0, 128).fault().1, Fault::Truncated { .. }));
    assert!(matches!(tl(0, u64::MAX - 31).fault().1, Fault::Truncated { .. }));
}

#[test]
fn wrong_types_are_named() {
    let file = Gguf::from_vec("s.gguf", sample()).unwrap();
    assert_eq!(file.get_u32("general.alignment").unwrap(), Some(64));
    assert_eq!(file.get_u32("absent").unwrap(), None);
    let at = file.get_str("eps").unwrap_err().to_string();
    assert!(
        at.starts_with("s.gguf: key \"eps\" at byte ") && at.ends_with(": expected str, found f32"),
        "{at}"
    );
    let negative = raw().key("k", 5, (-3i32).to_le_bytes()).bytes();
    let error = Gguf::from_vec("n", negative).unwrap().get_u64("k").unwrap_err().to_string();
    assert_eq!(error, "n: key \"k\" at byte 37: expected u64, found i32 -3");
}

#[test]
fn every_truncation_is_an_error() {
    let whole = sample();
    let file = Gguf::from_vec("whole", whole.clone()).unwrap();
    touch(&file);
    let end = file.tensors().iter().map(|t| t.range().end).max().unwrap() as usize;
    assert!(whole.len() - end < 64); // what remains is padding
    for len in 0..end {
        fault(whole[..len].to_vec());
    }
}

/// Parses without trust: no panic, and no more memory than a small multiple of the file.
fn parse_untrusted(bytes: Vec<u8>) {
    let budget = 4096 + 64 * bytes.len();
    ALLOCATED.set(0);
    let parsed = Gguf::from_vec("mutant", bytes);
    let allocated = ALLOCATED.get();
    assert!(allocated < budget, "{allocated} bytes allocated");
    match parsed {
        Ok(file) => touch(&file),
        Err(error) => assert!(!error.to_string().contains(char::is_control)),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(4000) })]

    #[test]
    fn mutations_are_survived(edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8)) {
        let mut bytes = sample();
        for (at, byte) in edits {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        parse_untrusted(bytes);
    }

    #[test]
    fn hostile_numbers_are_survived(
        at in any::<prop::sample::Index>(),
        number in prop_oneof![any::<u64>(), (0u32..64, -2i64..3).prop_map(|(bit, d)| (1u64 << bit).wrapping_add_signed(d))],
        width in prop_oneof![Just(4usize), Just(8)],
    ) {
        let mut bytes = sample();
        let at = at.index(bytes.len() - 8);
        bytes[at..at + width].copy_from_slice(&number.to_le_bytes()[..width]);
        parse_untrusted(bytes);
    }

    #[test]
    fn noise_is_survived(body in prop::collection::vec(any::<u8>(), 0..300), counts in (0u64..4, 0u64..4)) {
        let head = [b"GGUF\x02\0\0\0".to_vec(), counts.0.to_le_bytes().to_vec(), counts.1.to_le_bytes().to_vec()];
        parse_untrusted([head.concat(), body].concat());
    }
}

#[test]
fn the_fuzz_seeds_are_what_they_are_called() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fuzz/seeds/gguf");
    let mut seen = 0;
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let bad = path.file_name().unwrap().to_str().unwrap().starts_with("bad_");
        match Gguf::open(&path) {
            Ok(file) => touch(&file),
            Err(error) => assert!(bad, "{error}"),
        }
        assert_eq!(Gguf::open(&path).is_err(), bad, "{}", path.display());
        seen += 1;
    }
    assert!(seen >= 20);
}
