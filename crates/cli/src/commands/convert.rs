use crate::hub;
use crate::output::{self, note, notice};
use anyhow::bail;
use bitnet::convert::{HeadType, Options, TernaryType, convert};
use clap::builder::{PossibleValuesParser, TypedValueParser};
use indicatif::ProgressStyle;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::atomic::Ordering;

/// Make a GGUF file of a Hugging Face model folder, or of one with other types
///
/// A folder has config.json, safetensors with master or packed weights, and a tokenizer. The ternary weights stay the same
/// in every type; the file is read again before it appears, and the hash of all its weights is printed.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  bitnet convert ./bitnet-b1.58-2B-4T-bf16 model.gguf
  bitnet convert llama3-8b model.gguf                   downloads it first
  bitnet convert model.gguf small.gguf --type tq1_0 --head q6_k")]
pub struct Args {
    /// The folder, a GGUF file, or the name of a model on the hub
    input: String,
    /// The file to write
    output: PathBuf,
    /// Type of the ternary matrices; f16 and bf16 are for programs that have no ternary types
    #[arg(long = "type", value_name = "TYPE", value_parser = names(TernaryType::ALL, TernaryType::name),
          ignore_case = true, default_value = "i2_s")]
    ternary: TernaryType,
    /// Type of the embedding and the output head; auto: as it is, or of a folder the smallest of F16, BF16 and F32 that
    /// holds every value exactly
    #[arg(long, value_parser = names(HeadType::ALL, HeadType::name), ignore_case = true, default_value = "auto")]
    head: HeadType,
    /// No progress and notices on stderr
    #[arg(short = 'q', long)]
    quiet: bool,
}

/// One of `all` by its name.
fn names<T: Copy + Send + Sync + 'static, const N: usize>(
    all: [T; N],
    name: fn(T) -> &'static str,
) -> impl TypedValueParser<Value = T> {
    let is = move |text: &str, ty: T| name(ty).eq_ignore_ascii_case(text);
    PossibleValuesParser::new(all.map(name))
        .try_map(move |text| all.into_iter().find(|&ty| is(&text, ty)).ok_or("no such type"))
}

pub fn run(args: &Args) -> anyhow::Result<()> {
    let options = Options { ternary: args.ternary, head: args.head };
    let mut input = PathBuf::from(&args.input);
    if let Some(name) = hub::name_unless_path(&args.input)? {
        input = match hub::settings()?.find(&name, true)? {
            Some(path) => path,
            None => hub::pull(&name, true, args.quiet)?.path,
        };
    }
    if let (Ok(from), Ok(to)) = (input.canonicalize(), args.output.canonicalize())
        && from == to
    {
        bail!("{}: this is the input; give another name to write", args.output.display());
    }
    let bar = hub::bar(args.quiet);
    bar.set_style(ProgressStyle::with_template("{wide_bar} {bytes} of {total_bytes}, {eta} left")?);
    let interrupted = output::interrupt_flag()?;
    let report = convert(&input, &args.output, options, &mut |progress| {
        bar.set_length(progress.total);
        bar.set_position(progress.done);
        if interrupted.load(Ordering::Relaxed) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    bar.finish_and_clear();
    let report = report?;
    report.notices.iter().for_each(|line| note(args.quiet, line));
    if !args.quiet {
        let zeros = 100.0 * report.zero_weights as f64 / report.ternary_weights.max(1) as f64;
        notice(format_args!(
            "{}: {}, {} tensors, {} ternary weights in {} ({zeros:.1} % zero), embedding {}, verified",
            args.output.display(),
            report.architecture,
            report.tensors,
            report.ternary_weights,
            options.ternary.tensor_type(),
            report.embedding
        ));
    }
    output::print(format!("trits {}\n", report.trits).as_bytes())
}
