//! `pull`, `list`, `rm` and hub names against a server in the test.

#[path = "../../../bitnet/tests/hub_server/mod.rs"]
mod hub_server;

use super::DEMO;
use hub_server::{Manners, Server, noise, sha256};
use std::fs;
use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

const REPO: &str = "microsoft/bitnet-b1.58-2B-4T-gguf";

/// The command with nothing of this machine's settings.
fn command(home: &Path, endpoint: &str, args: &[&str]) -> Command {
    let mut command = super::command(args);
    for (name, _) in std::env::vars() {
        let lower = name.to_lowercase();
        if lower.starts_with("hf_") || lower.contains("proxy") || lower == "xdg_cache_home" {
            command.env_remove(name);
        }
    }
    command.env("HF_HOME", home).env("HF_ENDPOINT", endpoint).stdin(Stdio::null());
    command
}

/// stdout and stderr of a command that must end with this code.
fn bitnet(home: &Path, endpoint: &str, args: &[&str], code: i32) -> (String, String) {
    let Output { status, stdout, stderr } = command(home, endpoint, args).output().unwrap();
    let (stdout, stderr) = (String::from_utf8(stdout).unwrap(), String::from_utf8(stderr).unwrap());
    assert_eq!(status.code(), Some(code), "{args:?}: {stderr}");
    (stdout, stderr)
}

#[test]
fn a_model_is_downloaded_once_and_runs_by_its_name() {
    const NOWHERE: &str = "http://127.0.0.1:1";
    let home = tempfile::tempdir().unwrap();
    let home = home.path();
    let server = Server::new(&[("ggml-model-i2_s.gguf", DEMO.to_vec())], Manners::default());
    assert!(bitnet(home, &server.url, &["list"], 0).1.contains("bitnet pull"));
    let run = ["run", "-p", "Once upon a time", "-n", "8", "--seed", "7"];
    let expected = bitnet(home, NOWHERE, &run, 0).0;

    // The first run downloads with a notice, the next ones need no network.
    let named = [&run[..], &["-m", "2b-4t"]].concat();
    let (text, notices) = bitnet(home, &server.url, &named, 0);
    assert_eq!(text, expected);
    assert!(notices.contains("downloading") && notices.contains("verified"), "{notices}");
    for name in ["2b-4t", REPO, &format!("hf:{REPO}"), &format!("hf:{REPO}:ggml-model-i2_s.gguf")] {
        let (text, notices) = bitnet(home, NOWHERE, &[&run[..], &["-m", name]].concat(), 0);
        assert_eq!(text, expected);
        assert!(!notices.contains("downloading"), "{notices}");
    }
    let (path, _) = bitnet(home, &server.url, &["pull", REPO], 0);
    assert!(fs::read(path.trim_end()).unwrap() == DEMO);
    assert!(Path::new(path.trim_end()).starts_with(home.join("hub")));
    let (same, notices) = bitnet(home, NOWHERE, &["pull", REPO], 0);
    assert!(same == path && notices.contains("the hub could not be asked"), "{notices}");

    let (list, _) = bitnet(home, NOWHERE, &["list"], 0);
    assert!(
        list.starts_with(&format!("hf:{REPO}:ggml-model-i2_s.gguf ")) && list.contains("bitnet"),
        "{list}"
    );
    let json: serde_json::Value =
        serde_json::from_str(&bitnet(home, NOWHERE, &["list", "--json"], 0).0).unwrap();
    assert_eq!(
        (json[0]["size"].as_u64(), json[0]["complete"].as_bool()),
        (Some(DEMO.len() as u64), Some(true))
    );
    let files = [("config.json", b"{}".to_vec()), ("model.safetensors", vec![1])];
    let (checkpoint, _) = bitnet(home, &Server::new(&files, Manners::default()).url, &["pull", "a/b"], 0);
    assert_eq!(bitnet(home, NOWHERE, &["pull", "a/b"], 0).0, checkpoint);
    assert!(bitnet(home, NOWHERE, &["rm", "a/b", "2b-4t"], 0).1.contains("freed"));
    assert_eq!(bitnet(home, NOWHERE, &["list"], 0).0, "");
    let (_, gone) = bitnet(home, NOWHERE, &["rm", "2b-4t", "a/b"], 1);
    assert!(gone.matches("bitnet list").count() == 2, "all names are tried: {gone}");
}

