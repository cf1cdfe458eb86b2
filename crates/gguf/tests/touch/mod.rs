//! What must hold of every file that parses; the fuzz target asks for it too.

use bitnet_gguf::{Array, Gguf, Writer};

/// Uses everything in a file, and writes it again.
pub(crate) fn touch(file: &Gguf) {
    let mut writer = Writer::new("copy".as_ref());
    for (key, value) in file.metadata() {
        assert_eq!(file.get(key).map(|v| v.ty()), Some(value.ty()));
        assert_eq!(file.get_u32(key).is_ok(), value.as_int().is_some_and(|x| u32::try_from(x).is_ok()));
        assert_eq!(file.get_u64(key).ok().flatten(), value.as_int().and_then(|x| x.try_into().ok()));
        assert_eq!(file.get_f32(key).is_ok(), value.as_f32().is_some());
        assert_eq!(file.get_bool(key).is_ok(), value.as_bool().is_some());
        assert_eq!(file.get_str(key).is_ok(), value.as_str().is_some());
        value.as_array().into_iter().for_each(array);
        writer.meta(key, value).expect("what was read can be written");
    }
    let mut ends = Vec::new();
    for t in file.tensors() {
        assert_eq!(file.tensor(&t.name), Some(t));
        assert_eq!(file.tensor_bytes(t).len() as u64, t.byte_len);
        assert!(t.byte_len > 0 && t.n_elements() > 0 && t.offset % file.alignment() as u64 == 0);
        ends.push((t.offset, t.range().end));
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
}

fn array(a: Array<'_>) {
    assert_eq!(a.values().count(), a.len());
    for (counted, typed) in
        [(a.strs().map(Iterator::count), "str"), (a.arrays().map(Iterator::count), "array")]
    {
        assert_eq!(counted, (a.element_type().name() == typed).then_some(a.len()));
    }
    for (counted, typed) in [(a.ints().map(Iterator::count), "iu"), (a.f32s().map(Iterator::count), "f")] {
        assert_eq!(
            counted,
            a.element_type().name().starts_with(|c: char| typed.contains(c)).then_some(a.len())
        );
    }
    a.arrays().into_iter().flatten().for_each(array);
}
