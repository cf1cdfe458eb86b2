//! Any bytes: the parser answers with an error of one line or with a file in which everything can be used, and what it
//! accepts can be written again.

#![no_main]

#[path = "../../crates/gguf/tests/touch/mod.rs"]
mod touch;

use bitnet_gguf::Gguf;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    match Gguf::from_vec("fuzz", bytes.to_vec()) {
        Ok(file) => touch::touch(&file),
        Err(error) => {
            let message = error.to_string();
            assert!(!message.contains(char::is_control) && message.len() < 1000, "{message}");
        }
    }
});
