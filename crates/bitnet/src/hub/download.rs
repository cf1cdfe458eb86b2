//! One file: ranges of it arrive on several connections and are written in order, so that what is on disk is always the
//! beginning of the file, whoever stops when.

use super::HubError;
use super::client::{Client, Failure, FileMeta, header};
use sha2::digest::{Digest, DynDigest};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// Connections at a time. Each holds at most one range in memory.
const CONNECTIONS: u64 = 8;
/// Bytes read from a connection at once.
const PIECE: usize = 256 << 10;

type Hasher = Box<dyn DynDigest + Send>;

fn hasher(meta: &FileMeta) -> Hasher {
    match meta.digest.len() {
        64 => Box::new(sha2::Sha256::new()),
        // Git hashes a header with the file.
        _ => Box::new(sha1::Sha1::new_with_prefix(format!("blob {}\0", meta.size))),
    }
}

/// One download at work.
struct Job<'a> {
    client: &'a Client<'a>,
    url: &'a str,
    meta: &'a FileMeta,
    path: &'a Path,
    /// Bytes that are here, written or in memory.
    arrived: AtomicU64,
    progress: &'a (dyn Fn(u64) + Sync),
    /// Whether the server sends ranges. If not, one connection reads whole files and passes over what is here.
    ranged: bool,
    state: Mutex<State>,
    turn: Condvar,
}

struct State {
    /// Where the next range begins.
    next: u64,
    /// Bytes in the file and in the hash.
    written: u64,
    file: File,
    hasher: Hasher,
    /// Where the last redirect led, so that the hub is not asked for every range.
    location: Option<String>,
    failure: Option<Stop>,
}

/// Why a request, or the whole download, brought less than it was to.
enum Stop {
    Failure(Failure),
    /// The server sends whole files only.
    NoRanges,
}

impl<E: Into<Failure>> From<E> for Stop {
    fn from(error: E) -> Self {
        Self::Failure(error.into())
    }
}

/// Completes the file at `path`, of which the beginning may be there, and verifies it. `progress` gets the bytes that are
/// here.
pub(super) fn download(
    client: &Client<'_>,
    url: &str,
    meta: &FileMeta,
    path: &Path,
    progress: &(dyn Fn(u64) + Sync),
) -> Result<(), HubError> {
    let options = File::options().read(true).write(true).create(true).truncate(false).open(path);
    let mut file = options.map_err(HubError::io(path, "open"))?;
    let mut ranged = true;
    loop {
        let (written, hasher) = prefix(&mut file, meta).map_err(HubError::io(path, "read"))?;
        progress(written);
        let job = Job {
            client,
            url,
            meta,
            path,
            arrived: written.into(),
            progress,
            ranged,
            state: Mutex::new(State {
                next: written,
                written,
                file: file.try_clone().map_err(HubError::io(path, "open"))?,
                hasher,
                location: None,
                failure: None,
            }),
            turn: Condvar::new(),
        };
        let found = match job.run() {
            Ok(hasher) => hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect::<String>(),
            Err(Stop::Failure(failure)) => return Err(failure.error),
            Err(Stop::NoRanges) => {
                ranged = false;
                continue;
            }
        };
        if found == meta.digest {
            return file.sync_all().map_err(HubError::io(path, "write"));
        }
        file.set_len(0).map_err(HubError::io(path, "write"))?;
        // What was here before may have been wrong; then the rest is not to blame.
        if written == 0 {
            std::fs::remove_file(path).map_err(HubError::io(path, "remove"))?;
            let file = url.rsplit('/').next().unwrap_or_default().to_owned();
            let expected = meta.digest.clone();
            return Err(HubError::Checksum { file, expected, found });
        }
    }
}

/// Length and hash of what is already there.
fn prefix(file: &mut File, meta: &FileMeta) -> std::io::Result<(u64, Hasher)> {
    if file.metadata()?.len() > meta.size {
        file.set_len(0)?;
    }
    file.seek(SeekFrom::Start(0))?;
    let (mut hasher, mut written, mut piece) = (hasher(meta), 0, vec![0; PIECE]);
    loop {
        let n = file.read(&mut piece)?;
        if n == 0 {
            return Ok((written, hasher));
        }
        hasher.update(&piece[..n]);
        written += n as u64;
    }
}

