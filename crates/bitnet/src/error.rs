use crate::text::{TemplateError, TokenizerError};

/// What can go wrong between a model file and its text. Every message is one line.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The file is not a valid GGUF, or cannot be read; the fault is in the file or outside.
    #[error(transparent)]
    Gguf(#[from] bitnet_gguf::Error),
    /// A valid GGUF that is not a BitNet this engine can run; the fault is in the file.
    #[error("{file}: {thing}: {problem}")]
    Model {
        /// The file.
        file: String,
        /// The key or tensor, with its byte offset where it has one.
        thing: String,
        /// What was found, and what was expected.
        problem: String,
    },
    /// The vocabulary in the file is broken.
    #[error("{file}: tokenizer: {error}")]
    Tokenizer {
        /// The file.
        file: String,
        /// What is wrong with it.
        error: TokenizerError,
    },
    /// The model has no tokenizer, and text was to be made into tokens or back.
    #[error("{0}: the file has no tokenizer (tokenizer.ggml.tokens)")]
    NoTokenizer(String),
    /// Messages cannot be made into a prompt.
    #[error("{file}: {error}")]
    Template {
        /// The file.
        file: String,
        /// Why not.
        error: TemplateError,
    },
    /// The caller named a token that the model does not have.
    #[error("token {index} of the input is {id}, the vocabulary ends at {last}", last = vocab_size - 1)]
    TokenOutOfRange {
        /// Position in the caller's tokens.
        index: usize,
        /// The id.
        id: u32,
        /// Tokens in the vocabulary.
        vocab_size: usize,
    },
    /// The sequence would grow beyond the context.
    #[error("{needed} tokens do not fit in the context of {context} tokens")]
    ContextFull {
        /// Tokens that the sequence would have.
        needed: usize,
        /// Tokens that fit.
        context: usize,
    },
    /// No page of the key/value cache is free.
    #[error("the key/value cache is full: {pages} pages of {page_tokens} tokens are in use")]
    CacheFull {
        /// Pages in all.
        pages: usize,
        /// Tokens a page holds.
        page_tokens: usize,
    },
    /// The flag of [`Engine::cancel_by`](crate::Engine::cancel_by) was raised.
    #[error("cancelled")]
    Cancelled,
    /// There is nothing to continue.
    #[error("the prompt is empty, and the model has no token that begins a text")]
    EmptyPrompt,
    /// No token could be chosen.
    #[error(transparent)]
    Sample(#[from] crate::generate::SampleError),
    /// A text cannot follow the grammar it should follow.
    #[error("grammar: {0}")]
    Constraint(#[from] crate::generate::ConstraintError),
    /// The system has no memory left for a buffer.
    #[error("the system refuses {bytes} bytes for {what}")]
    NoMemory {
        /// What the buffer is for.
        what: &'static str,
        /// Its size.
        bytes: usize,
    },
}
