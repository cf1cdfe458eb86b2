//! Jinja as Hugging Face sets it up for chat templates, with a bound on the work.

use super::TemplateError;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Value};
use minijinja::{Environment, Error, ErrorKind, context};

/// Steps that any template may take, each also good for 64 bytes of text. Real ones take a few hundred a message.
const BASE_FUEL: u64 = 200_000;
/// A longer source is no chat template.
const MAX_SOURCE: usize = 1 << 20;

/// A parsed template.
pub(super) struct Jinja(Environment<'static>);

impl Jinja {
    pub(super) fn new(source: &str) -> Result<Self, TemplateError> {
        if source.len() > MAX_SOURCE {
            return Err(TemplateError::Broken(format!("{} bytes; expected at most {MAX_SOURCE}", source.len())));
        }
        let mut env = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        env.set_syntax(syntax.map_err(|error| broken(&error))?);
        env.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        env.add_function("raise_exception", |message: String| -> Result<Value, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, message).with_source(Refusal))
        });
        // Neither escapes HTML, unlike Jinja's own.
        env.add_filter("tojson", |value: &Value, _: Kwargs| {
            serde_json::to_string(value).map_err(|e| Error::new(ErrorKind::BadSerialization, e.to_string()))
        });
        env.add_template_owned("template", source.to_owned()).map_err(|error| broken(&error))?;
        Ok(Self(env))
    }

    /// Renders messages of (role, content); `answer` adds what an answer begins with.
    pub(super) fn render<'m>(
        &self,
        messages: impl Iterator<Item = (&'static str, &'m str)>,
        answer: bool,
        bos: &str,
        eos: &str,
    ) -> Result<String, TemplateError> {
        let mut bytes = 0;
        let messages: Vec<Value> = messages
            .map(|(role, content)| {
                bytes += content.len() as u64 + 64;
                context! { role, content }
            })
            .collect();
        // Most of the environment is shared by the clone; the fuel is a setting of it.
        let mut env = self.0.clone();
        env.set_fuel(Some(BASE_FUEL + 4 * bytes));
        let template = env.get_template("template").map_err(|error| broken(&error))?;
        // Hugging Face passes the last two as None; templates ask for them.
        let values = context! {
            messages, add_generation_prompt => answer, bos_token => bos, eos_token => eos,
            tools => Value::from(()), documents => Value::from(()),
        };
        template.render(values).map_err(|error| {
            let source = std::iter::successors(Some(&error as &dyn std::error::Error), |e| e.source());
            if error.kind() == ErrorKind::OutOfFuel {
                TemplateError::Endless
            } else if source.into_iter().any(|e| e.is::<Refusal>()) {
                TemplateError::Refused(one_line(error.detail().unwrap_or_default()))
            } else {
                broken(&error)
            }
        })
    }
}

/// Tells the template's own refusals from its faults.
#[derive(Debug, thiserror::Error)]
#[error("refused by the template")]
struct Refusal;

fn broken(error: &Error) -> TemplateError {
    TemplateError::Broken(one_line(&error.to_string()))
}

fn one_line(text: &str) -> String {
    text.replace(['\n', '\r'], " ").chars().take(400).collect()
}
