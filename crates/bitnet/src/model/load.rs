//! From a file to a model: everything is checked here, once.

use super::config::{Keys, Repair};
use super::fill::Beside;
use super::rope::inverse_frequencies;
use super::weights::WeightPlan;
use super::{Config, Strategy, Weights, identity};
use crate::text::{
    AT_SPACES, Building, ChatTemplate, Key, NUMERALS, PREFIX, Prefix, Specials, Split, TemplateError,
    TemplateModel, Tokenizer, TokenizerError, Vocab,
};
use crate::{EngineOptions, Error, MemoryPlan};
use bitnet_gguf::Gguf;
use bitnet_kernels::math::sin_cos64;
use bitnet_kernels::{Compute, MemoryPart, PartBytes};
use std::sync::{Arc, OnceLock};

/// A model, which many sequences share: but for [settling](Self::settle) it does not change.
pub struct Model {
    name: String,
    file: Option<Arc<Gguf>>,
    identity: OnceLock<[u8; 32]>,
    config: Config,
    weights: Weights,
    tokenizer: Option<Arc<Tokenizer>>,
    special: SpecialTokens,
    template: Option<String>,
    repairs: Vec<Repair>,
    inverse_frequencies: Vec<f32>,
}

/// The tokens with a meaning of their own.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SpecialTokens {
    /// Begins every sequence, where `add_bos`.
    pub bos: Option<u32>,
    /// Whether a prompt begins with `bos`.
    pub add_bos: bool,
    /// Ends a text.
    pub eos: Option<u32>,
    /// Ids that end a text: end of text, end of turn.
    pub stop: Vec<u32>,
}

/// What a model file says, checked, with no weight read yet.
pub struct ModelInfo<'a> {
    /// The configuration.
    pub config: Config,
    /// What was repaired.
    pub repairs: Vec<Repair>,
    /// Special tokens.
    pub special: SpecialTokens,
    gguf: &'a Gguf,
    plan: WeightPlan<'a>,
    vocab: Option<Vocab<&'a str>>,
    template: Option<&'a str>,
}

impl<'a> ModelInfo<'a> {
    /// Reads and checks the metadata and the shape of every tensor of `gguf`.
    ///
    /// # Errors
    /// The first thing that is wrong, with file, key or tensor, offset, and what was expected.
    pub fn new(gguf: &'a Gguf, strategy: Strategy) -> Result<Self, Error> {
        let mut repairs = Vec::new();
        let config = Config::from_gguf(gguf, &mut repairs)?;
        let plan = WeightPlan::new(gguf, &config, strategy)?;
        let keys = Keys { gguf, arch: config.architecture.clone() };
        let vocab = read_vocab(&keys, &config, &mut repairs)?;
        let special = read_special(&keys, &config, vocab.as_ref(), &mut repairs)?;
        let template = read_template(gguf, &mut repairs)?;
        Ok(Self { config, repairs, special, gguf, plan, vocab, template })
    }

    /// The memory that the model takes with an engine of these sizes on `threads` threads.
    pub fn memory(&self, options: &EngineOptions, threads: usize) -> MemoryPlan {
        let mut vocabulary = PartBytes::default();
        vocabulary[MemoryPart::Vocabulary as usize] = self.vocab.as_ref().map_or(0, Vocab::table_bytes);
        MemoryPlan::default().and(self.plan.bytes()).and(vocabulary).and(options.bytes(&self.config, threads))
    }

    /// Checks the weights with all threads of `compute`, and reads those that cannot be used as they lie in the file. `file` is the one
    /// that this was read from. The threads build the tokenizer meanwhile, and one hands it to `beside`.
    ///
    /// # Errors
    /// What only the weights and the vocabulary themselves can show.
    ///
    /// # Panics
    /// If it is another file.
    pub fn load_with(
        self,
        file: &Arc<Gguf>,
        compute: &Compute,
        beside: impl Fn(&Arc<Tokenizer>) + Sync,
    ) -> Result<Model, Error> {
        assert!(std::ptr::eq(self.gguf, &raw const **file), "another file");
        let Self { config, repairs, special, plan, vocab, template, .. } = self;
        // The tokenizer is built meanwhile.
        let building = vocab.as_ref().map(Building::new);
        let making = Making { building, built: OnceLock::new(), then: beside };
        let weights = plan.load(&config, file, compute, &making);
        let tokenizer = making.built.into_inner().transpose();
        let name = file.name().to_owned();
        let tokenizer = tokenizer.map_err(|error| Error::Tokenizer { file: name.clone(), error })?;
        Ok(Model {
            inverse_frequencies: inverse_frequencies(&config),
            name,
            file: Some(file.clone()),
            identity: OnceLock::new(),
            config,
            weights: weights?,
            tokenizer,
            special,
            template: template.map(str::to_owned),
            repairs,
        })
    }

