//! How texts are generated: the options that `run`, `chat` and `batch` share.

use crate::constraint::ConstraintArgs;
use crate::source;
use anyhow::bail;
use bitnet::generate::{Sampler, SamplerConfig, Speculation, StopConditions};
use bitnet::model::Model;
use std::hash::{BuildHasher, RandomState};

#[derive(clap::Args)]
pub struct GenerateArgs {
    /// Most tokens to generate; -1: until the model ends the text or the context is full
    #[arg(short = 'n', long, value_name = "N", default_value = "128",
          value_parser = clap::value_parser!(i64).range(-1..))]
    n_predict: i64,
    /// Tokens of context; 0: as many as the model was trained with [default: the same, at most 4096]
    #[arg(short = 'c', long, value_name = "CTX", value_parser = source::context_range())]
    pub ctx_size: Option<u32>,
    /// End at this text, which is not part of the result; may be given several times
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true,
          value_parser = clap::builder::NonEmptyStringValueParser::new())]
    stop: Vec<String>,
    /// Do not let a step check tokens that may come next because they came before; the text is the same
    #[arg(long)]
    no_speculation: bool,
    #[command(flatten)]
    pub constraint: ConstraintArgs,
    #[command(flatten)]
    pub sampling: SamplingArgs,
}

impl GenerateArgs {
    /// What ends a text besides tokens, and no constraint yet.
    pub fn stop(&self) -> StopConditions {
        StopConditions {
            strings: self.stop.clone(),
            max_tokens: usize::try_from(self.n_predict).ok(),
            speculation: if self.no_speculation { Speculation::Off } else { Speculation::Adaptive },
            ..StopConditions::default()
        }
    }
}

#[derive(clap::Args)]
#[command(next_help_heading = "Sampling")]
pub struct SamplingArgs {
    /// 0: always the most probable token
    #[arg(long, value_name = "T", default_value_t = 0.8)]
    temp: f32,
    /// Only the K most probable tokens; 0: all
    #[arg(long, value_name = "K", default_value_t = 40)]
    top_k: u32,
    /// Only the most probable tokens that together have probability P; 1: all
    #[arg(long, value_name = "P", default_value_t = 0.95)]
    top_p: f32,
    /// Only tokens with at least P times the probability of the most probable; 0: all
    #[arg(long, value_name = "P", default_value_t = 0.05)]
    min_p: f32,
    /// Factor against tokens that occurred; 1: none
    #[arg(long, value_name = "R", default_value_t = 1.0)]
    repeat_penalty: f32,
    /// How many of the last tokens the penalties look at
    #[arg(long, value_name = "N", default_value_t = 64)]
    repeat_last_n: u32,
    /// Taken off a token's logit for each time it occurred
    #[arg(long, value_name = "X", default_value_t = 0.0)]
    frequency_penalty: f32,
    /// Taken off a token's logit if it occurred
    #[arg(long, value_name = "X", default_value_t = 0.0)]
    presence_penalty: f32,
    /// Added to a token's logit; -inf forbids it; may be given several times
    #[arg(long, value_name = "ID=BIAS", value_parser = parse_bias)]
    logit_bias: Vec<(u32, f32)>,
    /// Start of the random numbers, 64 bits [default: 32 random ones, told with the statistics, in a chat by /set]
    #[arg(short = 's', long, value_name = "S")]
    seed: Option<u64>,
}

impl SamplingArgs {
    /// The sampler, with `seed` where the user gave none; a setting out of range is a usage error.
    pub fn sampler(&self, seed: u64) -> Sampler {
        let config = SamplerConfig {
            temperature: self.temp,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            repeat_penalty: self.repeat_penalty,
            repeat_last_n: self.repeat_last_n,
            frequency_penalty: self.frequency_penalty,
            presence_penalty: self.presence_penalty,
            logit_bias: self.logit_bias.clone(),
            seed: self.seed.unwrap_or(seed),
        };
        Sampler::new(config)
            .unwrap_or_else(|error| crate::usage_error(clap::error::ErrorKind::ValueValidation, error))
    }
}

/// A seed that is another each time, and short enough to be typed.
pub fn random_seed() -> u64 {
    RandomState::new().hash_one(0) >> 32
}

/// Checks that the model has the tokens whose logits are biased.
pub fn check_biases(sampler: &SamplerConfig, model: &Model) -> anyhow::Result<()> {
    let vocab = model.config().vocab_size;
    match sampler.logit_bias.iter().find(|(id, _)| *id as usize >= vocab) {
        Some((id, _)) => bail!("logit_bias has token {id}, the vocabulary ends at {}", vocab - 1),
        None => Ok(()),
    }
}

fn parse_bias(text: &str) -> Result<(u32, f32), String> {
    let parsed = text.split_once('=').and_then(|(id, bias)| Some((id.parse().ok()?, bias.parse().ok()?)));
    parsed.ok_or_else(|| "expected ID=BIAS, such as 15043=-1.5".to_owned())
}
