//! Jinja as Hugging Face sets it up for chat templates, with a bound on the work.

use super::jinja_guard::{COPIED, PLAIN, SMALL, guard_operators};
use super::{Role, TemplateError};
use jiff::{ZonedDateTime, fmt::strtime};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{DynObject, Kwargs, Rest, Serde, Value, ValueKind};
use minijinja::{Environment, Error, ErrorKind, State, context, filters};
use std::collections::BTreeMap;
use std::fmt::{self, Write};
use std::io;

/// Steps that any template may take, each also good for 64 bytes of text. Real ones take some hundreds.
const BASE_FUEL: u64 = 50_000;
/// Steps for each message, besides one for each of its bytes.
const MESSAGE_FUEL: u64 = 1000;
/// Bytes of text that a step is good for.
const FUEL_BYTES: u64 = 64;
/// Columns that `indent` may add.
const MAX_INDENT: usize = 1000;
/// Lists in lists.
const MAX_DEPTH: usize = 100;
/// Calls in calls, each of which counts as four.
const MAX_RECURSION: usize = 100;
/// A longer source is no chat template.
const MAX_SOURCE: usize = 1 << 20;

/// A parsed template.
pub(super) struct Jinja(Environment<'static>);

impl Jinja {
    pub(super) fn new(source: &str) -> Result<Self, TemplateError> {
        if source.len() > MAX_SOURCE {
            return Err(TemplateError::Broken(format!(
                "{} bytes; expected at most {MAX_SOURCE}",
                source.len()
            )));
        }
        let mut env = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        env.set_syntax(syntax.map_err(|error| broken(&error))?);
        env.set_unknown_method_callback(method);
        env.add_function("raise_exception", |message: &Value| -> Result<Value, Error> {
            let message = plain(message)?.to_string();
            Err(Error::new(ErrorKind::InvalidOperation, message).with_source(Refusal))
        });
        env.add_function(PLAIN, plain);
        env.add_function(SMALL, |state: &State, value: &Value| {
            copied(state, value, 0).map(|_| value.clone())
        });
        env.add_function(COPIED, |state: &State, value: &Value| copied(state, value, 0));
        env.set_recursion_limit(MAX_RECURSION);
        env.add_function("strftime_now", |format: &str| {
            let refused =
                |problem: String| Error::new(ErrorKind::InvalidOperation, format!("strftime_now: {problem}"));
            if format.len() > 100 {
                return Err(refused("the format is too long".into()));
            }
            strtime::format(format, &ZonedDateTime::now()).map_err(|error| refused(error.to_string()))
        });
        macro_rules! named {
            ($($name:ident),+) => { [$((stringify!($name), Value::from_function(filters::$name))),+] };
        }
        // Those that make text of whatever they get.
        let text_filters = named!(
            upper, lower, title, capitalize, trim, replace, split, lines, indent, format, safe, escape
        );
        let short = ("e", Value::from_function(filters::escape));
        for (name, filter) in text_filters.into_iter().chain([short]) {
            env.add_filter(name, move |state: &mut State, values: Rest<Value>| {
                for value in values.iter().filter(|value| !value.is_kwargs()) {
                    plain(value)?;
                }
                let wide = |value: &Value| value.as_usize().is_some_and(|width| width > MAX_INDENT);
                let named = values.last().and_then(|last| last.get_attr("width").ok());
                if name == "indent" && values.iter().chain(&named).any(wide) {
                    return Err(ErrorKind::OutOfFuel.into()); // the filter itself finds out too late
                }
                filter.call(state, &values)
            });
        }
        // These work on long texts without using fuel, or are not Jinja's.
        ["pprint", "max", "min", "unique", "chain", "zip"]
            .iter()
            .for_each(|filter| env.remove_filter(filter));
        ["in", "startingwith", "endingwith", "containing"].iter().for_each(|test| env.remove_test(test));
        env.set_formatter(|out, state, value| out.write_str(&text(state, value)?).map_err(Error::from));
        env.add_filter("join", |state: &State, items: &Value, separator: Option<&str>, options: Kwargs| {
            join(state, items, separator, &options)
        });
        env.add_filter("string", |state: &State, value: &Value| text(state, value));
        // Jinja's own escapes HTML, Hugging Face's does not.
        env.add_filter("tojson", |state: &State, value: &Value, _: Kwargs| {
            let mut out = Bounded::new(state);
            match serde_json::to_writer(&mut out, value) {
                Ok(()) => Ok(out.text),
                Err(error) if error.is_io() => Err(ErrorKind::OutOfFuel.into()),
                Err(error) => Err(Error::new(ErrorKind::BadSerialization, error.to_string())),
            }
        });
        let guarded = guard_operators(source);
        let guarded = guarded.ok_or_else(|| TemplateError::Broken("brackets are nested too deep".into()))?;
        env.add_template_owned("template", guarded).map_err(|error| broken(&error))?;
        Ok(Self(env))
    }

    /// Renders messages of (role, content); `answer` adds what an answer begins with.
    pub(super) fn render<'m>(
        &self,
        messages: impl Iterator<Item = (Role, &'m str)>,
        answer: bool,
        bos: &str,
        eos: &str,
    ) -> Result<String, TemplateError> {
        let mut fuel = BASE_FUEL;
        let messages: Vec<Value> = messages
            .map(|(role, content)| {
                fuel += content.len() as u64 + MESSAGE_FUEL;
                context! { role => Serde(role), content }
            })
            .collect();
        // Most of the environment is shared by the clone; the fuel is a setting of it.
        let mut env = self.0.clone();
        env.set_fuel(Some(fuel));
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
            } else if source.into_iter().any(<dyn std::error::Error>::is::<Refusal>) {
                TemplateError::Refused(one_line(error.detail().unwrap_or_default()))
            } else {
                broken(&error)
            }
        })
    }
}

