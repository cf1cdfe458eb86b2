//! Hugging Face's `tokenizer.json`.

use std::collections::HashMap;

use serde::Deserialize;
use serde_json::Value;

use super::split::PATTERN;
use super::tokenizer::{TokenizerError, Vocab, shortened};

/// The vocabulary of a `tokenizer.json` or `tokenizer.model`, in the form of GGUF's `tokenizer.ggml` arrays.
#[derive(Debug, Clone, PartialEq)]
pub struct HfVocab {
    /// Token texts by id: in GPT-2's byte alphabet for normal tokens, as they are for all others.
    pub tokens: Vec<String>,
    /// One per token: 1 normal, 3 control, 4 user-defined; as SentencePiece has them also 2 unknown, 5 unused, 6 byte.
    pub token_types: Vec<i32>,
    /// `left right` in the byte alphabet, in order of rank.
    pub merges: Vec<String>,
    /// Whether a piece that is a token is that token, even where the merges would not lead to it.
    pub ignore_merges: bool,
    /// SentencePiece's scores, one a token, in place of `merges`.
    pub scores: Option<Vec<f32>>,
    /// llama.cpp's name for the way text is cut: `llama-bpe`, `falcon3`, or `default` for SentencePiece.
    pub pre: &'static str,
}

impl HfVocab {
    /// Reads a `tokenizer.json`; refuses all but byte-level BPE with the LLaMA-3 split, or Falcon3's, which loading a model
    /// notices.
    /// The arrays are checked only when a tokenizer is made of them.
    pub fn parse(json: &[u8]) -> Result<Self, TokenizerError> {
        let file: File = serde_json::from_slice(json)?;
        let File { added_tokens, model, .. } = &file;
        let not_null = |value: &Value| !value.is_null() && value != "";
        let pre = if is_llama3_split(&file.pre_tokenizer) {
            Some("llama-bpe")
        } else {
            is_falcon_split(&file.pre_tokenizer).then_some("falcon3")
        };
        let refusals = [
            ("normalizer", &file.normalizer, not_null(&file.normalizer)),
            ("pre_tokenizer", &file.pre_tokenizer, pre.is_none()),
            ("model.type", &model.model_type, model.model_type != "BPE"),
            ("model.dropout", &model.dropout, not_null(&model.dropout)),
            ("model.continuing_subword_prefix", &model.prefix, not_null(&model.prefix)),
            ("model.end_of_word_suffix", &model.suffix, not_null(&model.suffix)),
            ("model.byte_fallback", &model.byte_fallback, model.byte_fallback == true),
        ];
        if let Some((what, found, _)) = refusals.into_iter().find(|refusal| refusal.2) {
            return Err(TokenizerError::Unsupported { what, found: shortened(&found.to_string()) });
        }
        if let Some(token) = added_tokens.iter().find(|t| t.single_word || t.lstrip || t.rstrip) {
            let found = format!("{:?} with single_word, lstrip or rstrip", shortened(&token.content));
            return Err(TokenizerError::Unsupported { what: "an added token", found });
        }

        let added = added_tokens.iter().map(|t| (t.id, (t.content.as_str(), if t.special { 3 } else { 4 })));
        let normal = model.vocab.iter().map(|(text, &id)| (id, (text.as_str(), 1)));
        let mut entries: Vec<(u32, (&str, i32))> = added.chain(normal).collect();
        entries.sort_by_key(|entry| entry.0);
        // An added token may be listed with the normal ones too.
        entries.dedup_by(|next, first| next.0 == first.0 && first.1.1 != 1 && next.1.0 == first.1.0);
        if let Some((id, _)) = (0..).zip(&entries).find(|(at, entry)| *at != entry.0).map(|(_, entry)| entry)
        {
            return Err(TokenizerError::Ids { id: *id, count: entries.len() });
        }
        Ok(Self {
            tokens: entries.iter().map(|entry| entry.1.0.to_owned()).collect(),
            token_types: entries.iter().map(|entry| entry.1.1).collect(),
            merges: file.model.merges.into_iter().map(Merge::into_text).collect(),
            ignore_merges: file.model.ignore_merges,
            scores: None,
            pre: pre.unwrap_or_default(),
        })
    }

    /// The same, borrowed.
    pub fn vocab(&self) -> Vocab<'_> {
        Vocab {
            tokens: self.tokens.iter().map(String::as_str).collect(),
            token_types: self.token_types.clone(),
            merges: self.merges.iter().map(String::as_str).collect(),
            ignore_merges: self.ignore_merges,
            scores: self.scores.clone(),
        }
    }
}

/// A split by the pattern, then the byte alphabet without a split of its own.
fn is_llama3_split(pre_tokenizer: &Value) -> bool {
    let steps = pre_tokenizer["pretokenizers"].as_array().map_or(&[][..], Vec::as_slice);
    let [split, bytes] = steps else { return false };
    pre_tokenizer["type"] == "Sequence"
        && split["type"] == "Split"
        && split["pattern"]["Regex"] == PATTERN
        && split["behavior"] == "Isolated"
        && split["invert"] == false
        && bytes["type"] == "ByteLevel"
        && bytes["add_prefix_space"] == false
        && bytes["use_regex"] == false
}

/// Runs of punctuation on their own, then GPT-2's pattern, then digits.
fn is_falcon_split(pre_tokenizer: &Value) -> bool {
    let steps = pre_tokenizer["pretokenizers"].as_array().map_or(&[][..], Vec::as_slice);
    let [punctuation, bytes, digits @ ..] = steps else { return false };
    pre_tokenizer["type"] == "Sequence"
        && punctuation["type"] == "Punctuation"
        && bytes["type"] == "ByteLevel"
        && bytes["add_prefix_space"] == false
        && digits.iter().all(|step| step["type"] == "Digits" || step["type"] == "Split")
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
