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

/// What ends a command without being a failure of it.
#[derive(Debug)]
pub enum Quit {
    /// Whoever read stdout has left.
    ReaderLeft,
    /// The user pressed Ctrl-C, or something asked the program to end.
    Interrupted,
}

pub use Quit::Interrupted;

impl Display for Quit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:?}")
    }
}

impl std::error::Error for Quit {}

/// Writes to stdout and flushes.
pub fn print(bytes: &[u8]) -> anyhow::Result<()> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(bytes).and_then(|()| stdout.flush()).map_err(|error| match error.kind() {
        io::ErrorKind::BrokenPipe => Quit::ReaderLeft.into(),
        _ => anyhow::Error::new(error).context("cannot write to stdout"),
    })
}

/// `text` for a terminal, which obeys control characters: they are replaced, but for newlines and tabs.
pub fn harmless(text: &str) -> String {
    text.replace(|c: char| c.is_control() && !matches!(c, '\n' | '\t'), "\u{fffd}")
}

/// The same on one line.
pub fn one_line(text: &str) -> String {
    harmless(text).replace(['\n', '\t'], " ")
}

/// Writes a model's text.
pub fn print_text(text: &str) -> anyhow::Result<()> {
    if io::stdout().is_terminal() {
        return print(harmless(text).as_bytes());
    }
    print(text.as_bytes())
}

/// Writes a line of a report: what, and what was found of it.
pub fn say(what: &str, found: impl Display) -> anyhow::Result<()> {
    print(format!("{what:<11} {}\n", one_line(&found.to_string())).as_bytes())
}

/// Writes a JSON value and a newline to stdout.
pub fn print_json(value: &serde_json::Value) -> anyhow::Result<()> {
    print(format!("{value:#}\n").as_bytes())
}

/// Writes a line to stderr; nobody needs to read it.
pub fn notice(line: impl Display) {
    let _ = writeln!(io::stderr(), "{}", harmless(&line.to_string()));
}

/// A [`notice`] that the user may not want.
pub fn note(quiet: bool, line: impl Display) {
    if !quiet {
        notice(format_args!("note: {line}"));
    }
}

/// As [`notice`], less prominent where the terminal has colours and the user wants them (NO_COLOR is honoured).
pub fn hint(line: impl Display) {
    let _ = writeln!(anstream::stderr(), "\x1b[2m{}\x1b[0m", harmless(&line.to_string()));
}

/// Whether nothing more can be printed, or the user wants to leave.
pub fn is_final(error: &anyhow::Error) -> bool {
    error.is::<Quit>()
}

/// The exit code of a failed command, after its one line on stderr.
pub fn report(error: &anyhow::Error) -> ExitCode {
    if let Some(Quit::ReaderLeft) = error.downcast_ref() {
        return ExitCode::SUCCESS;
    }
    let cancelled = matches!(error.downcast_ref(), Some(bitnet::Error::Cancelled))
        || matches!(error.downcast_ref(), Some(ConvertError::Cancelled));
    if cancelled || is_final(error) {
        return ExitCode::from(interrupted_code());
    }
    notice(format_args!("error: {}", one_line(&format!("{error:#}"))));
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

/// As [`interrupt_flag`], for Ctrl-C only, which never ends the program.
pub fn ctrl_c_flag() -> anyhow::Result<Arc<AtomicBool>> {
    flag(false)
}

#[cfg(unix)]
fn flag(ends: bool) -> anyhow::Result<Arc<AtomicBool>> {
    use signal_hook::consts::{SIGINT, SIGTERM};
    use signal_hook::flag::{register, register_conditional_shutdown};

    let flag = Arc::new(AtomicBool::new(false));
    let watch = |signal| {
        // A signal has lost its own effect with the first of these; one that comes before the last is not forgotten.
        let early = Arc::new(AtomicBool::new(false));
        register(signal, early.clone())?;
        if signal == SIGTERM {
            register(signal, REQUESTED.clone())?;
        }
        if ends {
            // Before the flag goes up, for the first signal must find it down.
            register_conditional_shutdown(signal, 128 + signal, flag.clone())?;
        }
        register(signal, flag.clone())?;
        if early.load(Ordering::Relaxed) {
            REQUESTED.fetch_or(signal == SIGTERM, Ordering::Relaxed);
            flag.store(true, Ordering::Relaxed);
        }
        Ok::<_, io::Error>(())
    };
    let signals: &[_] = if ends { &[SIGINT, SIGTERM] } else { &[SIGINT] };
    signals.iter().try_for_each(|&signal| watch(signal)).context("cannot watch for signals")?;
    Ok(flag)
}

/// Windows ends a program without a request that it could see.
#[cfg(windows)]
fn flag(ends: bool) -> anyhow::Result<Arc<AtomicBool>> {
    use std::sync::{Mutex, PoisonError};

    static FLAGS: Mutex<Vec<(Arc<AtomicBool>, bool)>> = Mutex::new(Vec::new());
    let raise = || {
        let flags = FLAGS.lock().unwrap_or_else(PoisonError::into_inner);
        if flags.iter().fold(false, |end, (flag, ends)| flag.swap(true, Ordering::Relaxed) && *ends || end) {
            std::process::exit(130);
        }
    };
    let mut flags = FLAGS.lock().unwrap_or_else(PoisonError::into_inner);
    if flags.is_empty() {
        ctrlc::set_handler(raise).context("cannot watch for Ctrl-C")?;
    }
    flags.push((Arc::default(), ends));
    Ok(flags[flags.len() - 1].0.clone())
}

/// Writes a file by `write`, whose own `io::Error`s get its name: it appears when it is complete, or not at all.
pub fn write_file(
    path: &Path,
    write: impl FnOnce(&mut dyn Write) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let failed = || format!("{}: cannot write", path.display());
    // A link stays one.
    let place = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let mut file = AtomicFile::create(&place).with_context(failed)?;
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
