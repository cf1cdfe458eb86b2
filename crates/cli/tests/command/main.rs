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
use bitnet::gguf::{Gguf, Value, Writer};
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

const DEMO: &[u8] = include_bytes!("../../../../models/demo.gguf");
const DEMO_PATH: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/demo.gguf");

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

/// The one line on stderr, besides notes, of a command that must fail: it has these words, and stdout has nothing.
fn refused(stdin: impl AsRef<[u8]>, args: &[&str], words: &str) -> String {
    let (stdout, stderr, code) = bitnet(stdin, args);
    let mut lines = stderr.lines().filter(|line| !line.starts_with("note: "));
    let line = lines.next().and_then(|line| line.strip_prefix("error: ")).unwrap_or_default();
    assert!(
        code == 1 && line.contains(words) && lines.next().is_none() && stdout.trim().is_empty(),
        "{args:?}, {words}: {code}: {stdout}{stderr}"
    );
    line.to_owned()
}

/// What a command that must succeed prints as JSON.
fn json(args: &[&str]) -> serde_json::Value {
    serde_json::from_str(&coded(args, 0).0).unwrap()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// The demo as [`Writer`] writes it, with other keys and tensors: `key` gives None for what is left out, and `tensor` the names
/// and dimensions that come in its place.
fn rewritten(
    folder: &Path,
    key: impl for<'a> Fn(&str, Value<'a>) -> Option<Value<'a>>,
    tensor: impl Fn(&str, &[u64]) -> Vec<(String, Vec<u64>)>,
) -> PathBuf {
    let demo = Gguf::from_static("demo", DEMO).unwrap();
    let path = folder.join("edited.gguf");
    let mut writer = Writer::new(&path);
    for (name, value) in demo.metadata() {
        if let Some(value) = key(name, value) {
            writer.meta(name, value).unwrap();
        }
    }
    let all =
        || demo.tensors().iter().flat_map(|t| tensor(&t.name, &t.dims).into_iter().map(move |n| (t, n)));
    for (t, (name, dims)) in all() {
        writer.tensor(&name, &dims, t.ty).unwrap();
    }
    let mut data = writer.create().unwrap();
    for (t, (name, dims)) in all() {
        data.tensor(&name, &demo.tensor_bytes(t)[..t.ty.byte_len(&dims).unwrap() as usize]).unwrap();
    }
    data.finish().unwrap();
    path
}

/// The demo with the bytes of one tensor changed.
fn with_tensor(folder: &Path, name: &str, change: impl FnOnce(&mut [u8])) -> PathBuf {
    let range = Gguf::from_static("demo", DEMO).unwrap().tensor(name).unwrap().range();
    let mut bytes = DEMO.to_vec();
    change(&mut bytes[range.start as usize..range.end as usize]);
    let path = folder.join("changed.gguf");
    fs::write(&path, bytes).unwrap();
    path
}

#[cfg(unix)]
fn send(signal: &str, child: &Child) {
    assert!(Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap().success());
}
