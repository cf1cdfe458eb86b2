//! The `bitnet` command.
fn main() {}
