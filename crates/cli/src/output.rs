//! Where things are printed: results on stdout, notices on stderr, and how a command ends.

use anyhow::Context;
use bitnet::convert::ConvertError;
use bitnet::generate::ConstraintError;
use bitnet::gguf::AtomicFile;
use std::fmt::{self, Display};
use std::io::{self, IsTerminal, Write};
use std::path::Path;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, LazyLock};
use std::time::Duration;

/// Whoever read stdout has left: not a failure.
#[derive(Debug)]
struct ReaderLeft;

/// The user pressed Ctrl-C, or something asked the program to end.
#[derive(Debug)]
pub struct Interrupted;

impl Display for ReaderLeft {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the reader of the output has left")
    }
}

impl Display for Interrupted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("interrupted")
    }
}

impl std::error::Error for ReaderLeft {}
impl std::error::Error for Interrupted {}

/// Writes to stdout and flushes.
pub fn print(bytes: &[u8]) -> anyhow::Result<()> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(bytes).and_then(|()| stdout.flush()).map_err(|error| match error.kind() {
        io::ErrorKind::BrokenPipe => ReaderLeft.into(),
        _ => anyhow::Error::new(error).context("cannot write to stdout"),
    })
}

/// Writes a model's text. A terminal obeys control characters, so there they are replaced.
pub fn print_text(text: &str) -> anyhow::Result<()> {
    let harmful = |c: char| c.is_control() && !matches!(c, '\n' | '\t');
    if text.contains(harmful) && io::stdout().is_terminal() {
        return print(text.replace(harmful, "\u{fffd}").as_bytes());
    }
    print(text.as_bytes())
}

/// Writes a JSON value and a newline to stdout.
pub fn print_json(value: &serde_json::Value) -> anyhow::Result<()> {
    print(format!("{value:#}\n").as_bytes())
}

/// Writes a line to stderr; nobody needs to read it.
pub fn notice(line: impl Display) {
    let _ = writeln!(io::stderr(), "{line}");
}

/// As [`notice`], less prominent where the terminal has colours and the user wants them (NO_COLOR is honoured).
pub fn hint(line: impl Display) {
    let _ = writeln!(anstream::stderr(), "\x1b[2m{line}\x1b[0m");
}

/// Whether nothing more can be printed, or the user wants to leave.
pub fn is_final(error: &anyhow::Error) -> bool {
    error.is::<ReaderLeft>() || error.is::<Interrupted>()
}

/// The exit code of a failed command, after its one line on stderr.
pub fn report(error: &anyhow::Error) -> ExitCode {
    if error.is::<ReaderLeft>() {
        return ExitCode::SUCCESS;
    }
    let cancelled = matches!(error.downcast_ref(), Some(bitnet::Error::Cancelled))
        || matches!(error.downcast_ref(), Some(ConvertError::Cancelled));
    if cancelled || error.is::<Interrupted>() {
        return ExitCode::from(interrupted_code());
    }
    notice(format_args!("error: {}", format!("{error:#}").replace(['\n', '\r'], " ")));
    // A grammar that is wrong is wrong usage.
    ExitCode::from(if error.is::<ConstraintError>() { 2 } else { 1 })
}

/// Whether a request to end came, and not Ctrl-C.
static REQUESTED: LazyLock<Arc<AtomicBool>> = LazyLock::new(Arc::default);

/// The exit code of a command that was interrupted: as a shell gives it, 128 and the number of the signal.
pub fn interrupted_code() -> u8 {
    if REQUESTED.load(Ordering::Relaxed) { 143 } else { 130 }
}

/// A flag that Ctrl-C or a request to end raises, so that the command can clean up; while it is up, another one ends the
/// program at once.
pub fn interrupt_flag() -> anyhow::Result<Arc<AtomicBool>> {
    flag(true)
}

/// As [`interrupt_flag`], for Ctrl-C only.
pub fn ctrl_c_flag() -> anyhow::Result<Arc<AtomicBool>> {
    flag(false)
}

#[cfg(unix)]
fn flag(requests_too: bool) -> anyhow::Result<Arc<AtomicBool>> {
    use signal_hook::consts::{SIGINT, SIGTERM};
    use signal_hook::flag::{register, register_conditional_shutdown};

    let flag = Arc::new(AtomicBool::new(false));
    if requests_too {
        register(SIGTERM, REQUESTED.clone()).context("cannot watch for requests to end")?;
    }
    for &signal in if requests_too { &[SIGINT, SIGTERM][..] } else { &[SIGINT] } {
        // In this order, for the first signal must find the flag down.
        register_conditional_shutdown(signal, 128 + signal, flag.clone())
            .and_then(|_| register(signal, flag.clone()))
            .context("cannot watch for Ctrl-C")?;
    }
    Ok(flag)
}

/// Windows ends a program without a request that it could see.
#[cfg(windows)]
fn flag(_: bool) -> anyhow::Result<Arc<AtomicBool>> {
    use std::sync::{Mutex, PoisonError};

    static FLAGS: Mutex<Vec<Arc<AtomicBool>>> = Mutex::new(Vec::new());
    let raise = || {
        let flags = FLAGS.lock().unwrap_or_else(PoisonError::into_inner);
        if flags.iter().fold(false, |up, flag| flag.swap(true, Ordering::Relaxed) || up) {
            std::process::exit(130);
        }
    };
    let mut flags = FLAGS.lock().unwrap_or_else(PoisonError::into_inner);
    if flags.is_empty() {
        ctrlc::set_handler(raise).context("cannot watch for Ctrl-C")?;
    }
    flags.push(Arc::default());
    Ok(flags[flags.len() - 1].clone())
}

/// Writes a file by `write`, whose own `io::Error`s get its name: it appears when it is complete, or not at all.
pub fn write_file(
    path: &Path,
    write: impl FnOnce(&mut dyn Write) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let failed = || format!("{}: cannot write", path.display());
    let mut file = AtomicFile::create(path).with_context(failed)?;
    write(&mut file).map_err(|e| if e.is::<io::Error>() { e.context(failed()) } else { e })?;
    file.commit().with_context(failed)
}

/// `1 thread`, `2 threads`.
pub fn threads(n: usize) -> String {
    format!("{n} thread{}", if n == 1 { "" } else { "s" })
}

/// Tokens per second.
pub fn rate(tokens: usize, time: Duration) -> f64 {
    if time.is_zero() { 0.0 } else { tokens as f64 / time.as_secs_f64() }
}

/// `1.25 GiB`, for a person.
pub fn bytes(n: u64) -> String {
    let mut value = n as f64;
    for unit in ["bytes", "KiB", "MiB", "GiB"] {
        if value < 1024.0 {
            return match unit {
                "bytes" => format!("{n} bytes"),
                "GiB" => format!("{value:.2} GiB"),
                _ => format!("{value:.1} {unit}"),
            };
        }
        value /= 1024.0;
    }
    format!("{value:.1} TiB")
}
