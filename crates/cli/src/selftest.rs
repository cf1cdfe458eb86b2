//! Whether kernels compute the bits that the scalar ones define.

use bitnet::kernels::{Activation, Compute, Kernels, Logits, supported};
use bitnet::model::{Config, Model, Strategy};
use bitnet::{Engine, EngineOptions, Error, Feed, Wanted};

/// Several tokens in one step, and then one.
const TOKENS: [&[u32]; 2] = [&[1, 7, 3, 5, 2], &[4]];

/// The bits of the logits of a few tokens, which depend on every weight.
pub fn bits(model: Model, compute: Compute) -> Result<Vec<u32>, Error> {
    let config = model.config();
    let last = config.vocab_size as u32 - 1;
    let context = config.context_length.min(16);
    let options = EngineOptions { context, max_rows: context, ..EngineOptions::for_model(config) };
    let mut engine = Engine::new(model, compute, options)?;
    let sequence = engine.open();
    let mut bits = Vec::new();
    for tokens in TOKENS {
        let tokens: Vec<u32> = tokens.iter().map(|&token| token.min(last)).collect();
        let logits =
            engine.feed(&[Feed { sequence, tokens: &tokens, wanted: Wanted::All(Logits::Every) }])?;
        bits.extend(logits.iter().map(|x| x.to_bits()));
    }
    Ok(bits)
}

/// Runs a tiny random model: a fraction of a millisecond's work that finds a CPU or an emulator that computes wrongly.
pub fn passes(kernels: &'static Kernels) -> bool {
    let config = Config {
        vocab_size: 32,
        context_length: 16,
        hidden_size: 256,
        n_layers: 1,
        intermediate_size: 512,
        n_heads: 2,
        n_kv_heads: 1,
        head_dim: 128,
        activation: Activation::Relu2,
        ..Config::bitnet_2b_4t()
    };
    let run = |kernels| {
        let compute = Compute::new(kernels, 1);
        bits(Model::random(config.clone(), &compute, Strategy::default()).ok()?, compute).ok()
    };
    match supported().first() {
        Some(scalar) if scalar.name() != kernels.name() => run(scalar) == run(kernels),
        _ => true,
    }
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
    fn all_kernels_pass_and_the_test_sees_something() {
        for kernels in supported() {
            assert!(passes(kernels), "{}", kernels.name());
        }
    }
}
