//! Hugging Face's `tokenizer.json`.

use std::collections::HashMap;

use serde::Deserialize;
use serde_json::{Value, json};

use super::split::{Numerals, PATTERN, PREFIX, Prefix, Split};
use super::tokenizer::{TokenizerError, Vocab};
use super::words::{byte_of, shortened};

/// The vocabulary of a `tokenizer.json` or `tokenizer.model`.
pub type HfVocab = Vocab<String>;

impl HfVocab {
    /// Reads a `tokenizer.json`; refuses all but byte-level BPE with the splits of LLaMA-3 and Falcon, and SentencePiece's BPE
    /// in the forms that LLaMA-2 has it.
    /// The arrays are checked only when a tokenizer is made of them.
    pub fn parse(json: &[u8]) -> Result<Self, TokenizerError> {
        let file: File = serde_json::from_slice(json)?;
        let File { added_tokens, model, normalizer, pre_tokenizer } = &file;
        let not_null = |value: &Value| !value.is_null() && value != "";
        let sentence = model.byte_fallback == true;
        let split = if sentence { sentence_split(normalizer, pre_tokenizer) } else { split(pre_tokenizer) };
        let ignore_merges = Value::Bool(model.ignore_merges);
        let refusals = [
            (
                "model.type",
                &model.model_type,
                model.model_type != "BPE" && (!sentence || not_null(&model.model_type)),
            ),
            ("normalizer", normalizer, not_null(normalizer) && !(sentence && *normalizer == spaces())),
            ("pre_tokenizer", pre_tokenizer, split.is_none()),
            ("model.ignore_merges", &ignore_merges, sentence && ignore_merges == true),
            ("model.dropout", &model.dropout, not_null(&model.dropout)),
            ("model.continuing_subword_prefix", &model.prefix, not_null(&model.prefix)),
            ("model.end_of_word_suffix", &model.suffix, not_null(&model.suffix)),
        ];
        if let Some((what, found, _)) = refusals.into_iter().find(|refusal| refusal.2) {
            return Err(TokenizerError::Unsupported { what, found: shortened(&found.to_string()) });
        }
        if let Some(token) = added_tokens.iter().find(|t| t.single_word || t.lstrip || t.rstrip) {
            let found = format!("{:?} with single_word, lstrip or rstrip", shortened(&token.content));
            return Err(TokenizerError::Unsupported { what: "an added token", found });
        }

        let added = added_tokens.iter().map(|t| (t.id, (t.content.as_str(), if t.special { 3 } else { 4 })));
        let kind = |text: &str| if sentence && byte_of(text).is_some() { 6 } else { 1 };
        let normal = model.vocab.iter().map(|(text, &id)| (id, (text.as_str(), kind(text))));
        let mut entries: Vec<(u32, (&str, i32))> = added.chain(normal).collect();
        entries.sort_by_key(|entry| entry.0);
        // An added token may be listed with the normal ones too.
        entries.dedup_by(|next, first| next.0 == first.0 && first.1.1 != 1 && next.1.0 == first.1.0);
        if let Some((id, _)) = (0..).zip(&entries).find(|(at, entry)| *at != entry.0).map(|(_, entry)| entry)
        {
            return Err(TokenizerError::Ids { id: *id, count: entries.len() });
        }
        let tokens: Vec<_> = entries.iter().map(|entry| entry.1.0.to_owned()).collect();
        let token_types = entries.iter().map(|entry| entry.1.1).collect();
        let merges: Vec<_> = file.model.merges.into_iter().map(Merge::into_text).collect();
        // For programs that go by the scores alone: what is merged first has the highest.
        let scored = if sentence { &tokens[..] } else { &[] };
        let results = merges.iter().enumerate().rev().map(|(rank, merge)| (merge.replacen(' ', "", 1), rank));
        let ranks: HashMap<String, usize> = results.filter(|_| sentence).collect();
        let score = |token| ranks.get(token).map_or(-1e9, |rank| -(*rank as f32));
        let scores = scored.iter().map(score).collect();
        let ignore_merges = file.model.ignore_merges;
        Ok(Self { tokens, token_types, merges, ignore_merges, scores, split: split.unwrap_or_default() })
    }
}

