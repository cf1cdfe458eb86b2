//! The `bitnet` command as its users meet it: the real binary on the built-in demo.
#![allow(clippy::unwrap_used)] // in the helpers of tests too

mod batch;
mod chat;
mod constraint;
mod hub;
mod memory;
mod models;
mod scripts;
#[cfg(target_os = "linux")]
mod signals;

use assert_cmd::cargo::CommandCargoExt;
use std::io::Write;
use std::path::Path;
use std::process::{Child, Command, Stdio};

const DEMO: &[u8] = include_bytes!("../../../../models/demo.gguf");

/// The command with pipes on all sides.
fn command(args: &[&str]) -> Command {
    let mut command = Command::cargo_bin("bitnet").unwrap();
    command.args(args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// stdout, stderr and exit code of a command that gets `stdin`.
fn ended(mut child: Child, stdin: &[u8]) -> (String, String, i32) {
    // It may end without reading.
    let _ = child.stdin.take().unwrap().write_all(stdin);
    let output = child.wait_with_output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (text(output.stdout), text(output.stderr), output.status.code().unwrap())
}

/// stdout, stderr and exit code of `bitnet`.
fn bitnet(stdin: impl AsRef<[u8]>, args: &[&str]) -> (String, String, i32) {
    ended(command(args).spawn().unwrap(), stdin.as_ref())
}

/// stdout and stderr of a command that must end with this code.
fn coded(args: &[&str], code: i32) -> (String, String) {
    let (stdout, stderr, found) = bitnet("", args);
    assert_eq!(found, code, "{args:?}: {stderr}");
    (stdout, stderr)
}

/// What a command that must succeed prints as JSON.
fn json(args: &[&str]) -> serde_json::Value {
    serde_json::from_str(&coded(args, 0).0).unwrap()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}
