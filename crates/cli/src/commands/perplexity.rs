use crate::output::{self, notice};
use crate::source::{self, Wish};
use anyhow::ensure;
use bitnet::kernels::Logits;
use bitnet::kernels::math::exp64;
use bitnet::text::Specials;
use bitnet::{Engine, Feed, Wanted};
use std::path::PathBuf;

/// Tokens whose logits are in memory at once.
const CHUNK: usize = 32;

/// Measure how well the model predicts a text
///
/// Perplexity as llama.cpp defines it: the text is cut into windows of CTX tokens, and each window is scored over its
/// second half. The same figures as those of llama-perplexity, to the rounding of the two (a few parts in ten thousand),
/// need the same tokens: of a file that names no pre-tokenizer llama.cpp splits the text in a way of its own.
#[derive(clap::Args)]
#[command(after_help = "Example:
  bitnet perplexity -m model.gguf -f wiki.test.raw -c 512")]
pub struct Args {
    #[command(flatten)]
    model: source::ModelArgs,
    /// The text, UTF-8 [default: stdin]
    #[arg(short = 'f', long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// Tokens of a window
    #[arg(short = 'c', long, value_name = "CTX", default_value_t = 512,
          value_parser = clap::value_parser!(u32).range(4..=1 << 24))]
    ctx_size: u32,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Negative log-likelihoods: their number, sum, and sum of squares.
#[derive(Default)]
struct Score {
    count: usize,
    sum: f64,
    squares: f64,
}

pub fn run(args: &Args) -> anyhow::Result<()> {
    args.model.file.check()?;
    let text = source::read_prompt(args.file.as_deref())?;
    let compute = args.model.compute()?;
    let wish = Wish { context: Some(args.ctx_size), logits: CHUNK, ..Wish::default() };
    let (model, options) = args.model.load(&compute, &wish, |_| ())?;
    let tokens = model.prompt(&text, Specials::AsText)?;
    let window = options.context;
    let (found, needed) = (tokens.len(), 2 * window);
    ensure!(found >= needed, "the text has {found} tokens; windows of {window} (-c) need at least {needed}");
    let bos = model.special().first();

    let vocab = model.config().vocab_size;
    let mut engine = Engine::new(model, compute, options)?;
    let sequence = engine.open();
    engine.cancel_by(output::interrupt_flag()?);
    let first = window / 2;
    let mut score = Score::default();
    let windows = tokens.chunks_exact(window);
    let n_windows = windows.len();
    for (index, window) in windows.enumerate() {
        let mut input = window.to_vec();
        input[0] = bos.unwrap_or(input[0]);
        engine.truncate(sequence, 0);
        engine.feed(&[Feed { sequence, tokens: &input[..first], wanted: Wanted::Nothing }])?;
        for start in (first..window.len() - 1).step_by(CHUNK) {
            let tokens = &input[start..(start + CHUNK).min(window.len() - 1)];
            let logits = engine.feed(&[Feed { sequence, tokens, wanted: Wanted::All(Logits::Every) }])?;
            for (logits, &next) in logits.chunks_exact(vocab).zip(&window[start + 1..]) {
                score.add(logits, next);
            }
        }
        let (perplexity, _) = score.perplexity();
        if !args.model.file.quiet {
            notice(format_args!("[{}/{n_windows}] {perplexity:.4}", index + 1));
        }
    }
    args.model.tell_memory(&engine);
    let (perplexity, error) = score.perplexity();
    if args.json {
        return output::print_json(&serde_json::json!({
            "perplexity": perplexity, "error": error, "tokens_scored": score.count,
            "tokens": tokens.len(), "windows": n_windows, "context": window,
        }));
    }
    output::print(format!("perplexity: {perplexity:.4} ± {error:.5}\n").as_bytes())
}

impl Score {
    fn add(&mut self, logits: &[f32], token: u32) {
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f64 = logits.iter().map(|&logit| exp64(f64::from(logit) - f64::from(max))).sum();
        let nll = sum.ln() + f64::from(max) - f64::from(logits[token as usize]);
        self.count += 1;
        self.sum += nll;
        self.squares += nll * nll;
    }

    /// The perplexity and its standard error.
    fn perplexity(&self) -> (f64, f64) {
        let n = self.count as f64;
        let mean = self.sum / n;
        let variance = (self.squares / n - mean * mean).max(0.0);
        let perplexity = mean.exp();
        (perplexity, perplexity * (variance / (n - 1.0).max(1.0)).sqrt())
    }
}

#[cfg(test)]
mod tests {
    use super::Score;

    #[test]
    fn uniform_logits_have_the_perplexity_of_the_vocabulary() {
        let mut score = Score::default();
        for token in 0..10 {
            score.add(&[3.5; 50], token);
        }
        let (perplexity, error) = score.perplexity();
        assert!((perplexity - 50.0).abs() < 1e-9 && error < 1e-5, "{perplexity} {error}");
    }
}
