//! What the writer writes, the parser reads; what it must not write, it refuses and leaves no trace.

#![allow(clippy::unwrap_used, reason = "a test helper fails by panicking")]

mod touch;

use bitnet_gguf::{Array, AtomicFile, Error, Gguf, TensorType, TensorWriter, Value, ValueType, Writer};
use proptest::prelude::*;
use std::{collections::BTreeMap, fs, io::Write};
use touch::touch;

/// A value, or the elements of an array and their type.
type Owned = (ValueType, Vec<Value<'static>>);

fn many<T: Arbitrary + 'static>(ty: ValueType, wrap: fn(T) -> Value<'static>) -> BoxedStrategy<Owned> {
    let values = prop::collection::vec(any::<T>().prop_map(wrap), 0..10);
    values.prop_map(move |values| (ty, values)).boxed()
}

fn value() -> impl Strategy<Value = Owned> {
    prop_oneof![
        many(ValueType::U8, Value::U8),
        many(ValueType::I8, Value::I8),
        many(ValueType::U16, Value::U16),
        many(ValueType::I16, Value::I16),
        many(ValueType::U32, Value::U32),
        many(ValueType::I32, Value::I32),
        many(ValueType::U64, Value::U64),
        many(ValueType::I64, Value::I64),
        many(ValueType::F32, Value::F32),
        many(ValueType::F64, Value::F64),
        many(ValueType::Bool, Value::Bool),
        many(ValueType::Str, |text: String| Value::Str(text.leak())),
    ]
}

fn tensor_type() -> impl Strategy<Value = TensorType> {
    prop::sample::select(TensorType::all().filter(|ty| ty.size_is_known()).collect::<Vec<_>>())
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(400) })]

    #[test]
    fn what_is_written_is_read(
        metadata in prop::collection::btree_map(any::<String>(), value(), 0..8),
        tensors in prop::collection::btree_map(
            any::<String>(), (tensor_type(), 1u64..3, prop::collection::vec(1u64..4, 0..4), any::<u8>()), 0..6),
        alignment in 3u32..8,
    ) {
        let mut w = Writer::new("x.gguf".as_ref());
        w.meta("general.alignment", Value::U32(1 << alignment)).unwrap();
        for (key, (ty, values)) in &metadata {
            match values[..] {
                [value] => w.meta(key, value).unwrap(),
                _ => w.meta_array(key, *ty, values.iter().copied()).unwrap(),
            }
        }
        let shape = |row: u64, outer: &Vec<u64>| [vec![256 * row], outer.clone()].concat();
        for (name, (ty, row, outer, _)) in &tensors {
            w.tensor(name, &shape(*row, outer), *ty).unwrap();
        }
        let mut data = w.write_to(Vec::new()).unwrap();
        let mut contents = BTreeMap::new();
        for (name, (ty, row, outer, fill)) in &tensors {
            let len = ty.byte_len(&shape(*row, outer)).unwrap();
            let bytes: Vec<u8> = (0..len).map(|i| (i as u8).wrapping_mul(31).wrapping_add(*fill)).collect();
            data.start(name).unwrap();
            for part in bytes.chunks(1000) {
                data.write_all(part).unwrap();
            }
            contents.insert(name, bytes);
        }
        let file = Gguf::from_vec("x.gguf", data.end().unwrap()).unwrap();

        prop_assert_eq!(file.version(), 3);
        prop_assert_eq!(file.alignment(), 1 << alignment);
        prop_assert_eq!(file.byte_len() % (1 << alignment), 0);
        prop_assert_eq!(file.metadata().count(), metadata.len() + 1);
        prop_assert!(file.metadata().skip(1).map(|(key, _)| key).eq(metadata.keys()));
        for (key, (ty, values)) in &metadata {
            match (values[..].first(), file.get_array(key)) {
                (Some(value), Err(_)) => prop_assert_eq!(file.get(key), Some(*value)),
                (_, array) => {
                    let array = array.unwrap().unwrap();
                    prop_assert_eq!(array.element_type(), *ty);
                    prop_assert!(array.values().eq(values.iter().copied()));
                }
            }
        }
        prop_assert_eq!(file.tensors().len(), tensors.len());
        for (name, (ty, row, outer, _)) in &tensors {
            let t = file.tensor(name).unwrap();
            prop_assert_eq!((&t.dims, t.ty), (&shape(*row, outer), *ty));
            prop_assert_eq!(file.tensor_bytes(t), &contents[name][..]);
        }
        touch(&file);
    }
}

fn message<T>(result: Result<T, Error>) -> String {
    result.err().expect("must be refused").to_string()
}

