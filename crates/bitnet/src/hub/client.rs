//! Requests to the hub: redirects that the token does not follow, and retries of what may pass.

use super::{Hub, HubError, Revision};
use serde::de::DeserializeOwned;
use std::io::{self, Read};
use std::thread::sleep;
use std::time::Duration;
use ureq::http::{HeaderMap, Response, Uri};
use ureq::{Agent, Body};

/// Redirects that are followed.
const MAX_REDIRECTS: usize = 10;
/// Tries of a request in a row that bring nothing.
const MAX_TRIES: u32 = 5;
/// Longest pause that a server may ask for.
const MAX_PAUSE: Duration = Duration::from_secs(120);
/// Longest answer in JSON: a repository of 10,000 files has some 2 MB.
const MAX_JSON: u64 = 32 << 20;

/// What the hub says about a file.
#[derive(Clone, Debug)]
pub(super) struct FileMeta {
    /// The commit, 40 hexadecimal digits.
    pub(super) commit: String,
    /// In lower-case hexadecimal digits: the 64 of the SHA-256 of a large file, or the 40 of the SHA-1 of a small one as git
    /// stores it.
    pub(super) digest: String,
    pub(super) size: u64,
}

/// A request that did not succeed.
pub(super) struct Failure {
    pub(super) error: HubError,
    /// Whether a later try may succeed.
    pub(super) passing: bool,
    /// The pause that the server asks for.
    pub(super) pause: Option<Duration>,
}

impl From<HubError> for Failure {
    fn from(error: HubError) -> Self {
        Self { error, passing: false, pause: None }
    }
}

impl Failure {
    /// A connection that failed or broke.
    pub(super) fn passing(url: &str, cause: impl std::fmt::Display) -> Self {
        let error = HubError::Unreachable { url: shown(url), cause: cause.to_string() };
        Self { error, passing: true, pause: None }
    }
}

pub(super) struct Client<'a> {
    pub(super) hub: &'a Hub,
    agent: Agent,
    endpoint: Origin,
}

/// What decides who a server is.
#[derive(PartialEq, Eq)]
struct Origin {
    secure: bool,
    host: String,
    port: u16,
}

impl Origin {
    fn of(url: &str) -> Option<Self> {
        let uri: Uri = url.parse().ok()?;
        let secure = match uri.scheme_str()? {
            "https" => true,
            "http" => false,
            _ => return None,
        };
        let authority = uri.authority()?;
        // A name before the host serves nobody but those who hide the host.
        if authority.as_str().contains('@') || authority.host().is_empty() {
            return None;
        }
        let port = authority.port_u16().unwrap_or(if secure { 443 } else { 80 });
        Some(Self { secure, host: authority.host().to_ascii_lowercase(), port })
    }
}

impl<'a> Client<'a> {
    pub(super) fn new(hub: &'a Hub) -> Result<Self, HubError> {
        let endpoint = Origin::of(&hub.endpoint).ok_or_else(|| HubError::Name {
            name: hub.endpoint.clone(),
            problem: "expected the address of a server, such as https://huggingface.co, in HF_ENDPOINT"
                .into(),
        })?;
        // Redirects are followed here, where the token is held back.
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .user_agent(concat!("bitnet-rust/", env!("CARGO_PKG_VERSION")))
            .timeout_connect(Some(hub.timeout))
            .timeout_recv_response(Some(hub.timeout))
            .timeout_per_read(Some(hub.timeout));
        Ok(Self { hub, agent: config.build().into(), endpoint })
    }

    /// The files of a repository.
    pub(super) fn revision(&self, repo: &str, revision: &str) -> Result<Revision, HubError> {
        let url = format!("{}/api/models/{repo}/revision/{revision}", self.hub.endpoint);
        let found: Revision = self.retry(|| self.json(&url))?;
        check_commit(&url, Some(&found.sha))?;
        Ok(found)
    }

    /// Where a file is.
    pub(super) fn resolve_url(&self, repo: &str, revision: &str, file: &str) -> String {
        format!("{}/{repo}/resolve/{revision}/{}", self.hub.endpoint, escape(file))
    }

