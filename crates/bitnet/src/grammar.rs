//! Texts that follow a JSON schema, a grammar or a regular expression, with the `llguidance` crate.
//!
//! A [`Grammar`] is checked without a model; [`Vocabulary::constraint`] makes of it what
//! [`StopConditions`](crate::generate::StopConditions) take. What a grammar may cost is limited, in memory and in time.

use crate::generate::{Constraint, ConstraintError, Guide};
use crate::text::{Specials, Tokenizer};
use llguidance::api::{GrammarInit, ParserLimits, TopLevelGrammar};
use llguidance::earley::SlicedBiasComputer;
use llguidance::toktrie::{InferenceCapabilities, TokEnv, TokRxInfo, TokTrie, TokenId, TokenizerEnv};
use llguidance::{Matcher, ParserFactory, panic_utils::catch_unwind};
use std::fmt::{self, Debug, Display};
use std::panic::AssertUnwindSafe;
use std::sync::Arc;

/// Most bytes of a schema, grammar or regular expression: the time to compile the worst ones grows with its cube.
const MAX_TEXT: usize = 128 << 10;

/// Compilers recurse: the deepest text of [`MAX_TEXT`] bytes must fit.
const STACK: usize = 128 << 20;

/// Longest token in bytes that a constrained text may have, and all tokens together.
const MAX_TOKEN: usize = 512;
const MAX_TOKENS: usize = 1 << 22;

/// JSON that goes on with white space for ever is no use to anybody.
const WHITE_SPACE: &str = r" |\n[ \t]{0,20}";

/// The form of a text.
#[derive(Clone)]
pub struct Grammar {
    init: GrammarInit,
}

impl Grammar {
    /// JSON texts that satisfy a JSON schema (draft 2020-12 and older ones), with its properties in its order.
    ///
    /// # Errors
    /// What is no JSON, and what in the schema is wrong or not supported.
    pub fn json_schema(text: &str) -> Result<Self, ConstraintError> {
        check_length(text)?;
        let mut schema: serde_json::Value = serde_json::from_str(text).map_err(|error| one_line(&error))?;
        if let Some(object) = schema.as_object_mut() {
            let options = serde_json::json!({ "whitespace_pattern": WHITE_SPACE });
            object.entry("x-guidance").or_insert(options);
        }
        Self::new(TopLevelGrammar::from_json_schema(schema))
    }

    /// Texts of a context-free grammar in llguidance's dialect of Lark, whose first rule is `start`.
    pub fn lark(text: &str) -> Result<Self, ConstraintError> {
        check_length(text)?;
        Self::new(TopLevelGrammar::from_lark(text.to_owned())).map_err(|ConstraintError(why)| {
            let hint =
                if text.contains("::=") { "; this looks like GBNF, whose ::= is : in Lark" } else { "" };
            ConstraintError(why + hint)
        })
    }

    /// Texts that a regular expression matches from beginning to end.
    pub fn regex(text: &str) -> Result<Self, ConstraintError> {
        check_length(text)?;
        // The place is one in a grammar around it.
        let wrong = |ConstraintError(why)| {
            ConstraintError(why.split_once(": ").map_or(why.clone(), |(_, why)| why.to_owned()))
        };
        Self::new(TopLevelGrammar::from_regex(text)).map_err(wrong)
    }

    fn new(grammar: TopLevelGrammar) -> Result<Self, ConstraintError> {
        guarded(move || {
            let (grammar, lexer) = GrammarInit::Serialized(grammar).to_internal(None, limits())?;
            // Without a tokenizer llguidance cannot know tokens by name or number, and warns.
            let names_tokens = lexer.render_warnings().iter().any(|warning| warning.contains("no tokenizer"));
            anyhow::ensure!(
                !names_tokens,
                "tokens in angle brackets, such as <|name|>, cannot be part of a text"
            );
            Ok(Self { init: GrammarInit::Internal(grammar, lexer) })
        })
    }
}

/// The tokens of a model, prepared for grammars.
pub struct Vocabulary {
    factory: ParserFactory,
    tokens: Arc<Tokens>,
}

/// What its guides need to know of a vocabulary.
struct Tokens {
    /// Stands for the end of the text; no token of the model.
    end: TokenId,
    /// Tokens that are text, a bit for each.
    text: Vec<u32>,
}

struct Environment {
    trie: TokTrie,
    tokenizer: Arc<Tokenizer>,
    /// Whether the tokens of a part of a text give that part. SentencePiece's begin with a space.
    exact: bool,
}

impl TokenizerEnv for Environment {
    fn tok_trie(&self) -> &TokTrie {
        &self.trie
    }
    fn tokenize_is_canonical(&self) -> bool {
        self.exact
    }
    fn tokenize_bytes(&self, bytes: &[u8]) -> Vec<TokenId> {
        self.trie.tokenize_with_greedy_fallback(bytes, |text| self.tokenizer.encode(text, Specials::AsText))
    }
}