#[test]
fn the_writer_refuses_what_the_parser_would() {
    let mut w = Writer::new("w.gguf".as_ref());
    w.meta("k", Value::U8(1)).unwrap();
    assert_eq!(message(w.meta("k", Value::U8(2))), "w.gguf: cannot write key \"k\": it is already there");
    for bad in [Value::U32(48), Value::Str("32"), Value::U32(0)] {
        assert!(message(w.meta("general.alignment", bad)).contains("no power of two from 8 to 1048576"));
    }
    let mixed = w.meta_array("m", ValueType::U8, [Value::U8(1), Value::Bool(true)]);
    assert_eq!(message(mixed), "w.gguf: cannot write key \"m\": element 1 of an array of u8 is bool");
    assert!(message(w.meta(&"k".repeat(65_536), Value::U8(1))).contains("65536 bytes"));
    assert!(message(w.tensor(&"k".repeat(65_536), &[1], TensorType::F32)).contains("65536 bytes"));
    assert!(message(w.tensor("t", &[256], TensorType::TL1)).ends_with("the size of type TL1 is not known"));
    for (dims, problem) in [
        (&[][..], "1 to 4"),
        (&[1; 5][..], "1 to 4"),
        (&[0], "zero"),
        (&[100], "whole blocks"),
        (&[1 << 40, 1 << 40], "at most"),
    ] {
        assert!(message(w.tensor("t", dims, TensorType::Q4_0)).contains(problem));
    }
    w.tensor("t", &[1], TensorType::F32).unwrap();
    assert!(message(w.tensor("t", &[1], TensorType::F32)).ends_with("it is already there"));
    // None of the refusals left a trace.
    let mut data = w.write_to(Vec::new()).unwrap();
    data.tensor("t", &[0; 4]).unwrap();
    let file = Gguf::from_vec("w.gguf", data.end().unwrap()).unwrap();
    assert_eq!((file.metadata().count(), file.tensors().len()), (1, 1));
}

#[test]
fn nesting_is_limited_when_writing_too() {
    fn wrap(inner: Option<Array<'_>>) -> Gguf {
        let mut w = Writer::new("n.gguf".as_ref());
        match inner {
            Some(array) => w.meta_array("k", ValueType::Array, [Value::Array(array)]).unwrap(),
            None => w.meta_array("k", ValueType::I8, [Value::I8(-1)]).unwrap(),
        }
        Gguf::from_vec("n.gguf", w.write_to(Vec::new()).unwrap().end().unwrap()).unwrap()
    }
    let mut file = wrap(None);
    for _ in 1..4 {
        file = wrap(file.get_array("k").unwrap());
    }
    let deepest = Value::Array(file.get_array("k").unwrap().unwrap());
    let deeper = Writer::new("n.gguf".as_ref()).meta_array("k", ValueType::Array, [deepest]);
    assert!(message(deeper).ends_with("arrays are nested more than 4 deep"));
    let mut array = file.get_array("k").unwrap().unwrap();
    for _ in 1..4 {
        array = array.arrays().unwrap().next().unwrap();
    }
    assert!(array.ints().unwrap().eq([-1]));
}

fn two_tensors<W: Write>(
    create: impl FnOnce(Writer) -> Result<TensorWriter<W>, Error>,
) -> Result<TensorWriter<W>, Error> {
    let mut w = Writer::new("two.gguf".as_ref());
    w.tensor("a", &[3], TensorType::I8)?;
    w.tensor("b", &[2], TensorType::F32)?;
    create(w)
}

#[test]
fn sizes_and_order_of_the_data_are_checked() {
    let data = || two_tensors(|w| w.write_to(Vec::new())).unwrap();
    assert!(message(data().tensor("a", &[0; 4])).ends_with("expected 3 bytes of data, got 4"));
    assert!(message(data().tensor("b", &[0; 8])).ends_with("expected tensor \"a\" to be next"));
    assert!(message(data().end()).ends_with("tensor \"a\": expected its data before the end"));
    let mut short = data();
    short.start("a").unwrap();
    short.write_all(&[1, 2]).unwrap();
    assert!(message(short.start("b")).ends_with("tensor \"a\": 1 bytes of 3 are missing"));
    assert!(short.write_all(&[3, 4]).is_err()); // too much
    short.write_all(&[3]).unwrap();
    // A refusal is not the end: what is right still works.
    assert!(short.start("c").is_err());
    short.tensor("b", &[5; 8]).unwrap();
    assert!(message(short.start("c")).ends_with("expected no more tensors"));
    let file = Gguf::from_vec("two", short.end().unwrap()).unwrap();
    assert_eq!(file.tensor("a").map(|t| file.tensor_bytes(t)), Some(&[1, 2, 3][..]));
    assert_eq!(file.tensor("b").map(|t| file.tensor_bytes(t)), Some(&[5; 8][..]));
}