/// A space before the text, and SentencePiece's character in place of spaces.
fn spaces() -> Value {
    json!({ "type": "Sequence", "normalizers": [
        { "type": "Prepend", "prepend": "\u{2581}" },
        { "type": "Replace", "pattern": { "String": " " }, "content": "\u{2581}" },
    ] })
}

/// How a tokenizer like SentencePiece's makes spaces visible: by the normalizer, or by the step "Metaspace".
fn sentence_split(normalizer: &Value, pre_tokenizer: &Value) -> Option<Split> {
    if pre_tokenizer.is_null() {
        return (*normalizer == spaces())
            .then_some(Split::Sentence { prefix: Prefix::Each, at_spaces: false });
    }
    let known = pre_tokenizer["type"] == "Metaspace" && pre_tokenizer["replacement"] == "\u{2581}";
    let old = pre_tokenizer["add_prefix_space"].as_bool().map(|adds| if adds { "always" } else { "never" });
    let name = pre_tokenizer["prepend_scheme"].as_str().or(old).unwrap_or("always");
    let (_, prefix) = PREFIX.1.into_iter().find(|known| known.0 == name)?;
    let at_spaces = pre_tokenizer["split"].as_bool().unwrap_or(true);
    (known && normalizer.is_null()).then_some(Split::Sentence { prefix, at_spaces })
}

/// The split that a pre-tokenizer of byte-level BPE describes, if it is a known one.
fn split(pre_tokenizer: &Value) -> Option<Split> {
    let steps = pre_tokenizer["pretokenizers"].as_array().filter(|_| pre_tokenizer["type"] == "Sequence")?;
    let pattern = |step: &Value| {
        let isolated = step["type"] == "Split" && step["behavior"] == "Isolated" && step["invert"] == false;
        step["pattern"]["Regex"].as_str().filter(|_| isolated).map(str::to_owned)
    };
    // Whether to split by GPT-2's pattern is true where it is left out.
    let bytes = |step: &Value, regex: bool| {
        let splits = step.get("use_regex").is_none_or(|regex| *regex == true);
        step["type"] == "ByteLevel" && step["add_prefix_space"] == false && splits == regex
    };
    match &steps[..] {
        [split, last] if pattern(split)? == PATTERN && bytes(last, false) => Some(Split::Llama3),
        [marks, level, numbers @ ..] if bytes(level, true) => {
            if marks["type"] != "Punctuation" || marks["behavior"] != "Contiguous" {
                return None;
            }
            let (mut digits, mut numerals) = (None, None);
            for step in numbers {
                match (&step["type"], pattern(step).as_deref()) {
                    (_, Some("[0-9]")) if digits.is_none() => digits = Some(1),
                    (_, Some("[0-9][0-9][0-9]" | "[0-9]{3}")) if digits.is_none() => digits = Some(3),
                    (kind, _) if kind == "Digits" && digits.is_none() && numerals.is_none() => {
                        let each = step["individual_digits"] == true;
                        numerals = Some(if each { Numerals::Each } else { Numerals::Runs });
                    }
                    _ => return None,
                }
            }
            let digits = digits.or((numerals == Some(Numerals::Each)).then_some(1))?;
            Some(Split::Falcon { digits, numerals })
        }
        _ => None,
    }
}

#[derive(Deserialize)]
struct File {
    #[serde(default)]
    added_tokens: Vec<AddedToken>,
    #[serde(default)]
    normalizer: Value,
    #[serde(default)]
    pre_tokenizer: Value,
    model: Model,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct AddedToken {
    id: u32,
    content: String,
    single_word: bool,
    lstrip: bool,
    rstrip: bool,
    special: bool,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Model {
    #[serde(rename = "type")]
    model_type: Value,
    dropout: Value,
    #[serde(rename = "continuing_subword_prefix")]
    prefix: Value,
    #[serde(rename = "end_of_word_suffix")]
    suffix: Value,
    byte_fallback: Value,
    ignore_merges: bool,
    vocab: HashMap<String, u32>,
    merges: Vec<Merge>,
}

/// Newer files have pairs, older ones text.
#[derive(Deserialize)]
#[serde(untagged)]
enum Merge {
    Pair(String, String),
    Text(String),
}

impl Merge {
    fn into_text(self) -> String {
        match self {
            Self::Pair(left, right) => format!("{left} {right}"),
            Self::Text(text) => text,
        }
    }
}
