//! The rows of a batch: where they come from and what they ask for.

use crate::constraint::Form;
use crate::source;
use anyhow::{Context, anyhow, bail, ensure};
use bitnet::generate::{Sampler, SamplerConfig, StopConditions};
use bitnet::text::Message;
use serde::{Deserialize, Deserializer};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::vec;

/// No row is longer.
const MAX_ROW: u64 = 64 << 20;

/// An input file.
pub enum Input {
    /// A row a line, each JSON; without a path stdin.
    Lines(Option<PathBuf>),
    /// One row, whose prompt is the file.
    Text(PathBuf),
}

/// The inputs that `paths` name, folders walked in the order of names, without hidden files and without `output`.
///
/// # Errors
/// Where one is not there or is the output itself.
pub fn inputs(paths: &[PathBuf], output: &Path) -> anyhow::Result<Vec<Input>> {
    let output = output.canonicalize().ok();
    let is_output = |path: &Path| output.is_some() && path.canonicalize().ok() == output;
    let mut all = Vec::new();
    for path in paths {
        if path.as_os_str() == "-" {
            all.push(Input::Lines(None));
            continue;
        }
        let name = path.display();
        let metadata = path.metadata().with_context(|| format!("{name}: cannot read"))?;
        ensure!(!is_output(path), "{name}: is both input and output");
        if metadata.is_dir() {
            walk(path, &is_output, &mut all)?;
        } else {
            all.push(input(path.clone()));
        }
    }
    Ok(all)
}

fn walk(folder: &Path, is_output: &dyn Fn(&Path) -> bool, all: &mut Vec<Input>) -> anyhow::Result<()> {
    let failed = || format!("{}: cannot read", folder.display());
    let mut entries =
        fs::read_dir(folder).and_then(Iterator::collect::<io::Result<Vec<_>>>).with_context(failed)?;
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let path = entry.path();
        if entry.file_name().as_encoded_bytes().starts_with(b".") || is_output(&path) {
            continue;
        }
        // Links to folders are not followed, for they may lead in circles.
        if entry.file_type().with_context(failed)?.is_dir() {
            walk(&path, is_output, all)?;
        } else if path.is_file() {
            all.push(input(path));
        }
    }
    Ok(())
}

fn input(path: PathBuf) -> Input {
    let lines =
        path.extension().is_some_and(|e| e.eq_ignore_ascii_case("jsonl") || e.eq_ignore_ascii_case("ndjson"));
    if lines { Input::Lines(Some(path)) } else { Input::Text(path) }
}

/// A row as it stands in its input.
pub struct Row {
    /// From 0, over all inputs.
    pub index: u64,
    /// File and line, for errors.
    pub place: String,
    /// Its name where it gives none of its own.
    pub id: Value,
    /// A line or a file.
    pub raw: Vec<u8>,
    kind: Kind,
}

enum Kind {
    Json,
    Text,
    Unreadable(String),
}

/// Reads rows one after the other.
pub struct Rows {
    inputs: vec::IntoIter<Input>,
    lines: Option<(String, u64, Box<dyn BufRead + Send>)>,
    /// Lines of all inputs so far.
    all_lines: u64,
    next: u64,
}

impl Rows {
    pub fn new(inputs: Vec<Input>) -> Self {
        Self { inputs: inputs.into_iter(), lines: None, all_lines: 0, next: 0 }
    }

    /// How many rows there are; None where that cannot be known beforehand.
    pub fn count(inputs: &[Input]) -> Option<u64> {
        let mut all = 0;
        for input in inputs {
            all += match input {
                Input::Text(_) => 1,
                Input::Lines(None) => return None,
                Input::Lines(Some(path)) => {
                    // Something else than a file may be readable only once.
                    let file = path.is_file().then(|| File::open(path).ok()).flatten()?;
                    let lines = BufReader::new(file).split(b'\n');
                    lines.filter(|line| line.as_ref().is_ok_and(|line| !line.trim_ascii().is_empty())).count()
                        as u64
                }
            };
        }
        Some(all)
    }

