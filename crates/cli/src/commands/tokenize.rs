use crate::{output, source};
use bitnet::model::{ModelInfo, Strategy};
use bitnet::text::Specials;

/// Print the token ids of a text
#[derive(clap::Args)]
#[command(after_help = "Examples:
  bitnet tokenize \"Once upon a time\"
  bitnet tokenize -m model.gguf --json < text.txt")]
pub struct Args {
    #[command(flatten)]
    model: source::FileArgs,
    /// Print the text of every token too, as JSON
    #[arg(long)]
    json: bool,
    /// Recognise control tokens such as <|eot_id|> in the text
    #[arg(long)]
    special: bool,
    /// Do not begin with the begin-of-text token
    #[arg(long)]
    no_bos: bool,
    /// The text [default: stdin]
    text: Option<String>,
}

pub fn run(args: &Args) -> anyhow::Result<()> {
    let gguf = args.model.open()?;
    let text = match &args.text {
        Some(text) => text.clone(),
        None => source::read_text(None)?,
    };
    let info = ModelInfo::new(&gguf, Strategy::default())?;
    args.model.note_repairs(&info.repairs);
    let tokenizer = info.tokenizer()?;
    let specials = if args.special { Specials::Parse } else { Specials::AsText };
    let mut ids: Vec<u32> = info.special.first().filter(|_| !args.no_bos).into_iter().collect();
    ids.extend(tokenizer.encode(&text, specials));
    if args.json {
        let piece = |&id: &u32| String::from_utf8_lossy(tokenizer.token_bytes(id).unwrap_or_default());
        let pieces: Vec<_> = ids.iter().map(piece).collect();
        return output::print_json(&serde_json::json!({ "tokens": ids, "pieces": pieces }));
    }
    let words: Vec<_> = ids.iter().map(u32::to_string).collect();
    output::print(format!("{}\n", words.join(" ")).as_bytes())
}