#[test]
fn without_network_a_line_says_what_was_tried_and_what_to_do() {
    let home = tempfile::tempdir().unwrap();
    for args in [&["pull", "2b-4t"][..], &["run", "-q", "-m", REPO, "-p", "x"]] {
        let (stdout, stderr) = bitnet(home.path(), "http://127.0.0.1:1", args, 1);
        let lines: Vec<_> = stderr.lines().filter(|line| !line.starts_with("asking ")).collect();
        assert!(stdout.is_empty() && lines.len() == 1, "{stderr}");
        for part in
            ["error: ", REPO, "http://127.0.0.1:1/", "refused", "-m PATH", home.path().to_str().unwrap()]
        {
            assert!(stderr.contains(part), "{part}: {stderr}");
        }
    }
    let mut offline = command(home.path(), "http://127.0.0.1:1", &["pull", "2b-4t"]);
    let stderr = String::from_utf8(offline.env("HF_HUB_OFFLINE", "1").output().unwrap().stderr).unwrap();
    assert!(stderr.contains("HF_HUB_OFFLINE"), "{stderr}");
    for bad in ["hf:x", "model.gguf", "../a/b"] {
        assert!(bitnet(home.path(), "http://127.0.0.1:1", &["pull", bad], 1).1.contains("OWNER/"));
    }
    for (name, words) in [("", "is empty"), ("2B4T", "did you mean 2b-4t?")] {
        assert!(bitnet(home.path(), "http://127.0.0.1:1", &["pull", name], 1).1.contains(words));
    }
    // A word may be a file; where there is none, it was meant as a name.
    for args in [&["run", "-p", "x", "-m", "falcon"][..], &["convert", "falcon", "x.gguf"]] {
        let error = bitnet(home.path(), "http://127.0.0.1:1", args, 1).1;
        assert!(error.contains("falcon: not the name") && error.contains("falcon3-7b"), "{error}");
    }
}

#[test]
fn a_killed_download_goes_on_where_it_was() {
    let home = tempfile::tempdir().unwrap();
    let bytes = noise(24 << 20);
    let slow = Manners { slow: Some(Duration::from_millis(4)), ..Manners::default() };
    let server = Server::new(&[("model.gguf", bytes.clone())], slow);
    let mut child =
        command(home.path(), &server.url, &["pull", "a/b"]).stderr(Stdio::null()).spawn().unwrap();
    let blobs = home.path().join("hub/models--a--b/blobs");
    let partial = blobs.join(format!("{}.incomplete", sha256(&bytes)));
    let begin = Instant::now();
    while fs::metadata(&partial).map_or(0, |m| m.len()) < 1 << 20 {
        assert!(begin.elapsed() < Duration::from_secs(60), "nothing arrives");
        std::thread::sleep(Duration::from_millis(5));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    let kept = fs::metadata(&partial).unwrap().len();
    assert!(kept < bytes.len() as u64);
    assert!(!home.path().join("hub/models--a--b/snapshots").exists());
    let failed = bitnet(home.path(), "http://127.0.0.1:1", &["pull", "a/b"], 1).1;
    assert!(failed.contains("of it are here"), "{failed}");

    *server.manners.lock().unwrap() = Manners::default();
    server.seen.lock().unwrap().clear();
    let (path, _) = bitnet(home.path(), &server.url, &["pull", "a/b"], 0);
    assert!(fs::read(path.trim_end()).unwrap() == bytes);
    assert!(server.starts().iter().all(|start| *start >= kept), "{:?} {kept}", server.starts());
}

#[test]
#[cfg(unix)]
fn a_hub_that_says_nothing_is_named_and_ctrl_c_ends_the_wait() {
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let host = silent.local_addr().unwrap();
    let home = tempfile::tempdir().unwrap();
    let mut child = command(home.path(), &format!("http://{host}"), &["pull", "a/b"]).spawn().unwrap();
    let mut stderr = BufReader::new(child.stderr.take().unwrap()).lines();
    assert_eq!(stderr.next().unwrap().unwrap(), format!("asking {host} ..."));
    super::send("-INT", &child);
    assert!(stderr.next().unwrap().unwrap().contains("the same command goes on"));
    assert_eq!((child.wait().unwrap().code(), stderr.count()), (Some(130), 0));
}
