//! The logits and the greedy continuations of the golden models are, to the bit, those stored in `fixtures/models/bits.json`:
//! the same file on every machine, so two architectures that both pass have computed the same.
//!
//! The file changes only together with the arithmetic (ARCHITECTURE.md) and `bitnet::engine::DEFINITION`. Then this test prints its new contents.
#![allow(clippy::unwrap_used)]

mod common;

use bitnet::generate::{Sampler, SamplerConfig};
use bitnet::kernels::{Kernels, best, supported};
use bitnet::{Feed, Wanted};
use common::{MODELS, Tensors, engine, feed, fixture, gguf, ids, sha256};
use serde_json::json;

const POSITIONS: usize = 200;
const PROMPT: usize = 16;
const GENERATED: usize = 64;

#[test]
fn the_best_kernels_compute_the_stored_bits() {
    check(best());
}

#[test]
fn the_scalar_kernels_compute_the_stored_bits() {
    check(supported()[0]);
}

fn check(kernels: &'static Kernels) {
    let path = fixture("", "bits.json");
    let stored: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let mut all = serde_json::Map::new();
    for name in MODELS {
        let golden = Tensors::read(&fixture(name, "golden.safetensors"));
        let tokens = &ids(&golden)[..POSITIONS];
        let mut engine = engine(&gguf(name), kernels, 2, 64, 1);
        let sequence = engine.open();
        let logits = feed(&mut engine, sequence, tokens);
        let hash = sha256(logits.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<_>>().as_slice());

        engine.truncate(sequence, 0);
        let mut history = tokens[..PROMPT].to_vec();
        let mut sampler = Sampler::new(SamplerConfig::greedy()).unwrap();
        for step in 0..GENERATED {
            let next = if step == 0 { &history[..] } else { &history[history.len() - 1..] };
            let wanted = Wanted::Last(sampler.wanted(&history));
            let logits = engine.feed(&[Feed { sequence, tokens: next, wanted }]).unwrap();
            let id = sampler.sample(logits, &history).unwrap();
            history.push(id);
        }
        let mut entry = json!({ "logits_sha256": hash, "greedy_ids": &history[PROMPT..] });
        if let Ok(tokenizer) = engine.model().tokenizer() {
            let bytes: Vec<u8> = history
                .iter()
                .flat_map(|&id| tokenizer.token_bytes(id).unwrap_or_default())
                .copied()
                .collect();
            entry["text"] = String::from_utf8_lossy(&bytes).into();
        }
        all.insert(name.into(), entry);
    }
    let lines: Vec<String> = all.iter().map(|(name, entry)| format!("  \"{name}\": {entry}")).collect();
    assert!(
        stored == serde_json::Value::Object(all),
        "{} computes other bits than {} has; its own:\n{{\n{}\n}}",
        kernels.name(),
        path.display(),
        lines.join(",\n")
    );
}
