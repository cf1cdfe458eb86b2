use crate::output;
use crate::source::{self, Wish};
use crate::usage_error;
use anyhow::{anyhow, ensure};
use bitnet::kernels::Logits;
use bitnet::{Engine, Feed, Wanted};
use clap::error::ErrorKind;
use std::path::PathBuf;

/// Tokens whose logits are in memory at once.
const CHUNK: usize = 32;

/// Write the logits of every token to a NumPy file
#[derive(clap::Args)]
#[command(after_help = "Example:
  bitnet logits -m model.gguf --tokens 128000,9906 -o logits.npy")]
pub struct Args {
    #[command(flatten)]
    model: source::ModelArgs,
    /// Token ids: 1,2,3 (nothing is added before them)
    #[arg(long, value_name = "IDS", value_parser = source::parse_ids, required_unless_present = "tokens_file")]
    tokens: Vec<source::Ids>,
    /// File of token ids, with spaces, commas or newlines between them
    #[arg(long, value_name = "FILE", conflicts_with = "tokens")]
    tokens_file: Option<PathBuf>,
    /// File to write: float32 [tokens, vocab] in NumPy's format
    #[arg(short = 'o', long, value_name = "OUT.npy")]
    output: PathBuf,
}

pub fn run(args: &Args) -> anyhow::Result<()> {
    if args.output.as_os_str() == "-" {
        usage_error(ErrorKind::InvalidValue, "-o -: an array is written to a file");
    }
    let tokens = match &args.tokens_file {
        Some(file) => source::parse_ids(&source::read_text(Some(file))?)
            .map_err(|error| anyhow!("{}: {error}", file.display()))?,
        None => args.tokens.concat(),
    };
    ensure!(!tokens.is_empty(), "there are no tokens to compute logits of");
    let compute = args.model.compute()?;
    let context = u32::try_from(tokens.len()).ok();
    let wish = Wish { context, max_rows: CHUNK, logits: CHUNK, ..Wish::default() };
    let (model, options) = args.model.load(&compute, &wish, |_| ())?;
    source::check_ids(&tokens, model.config())?;
    let vocab = model.config().vocab_size;
    let mut engine = Engine::new(model, compute, options)?;
    let sequence = engine.open();
    engine.cancel_by(output::interrupt_flag()?);
    output::write_file(&args.output, |out| {
        out.write_all(&npy_header(tokens.len(), vocab))?;
        for tokens in tokens.chunks(CHUNK) {
            let logits = engine.feed(&[Feed { sequence, tokens, wanted: Wanted::All(Logits::Every) }])?;
            for value in logits {
                out.write_all(&value.to_le_bytes())?;
            }
        }
        Ok(())
    })?;
    args.model.tell_memory(&engine);
    Ok(())
}

/// The header of a version 1.0 file of float32, in C order, padded so that the data begin at a multiple of 64 bytes
/// (<https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html>).
fn npy_header(rows: usize, columns: usize) -> Vec<u8> {
    let dict = format!("{{'descr': '<f4', 'fortran_order': False, 'shape': ({rows}, {columns}), }}");
    let len = (10 + dict.len() + 1).next_multiple_of(64) - 10;
    let mut header = b"\x93NUMPY\x01\x00".to_vec();
    header.extend((len as u16).to_le_bytes());
    header.extend(format!("{dict:width$}\n", width = len - 1).as_bytes());
    header
}

#[cfg(test)]
mod tests {
    #[test]
    fn header_is_aligned() {
        for (rows, columns) in [(1, 1), (17, 128_256), (999_999, 16_777_216)] {
            let header = super::npy_header(rows, columns);
            assert_eq!(header.len() % 64, 0);
            assert_eq!(u16::from_le_bytes([header[8], header[9]]) as usize, header.len() - 10);
            assert_eq!(header.last(), Some(&b'\n'));
        }
    }
}
