//! Any bytes: the parser answers with an error of one line or with a file in which everything can be used, and what it
//! accepts can be written again.

#![no_main]

use bitnet_gguf::{Array, Gguf, Writer};
use libfuzzer_sys::fuzz_target;
use std::hint::black_box;

fn array(a: Array<'_>) {
    assert_eq!(a.values().count(), a.len());
    for (counted, typed) in [
        (a.strs().map(Iterator::count), "str"),
        (a.bools().map(Iterator::count), "bool"),
        (a.arrays().map(Iterator::count), "array"),
    ] {
        assert_eq!(counted, (a.element_type().name() == typed).then_some(a.len()));
    }
    black_box((a.ints().map(Iterator::last), a.f32s().map(Iterator::last)));
    a.arrays().into_iter().flatten().for_each(array);
}

fuzz_target!(|bytes: &[u8]| {
    let file = match Gguf::from_vec("fuzz", bytes.to_vec()) {
        Ok(file) => file,
        Err(error) => {
            let message = error.to_string();
            assert!(!message.contains(char::is_control) && message.len() < 1000, "{message}");
            return;
        }
    };
    let mut writer = Writer::new("fuzz".as_ref());
    for (key, value) in file.metadata() {
        assert_eq!(file.get(key).map(|v| v.ty()), Some(value.ty()));
        black_box((file.get_u32(key).is_ok(), file.get_f32(key).is_ok(), file.get_bool(key).is_ok()));
        value.as_array().into_iter().for_each(array);
        writer.meta(key, value).expect("what was read can be written");
    }
    let mut ends = Vec::new();
    for t in file.tensors() {
        assert_eq!(file.tensor(&t.name), Some(t));
        assert_eq!(file.tensor_bytes(t).len() as u64, t.byte_len);
        assert!(t.n_elements() > 0 && t.offset % file.alignment() as u64 == 0);
        ends.push((t.offset, t.range().end));
        black_box(file.tensor_bytes(t).iter().fold(0u8, |sum, &b| sum ^ b));
        if t.ty.size_is_known() {
            writer.tensor(&t.name, &t.dims, t.ty).expect("what was read can be written");
        }
    }
    ends.sort_unstable();
    assert!(ends.windows(2).all(|pair| pair[0].1 <= pair[1].0));

    let known = || file.tensors().iter().filter(|t| t.ty.size_is_known());
    let mut data = writer.write_to(Vec::new()).expect("memory takes it");
    for t in known() {
        data.tensor(&t.name, file.tensor_bytes(t)).expect("the sizes agree");
    }
    let copy = Gguf::from_vec("copy", data.end().expect("all is written")).expect("what was written is read");
    assert!(copy.metadata().map(|(key, _)| key).eq(file.metadata().map(|(key, _)| key)));
    for (ours, theirs) in copy.tensors().iter().zip(known()) {
        assert_eq!((&ours.name, &ours.dims, ours.ty), (&theirs.name, &theirs.dims, theirs.ty));
        assert_eq!(copy.tensor_bytes(ours), file.tensor_bytes(theirs));
    }
});