    /// Builds the tokenizer: for those who need no weights.
    ///
    /// # Errors
    /// [`Error::NoTokenizer`] where the file has none, [`Error::Tokenizer`] where its vocabulary is broken.
    pub fn tokenizer(&self) -> Result<Tokenizer, Error> {
        let file = || self.gguf.name().to_owned();
        let vocab = self.vocab.as_ref().ok_or_else(|| Error::NoTokenizer(file()))?;
        Tokenizer::new(vocab).map_err(|error| Error::Tokenizer { file: file(), error })
    }
}

/// A tokenizer that all threads build while they load weights, and what one of them then does with it.
struct Making<'a, F> {
    building: Option<Building<'a, &'a str>>,
    built: OnceLock<Result<Arc<Tokenizer>, TokenizerError>>,
    then: F,
}

impl<F: Fn(&Arc<Tokenizer>) + Sync> Beside for Making<'_, F> {
    fn begin(&self) {
        let Some(building) = &self.building else { return };
        let built = building.build().map(Arc::new);
        if let Ok(tokenizer) = &built {
            (self.then)(tokenizer);
        }
        let _ = self.built.set(built);
    }
    fn help(&self, wait: bool) {
        self.building.iter().for_each(|building| building.help(wait));
    }
}

impl SpecialTokens {
    /// The token that begins every prompt, where the model wants one.
    pub fn first(&self) -> Option<u32> {
        self.bos.filter(|_| self.add_bos)
    }
}

impl Model {
    /// Loads a model with all threads of `compute`.
    ///
    /// # Errors
    /// As [`ModelInfo::new`], and what only the weights and the vocabulary themselves can show.
    pub fn load(gguf: &Arc<Gguf>, compute: &Compute, strategy: Strategy) -> Result<Self, Error> {
        ModelInfo::new(gguf, strategy)?.load_with(gguf, compute, |_| ())
    }

    /// A model of the shape of `config` with random weights and no tokenizer, for measuring speed without a file.
    pub fn random(config: Config, compute: &Compute, strategy: Strategy) -> Result<Self, Error> {
        let weights = Weights::random(&config, compute, strategy)?;
        Ok(Self {
            inverse_frequencies: inverse_frequencies(&config),
            name: "random weights".into(),
            file: None,
            identity: OnceLock::new(),
            config,
            weights,
            tokenizer: None,
            special: SpecialTokens::default(),
            template: None,
            repairs: Vec::new(),
        })
    }

    /// Brings weights that are still read from the file into the engine's layout until all are or `enough` says so, which is asked
    /// after every few megabytes. The bits of the results stay the same.
    pub fn settle(&mut self, compute: &Compute, enough: impl Fn() -> bool) {
        self.weights.settle(compute, enough);
    }

    /// Cosines and sines of RoPE's angles at `position`, `rope_dim / 2` each. The angle is rounded to float32 before its
    /// cosine is taken, as in the reference; at large positions that matters.
    pub fn rope_angles(&self, position: usize, cos: &mut [f32], sin: &mut [f32]) {
        for (i, f) in self.inverse_frequencies.iter().enumerate() {
            let (s, c) = sin_cos64(f64::from(position as f32 * f));
            (cos[i], sin[i]) = (c as f32, s as f32);
        }
    }