impl Job<'_> {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(self) -> Result<Hasher, Stop> {
        let (range, most) =
            if self.ranged { (self.client.hub.range.max(1), CONNECTIONS) } else { (u64::MAX, 1) };
        let ranges = (self.meta.size - self.lock().written).div_ceil(range);
        std::thread::scope(|scope| {
            for _ in 0..ranges.min(most) {
                scope.spawn(|| {
                    if let Err(stop) = self.work(range) {
                        self.lock().failure.get_or_insert(stop);
                        self.turn.notify_all();
                    }
                });
            }
        });
        let (url, size) = (self.url, self.meta.size);
        let State { failure, hasher, written, .. } =
            self.state.into_inner().unwrap_or_else(PoisonError::into_inner);
        match failure {
            None if written == size => Ok(hasher),
            Some(stop) => Err(stop),
            None => Err(HubError::server(url, "the download ended early").into()),
        }
    }

    /// Takes ranges until there are none left.
    fn work(&self, range: u64) -> Result<(), Stop> {
        let mut buffer = Vec::new();
        loop {
            let (start, end) = {
                let mut state = self.lock();
                if state.failure.is_some() || state.next >= self.meta.size {
                    return Ok(());
                }
                let start = state.next;
                state.next = self.meta.size.min(start.saturating_add(range));
                (start, state.next)
            };
            let (mut at, mut tries) = (start, 0);
            while at < end {
                let before = at;
                match self.fetch(&mut at, end, &mut buffer) {
                    Ok(()) => break,
                    Err(Stop::NoRanges) => return Err(Stop::NoRanges),
                    Err(Stop::Failure(failure)) => {
                        // Whatever arrived proves that trying is worth it.
                        tries = if at > before { 1 } else { tries + 1 };
                        self.client.pause(failure, tries)?;
                    }
                }
                if self.lock().failure.is_some() {
                    return Ok(());
                }
            }
            let mut state = self.lock();
            while state.written + (buffer.len() as u64) < end && state.failure.is_none() {
                state = self.turn.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            if state.failure.is_some() {
                return Ok(());
            }
            self.write(&mut state, &mut buffer)?;
        }
    }

    /// Appends what is in memory, whose turn it is.
    fn write(&self, state: &mut State, buffer: &mut Vec<u8>) -> Result<(), HubError> {
        let State { file, hasher, written, .. } = state;
        file.write_all(buffer).map_err(HubError::io(self.path, "write"))?;
        hasher.update(buffer);
        *written += buffer.len() as u64;
        buffer.clear();
        self.turn.notify_all();
        Ok(())
    }

    /// Reads the range from `at` to `end`, moving `at`, into memory, and from there to the file as soon as it is its turn.
    fn fetch(&self, at: &mut u64, end: u64, buffer: &mut Vec<u8>) -> Result<(), Stop> {
        let known = self.lock().location.clone();
        let url = known.as_deref().unwrap_or(self.url);
        let answer = self.client.follow("GET", url, Some((*at, end)), false);
        let (location, mut response) = answer.map_err(|mut failure| {
            // A signed address expires; the hub gives a new one.
            if known.is_some() && matches!(failure.error, HubError::Status { status: 400..=410, .. }) {
                self.lock().location = None;
                failure.passing = true;
            }
            failure
        })?;
        self.lock().location = Some(location);
        let whole = response.status() == 200;
        let length = header(response.headers(), "content-length").and_then(|n| n.parse().ok());
        if length.is_some_and(|n: u64| whole && n != self.meta.size) {
            let problem = format!("expected {} bytes, the server sends {length:?}", self.meta.size);
            return Err(HubError::server(self.url, problem).into());
        }
        if whole && self.ranged && (*at, end) != (0, self.meta.size) {
            return Err(Stop::NoRanges);
        }
        if response.status() == 206 {
            let found = header(response.headers(), "content-range").unwrap_or("nothing");
            let (start, last, size) = (*at, end - 1, self.meta.size);
            let problem = format!("expected the bytes {start}-{last}/{size}, the server sends {found}");
            let expected = found.strip_prefix("bytes ").and_then(|range| range.split_once('/'));
            let (range, total) = expected.ok_or_else(|| HubError::server(self.url, problem.clone()))?;
            let starts = range.split_once('-').is_some_and(|(first, _)| first.parse() == Ok(start));
            if !starts || total != "*" && total.parse() != Ok(size) {
                return Err(HubError::server(self.url, problem).into());
            }
        }
        let mut body = response.body_mut().as_reader();
        if whole {
            let passed = std::io::copy(&mut body.by_ref().take(*at), &mut std::io::sink());
            passed.map_err(|error| Failure::passing(self.url, error))?;
        }
        while *at < end {
            let from = buffer.len();
            let want = (PIECE as u64).min(end - *at) as usize;
            buffer.resize(from + want, 0);
            let read = body.read(&mut buffer[from..]);
            let n = *read.as_ref().unwrap_or(&0);
            buffer.truncate(from + n);
            *at += n as u64;
            (self.progress)(self.arrived.fetch_add(n as u64, Ordering::Relaxed) + n as u64);
            let mut state = self.lock();
            if state.written + buffer.len() as u64 == *at {
                self.write(&mut state, buffer)?;
            }
            drop(state);
            match read {
                Ok(0) => return Err(Failure::passing(self.url, "the connection broke off").into()),
                Err(error) => return Err(Failure::passing(self.url, error).into()),
                Ok(_) => {}
            }
        }
        Ok(())
    }
}
