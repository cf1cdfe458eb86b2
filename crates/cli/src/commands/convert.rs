use crate::output::{self, notice};
use bitnet::convert::{HeadType, hf_to_gguf};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::atomic::Ordering;

/// Makes a GGUF file of a Hugging Face model folder with config.json, safetensors weights (the bf16 master weights) and
/// tokenizer.json.
#[derive(clap::Args)]
#[command(after_help = "Example:
  bitnet convert ./bitnet-b1.58-2B-4T-bf16 model.gguf")]
pub struct Args {
    /// The folder
    input: PathBuf,
    /// The file to write
    output: PathBuf,
    /// Type of the embedding and the output head; auto: the smallest that holds every value exactly
    #[arg(long, value_enum, default_value = "auto")]
    head: Head,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum Head {
    Auto,
    F16,
    Bf16,
    F32,
}

pub fn run(args: &Args) -> anyhow::Result<()> {
    let head = match args.head {
        Head::Auto => HeadType::Auto,
        Head::F16 => HeadType::F16,
        Head::Bf16 => HeadType::Bf16,
        Head::F32 => HeadType::F32,
    };
    // Drawn only where stderr is a terminal.
    let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
    bar.set_style(ProgressStyle::with_template("{bar:40} {bytes} of {total_bytes} {eta} {wide_msg}")?);
    let interrupted = output::interrupt_flag()?;
    let report = hf_to_gguf(&args.input, &args.output, head, &mut |progress| {
        bar.set_length(progress.total);
        bar.set_position(progress.done);
        bar.set_message(progress.tensor.to_owned());
        if interrupted.load(Ordering::Relaxed) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    bar.finish_and_clear();
    let report = report?;
    for line in &report.notices {
        notice(format_args!("note: {line}"));
    }
    let zeros = 100.0 * report.zero_weights as f64 / report.ternary_weights.max(1) as f64;
    notice(format_args!(
        "{}: {}, {} tensors, {} ternary weights ({zeros:.1} % zero), embedding {}",
        args.output.display(),
        report.architecture,
        report.tensors,
        report.ternary_weights,
        report.embedding
    ));
    Ok(())
}