    /// The name of the file the model came from.
    pub fn file(&self) -> &str {
        &self.name
    }
    /// What tells the model's file from others: see [`identity`](super::identity). None for random weights.
    pub fn identity(&self, compute: &Compute) -> Option<[u8; 32]> {
        self.file.as_ref().map(|file| *self.identity.get_or_init(|| identity(file, compute)))
    }
    /// The configuration.
    pub fn config(&self) -> &Config {
        &self.config
    }
    /// The weights.
    pub fn weights(&self) -> &Weights {
        &self.weights
    }
    /// The tokenizer.
    ///
    /// # Errors
    /// [`Error::NoTokenizer`] where the file has none.
    pub fn tokenizer(&self) -> Result<&Arc<Tokenizer>, Error> {
        self.tokenizer.as_ref().ok_or_else(|| Error::NoTokenizer(self.name.clone()))
    }
    /// The tokens of `text`, after the token that begins a sequence where the model wants one.
    ///
    /// # Errors
    /// [`Error::NoTokenizer`] where the file has none.
    pub fn prompt(&self, text: &str, specials: Specials) -> Result<Vec<u32>, Error> {
        let ids = self.tokenizer()?.encode(text, specials);
        // A text that names the token has it already.
        let first = self.special.first().filter(|bos| ids.first() != Some(bos));
        Ok(first.into_iter().chain(ids).collect())
    }
    /// The chat template `choice`: the name of a built-in one or Jinja (anything with a brace in it); without a choice the
    /// one in the file, or the built-in one that fits the model.
    ///
    /// # Errors
    /// [`Error::NoTokenizer`] and [`Error::Template`].
    pub fn chat_template(&self, choice: Option<&str>) -> Result<ChatTemplate, Error> {
        let SpecialTokens { bos, eos, .. } = self.special;
        let architecture = &self.config.architecture;
        let model = TemplateModel { tokenizer: self.tokenizer()?, architecture, bos, eos };
        let template = match choice {
            Some(source) if source.contains('{') => ChatTemplate::from_jinja(source, model),
            Some(name) => ChatTemplate::built_in(name, model),
            None => ChatTemplate::of_model(self.template.as_deref(), model),
        };
        template.map_err(|error: TemplateError| Error::Template { file: self.name.clone(), error })
    }
    /// Special tokens.
    pub fn special(&self) -> &SpecialTokens {
        &self.special
    }
    /// What was repaired on load.
    pub fn repairs(&self) -> &[Repair] {
        &self.repairs
    }
}

fn read_vocab<'a>(
    keys: &Keys<'a>,
    config: &Config,
    repairs: &mut Vec<Repair>,
) -> Result<Option<Vocab<&'a str>>, Error> {
    let gguf = keys.gguf;
    let wrong = |name: &str, problem: &str| keys.error(format!("key \"tokenizer.ggml.{name}\""), problem);
    let strings = |name: &str| -> Result<Option<Vec<&'a str>>, Error> {
        let Some(array) = gguf.get_array(&format!("tokenizer.ggml.{name}"))? else { return Ok(None) };
        let strs = array.strs().ok_or_else(|| wrong(name, "expected an array of strings"))?;
        Ok(Some(strs.collect()))
    };
    let Some(tokens) = strings("tokens")? else { return Ok(None) };
    let sentence = match gguf.get_str("tokenizer.ggml.model")? {
        Some("gpt2") => false,
        Some("llama") => true,
        other => {
            let expected = "\"gpt2\" (byte-level BPE) or \"llama\" (SentencePiece)";
            return Err(wrong("model", &format!("expected {expected}, found {other:?}")));
        }
    };
    let split = match gguf.get_str("tokenizer.ggml.pre")? {
        _ if sentence => {
            let no_prefix = gguf.get_bool("tokenizer.ggml.add_space_prefix")? == Some(false);
            let simple = if no_prefix { Prefix::Never } else { Prefix::Each };
            let prefix = read_key(keys, &PREFIX)?.unwrap_or(simple);
            Split::Sentence { prefix, at_spaces: gguf.get_bool(AT_SPACES)?.unwrap_or(false) }
        }
        Some("llama-bpe" | "llama3" | "llama-v3") => Split::Llama3,
        Some(pre @ ("falcon" | "falcon3" | "falcon_e" | "falcon-e")) => {
            let digits = if pre == "falcon" { 3 } else { 1 };
            match read_key(keys, &NUMERALS)? {
                // llama.cpp and bitnet.cpp mean different things by the newer names; no cut between digits leads to this token.
                None if digits == 1 && tokens.contains(&"10") => Split::Llama3,
                numerals => Split::Falcon { digits, numerals: numerals.flatten() },
            }
        }
        Some(other) => {
            let expected = "\"llama-bpe\", \"falcon\", \"falcon3\" or \"falcon_e\"";
            return Err(wrong("pre", &format!("expected {expected}, found {other:?}")));
        }
        None => {
            let message = "no pre-tokenizer in the metadata: text is split as LLaMA-3 does".to_owned();
            repairs.push(Repair { name: "pre_tokenizer", message });
            Split::Llama3
        }
    };
    if tokens.len() > config.vocab_size {
        let problem = format!("{} tokens, the embedding has {} rows", tokens.len(), config.vocab_size);
        return Err(wrong("tokens", &problem));
    }
    let count = tokens.len();
    let types = gguf.get_array("tokenizer.ggml.token_type")?.map(|types| {
        let ints = types.ints().map(|ints| ints.map(|t| t as i32).collect::<Vec<_>>());
        ints.filter(|ints| ints.len() == count)
    });
    let token_types = types.unwrap_or_else(|| Some(vec![1; count]));
    let token_types =
        token_types.ok_or_else(|| wrong("token_type", &format!("expected {count} integers, one a token")))?;
    let scores = match gguf.get_array("tokenizer.ggml.scores")? {
        _ if !sentence => Vec::new(),
        scores => {
            let floats = scores.and_then(|scores| scores.f32s()).map(Iterator::collect);
            floats.ok_or_else(|| wrong("scores", "expected floats: SentencePiece needs its scores"))?
        }
    };
    let merges = match strings("merges")? {
        None if !sentence => {
            return Err(wrong("merges", "missing: byte-level BPE needs its merges"));
        }
        merges => merges.unwrap_or_default(),
    };
    let ignore_merges = split == Split::Llama3;
    Ok(Some(Vocab { tokens, token_types, merges, ignore_merges, scores, split }))
}