    /// The next row.
    ///
    /// # Errors
    /// Where a file of rows cannot be read; what is wrong with a single row is told by [`Row::request`].
    pub fn next(&mut self) -> anyhow::Result<Option<Row>> {
        loop {
            if let Some((name, line, reader)) = &mut self.lines {
                let mut raw = Vec::new();
                reader
                    .take(MAX_ROW + 1)
                    .read_until(b'\n', &mut raw)
                    .with_context(|| format!("{name}: cannot read"))?;
                if raw.last() == Some(&b'\n') {
                    raw.pop();
                } else if raw.is_empty() {
                    self.lines = None;
                    continue;
                }
                *line += 1;
                self.all_lines += 1;
                let place = format!("{name}:{line}");
                ensure!(raw.len() as u64 <= MAX_ROW, "{place}: longer than {} MiB", MAX_ROW >> 20);
                if raw.trim_ascii().is_empty() {
                    continue;
                }
                let id = Value::from(self.all_lines);
                return Ok(Some(self.row(place, id, raw, Kind::Json)));
            }
            match self.inputs.next() {
                None => return Ok(None),
                Some(Input::Lines(None)) => {
                    self.lines = Some(("stdin".to_owned(), 0, Box::new(BufReader::new(io::stdin()))));
                }
                Some(Input::Lines(Some(path))) => {
                    let name = path.display().to_string();
                    let file = File::open(&path).with_context(|| format!("{name}: cannot read"))?;
                    self.lines = Some((name, 0, Box::new(BufReader::new(file))));
                }
                Some(Input::Text(path)) => {
                    let name = path.display().to_string();
                    let mut raw = Vec::new();
                    let read =
                        File::open(&path).and_then(|file| file.take(MAX_ROW + 1).read_to_end(&mut raw));
                    let kind = match read {
                        Err(error) => Kind::Unreadable(format!("cannot read: {error}")),
                        Ok(_) if raw.len() as u64 > MAX_ROW => {
                            Kind::Unreadable(format!("longer than {} MiB", MAX_ROW >> 20))
                        }
                        Ok(_) => Kind::Text,
                    };
                    return Ok(Some(self.row(name.clone(), Value::from(name), raw, kind)));
                }
            }
        }
    }

    fn row(&mut self, place: String, id: Value, raw: Vec<u8>, kind: Kind) -> Row {
        let index = self.next;
        self.next += 1;
        Row { index, place, id, raw, kind }
    }
}

/// What a row asks for.
pub struct Request {
    pub prompt: Prompt,
    pub sampler: Sampler,
    pub stop: StopConditions,
    pub ignore_eos: bool,
    pub form: Option<Form>,
}

/// What is to be continued or answered.
pub enum Prompt {
    Text(String),
    Messages(Vec<Message>),
}

/// What holds for rows that do not say otherwise.
pub struct Defaults {
    /// The seed of the row with index 0; the next one has the next.
    pub sampler: SamplerConfig,
    /// Without the model's tokens.
    pub stop: StopConditions,
    pub ignore_eos: bool,
    pub form: Option<Form>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Fields {
    #[serde(rename = "id")]
    _id: Option<Value>,
    prompt: Option<String>,
    messages: Option<Vec<Message>>,
    n: Option<u32>,
    #[serde(alias = "n_predict", alias = "max_completion_tokens")]
    max_tokens: Option<i64>,
    #[serde(alias = "temp")]
    temperature: Option<f32>,
    top_k: Option<u32>,
    top_p: Option<f32>,
    min_p: Option<f32>,
    repeat_penalty: Option<f32>,
    repeat_last_n: Option<u32>,
    frequency_penalty: Option<f32>,
    presence_penalty: Option<f32>,
    logit_bias: Option<BTreeMap<u32, f32>>,
    seed: Option<u64>,
    #[serde(default, deserialize_with = "strings")]
    stop: Option<Vec<String>>,
    ignore_eos: Option<bool>,
    json_schema: Option<Value>,
    grammar: Option<String>,
    regex: Option<String>,
}

/// One string, a list of them, or null.
fn strings<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Vec<String>>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged, expecting = "stop must be a string or a list of strings")]
    enum Strings {
        None(()),
        One(String),
        Many(Vec<String>),
    }
    Ok(match Strings::deserialize(from)? {
        Strings::None(()) => None,
        Strings::One(one) => Some(vec![one]),
        Strings::Many(many) => Some(many),
    })
}

