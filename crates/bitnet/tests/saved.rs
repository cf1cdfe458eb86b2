//! Saved sequences: going on from one gives the bits of going on without, and no file leads astray.
#![allow(clippy::unwrap_used)]

mod common;

use bitnet::generate::{Sampler, SamplerConfig, StopConditions, generate};
use bitnet::gguf::Gguf;
use bitnet::kernels::{Compute, KvType, PAGE, best, supported};
use bitnet::model::{Strategy, identity};
use bitnet::{Engine, EngineOptions, SavedError, SequenceId};
use common::{OPTIONS, build, engine_with, feed, gguf, last, random};
use sha2::{Digest, Sha256};
use std::ops::ControlFlow;

const HEADER: usize = 56;

fn tokens(count: usize) -> Vec<u32> {
    (0..count as u32).map(|i| 3 + i * 7 % 200).collect()
}

/// An engine that read `prompt`, and the file of its first `len` tokens.
fn saved(model: &str, ty: KvType, prompt: &[u32], len: usize) -> (Engine, SequenceId, Vec<u8>) {
    let mut engine = engine_with(&gguf(model), best(), 2, 64, 1, ty);
    let sequence = engine.open();
    last(&mut engine, sequence, prompt).unwrap();
    let mut file = Vec::new();
    engine.save(sequence, len, &mut file, || true).unwrap();
    (engine, sequence, file)
}

fn restore(engine: &mut Engine, mut file: &[u8], wanted: Option<&[u32]>) -> Result<usize, SavedError> {
    let sequence = engine.open();
    let len = file.len() as u64;
    let result = engine.restore(sequence, &mut file, len, wanted);
    let held = engine.tokens(sequence).len();
    engine.close(sequence);
    result.map(|()| held)
}

#[test]
fn what_follows_has_the_same_bits() {
    let (prompt, rest) = (tokens(150), tokens(20));
    for model in ["demo", "gqa", "ragged"] {
        for ty in KvType::ALL {
            let (mut first, sequence, file) = saved(model, ty, &prompt, prompt.len());
            let expected = feed(&mut first, sequence, &rest);
            // Another instruction set, other threads and steps.
            let mut second = engine_with(&gguf(model), supported()[0], 1, 7, 1, ty);
            let sequence = second.open();
            let len = file.len() as u64;
            second.restore(sequence, &mut &file[..], len, Some(&prompt)).unwrap();
            assert_eq!(second.tokens(sequence), prompt);
            assert_eq!(feed(&mut second, sequence, &rest), expected, "{model} {ty:?}");
        }
    }
}

#[test]
fn the_longest_common_beginning_is_taken() {
    let prompt = tokens(150);
    let (_, _, file) = saved("demo", KvType::F32, &prompt, 140);
    let mut engine = engine_with(&gguf("demo"), best(), 2, 64, 1, KvType::F32);
    let mut held = |wanted: Option<&[u32]>| restore(&mut engine, &file, wanted).unwrap();
    assert_eq!(
        (held(None), held(Some(&prompt)), held(Some(&prompt[..129])), held(Some(&[]))),
        (140, 140, 129, 0)
    );
    for at in [0, 1, 63, 64, 100, 127, 128, 139] {
        let mut other = prompt.clone();
        other[at] += 1;
        assert_eq!(held(Some(&other)), at);
    }
    let (mut long, sequence, _) = saved("demo", KvType::F32, &tokens(600), 0);
    let mut file = Vec::new();
    long.save(sequence, usize::MAX, &mut file, || true).unwrap();
    let other = long.open();
    let len = file.len() as u64;
    long.restore(other, &mut &file[..], len, None).unwrap();
    assert_eq!(long.tokens(other).len(), 0, "all pages are in use");
    // Of a context that is shorter than what was saved, what has room: there are more pages than one sequence may have.
    let options = EngineOptions { context: 128, sequences: 2, ..OPTIONS };
    let mut short = build(&gguf("demo"), Strategy::SPARSE, best(), 2, options);
    assert_eq!(restore(&mut short, &file, None).unwrap(), 128);
}

