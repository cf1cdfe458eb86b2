//! The `bitnet` command when a signal ends it.

use super::{command, send, text};
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Output, Stdio};
use std::thread::sleep;
use std::time::Duration;

/// Slow enough not to be done before the signal comes.
fn spawn(args: &[&str]) -> Child {
    command(args).args(["--kernels", "scalar", "-t", "1"]).stdin(Stdio::null()).spawn().unwrap()
}

/// What a program does that is ended while it works. Nothing shows from outside when it begins to watch for signals (an
/// emulator catches them all from its start), but one that does not yet is killed; not by SIGINT, though, which what a shell
/// started in the background ignores.
fn interrupted(spawn: impl Fn() -> Child) -> Output {
    let mut wait = Duration::from_millis(20);
    loop {
        let child = spawn();
        sleep(wait);
        send("-TERM", &child);
        let output = child.wait_with_output().unwrap();
        if output.status.signal().is_none() {
            return checked(output, "-TERM");
        }
        wait *= 2;
    }
}

fn ended(child: Child, signal: &str) -> Output {
    checked(child.wait_with_output().unwrap(), signal)
}

fn checked(output: Output, signal: &str) -> Output {
    let code = if signal == "-TERM" { 143 } else { 130 };
    assert_eq!(output.status.code(), Some(code), "{}", String::from_utf8_lossy(&output.stderr));
    output
}

#[test]
fn an_interrupt_ends_the_text() {
    let mut child = spawn(&["run", "-p", "Once", "-n", "-1", "--ignore-eos"]);
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    assert!(!stdout.fill_buf().unwrap().is_empty());
    send("-INT", &child);
    let mut text = String::new();
    while stdout.read_line(&mut text).unwrap() > 0 {}
    let stderr = ended(child, "-INT").stderr;
    assert!(text.ends_with('\n') && String::from_utf8_lossy(&stderr).contains("ended: cancelled"));
}

#[test]
fn an_interrupt_ends_a_long_prompt() {
    let folder = tempfile::tempdir().unwrap();
    let prompt = folder.path().join("prompt.txt");
    fs::write(&prompt, "once upon a time ".repeat(4000)).unwrap();
    for (json, expected) in [(&["--json"][..], "\"tokens\": []"), (&[], "")] {
        let args = [&["run", "-f", text(&prompt), "-c", "65536"], json].concat();
        let stdout = interrupted(|| spawn(&args)).stdout;
        let stdout = String::from_utf8_lossy(&stdout);
        assert!(stdout.contains(expected) && stdout.is_empty() == expected.is_empty(), "{stdout}");
    }
}

#[test]
fn an_interrupt_ends_a_chat_that_waits_for_its_pipe_and_keeps_its_cache() {
    let folder = tempfile::tempdir().unwrap();
    let cache = folder.path().join("cache");
    for signal in ["-INT", "-TERM"] {
        let mut child = command(&["chat", "-n", "3", "--prompt-cache", text(&cache)]).spawn().unwrap();
        let mut stdin = child.stdin.take().unwrap();
        stdin.write_all(b"Once upon a time\n").unwrap();
        let mut answer = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut answer).unwrap();
        // Whether the answer has ended yet or not.
        send(signal, &child);
        ended(child, signal);
        assert!(fs::metadata(&cache).unwrap().len() > 1000);
        fs::remove_file(&cache).unwrap();
    }
}

#[test]
fn signals_leave_no_half_written_file() {
    let folder = tempfile::tempdir().unwrap();
    let tokens = tempfile::NamedTempFile::new().unwrap();
    fs::write(&tokens, "1 2 3 4 ".repeat(10_000)).unwrap();
    let out = folder.path().join("x.npy");
    let files = || fs::read_dir(folder.path()).unwrap().count();
    for signal in ["-INT", "-TERM"] {
        let child = spawn(&["logits", "--tokens-file", text(tokens.path()), "-o", text(&out)]);
        while files() == 0 {
            sleep(Duration::from_millis(1));
        }
        send(signal, &child);
        ended(child, signal);
        assert_eq!(files(), 0);
    }
}

#[test]
fn signals_leave_a_whole_prompt_cache_or_none() {
    let folder = tempfile::tempdir().unwrap();
    let (prompt, cache) = (folder.path().join("prompt.txt"), folder.path().join("cache"));
    fs::write(&prompt, "once upon a time ".repeat(200)).unwrap();
    let run = |n: &str| {
        let args = ["run", "-f", text(&prompt), "-c", "4096", "--ignore-eos", "-n", n, "--prompt-cache"];
        command(&args).arg(&cache).stdin(Stdio::null()).spawn().unwrap()
    };
    let files = || fs::read_dir(folder.path()).unwrap().count();
    // While it generates: what was read of the prompt is kept.
    let mut child = run("-1");
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    let begun = !stdout.fill_buf().unwrap().is_empty();
    send("-INT", &child);
    std::io::copy(&mut stdout, &mut std::io::sink()).unwrap();
    ended(child, "-INT");
    assert!(begun && cache.exists() && files() == 2);
    let again = run("1").wait_with_output().unwrap();
    assert!(String::from_utf8_lossy(&again.stderr).contains("from the prompt cache"));
    // While it writes.
    fs::remove_file(&cache).unwrap();
    let child = run("1");
    while files() == 1 {
        sleep(Duration::from_micros(100));
    }
    send("-TERM", &child);
    let code = child.wait_with_output().unwrap().status.code();
    assert!(code == Some(0) && cache.exists() || code == Some(143) && !cache.exists(), "{code:?}");
    assert_eq!(files(), 1 + usize::from(cache.exists()));
}
