//! A hub that runs in the test and misbehaves on request.
#![allow(clippy::unwrap_used, dead_code, unreachable_pub)] // shared by tests that each use a part of it

use sha2::Digest;
use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread::sleep;
use std::time::Duration;

pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// How the server answers requests for a file's bytes.
#[derive(Clone, Debug, Default)]
pub struct Manners {
    /// Cut the connection after so many bytes of a body.
    pub cut: Option<usize>,
    /// Say nothing more after so many bytes of a body.
    pub stall: Option<usize>,
    /// How many bodies are cut or stalled.
    pub times: usize,
    /// Refuse everything with this status after that.
    pub then: Option<u16>,
    /// Statuses to answer with first, with a Retry-After in seconds.
    pub statuses: Vec<(u16, Option<u64>)>,
    /// Send whole files whatever is asked.
    pub no_ranges: bool,
    /// Send the reader to this server.
    pub redirect: Option<String>,
    /// Claim another size.
    pub size: Option<u64>,
    /// Claim this checksum.
    pub etag: Option<String>,
    /// Claim another total in Content-Range.
    pub total: Option<u64>,
    /// Send other bytes, of the right number.
    pub corrupt: bool,
    /// Answer the first request for a body with redirects in a circle.
    pub circle: bool,
    /// Names to list besides the files.
    pub names: Vec<String>,
    /// Pause after each 64 KiB.
    pub slow: Option<Duration>,
}

/// A request as the server saw it.
#[derive(Clone, Debug)]
pub struct Seen {
    pub method: String,
    pub headers: HashMap<String, String>,
}

pub struct Server {
    pub url: String,
    pub seen: Arc<Mutex<Vec<Seen>>>,
    pub manners: Arc<Mutex<Manners>>,
}

pub fn sha256(bytes: &[u8]) -> String {
    sha2::Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect()
}

/// Bytes without repetition.
pub fn noise(len: usize) -> Vec<u8> {
    let mut state = 1u64;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8
    };
    (0..len).map(|_| next()).collect()
}

impl Server {
    /// Serves files of one repository, whatever it is called.
    pub fn new(files: &[(&str, Vec<u8>)], manners: Manners) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let files: HashMap<String, Vec<u8>> =
            files.iter().map(|(name, bytes)| ((*name).to_owned(), bytes.clone())).collect();
        let server = Self { url, seen: Arc::default(), manners: Arc::new(Mutex::new(manners)) };
        let (seen, manners, files) = (server.seen.clone(), server.manners.clone(), Arc::new(files));
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (seen, manners, files) = (seen.clone(), manners.clone(), files.clone());
                std::thread::spawn(move || while answer(&stream, &files, &manners, &seen).is_some() {});
            }
        });
        server
    }

    pub fn requests(&self, method: &str) -> Vec<Seen> {
        self.seen.lock().unwrap().iter().filter(|seen| seen.method == method).cloned().collect()
    }

    /// First bytes of the ranges that were asked for.
    pub fn starts(&self) -> Vec<u64> {
        let start =
            |seen: &Seen| seen.headers.get("range")?.strip_prefix("bytes=")?.split_once('-')?.0.parse().ok();
        self.requests("GET").iter().filter_map(start).collect()
    }
}