#[test]
fn other_files_are_refused() {
    let prompt = tokens(70);
    let (writer, written, file) = saved("gqa", KvType::F16, &prompt, 70);
    let mut other = engine_with(&gguf("mha"), best(), 2, 64, 1, KvType::F16);
    assert!(matches!(restore(&mut other, &file, None), Err(SavedError::OtherModel)));
    let mut other = engine_with(&gguf("gqa"), best(), 2, 64, 1, KvType::Q8);
    let error = restore(&mut other, &file, None).unwrap_err();
    assert!(error.to_string().contains("--cache-type f16"), "{error}");

    let mut fresh = engine_with(&gguf("gqa"), best(), 2, 64, 1, KvType::F16);
    let mut refused = |file: &[u8]| restore(&mut fresh, file, None).unwrap_err();
    // Every byte of the header, and many of the rest.
    for at in
        (0..HEADER + 4 * PAGE).chain((HEADER + 4 * PAGE..file.len()).step_by(499)).chain([file.len() - 1])
    {
        let mut flipped = file.clone();
        flipped[at] ^= 1 << (at % 8);
        let error = refused(&flipped);
        let expected = match at {
            0..8 => matches!(error, SavedError::NotOne),
            8..16 => matches!(error, SavedError::Version { .. }),
            16..48 => matches!(error, SavedError::OtherModel),
            48..52 => matches!(error, SavedError::CacheType { .. }),
            52..56 => matches!(error, SavedError::Length { .. } | SavedError::Damaged { .. }),
            _ => matches!(error, SavedError::Damaged { .. }),
        };
        assert!(expected, "byte {at}: {error}");
    }
    for len in (0..HEADER).chain((HEADER..file.len()).step_by(997)) {
        assert!(matches!(refused(&file[..len]), SavedError::NotOne | SavedError::Length { .. }), "{len}");
    }
    assert!(matches!(refused(&[&file[..], &[0]].concat()), SavedError::Length { .. }));
    // Pages that changed their places.
    let page = (file.len() - HEADER) / 2;
    let swapped = [&file[..HEADER], &file[HEADER + page..], &file[HEADER..HEADER + page]].concat();
    assert!(matches!(refused(&swapped), SavedError::Damaged { page: 0 }));
    // A file that became shorter after its length was asked.
    let sequence = fresh.open();
    let short = &mut &file[..file.len() - 1];
    let error = fresh.restore(sequence, short, file.len() as u64, None).unwrap_err();
    assert!(matches!(error, SavedError::Io(_)) && fresh.tokens(sequence).is_empty());
    // Nothing was lost of the cache.
    assert_eq!(restore(&mut fresh, &file, None).unwrap(), 70);

    // Writing ends where it is told to.
    let mut pages = std::cell::Cell::new(0);
    let go_on = || pages.replace(pages.get() + 1) == 0;
    let mut half = Vec::new();
    let error = writer.save(written, 70, &mut half, go_on).unwrap_err();
    assert!(matches!(error, SavedError::Io(error) if error.kind() == std::io::ErrorKind::Interrupted));
    assert_eq!((*pages.get_mut(), half.len()), (2, HEADER + page));
}

#[test]
fn a_forged_file_does_no_harm() {
    let prompt = tokens(70);
    let mut state = 1;
    for ty in KvType::ALL {
        let (_, _, file) = saved("demo", ty, &prompt, 70);
        let mut engine = engine_with(&gguf("demo"), best(), 2, 64, 1, ty);
        for pattern in 0..4 {
            let mut forged = file.clone();
            let (header, pages) = forged.split_at_mut(HEADER);
            let mut digest = Sha256::digest(&header);
            let len = pages.len() / 2;
            for page in pages.chunks_mut(len) {
                let (content, place) = page.split_at_mut(len - 32);
                for byte in &mut content[4 * PAGE..] {
                    // NaN, infinities, zeros and anything.
                    *byte = [0xff, 0x7f, 0, random(&mut state) as u8][pattern];
                }
                if pattern == 2 {
                    content[4 * PAGE - 1] = 0xff; // a token that does not exist
                }
                digest = Sha256::new().chain_update(digest).chain_update(&*content).finalize();
                place.copy_from_slice(&digest);
            }
            let sequence = engine.open();
            let restored = engine.restore(sequence, &mut &forged[..], forged.len() as u64, None);
            assert_eq!(restored.is_ok(), pattern != 2, "{ty:?} {pattern}");
            let mut sampler = Sampler::new(SamplerConfig::default()).unwrap();
            let stop = StopConditions { max_tokens: Some(8), ..StopConditions::default() };
            let mut emit = |_: &str| ControlFlow::Continue(());
            // An error or some text.
            let _ = generate(&mut engine, sequence, &[5], &mut sampler, &stop, &mut emit);
            engine.close(sequence);
        }
    }
}

#[test]
fn a_model_is_known_by_each_of_its_bytes() {
    let model = gguf("demo");
    let bytes: &[u8] = (*model).as_ref();
    let of = |gguf: &Gguf, threads| identity(gguf, &Compute::new(best(), threads));
    let own = of(&model, 2);
    assert_eq!(of(&model, 3), own);
    let first = model.data_offset() as usize;
    for at in (first..bytes.len()).step_by(99_991).chain([bytes.len() - 1]) {
        let mut other = bytes.to_vec();
        other[at] ^= 1;
        assert_ne!(of(&Gguf::from_vec("other", other).unwrap(), 2), own, "byte {at}");
    }
}
