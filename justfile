# The daily commands; `just` lists them.

[private]
default:
    @just --list

# The binary, optimised: target/release/bitnet
build:
    cargo build --release

# All tests
test *args:
    cargo test {{args}}

# What CI refuses
lint:
    cargo fmt --all --check
    cargo clippy --workspace --all-targets --locked -- -D warnings

# Format everything
fmt:
    cargo fmt --all

# Prompt and generation speed; arguments go to `bitnet bench`
bench *args:
    cargo run --release -- bench {{args}}

# Each kernel on its own; arguments choose, e.g. `just bench-kernels gemm`
bench-kernels *args:
    cargo bench -p bitnet-kernels --bench kernels -- {{args}}

# Fuzz the GGUF parser for so many seconds (needs cargo-fuzz)
fuzz seconds="60":
    mkdir -p fuzz/corpus/gguf
    cd fuzz && RUSTC_BOOTSTRAP=1 cargo fuzz run gguf corpus/gguf seeds/gguf -- -max_total_time={{seconds}}