/// Accepts so many bytes, then fails.
struct Full(usize);

impl Write for Full {
    fn write(&mut self, data: &[u8]) -> std::io::Result<usize> {
        let n = data.len().min(self.0);
        self.0 -= n;
        if n == 0 && !data.is_empty() { Err(std::io::ErrorKind::StorageFull.into()) } else { Ok(n) }
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[test]
fn after_a_failed_write_nothing_can_be_finished() {
    let header = 96; // of two_tensors
    let run = |room: usize| -> Result<Full, Error> {
        let mut data = two_tensors(|w| w.write_to(Full(room)))?;
        // The caller goes on after the failure.
        let failed = data.tensor("a", &[0; 3]).and_then(|()| data.tensor("b", &[0; 8]));
        assert_eq!(failed.is_err(), room < header + 32 + 8);
        data.end()
    };
    for room in 0..header + 64 {
        assert!(message(run(room)).starts_with("two.gguf: cannot write"), "{room}");
    }
    assert_eq!(run(header + 64).unwrap().0, 0);
}

#[test]
fn a_file_appears_whole_or_not_at_all() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    let entries = || fs::read_dir(folder.path()).unwrap().count();
    let begin = || {
        let mut w = Writer::new(&path);
        w.tensor("a", &[4], TensorType::F32).unwrap();
        w.create().unwrap()
    };
    drop(begin());
    assert_eq!(entries(), 0);
    assert!(begin().finish().is_err());
    assert_eq!(entries(), 0);
    // Two writers at a time do not meet; the older file stays until the new one is complete.
    for round in 0..2u8 {
        let mut first = begin();
        let second = begin();
        assert!(round == 0 || Gguf::open(&path).is_ok());
        first.tensor("a", &[round; 16]).unwrap();
        first.finish().unwrap();
        drop(second);
        assert_eq!(entries(), 1);
        let file = Gguf::open(&path).unwrap();
        assert_eq!(file.name(), path.display().to_string());
        let tensor = file.tensor("a").unwrap();
        assert_eq!(file.tensor_bytes(tensor), [round; 16]);
    }
    assert!(message(Writer::new(folder.path()).create()).contains("not a regular file"));
    assert!(message(Writer::new(&folder.path().join("no/such/folder")).create()).contains("cannot create"));
}

/// Whoever begins a file looks for what others left of it, and must not take theirs.
#[test]
fn writers_of_one_file_do_not_remove_what_others_began() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    let begin = || (0..2000).all(|_| AtomicFile::create(&path).unwrap().temporary().exists());
    std::thread::scope(|scope| {
        let threads = [0; 4].map(|_| scope.spawn(begin));
        assert!(threads.into_iter().all(|thread| thread.join().unwrap()));
    });
}

#[test]
fn what_is_no_file_cannot_be_opened() {
    let folder = tempfile::tempdir().unwrap();
    assert!(message(Gguf::open(folder.path())).contains("not a regular file"));
    assert!(message(Gguf::open(&folder.path().join("absent"))).contains("cannot open"));
    let empty = folder.path().join("empty");
    fs::write(&empty, []).unwrap();
    assert!(message(Gguf::open(&empty)).contains("truncated"));
}

/// The bytes are the same after all advice, also that which has no pages; whether pages were given back is not seen here.
#[test]
fn advice_changes_no_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("pages.gguf");
    let mut w = Writer::new(&path);
    w.tensor("a", &[1 << 20], TensorType::I8).unwrap();
    let contents: Vec<u8> = (0..1 << 20).map(|i: u32| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let mut data = w.create().unwrap();
    data.tensor("a", &contents).unwrap();
    data.finish().unwrap();
    let file = Gguf::open(&path).unwrap();
    let a = file.tensor("a").unwrap();
    assert_eq!(file.tensor_bytes(a), contents);
    for range in [a.range(), 0..u64::MAX, u64::MAX..u64::MAX, 5..6, std::ops::Range { start: 9, end: 3 }] {
        file.advise_dontneed(range);
        assert_eq!(file.tensor_bytes(a), contents);
    }
}

#[test]
fn a_tensor_of_another_file_has_no_bytes_here() {
    let mut data = two_tensors(|w| w.write_to(Vec::new())).unwrap();
    data.tensor("a", &[0; 3]).unwrap();
    data.tensor("b", &[0; 8]).unwrap();
    let file = Gguf::from_vec("two", data.end().unwrap()).unwrap();
    let mut forged = file.tensors()[0].clone();
    for (offset, byte_len) in [(1 << 40, 1), (0, u64::MAX), (u64::MAX, u64::MAX)] {
        (forged.offset, forged.byte_len) = (offset, byte_len);
        assert!(file.tensor_bytes(&forged).is_empty());
    }
}