impl Vocabulary {
    /// Takes some tenths of a second for a vocabulary of 128,256 tokens. Control tokens are in no text.
    ///
    /// # Errors
    /// If the tokens have too many bytes.
    pub fn new(tokenizer: &Arc<Tokenizer>) -> Result<Self, ConstraintError> {
        let n = tokenizer.n_vocab();
        let mut text = vec![0u32; (n + 1).div_ceil(32)];
        let mut words = vec![Vec::new(); n + 1];
        let mut total = 0;
        for (id, word) in words.iter_mut().enumerate().take(n) {
            let bytes = tokenizer.token_bytes(id as u32).unwrap_or_default();
            // 0xff, which is in no UTF-8, marks control tokens in the trie.
            let is_text =
                !tokenizer.is_control(id as u32) && bytes.len() <= MAX_TOKEN && !bytes.starts_with(&[0xff]);
            if is_text {
                text[id / 32] |= 1 << (id % 32);
                word.extend(bytes);
                total += bytes.len();
            }
        }
        if total >= MAX_TOKENS || n >= 1 << 24 {
            return Err(ConstraintError(format!("{n} tokens of {total} bytes are too many for grammars")));
        }
        let letter = tokenizer.encode("a", Specials::AsText);
        let exact = letter.iter().filter_map(|&id| tokenizer.token_bytes(id)).flatten().eq(b"a");
        let tokenizer = tokenizer.clone();
        guarded(move || {
            let end = n as u32;
            let trie = TokTrie::from(&TokRxInfo::new(end + 1, end), &words);
            let environment: TokEnv = Arc::new(Environment { trie, tokenizer, exact });
            let slices = SlicedBiasComputer::json_slices();
            let mut factory = ParserFactory::new(&environment, InferenceCapabilities::default(), &slices)?;
            *factory.limits_mut() = limits();
            factory.quiet();
            Ok(Self { factory, tokens: Arc::new(Tokens { end, text }) })
        })
    }

    /// What makes texts of this model follow a grammar.
    ///
    /// # Errors
    /// If the grammar takes too much time or memory.
    pub fn constraint(&self, grammar: &Grammar) -> Result<Arc<dyn Constraint>, ConstraintError> {
        let init = grammar.init.clone();
        let parser = guarded(|| self.factory.create_parser_from_init_default(init))?;
        Ok(Arc::new(Compiled { matcher: Matcher::new(Ok(parser)), tokens: self.tokens.clone() }))
    }
}

/// A grammar for a vocabulary.
struct Compiled {
    matcher: Matcher,
    tokens: Arc<Tokens>,
}

impl Debug for Compiled {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a grammar")
    }
}

impl Constraint for Compiled {
    fn start(&self) -> Box<dyn Guide> {
        // With caches of its own: what others put there counts against the limits.
        Box::new(Self { matcher: self.matcher.deep_clone(), tokens: self.tokens.clone() })
    }
}

impl Guide for Compiled {
    fn mask(&mut self, mask: &mut [u32]) -> Result<bool, ConstraintError> {
        let allowed = self.matcher.compute_mask_or_eos().map_err(|error| one_line(&error))?;
        mask.fill(0);
        for ((mask, allowed), text) in mask.iter_mut().zip(allowed.as_slice()).zip(&self.tokens.text) {
            *mask = allowed & text;
        }
        Ok(allowed.is_allowed(self.tokens.end))
    }
    fn push(&mut self, token: u32) -> Result<(), ConstraintError> {
        self.matcher.consume_token(token).map_err(|error| one_line(&error))
    }
    fn pop(&mut self, count: usize) -> Result<(), ConstraintError> {
        self.matcher.rollback(count).map_err(|error| one_line(&error))
    }
}

fn limits() -> ParserLimits {
    // A lexer state takes one or two kilobytes.
    ParserLimits { max_lexer_states: 50_000, verbose_errors: false, ..ParserLimits::default() }
}

fn check_length(text: &str) -> Result<(), ConstraintError> {
    match text.len() {
        0..=MAX_TEXT => Ok(()),
        len => Err(ConstraintError(format!("{len} bytes; the most are {MAX_TEXT}"))),
    }
}

/// Runs what may recurse deeply, or panic, on somebody else's text.
fn guarded<T: Send>(run: impl FnOnce() -> anyhow::Result<T> + Send) -> Result<T, ConstraintError> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().stack_size(STACK);
        let thread = thread.spawn_scoped(scope, || catch_unwind(AssertUnwindSafe(run)));
        let result = thread.map_err(|error| one_line(&error))?.join();
        result.map_err(|_| ConstraintError("panic".into()))?.map_err(|error| one_line(&error))
    })
}

/// The lines of a message that say something, as one, in this project's words.
fn one_line(error: &impl Display) -> ConstraintError {
    let message = error.to_string();
    if message.starts_with("NoExtensionBias") {
        return ConstraintError("no text follows this grammar".into());
    }
    let mut line = message.lines().next().unwrap_or_default().to_owned();
    // The second line and later ones quote the source, but for what is wrong in a regular expression.
    if let Some(why) = message.lines().find_map(|line| line.strip_prefix("error: ")) {
        line = line.replace("regex parse error:", why);
    }
    // "2(5): …" and "at 2(5): …": a line and a column.
    let place = line.strip_prefix("at ").unwrap_or(&line).split_once("): ");
    if let Some((place, why)) = place
        && let Some((row, column)) = place.split_once('(')
        && [row, column].iter().all(|number| number.parse::<u32>().is_ok())
    {
        line = format!("line {row}, column {column}: {why}");
    }
    let line = line.replace("Unimplemented keys:", "not supported:");
    ConstraintError(line.replace(" without 'referencing' feature", ""))
}
