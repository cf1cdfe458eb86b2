//! Lines from a person or from a pipe.

use crate::output::Interrupted;
use anyhow::{Context, bail, ensure};
use rustyline::completion::Completer;
use rustyline::error::ReadlineError;
use rustyline::highlight::Highlighter;
use rustyline::hint::Hinter;
use rustyline::history::FileHistory;
use rustyline::validate::{ValidationContext, ValidationResult, Validator};
use rustyline::{Cmd, CompletionType, Config, Editor, Helper, KeyCode, KeyEvent, Modifiers};
use std::ffi::OsString;
use std::io::{self, BufRead, IsTerminal, Read};
use std::path::PathBuf;
use std::sync::Arc;
#[cfg(unix)]
use std::sync::Weak;
#[cfg(unix)]
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::Duration;

/// A longer line of a pipe is no message.
const MAX_LINE: u64 = 16 << 20;

/// What came in.
pub enum Input {
    /// A line, or several lines that belong together.
    Text(String),
    /// Ctrl-C where there was something or nothing to edit.
    Cleared,
    /// There is no more.
    End,
}

/// Where lines come from.
pub enum Lines {
    /// A terminal on both sides: editing, history, completion.
    Edited { editor: Box<Editor<Words, FileHistory>>, history: Option<PathBuf>, _open: Arc<()> },
    /// A pipe or a file, or a terminal whose other side is one.
    Plain(Receiver<anyhow::Result<Input>>),
}

impl Lines {
    /// Lines of stdin. `words` are completed at the start of a line.
    pub fn new(words: &'static [&'static str], history: Option<PathBuf>) -> anyhow::Result<Self> {
        if !(io::stdin().is_terminal() && io::stdout().is_terminal()) {
            let (sender, lines) = mpsc::sync_channel(0);
            let mut number = 0;
            std::thread::spawn(move || while sender.send(next_plain(&mut number)).is_ok() {});
            return Ok(Self::Plain(lines));
        }
        let config = Config::builder()
            .max_history_size(1000)?
            .history_ignore_dups(true)?
            .history_ignore_space(true)
            .completion_type(CompletionType::List)
            .auto_add_history(true)
            .build();
        let mut editor = Editor::with_config(config).context("cannot use the terminal")?;
        editor.set_helper(Some(Words(words)));
        editor.bind_sequence(KeyEvent(KeyCode::Enter, Modifiers::ALT), Cmd::Newline);
        if let Some(file) = &history {
            let _ = editor.load_history(file); // there is none the first time
        }
        let open = Arc::default();
        #[cfg(unix)]
        give_back(Arc::downgrade(&open))?;
        Ok(Self::Edited { editor: Box::new(editor), history, _open: open })
    }

    /// Whether a person sits there.
    pub fn are_edited(&self) -> bool {
        matches!(self, Self::Edited { .. })
    }

    /// The next line. While `interrupted` is up, a pipe gives [`Interrupted`].
    pub fn next(&mut self, prompt: &str, interrupted: &AtomicBool) -> anyhow::Result<Input> {
        match self {
            Self::Plain(lines) => loop {
                ensure!(!interrupted.load(Ordering::Relaxed), Interrupted);
                match lines.recv_timeout(Duration::from_millis(50)) {
                    Err(RecvTimeoutError::Timeout) => {}
                    line => break line?,
                }
            },
            Self::Edited { editor, history, .. } => match editor.readline(prompt) {
                Ok(line) => {
                    if let Some(file) = history {
                        // A chat goes on without its history.
                        let _ = file.parent().map(std::fs::create_dir_all);
                        let _ = editor.append_history(file);
                    }
                    Ok(Input::Text(joined(&line)))
                }
                Err(ReadlineError::Interrupted) => Ok(Input::Cleared),
                Err(ReadlineError::Eof) => Ok(Input::End),
                Err(error) => Err(error).context("cannot read from the terminal"),
            },
        }
    }
}

