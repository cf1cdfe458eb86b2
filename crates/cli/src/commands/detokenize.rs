use crate::{output, source};
use bitnet::model::{ModelInfo, Strategy};
use std::io::IsTerminal;

/// Print the text of token ids
#[derive(clap::Args)]
#[command(after_help = "Examples:
  bitnet detokenize 4088 1013 262
  bitnet tokenize \"Once\" | xargs bitnet detokenize")]
pub struct Args {
    #[command(flatten)]
    model: source::FileArgs,
    /// Print control tokens such as <|eot_id|> too
    #[arg(long)]
    special: bool,
    /// Token ids, with spaces or commas between them
    #[arg(required = true, value_parser = source::parse_ids)]
    ids: Vec<source::Ids>,
}

pub fn run(args: &Args) -> anyhow::Result<()> {
    let gguf = args.model.open()?;
    let info = ModelInfo::new(&gguf, Strategy::default())?;
    args.model.note_repairs(&info.repairs);
    let ids = args.ids.concat();
    source::check_ids(&ids, &info.config)?;
    let bytes = info.tokenizer()?.decode(&ids, args.special)?;
    if std::io::stdout().is_terminal() {
        return output::print_text(&format!("{}\n", String::from_utf8_lossy(&bytes)));
    }
    output::print(&bytes)
}
