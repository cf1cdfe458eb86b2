use crate::text::{TemplateError, TokenizerError};

/// What can go wrong between a model file and its text. Every message is one line.
#[allow(missing_docs)] // the messages say it all
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The file is not a valid GGUF, or cannot be read; the fault is in the file or outside.
    #[error(transparent)]
    Gguf(#[from] bitnet_gguf::Error),
    /// A valid GGUF that is not a BitNet this engine can run; the fault is in the file.
    #[error("{file}: {thing}: {problem}")]
    Model { file: String, thing: String, problem: String },
    #[error("{file}: tokenizer: {error}")]
    Tokenizer { file: String, error: TokenizerError },
    #[error("{0}: the file has no tokenizer (tokenizer.ggml.tokens)")]
    NoTokenizer(String),
    #[error("{file}: {error}")]
    Template { file: String, error: TemplateError },
    /// Of the sequences of a step those with this token cannot be computed; the fault is in the file.
    #[error("{file}: tensor \"token_embd.weight\": row {token} holds a NaN or an infinity")]
    BadEmbedding { file: String, token: u32 },
    /// The caller named a token that the model does not have.
    #[error("token {index} of the input is {id}, the vocabulary ends at {last}", last = vocab_size - 1)]
    TokenOutOfRange { index: usize, id: u32, vocab_size: usize },
    #[error("{needed} tokens do not fit in the context of {context} tokens")]
    ContextFull { needed: usize, context: usize },
    #[error("the key/value cache is full: {pages} pages of {page_tokens} tokens are in use")]
    CacheFull { pages: usize, page_tokens: usize },
    /// The flag of [`Engine::cancel_by`](crate::Engine::cancel_by) was raised.
    #[error("cancelled")]
    Cancelled,
    #[error("the prompt is empty, and the model has no token that begins a text")]
    EmptyPrompt,
    #[error(transparent)]
    Sample(#[from] crate::generate::SampleError),
    #[error("grammar: {0}")]
    Constraint(#[from] crate::generate::ConstraintError),
    #[error("the system refuses {bytes} bytes for {what}")]
    NoMemory { what: &'static str, bytes: usize },
}