impl Row {
    /// What it asks for; takes over its id.
    ///
    /// # Errors
    /// What is wrong with it, for the user.
    pub fn request(&mut self, defaults: &Defaults) -> anyhow::Result<Request> {
        let mut stop = defaults.stop.clone();
        let (mut ignore_eos, mut form) = (defaults.ignore_eos, defaults.form.clone());
        let mut c = defaults.sampler.clone();
        c.seed = c.seed.wrapping_add(self.index);
        let prompt = match &self.kind {
            Kind::Unreadable(problem) => bail!("{problem}"),
            Kind::Text => {
                let text = source::utf8(self.raw.clone())?;
                Prompt::Text(text.strip_suffix('\n').map(str::to_owned).unwrap_or(text))
            }
            Kind::Json => {
                let text = source::utf8(self.raw.clone())?;
                let value: Value = serde_json::from_str(&text).context("not JSON")?;
                ensure!(value.is_object(), "expected an object");
                match value.get("id") {
                    Some(id @ (Value::String(_) | Value::Number(_))) => self.id = id.clone(),
                    None | Some(Value::Null) => {}
                    Some(_) => bail!("the id must be a string or a number"),
                }
                // From the text again, for the place of an error; a row is one line.
                let fields: Fields = serde_json::from_str(&text).map_err(|error| {
                    anyhow!(error.to_string().replace(" at line 1 column ", " at column "))
                })?;
                macro_rules! take {
                    ($($field:ident),*) => { $(if let Some(value) = fields.$field { c.$field = value; })* };
                }
                take!(temperature, top_k, top_p, min_p, repeat_penalty, repeat_last_n);
                take!(frequency_penalty, presence_penalty, seed);
                if let Some(biases) = fields.logit_bias {
                    c.logit_bias = biases.into_iter().collect();
                }
                let n = fields.n.unwrap_or(1);
                ensure!(n == 1, "n is {n}: a row gets 1 answer; max_tokens is the number of tokens");
                if let Some(max) = fields.max_tokens {
                    ensure!(max >= -1, "max_tokens is {max}; expected -1 (no limit) or more");
                    stop.max_tokens = usize::try_from(max).ok();
                }
                if let Some(strings) = fields.stop {
                    ensure!(!strings.iter().any(String::is_empty), "an empty stop string");
                    stop.strings = strings;
                }
                ignore_eos = fields.ignore_eos.unwrap_or(ignore_eos);
                let schema = fields.json_schema.map(|schema| Form::Schema(schema.to_string()));
                let forms = [schema, fields.grammar.map(Form::Grammar), fields.regex.map(Form::Regex)];
                let mut forms = forms.into_iter().flatten();
                form = forms.next().or(form);
                ensure!(forms.next().is_none(), "more than one of json_schema, grammar and regex");
                match (fields.prompt, fields.messages) {
                    (Some(text), None) => Prompt::Text(text),
                    (None, Some(messages)) if !messages.is_empty() => Prompt::Messages(messages),
                    (None, Some(_)) => bail!("there are no messages"),
                    _ => bail!("expected either \"prompt\" or \"messages\""),
                }
            }
        };
        Ok(Request { prompt, sampler: Sampler::new(c)?, stop, ignore_eos, form })
    }
}
