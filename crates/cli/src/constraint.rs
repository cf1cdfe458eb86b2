//! The form of the output, of a command or of a row of a batch.

use crate::source;
use anyhow::{Context, Error, anyhow};
use bitnet::generate::{Constraint, ConstraintError};
use bitnet::grammar::{Grammar, Vocabulary};
use bitnet::model::Model;
use bitnet::text::Tokenizer;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

/// For texts that ended too early.
pub const INCOMPLETE: &str = "the output is incomplete: it ended before it had the form that was asked for";

#[derive(clap::Args)]
#[command(next_help_heading = "Form of the output")]
pub struct ConstraintArgs {
    /// JSON that satisfies a JSON schema: a file, - for stdin, or the schema itself, which begins with {
    #[arg(long, value_name = "FILE|-|JSON", group = "form")]
    json_schema: Option<String>,
    /// Text of a grammar in llguidance's dialect of Lark
    #[arg(long, value_name = "FILE", group = "form")]
    grammar: Option<PathBuf>,
    /// Text that a regular expression matches from beginning to end
    #[arg(long, value_name = "REGEX", group = "form", allow_hyphen_values = true)]
    regex: Option<String>,
}

/// The source of a grammar.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Form {
    Schema(String),
    Grammar(String),
    Regex(String),
}

impl ConstraintArgs {
    /// Whether the schema comes from stdin.
    pub fn reads_stdin(&self) -> bool {
        self.json_schema.as_deref() == Some("-")
    }

    /// The form that is asked for; a wrong one is a usage error.
    pub fn form(&self) -> anyhow::Result<Option<Form>> {
        let (name, form) = match (&self.json_schema, &self.grammar, &self.regex) {
            (Some(schema), ..) if schema.trim_start().starts_with('{') => {
                ("--json-schema".to_owned(), Form::Schema(schema.clone()))
            }
            (Some(file), ..) if file == "-" => ("stdin".to_owned(), Form::Schema(source::read_text(None)?)),
            (Some(file), ..) => (file.clone(), Form::Schema(source::read_text(Some(Path::new(file)))?)),
            (_, Some(file), _) => (file.display().to_string(), Form::Grammar(source::read_text(Some(file))?)),
            (.., Some(regex)) => ("--regex".to_owned(), Form::Regex(regex.clone())),
            _ => return Ok(None),
        };
        form.compile().context(name)?;
        Ok(Some(form))
    }
}

impl Form {
    fn compile(&self) -> Result<Grammar, ConstraintError> {
        match self {
            Self::Schema(text) => Grammar::json_schema(text),
            Self::Grammar(text) => Grammar::lark(text),
            Self::Regex(text) => Grammar::regex(text),
        }
    }
}

/// Makes constraints of forms, of each one once.
#[derive(Default)]
pub struct Forms {
    vocabulary: OnceLock<Result<Vocabulary, ConstraintError>>,
    made: HashMap<Form, Arc<dyn Constraint>>,
}

impl Forms {
    /// Constraints that are kept; each may take some megabytes.
    const MOST: usize = 32;

    /// Prepares the vocabulary, which takes some tenths of a second, if it is needed for `form`.
    pub fn prepare(&self, form: Option<&Form>, tokenizer: &Arc<Tokenizer>) {
        if form.is_some() {
            self.vocabulary.get_or_init(|| Vocabulary::new(tokenizer));
        }
    }

    /// What makes the texts of `model` follow the form.
    pub fn constraint(
        &mut self,
        form: Option<&Form>,
        model: &Model,
    ) -> anyhow::Result<Option<Arc<dyn Constraint>>> {
        let Some(form) = form else { return Ok(None) };
        if let Some(made) = self.made.get(form) {
            return Ok(Some(made.clone()));
        }
        let tokenizer = model.tokenizer()?;
        let vocabulary = self.vocabulary.get_or_init(|| Vocabulary::new(tokenizer)).as_ref();
        // No fault of the usage, as what is wrong with a form is.
        let vocabulary = vocabulary.map_err(|error| anyhow!("{}: {error}", model.file()))?;
        let made = vocabulary.constraint(&form.compile()?).map_err(Error::new).context("grammar")?;
        if self.made.len() >= Self::MOST {
            self.made.clear();
        }
        self.made.insert(form.clone(), made.clone());
        Ok(Some(made))
    }
}
