use crate::{output, source};
use bitnet::model::{ModelInfo, Strategy};
use std::io::IsTerminal;

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
    #[arg(required = true, value_delimiter = ',')]
    ids: Vec<u32>,
}

pub fn run(args: &Args) -> anyhow::Result<()> {
    let gguf = args.model.open()?;
    let info = ModelInfo::new(&gguf, Strategy::default())?;
    args.model.note_repairs(&info.repairs);
    source::check_ids(&args.ids, &info.config)?;
    let mut bytes = info.tokenizer()?.decode(&args.ids, args.special)?;
    if std::io::stdout().is_terminal() {
        bytes.push(b'\n');
    }
    output::print(&bytes)
}