/// Reads one request and answers it; None ends the connection.
fn answer(
    mut stream: &TcpStream,
    files: &HashMap<String, Vec<u8>>,
    manners: &Mutex<Manners>,
    seen: &Mutex<Vec<Seen>>,
) -> Option<()> {
    let mut lines = BufReader::new(stream).lines().map_while(Result::ok);
    let first = lines.next()?;
    let mut words = first.split(' ');
    let (method, path) = (words.next()?.to_owned(), words.next()?.to_owned());
    let headers: HashMap<String, String> = lines
        .take_while(|line| !line.is_empty())
        .filter_map(|line| line.split_once(": ").map(|(k, v)| (k.to_lowercase(), v.to_owned())))
        .collect();
    seen.lock().unwrap().push(Seen { method: method.clone(), headers: headers.clone() });
    let mut now = manners.lock().unwrap().clone();
    let mut reply = |head: String, body: &[u8]| -> Option<()> {
        stream.write_all(format!("HTTP/1.1 {head}\r\n\r\n").as_bytes()).ok()?;
        for piece in body.chunks(64 << 10) {
            stream.write_all(piece).ok()?;
            if let Some(pause) = now.slow {
                sleep(pause);
            }
        }
        Some(())
    };
    if let Some((status, retry)) = {
        let mut manners = manners.lock().unwrap();
        (!manners.statuses.is_empty()).then(|| manners.statuses.remove(0))
    } {
        let retry = retry.map_or(String::new(), |s| format!("\r\nRetry-After: {s}"));
        return reply(format!("{status} no\r\nContent-Length: 0{retry}"), b"");
    }
    if path.starts_with("/api/models/") {
        let names = files.keys().chain(&now.names);
        let siblings: Vec<_> = names.map(|name| serde_json::json!({ "rfilename": name })).collect();
        let json = serde_json::json!({ "sha": COMMIT, "siblings": siblings }).to_string();
        return reply(format!("200 OK\r\nContent-Length: {}", json.len()), json.as_bytes());
    }
    if path.starts_with("/circle/") {
        return reply(format!("302 on\r\nLocation: {path}\r\nContent-Length: 0"), b"");
    }
    let bytes = files.iter().find(|(name, _)| path.ends_with(&format!("/{name}"))).map(|(_, bytes)| bytes);
    let Some(bytes) = bytes else { return reply("404 no\r\nContent-Length: 0".into(), b"") };
    let etag = now.etag.clone().unwrap_or_else(|| sha256(bytes));
    if method == "HEAD" {
        let size = now.size.unwrap_or(bytes.len() as u64);
        let head = format!(
            "X-Repo-Commit: {COMMIT}\r\nX-Linked-Etag: \"{etag}\"\r\nX-Linked-Size: {size}\r\n\
             Location: {}{path}\r\nContent-Length: 0",
            now.redirect.as_deref().unwrap_or("")
        );
        return reply(format!("302 on\r\n{head}"), b"");
    }
    if now.circle {
        return reply("302 on\r\nLocation: /circle/x\r\nContent-Length: 0".into(), b"");
    }
    if let Some(to) = &now.redirect {
        return reply(format!("302 on\r\nLocation: {to}{path}\r\nContent-Length: 0"), b"");
    }
    let range = headers.get("range").and_then(|range| range.strip_prefix("bytes=")?.split_once('-'));
    let (start, end) = match range {
        Some((start, last)) if !now.no_ranges => {
            (start.parse::<usize>().ok()?, bytes.len().min(last.parse::<usize>().ok()? + 1))
        }
        _ => (0, bytes.len()),
    };
    if start >= end {
        return reply("416 no\r\nContent-Length: 0".into(), b"");
    }
    let mut body = bytes[start..end].to_vec();
    if now.corrupt {
        body[0] ^= 1;
    }
    let status = if now.no_ranges { "200 OK" } else { "206 part" };
    let total = now.total.unwrap_or(bytes.len() as u64);
    let head = format!(
        "{status}\r\nContent-Length: {}\r\nContent-Range: bytes {start}-{}/{total}",
        body.len(),
        end - 1
    );
    let at = now.cut.or(now.stall).filter(|at| *at < body.len());
    if let Some(at) = at {
        let mut manners = manners.lock().unwrap();
        if manners.times > 0 {
            manners.times -= 1;
            manners.statuses.extend(now.then.map(|status| vec![(status, None); 9]).unwrap_or_default());
            drop(manners);
            reply(head, &body[..at])?;
            if now.stall.is_some() {
                sleep(Duration::from_secs(5));
            }
            return None;
        }
    }
    now.corrupt = false;
    reply(head, &body)
}
