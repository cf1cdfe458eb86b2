//! Whether kernels compute the bits that the scalar ones define.

use bitnet::kernels::ternary::Layout;
use bitnet::kernels::{Activation, Compute, Kernels, KvType, Logits, supported};
use bitnet::model::{Config, Model, Strategy};
use bitnet::{Engine, EngineOptions, Error, Feed, Wanted};

/// Several tokens in one step, and then one.
const TOKENS: [&[u32]; 2] = [&[1, 7, 3, 5, 2], &[4]];
/// How many logits are sought where not all are wanted.
const TOP: usize = 8;

/// The bits of the logits of a few tokens, which depend on every weight; and at the end 1, where the greatest of the last
/// token are those that a text would be generated with.
pub fn bits(model: Model, compute: Compute, cache_type: KvType) -> Result<Vec<u32>, Error> {
    let config = model.config();
    let vocab = config.vocab_size;
    let context = config.context_length.min(16);
    let options =
        EngineOptions { context, max_rows: context, cache_type, ..EngineOptions::for_model(config) };
    let mut engine = Engine::new(model, compute, options)?;
    engine.settle(|| false);
    let sequence = engine.open();
    let (mut bits, mut every) = (Vec::new(), Vec::new());
    let mut tokens = Vec::new();
    for some in TOKENS {
        tokens = some.iter().map(|&token| token.min(vocab as u32 - 1)).collect();
        let logits =
            engine.feed(&[Feed { sequence, tokens: &tokens, wanted: Wanted::All(Logits::Every) }])?;
        bits.extend(logits.iter().map(|x| x.to_bits()));
        every = logits[logits.len() - vocab..].to_vec();
    }
    engine.truncate(sequence, TOKENS[0].len());
    let wanted = Wanted::Last(Logits::Best { top: TOP, also: &[], among: None });
    let best = engine.feed(&[Feed { sequence, tokens: &tokens, wanted }])?;
    let mut order = every.clone();
    order.sort_by(|a, b| b.total_cmp(a));
    let least = order[TOP.min(vocab) - 1];
    let right = |(best, every): (&f32, &f32)| {
        best.to_bits() == every.to_bits() || *best == f32::NEG_INFINITY && *every < least
    };
    bits.push(u32::from(best.iter().zip(&every).all(right)));
    Ok(bits)
}

/// Runs tiny random models, with each layout and two caches, and one with a head that is screened: a few milliseconds' work
/// that finds a CPU or an emulator that computes wrongly.
pub fn passes(kernels: &'static Kernels) -> bool {
    let run = |kernels, vocab_size, rows, cache_type| {
        let config = Config {
            vocab_size,
            context_length: 16,
            hidden_size: 256,
            n_layers: 1,
            intermediate_size: 256,
            n_heads: 2,
            n_kv_heads: 1,
            head_dim: 128,
            activation: Activation::Relu2,
            ..Config::bitnet_2b_4t()
        };
        let compute = Compute::new(kernels, 1);
        let strategy = Strategy { rows, ..Strategy::default() };
        bits(Model::random(config, &compute, strategy).ok()?, compute, cache_type).ok()
    };
    let scalar = supported()[0];
    let cases = [(Layout::Rows, KvType::F32), (Layout::Base3, KvType::Q8)];
    scalar.name() == kernels.name()
        || cases.into_iter().all(|(rows, cache_type)| {
            let expected = run(scalar, 32, rows, cache_type);
            expected.is_some() && expected == run(kernels, 32, rows, cache_type)
        }) && run(kernels, 1024, Layout::Rows, KvType::F32).is_some_and(|bits| bits.last() == Some(&1))
}

/// `wanted`, or the best others where these do not pass.
pub fn sound(wanted: &'static Kernels, passes: impl Fn(&'static Kernels) -> bool) -> &'static Kernels {
    let others = supported().into_iter().rev();
    std::iter::once(wanted).chain(others).find(|kernels| passes(kernels)).unwrap_or(wanted)
}

#[cfg(test)]
mod tests {
    use super::*;
    use bitnet::kernels::best;

    #[test]
    fn wrong_kernels_give_way_to_the_next_best() {
        let names: Vec<_> = supported().iter().map(|kernels| kernels.name()).collect();
        for (count, name) in names.iter().enumerate() {
            let passes = |kernels: &'static Kernels| names[..=count].contains(&kernels.name());
            assert_eq!(sound(best(), passes).name(), *name);
            assert_eq!(sound(supported()[0], passes).name(), "scalar");
        }
    }

    #[test]
    fn all_kernels_pass() {
        for kernels in supported() {
            assert!(passes(kernels), "{}", kernels.name());
        }
    }
}
