//! The form of the output: the options that the generating commands share.

use crate::source;
use anyhow::Context;
use bitnet::generate::Constraint;
use bitnet::grammar::{Grammar, Vocabulary};
use bitnet::model::Model;
use std::path::{Path, PathBuf};
use std::sync::Arc;

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

impl ConstraintArgs {
    /// Whether the schema comes from stdin.
    pub fn reads_stdin(&self) -> bool {
        self.json_schema.as_deref() == Some("-")
    }

    /// The grammar, if there is one; a wrong one is a usage error.
    pub fn grammar(&self) -> anyhow::Result<Option<Grammar>> {
        let (name, grammar) = match (&self.json_schema, &self.grammar, &self.regex) {
            (Some(schema), ..) if schema.trim_start().starts_with('{') => {
                ("--json-schema".to_owned(), Grammar::json_schema(schema))
            }
            (Some(file), ..) if file == "-" => {
                ("stdin".to_owned(), Grammar::json_schema(&source::read_text(None)?))
            }
            (Some(file), ..) => {
                (file.clone(), Grammar::json_schema(&source::read_text(Some(Path::new(file)))?))
            }
            (_, Some(file), _) => {
                (file.display().to_string(), Grammar::lark(&source::read_text(Some(file))?))
            }
            (.., Some(regex)) => ("--regex".to_owned(), Grammar::regex(regex)),
            _ => return Ok(None),
        };
        Ok(Some(grammar.context(name)?))
    }

    /// What makes the texts of `model` follow the grammar.
    pub fn constraint(
        grammar: Option<&Grammar>,
        model: &Model,
    ) -> anyhow::Result<Option<Arc<dyn Constraint>>> {
        let Some(grammar) = grammar else { return Ok(None) };
        let vocabulary = Vocabulary::new(model.tokenizer()?)?;
        Ok(Some(vocabulary.constraint(grammar).context("grammar")?))
    }
}