    /// Commit, size and checksum of a file. The hub tells them before it sends a reader on to another server.
    pub(super) fn file(&self, repo: &str, revision: &str, file: &str) -> Result<FileMeta, HubError> {
        let url = self.resolve_url(repo, revision, file);
        let (_, response) = self.retry(|| self.follow("HEAD", &url, None, true))?;
        let headers = response.headers();
        let refuse = |problem: &str| HubError::server(&url, problem);
        let commit = check_commit(&url, header(headers, "x-repo-commit"))?;
        let etag = header(headers, "x-linked-etag").or_else(|| header(headers, "etag"));
        let hex = etag.unwrap_or_default().trim_start_matches("W/").trim_matches('"');
        let is_hex = hex.bytes().all(|b| b.is_ascii_hexdigit() && !b.is_ascii_uppercase());
        if !is_hex || ![64, 40].contains(&hex.len()) {
            let problem = "the server tells no checksum (ETag) of the file, so it could not be verified";
            return Err(refuse(problem));
        }
        let digest = hex.to_owned();
        let own = if response.status().is_success() { header(headers, "content-length") } else { None };
        let size = header(headers, "x-linked-size").or(own).and_then(|size| size.parse().ok());
        let size = size.ok_or_else(|| refuse("the server does not tell the size of the file"))?;
        Ok(FileMeta { commit, digest, size })
    }

    fn json<T: DeserializeOwned>(&self, url: &str) -> Result<T, Failure> {
        let (_, mut response) = self.follow("GET", url, None, false)?;
        let mut bytes = Vec::new();
        let mut body = response.body_mut().as_reader().take(MAX_JSON);
        body.read_to_end(&mut bytes).map_err(|error| Failure::passing(url, error))?;
        let refuse = |error| HubError::server(url, format!("not the JSON of a repository: {error}")).into();
        serde_json::from_slice(&bytes).map_err(refuse)
    }

    /// Sends a request and follows redirects, the last address coming back with the answer: 200 or 206. With
    /// `stay` a redirect to another server is an answer too.
    pub(super) fn follow(
        &self,
        method: &str,
        url: &str,
        range: Option<(u64, u64)>,
        stay: bool,
    ) -> Result<(String, Response<Body>), Failure> {
        let mut at = url.to_owned();
        for _ in 0..=MAX_REDIRECTS {
            let bad = |problem: &str| HubError::server(&at, problem);
            let origin = Origin::of(&at).ok_or_else(|| bad("this is no address of a server"))?;
            if self.endpoint.secure && !origin.secure {
                let problem = "the server sends the reader on to an address without encryption";
                return Err(bad(problem).into());
            }
            let mut request = if method == "HEAD" { self.agent.head(&at) } else { self.agent.get(&at) };
            if let Some(token) = self.hub.token.as_ref().filter(|_| origin == self.endpoint) {
                request = request.header("authorization", format!("Bearer {token}"));
            }
            if let Some((start, end)) = range {
                request = request.header("range", format!("bytes={start}-{}", end - 1));
            }
            let response = request.header("accept-encoding", "identity").call();
            let response = response.map_err(|error| Failure::passing(&at, cause(error)))?;
            match response.status().as_u16() {
                200 | 206 => return Ok((at, response)),
                301 | 302 | 303 | 307 | 308 => {
                    let location = header(response.headers(), "location");
                    let next = location.and_then(|to| join(&at, to));
                    let next = next.ok_or_else(|| bad("a redirect to nowhere"))?;
                    let away = Origin::of(&next).is_none_or(|origin| origin != self.endpoint);
                    let told = header(response.headers(), "x-linked-etag").is_some();
                    if stay && (away || told) {
                        return Ok((at, response));
                    }
                    at = next;
                }
                status => return Err(self.refusal(&at, status, response.headers())),
            }
        }
        Err(HubError::server(url, format!("more than {MAX_REDIRECTS} redirects")).into())
    }

    fn refusal(&self, url: &str, status: u16, headers: &HeaderMap) -> Failure {
        let problem = match (status, self.hub.token.is_some()) {
            (401 | 403, false) => {
                "no such repository, or it needs a token: set HF_TOKEN, and accept its terms on its page"
            }
            (401 | 403, true) => {
                "the token is wrong or gives no access: check HF_TOKEN, and accept the repository's terms on its page"
            }
            (404, _) => "no such repository or file",
            (429, false) => "too many requests: try again later, or set HF_TOKEN for a larger share",
            (429, true) => "too many requests: try again later",
            (416, _) => "the server does not have as many bytes as it said",
            (500.., _) => "the server has a problem: try again later",
            _ => "not the answer that was expected",
        };
        let seconds = header(headers, "retry-after").and_then(|text| text.trim().parse().ok());
        let pause = seconds.map(Duration::from_secs);
        let passing = matches!(status, 408 | 429 | 500..) && pause.is_none_or(|pause| pause <= MAX_PAUSE);
        let after = seconds.map_or(String::new(), |seconds| format!("; it asks to wait for {seconds} s"));
        let error = HubError::Status { url: shown(url), status, problem: format!("{problem}{after}") };
        Failure { error, passing, pause }
    }