/// Where a signal ends the program while a line is `open`, the terminal is first made what it was.
#[cfg(unix)]
fn give_back(open: Weak<()>) -> anyhow::Result<()> {
    use rustix::termios::{OptionalActions, tcgetattr, tcsetattr};
    use signal_hook::consts::{SIGHUP, SIGTERM};

    let before = tcgetattr(io::stdin()).context("cannot use the terminal")?;
    let ended = Arc::new(AtomicUsize::new(0));
    for signal in [SIGHUP, SIGTERM] {
        signal_hook::flag::register_usize(signal, ended.clone(), signal as usize)
            .context("cannot watch for signals")?;
    }
    std::thread::spawn(move || {
        while open.strong_count() > 0 {
            let signal = ended.load(Ordering::Relaxed);
            if signal != 0 {
                if tcgetattr(io::stdin()).is_ok_and(|now| now.local_modes != before.local_modes) {
                    let _ = tcsetattr(io::stdin(), OptionalActions::Now, &before);
                    // Pasted text has no brackets any more.
                    let _ = crate::output::print(b"\x1b[?2004l\n");
                }
                std::process::exit(128 + signal as i32);
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    });
    Ok(())
}

fn next_plain(lines: &mut u64) -> anyhow::Result<Input> {
    *lines += 1;
    let mut line = Vec::new();
    let stdin = io::stdin().lock();
    stdin.take(MAX_LINE + 1).read_until(b'\n', &mut line).context("stdin: cannot read")?;
    if line.len() as u64 > MAX_LINE {
        bail!("stdin: line {lines} is longer than {MAX_LINE} bytes");
    }
    if line.is_empty() {
        return Ok(Input::End);
    }
    let text = String::from_utf8(line);
    let text = text.map_err(|_| anyhow::anyhow!("stdin: line {lines} is not UTF-8"))?;
    let text = text.strip_suffix('\n').unwrap_or(&text);
    Ok(Input::Text(text.strip_suffix('\r').unwrap_or(text).to_owned()))
}

/// The lines that `"""` or a backslash at the end of a line hold together.
fn joined(text: &str) -> String {
    let quoted = text.trim().strip_prefix(QUOTES).and_then(|rest| rest.strip_suffix(QUOTES));
    quoted.map_or_else(|| text.replace("\\\n", "\n"), |inner| inner.trim_matches('\n').to_owned())
}

const QUOTES: &str = "\"\"\"";

/// Tells where a message ends, and completes commands.
pub struct Words(&'static [&'static str]);

impl Validator for Words {
    fn validate(&self, context: &mut ValidationContext<'_>) -> rustyline::Result<ValidationResult> {
        let text = context.input().trim();
        let open = text.strip_prefix(QUOTES).is_some_and(|rest| !rest.ends_with(QUOTES));
        let goes_on = open || context.input().ends_with('\\');
        Ok(if goes_on { ValidationResult::Incomplete } else { ValidationResult::Valid(None) })
    }
}

impl Completer for Words {
    type Candidate = String;

    fn complete(
        &self,
        line: &str,
        at: usize,
        _: &rustyline::Context<'_>,
    ) -> rustyline::Result<(usize, Vec<String>)> {
        let start = &line[..at];
        let found = self.0.iter().filter(|word| word.starts_with(start) && !start.is_empty());
        Ok((0, found.map(|word| (*word).to_owned()).collect()))
    }
}

impl Hinter for Words {
    type Hint = String;
}
impl Highlighter for Words {}
impl Helper for Words {}

/// Where the history of a chat is kept.
pub fn history_file() -> Option<PathBuf> {
    let state = state_folder(std::env::consts::OS, |name| std::env::var_os(name), std::env::home_dir());
    Some(state?.join("bitnet").join("chat_history"))
}

/// The user's folder for the state of programs, as each system has it.
fn state_folder(
    os: &str,
    variable: impl Fn(&str) -> Option<OsString>,
    home: Option<PathBuf>,
) -> Option<PathBuf> {
    let folder = |name: &str| variable(name).map(PathBuf::from).filter(|path| path.is_absolute());
    match os {
        "windows" => folder("LOCALAPPDATA"),
        "macos" => Some(home?.join("Library/Application Support")),
        _ => folder("XDG_STATE_HOME").or_else(|| Some(home?.join(".local/state"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_system_has_its_folder_for_state() {
        let root = |path: &str| std::path::absolute(path).unwrap();
        let home = || Some(root("/home"));
        let set = |_: &str| Some(root("/set").into_os_string());
        let unset = |_: &str| None;
        assert_eq!(state_folder("macos", set, home()), Some(root("/home/Library/Application Support")));
        assert_eq!(state_folder("linux", unset, home()), Some(root("/home/.local/state")));
        assert_eq!(state_folder("linux", set, home()), Some(root("/set")));
        assert_eq!(state_folder("linux", |_| Some("relative".into()), None), None);
        assert_eq!(state_folder("windows", set, home()), Some(root("/set")));
        assert_eq!(state_folder("windows", unset, home()), None);
    }

    #[test]
    fn lines_that_belong_together_are_one_message() {
        assert_eq!(joined("a"), "a");
        assert_eq!(joined("a\\\nb\\\nc"), "a\nb\nc");
        assert_eq!(joined("\"\"\"\na\n\nb\n\"\"\""), "a\n\nb");
        assert_eq!(joined("say \"\"\"a\"\"\""), "say \"\"\"a\"\"\"");
    }
}
