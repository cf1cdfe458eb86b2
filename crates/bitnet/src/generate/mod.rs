//! Choosing the next token: sampler and stop conditions.