/// Python's methods. Two of them could make more text than there is fuel for: `join`, and `format` with a width.
fn method(state: &mut State, value: &Value, method: &str, args: &[Value]) -> Result<Value, Error> {
    match (method, value.as_str(), args) {
        ("join", Some(separator), [items]) => {
            join(state, items, Some(separator), &Kwargs::from_iter([("", Value::UNDEFINED); 0]))
        }
        (_, Some(_), _) if args.iter().any(|arg| plain(arg).is_err()) => plain(&Value::from(args.to_vec())),
        ("format", Some(text), _) if text.contains(':') => Err(Error::new(
            ErrorKind::InvalidOperation,
            "str.format with a format after \":\" is not supported",
        )),
        _ => minijinja_contrib::pycompat::unknown_method_callback(state, value, method, args),
    }
}

fn join(state: &State, items: &Value, separator: Option<&str>, options: &Kwargs) -> Result<Value, Error> {
    let attribute: Option<&str> = options.get("attribute")?;
    let separator = separator.map_or_else(|| options.get("d").map(Option::unwrap_or_default), Ok)?;
    options.assert_all_used()?;
    let mut out = Bounded::new(state);
    for (index, item) in items.try_iter()?.enumerate() {
        state.consume_fuel(1)?;
        let item = attribute.map_or_else(|| Ok(item.clone()), |name| item.get_attr(name))?;
        write!(out, "{}{item}", if index > 0 { separator } else { "" }).map_err(|_| ErrorKind::OutOfFuel)?;
    }
    Ok(out.text.into())
}

/// A value that is no list and no map: what text operators may get.
fn plain(value: &Value) -> Result<Value, Error> {
    use ValueKind::{Bool, None, Number, String, Undefined};
    if matches!(value.kind(), Bool | None | Number | String | Undefined) {
        return Ok(value.clone());
    }
    Err(Error::new(ErrorKind::InvalidOperation, "a list or a map where text is expected"))
}

/// A value that shares no list or map with others, nor with itself, and of some depth; each list costs a step, a long one more.
fn copied(state: &State, value: &Value, depth: usize) -> Result<Value, Error> {
    let steps = |index: usize| state.consume_fuel(u64::from(index.is_multiple_of(16)));
    match value.kind() {
        ValueKind::Seq | ValueKind::Iterable | ValueKind::Map if depth > MAX_DEPTH => {
            Err(Error::new(ErrorKind::InvalidOperation, "lists and maps are nested too deep"))
        }
        ValueKind::Seq | ValueKind::Iterable => value
            .try_iter()?
            .enumerate()
            .map(|(index, item)| steps(index).and_then(|()| copied(state, &item, depth + 1)))
            .collect(),
        ValueKind::Map => {
            let mut copy = BTreeMap::new();
            let pairs = value.as_object().and_then(DynObject::try_iter_pairs);
            for (index, (key, item)) in pairs.into_iter().flatten().enumerate() {
                steps(index)?;
                copy.insert(plain(&key)?, copied(state, &item, depth + 1)?);
            }
            Ok(copy.into())
        }
        _ => Ok(value.clone()),
    }
}

/// A value as text.
fn text(state: &State, value: &Value) -> Result<String, Error> {
    let mut out = Bounded::new(state);
    write!(out, "{value}").map_err(|_| ErrorKind::OutOfFuel)?;
    Ok(out.text)
}

/// Text that ends where the fuel ends. What has become a value costs fuel by itself.
struct Bounded {
    text: String,
    most: u64,
}

impl Bounded {
    fn new(state: &State) -> Self {
        Self { text: String::new(), most: state.fuel_levels().map_or(0, |(_, left)| left * FUEL_BYTES) }
    }
}

impl Write for Bounded {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        if (self.text.len() + text.len()) as u64 > self.most {
            return Err(fmt::Error);
        }
        self.text.push_str(text);
        Ok(())
    }
}

impl io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let text = std::str::from_utf8(bytes).map_err(io::Error::other)?;
        self.write_str(text).map(|()| bytes.len()).map_err(io::Error::other)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
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