    /// Tries again what may pass. Where there is no connection at all a second try is enough.
    fn retry<T>(&self, mut request: impl FnMut() -> Result<T, Failure>) -> Result<T, HubError> {
        let mut tries = 0;
        loop {
            match request() {
                Ok(value) => return Ok(value),
                Err(failure) => {
                    let no_connection = matches!(failure.error, HubError::Unreachable { .. });
                    tries += if no_connection { MAX_TRIES - 1 } else { 1 };
                    self.pause(failure, tries.min(MAX_TRIES))?;
                }
            }
        }
    }

    /// Waits before try number `tries`; gives the failure back where there should be none.
    pub(super) fn pause(&self, failure: Failure, tries: u32) -> Result<(), HubError> {
        if !failure.passing || tries >= MAX_TRIES {
            return Err(failure.error);
        }
        let pause = self.hub.pause * 2u32.pow(tries.saturating_sub(1));
        sleep(failure.pause.unwrap_or(pause));
        Ok(())
    }
}

pub(super) fn header<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

fn check_commit(url: &str, commit: Option<&str>) -> Result<String, HubError> {
    let is_commit = |commit: &&str| commit.len() == 40 && commit.bytes().all(|b| b.is_ascii_hexdigit());
    let problem = "no commit of a repository in the answer: this is no Hugging Face hub";
    commit.filter(is_commit).map(str::to_owned).ok_or_else(|| HubError::server(url, problem))
}

/// An address as a person may see it: without the signatures of a download.
pub(super) fn shown(url: &str) -> String {
    url.split(['?', '#']).next().unwrap_or_default().to_owned()
}

/// The short reason behind an error of the transport.
fn cause(error: ureq::Error) -> String {
    const UNKNOWN: &str = "the name of the server is not known; there may be no network";
    match error {
        ureq::Error::HostNotFound => UNKNOWN.into(),
        ureq::Error::Io(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            "connection refused".into()
        }
        // The resolver of the standard library has no kind for it.
        ureq::Error::Io(error) if error.to_string().contains("lookup address") => UNKNOWN.into(),
        ureq::Error::Io(error) => error.to_string(),
        error => error.to_string(),
    }
}

/// An address relative to another.
fn join(base: &str, to: &str) -> Option<String> {
    if to.starts_with("https://") || to.starts_with("http://") {
        return Some(to.to_owned());
    }
    let base: Uri = base.parse().ok()?;
    let (scheme, authority) = (base.scheme_str()?, base.authority()?);
    if to.starts_with("//") {
        return Some(format!("{scheme}:{to}"));
    }
    let folder = base.path().rsplit_once('/').map_or("", |(folder, _)| folder);
    let path = if to.starts_with('/') { to.to_owned() } else { format!("{folder}/{to}") };
    Some(format!("{scheme}://{authority}{path}"))
}

/// A path for an address: all but the plainest bytes as %XX.
fn escape(path: &str) -> String {
    let mut escaped = String::new();
    for byte in path.bytes() {
        match byte {
            b'/' | b'-' | b'_' | b'.' | b'~' | b'0'..=b'9' | b'a'..=b'z' | b'A'..=b'Z' => {
                escaped.push(byte.into());
            }
            _ => escaped.push_str(&format!("%{byte:02X}")),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_joined_and_compared() {
        let base = "https://hub.co/a/resolve/main/f?x=1";
        for (to, want) in [
            ("https://cdn.co/y?s=1", "https://cdn.co/y?s=1"),
            ("/b/f", "https://hub.co/b/f"),
            ("g", "https://hub.co/a/resolve/main/g"),
            ("//evil.co/f", "https://evil.co/f"),
        ] {
            assert_eq!(join(base, to).as_deref(), Some(want));
        }
        let same = |a, b| Origin::of(a) == Origin::of(b);
        assert!(same("https://Hub.co/x", "https://hub.co:443/y"));
        for other in ["http://hub.co", "https://hub.co:444", "https://hub.co.evil.co", "https://x.hub.co"] {
            assert!(!same("https://hub.co", other), "{other}");
        }
        assert!(
            Origin::of("https://hub.co@evil.co/").is_none() && Origin::of("file:///etc/passwd").is_none()
        );
        assert_eq!(escape("a b/ü.gguf"), "a%20b/%C3%BC.gguf");
        assert_eq!(shown("https://cdn.co/f?Signature=x"), "https://cdn.co/f");
    }
}
