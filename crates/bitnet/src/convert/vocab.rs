//! tokenizer.json or tokenizer.model, and tokenizer_config.json, as GGUF metadata.

use std::path::Path;

use bitnet_gguf::{Value, ValueType, Writer};
use serde_json::Value as Json;

use super::ConvertError;
use super::checkpoint::read_json;
use super::config::{Family, HfConfig};
use crate::text::{AT_SPACES, HfVocab, Key, NUMERALS, PREFIX, Prefix, Split, Tokenizer};

/// GGUF's type of a token that no text leads to.
const UNUSED: i32 = 5;

/// The vocabulary, as long as the embedding, and what belongs to it.
pub(super) struct HfTokenizer {
    vocab: HfVocab,
    add_bos: bool,
    chat_template: Option<String>,
}

impl HfTokenizer {
    /// Reads the tokenizer of a checkpoint. None if it has none.
    pub(super) fn read(dir: &Path, config: &HfConfig) -> Result<Option<Self>, ConvertError> {
        // Both say the same, but for where spaces are added: 1bitLLM's own code goes by the one, Hugging Face's by the other.
        let mut names = ["tokenizer.json", "tokenizer.model"];
        if config.family == Family::OneBitLlm {
            names.reverse();
        }
        let Some(path) = names.map(|name| dir.join(name)).into_iter().find(|path| path.exists()) else {
            return Ok(None);
        };
        let sentence = path.ends_with("tokenizer.model");
        let bytes = std::fs::read(&path).map_err(|e| ConvertError::io(&path, "read", e))?;
        let broken = |error| ConvertError::Tokenizer { file: path.display().to_string(), error };
        let mut vocab = if sentence {
            HfVocab::parse_sentencepiece(&bytes).ok_or_else(|| {
                let expected = "expected SentencePiece's byte-pair encoding of a text as it is";
                ConvertError::checkpoint(&path, "vocabulary", expected)
            })?
        } else {
            HfVocab::parse(&bytes).map_err(broken)?
        };
        let implied = vocab.split == Split::Llama3;
        if vocab.ignore_merges != implied {
            let problem = format!("expected {implied}: GGUF's name of the pre-tokenizer implies it");
            return Err(ConvertError::checkpoint(&path, "key \"model.ignore_merges\"", problem));
        }
        let size = config.vocab_size as usize;
        if vocab.tokens.len() > size {
            let problem = format!("{} tokens, config.json has a vocab_size of {size}", vocab.tokens.len());
            return Err(ConvertError::checkpoint(&path, "vocabulary", problem));
        }
        // Other programs take the length of the list for the number of the embedding's rows.
        vocab.tokens.extend((vocab.tokens.len()..size).map(|id| format!("[PAD{id}]")));
        vocab.token_types.resize(size, UNUSED);
        if matches!(vocab.split, Split::Sentence { .. }) {
            vocab.scores.resize(size, 0.0);
        }
        Tokenizer::new(&vocab).map_err(broken)?;

        let settings_path = dir.join("tokenizer_config.json");
        let settings: Json = if settings_path.exists() { read_json(&settings_path)? } else { Json::Null };
        let template_path = dir.join("chat_template.jinja");
        let chat_template = if template_path.exists() {
            Some(
                std::fs::read_to_string(&template_path)
                    .map_err(|e| ConvertError::io(&template_path, "read", e))?,
            )
        } else {
            chat_template(&settings["chat_template"])
        };
        // Without the setting as the published BitNets, of which all but Falcons were trained with a first token.
        let falcon = matches!(vocab.split, Split::Falcon { .. });
        let add_bos = settings["add_bos_token"].as_bool().unwrap_or(!falcon);
        Ok(Some(Self { vocab, add_bos, chat_template }))
    }

    pub(super) fn write(&self, writer: &mut Writer) -> Result<(), ConvertError> {
        let HfVocab { tokens, token_types, merges, scores, split, .. } = &self.vocab;
        let (model, pre) = match *split {
            Split::Llama3 => ("gpt2", "llama-bpe"),
            Split::Falcon { digits: 3, .. } => ("gpt2", "falcon"),
            Split::Falcon { .. } => ("gpt2", "falcon3"),
            Split::Sentence { .. } => ("llama", "default"),
        };
        writer.meta("tokenizer.ggml.model", Value::Str(model))?;
        writer.meta("tokenizer.ggml.pre", Value::Str(pre))?;
        match *split {
            Split::Llama3 => {}
            Split::Falcon { numerals, .. } => write_key(writer, &NUMERALS, &numerals)?,
            Split::Sentence { prefix, at_spaces } => {
                writer.meta("tokenizer.ggml.add_space_prefix", Value::Bool(prefix != Prefix::Never))?;
                write_key(writer, &PREFIX, &prefix)?;
                writer.meta(AT_SPACES, Value::Bool(at_spaces))?;
            }
        }
        writer.meta_array("tokenizer.ggml.tokens", ValueType::Str, tokens.iter().map(|t| Value::Str(t)))?;
        let types = token_types.iter().copied().map(Value::I32);
        writer.meta_array("tokenizer.ggml.token_type", ValueType::I32, types)?;
        if !scores.is_empty() {
            let scores = scores.iter().copied().map(Value::F32);
            writer.meta_array("tokenizer.ggml.scores", ValueType::F32, scores)?;
        }
        if scores.is_empty() || !merges.is_empty() {
            let merges = merges.iter().map(|merge| Value::Str(merge));
            writer.meta_array("tokenizer.ggml.merges", ValueType::Str, merges)?;
        }
        if let Some(id) = tokens.iter().position(|token| token == "<|eot_id|>") {
            writer.meta("tokenizer.ggml.eot_token_id", Value::U32(id as u32))?;
        }
        writer.meta("tokenizer.ggml.add_bos_token", Value::Bool(self.add_bos))?;
        if let Some(template) = &self.chat_template {
            writer.meta("tokenizer.chat_template", Value::Str(template))?;
        }
        Ok(())
    }
}

/// Writes what a key of our own says, if that has a name.
fn write_key<T: PartialEq>(
    writer: &mut Writer,
    (key, names): &Key<T>,
    value: &T,
) -> Result<(), ConvertError> {
    if let Some((name, _)) = names.iter().find(|known| known.1 == *value) {
        writer.meta(key, Value::Str(name))?;
    }
    Ok(())
}

/// A template, or the one called "default" of a list of them.
fn chat_template(json: &Json) -> Option<String> {
    let template = match json {
        Json::Array(list) => &list.iter().find(|t| t["name"] == "default")?["template"],
        json => json,
    };
    template.as_str().map(str::to_owned)
}