/// What a key of our own says.
fn read_key<T: Copy>(keys: &Keys<'_>, (key, names): &Key<T>) -> Result<Option<T>, Error> {
    let Some(found) = keys.gguf.get_str(key)? else { return Ok(None) };
    let known = names.iter().find(|known| known.0 == found);
    known.map(|known| Some(known.1)).ok_or_else(|| {
        let all = names.each_ref().map(|known| known.0).join(", ");
        keys.error(format!("key {key:?}"), format!("expected one of {all}, found {found:?}"))
    })
}

fn read_special(
    keys: &Keys<'_>,
    config: &Config,
    vocab: Option<&Vocab<&str>>,
    repairs: &mut Vec<Repair>,
) -> Result<SpecialTokens, Error> {
    let id = |name: &str| -> Result<Option<u32>, Error> {
        let key = format!("tokenizer.ggml.{name}_token_id");
        match keys.gguf.get_u32(&key)? {
            Some(id) if (id as usize) < config.vocab_size => Ok(Some(id)),
            Some(id) => {
                let problem = format!("expected an id below {}, found {id}", config.vocab_size);
                Err(keys.error(format!("key {key:?}"), problem))
            }
            None => Ok(None),
        }
    };
    let (bos, eos, eot) = (id("bos")?, id("eos")?, id("eot")?);
    let mut stop: Vec<u32> = eos.into_iter().chain(eot).collect();
    // The published 2B-4T file ends its turns with a token that its metadata does not name.
    let turn = vocab.and_then(|vocab| vocab.tokens.iter().position(|t| *t == "<|eot_id|>"));
    if let (None, Some(turn)) = (eot, turn) {
        let turn = turn as u32;
        if !stop.contains(&turn) {
            stop.push(turn);
            let message =
                format!("no end-of-turn token in the metadata: <|eot_id|> ({turn}) ends a text too");
            repairs.push(Repair { name: "end_of_turn", message });
        }
    }
    stop.dedup();
    let falcon = keys.gguf.get_str("tokenizer.ggml.pre")?.is_some_and(|pre| pre.starts_with("falcon"));
    let add_bos = keys.gguf.get_bool("tokenizer.ggml.add_bos_token")?.unwrap_or(bos.is_some() && !falcon);
    Ok(SpecialTokens { bos, add_bos: add_bos && bos.is_some(), eos, stop })
}

fn read_template<'a>(gguf: &'a Gguf, repairs: &mut Vec<Repair>) -> Result<Option<&'a str>, Error> {
    let template = gguf.get_str("tokenizer.chat_template")?;
    if template.is_some_and(|t| t.contains("BITNETAssistant")) {
        let message = "the chat template in the metadata is not the model's: chat takes the one the model was trained with, \
                       \"Role: content<|eot_id|>\" for each message";
        repairs.push(Repair { name: "chat_template", message: message.into() });
        return Ok(None);
    }
    Ok(template.filter(|template| !template.trim().is_empty()))
}
