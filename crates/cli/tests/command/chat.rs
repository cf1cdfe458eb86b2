//! `bitnet chat` as a person and as a script meet it: on a pseudo-terminal and on pipes.

use super::{bitnet, refused};
use std::fs;
use std::path::Path;

#[test]
fn each_line_of_a_pipe_is_a_turn() {
    let args = ["chat", "--temp", "0", "-n", "12", "--logit-bias", "4092=-inf", "--logit-bias", "4089=-inf"];
    let (stdout, stderr, code) = bitnet(b"Once upon a time\n\n/save x\nAnd then?", &args);
    assert_eq!((stdout.lines().count(), stderr.lines().count(), code), (3, 3, 0), "{stdout}{stderr}");
    for words in ["12 tokens", "tokens/s", "first after", "context", "of 1024", "ended by -n"] {
        assert!(stderr.lines().all(|line| line.contains(words)), "{stderr}");
    }
    assert!(!stderr.contains('\x1b'), "no colours in a pipe");
    assert!(!Path::new("x").exists(), "a line of a pipe is no command");
    let (quiet, nothing, _) =
        bitnet(b"Once upon a time\r\n/save x\r\nAnd then?\r\n", &[&args[..], &["-q"]].concat());
    assert_eq!((quiet.as_str(), nothing.as_str()), (stdout.as_str(), ""));
    // Another system prompt, another answer; control tokens in a message are text.
    let (other, ..) =
        bitnet(b"Once upon a time\n", &[&args[..], &["--system", "You are a king.<|eot_id|>"]].concat());
    assert_ne!(other.lines().next(), stdout.lines().next());
    assert_eq!(bitnet(b"", &args), (String::new(), String::new(), 0));
}

#[test]
fn mistakes_are_told_with_the_next_step() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("t.jinja");
    let path = file.to_str().unwrap();
    let fails = |stdin: &[u8], args: &[&str], words: &str| drop(refused(stdin, args, words));
    fails(b"\xff\n", &["chat"], "stdin: line 1 is not UTF-8");
    fails(b"x\n", &["chat", "-c", "8"], "-c sets it");
    fails(b"x\n", &["chat", "--chat-template", "vicuna"], "bitnet, llama3, falcon3 and chatml");
    fails(b"x\n", &["chat", "--chat-template", "chatml"], "<|im_start|>");
    fails(b"x\n", &["chat", "--chat-template", path], "cannot read");
    fails(b"x\n", &["chat", "--load", path], "cannot read");
    for (template, words) in [
        ("{% for i in range(100000) %}{% for j in range(100000) %}.{% endfor %}{% endfor %}", "does not end"),
        ("{{ raise_exception('only jokes') }}", "only jokes"),
        ("{{ nothing(", "syntax error"),
        ("no template", "no Jinja"),
    ] {
        fs::write(&file, template).unwrap();
        fails(b"x\n", &["chat", "--chat-template", path], words);
    }
    fs::write(&file, "{\"messages\": [{\"role\": \"king\", \"content\": \"\"}]}").unwrap();
    fails(b"x\n", &["chat", "--load", path], "not a conversation");
    fs::write(&file, "{% for m in messages %}{{ m.content }}{% endfor %}").unwrap();
    let (stdout, _, code) = bitnet(b"Once\n", &["chat", "--chat-template", path, "-n", "4"]);
    assert!(code == 0 && stdout.trim() != "", "{stdout}");
}

#[test]
fn completions_and_manual_pages_know_every_command() {
    let commands = ["run", "chat", "tokenize", "convert", "bench", "completions", "man"];
    for shell in ["bash", "zsh", "fish", "powershell", "elvish"] {
        let (script, _, code) = bitnet(b"", &["completions", shell]);
        assert!(code == 0 && commands.iter().all(|name| script.contains(name)), "{shell}");
        assert!(script.contains("top-k"), "{shell}");
    }
    assert_eq!(bitnet(b"", &["completions", "cmd.exe"]).2, 2);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("man1");
    assert_eq!(bitnet(b"", &["man", "-o", path.to_str().unwrap()]), (String::new(), String::new(), 0));
    for name in commands {
        let page = fs::read_to_string(path.join(format!("bitnet-{name}.1"))).unwrap();
        assert_eq!(bitnet(b"", &["man", name]).0, page);
        assert!(page.contains(".SH SYNOPSIS") && !page.contains(".SH EXTRA"), "{name}");
        assert!(page.contains(&format!("\"bitnet-{name} ")), "{name}");
    }
    assert_eq!(bitnet(b"", &["man"]).0, fs::read_to_string(path.join("bitnet.1")).unwrap());
    assert_eq!(bitnet(b"", &["man", "no"]).2, 1);
}

#[cfg(unix)]
mod terminal {
    use super::*;
    use assert_cmd::cargo::CommandCargoExt;
    use rexpect::process::{Signal, WaitStatus};
    use rexpect::session::{PtySession, spawn_command};
    use std::process::Command;

    /// A chat on a terminal, with its files in `home`.
    fn chat(home: &Path, args: &[&str]) -> PtySession {
        chat_with(home, args, "X", "1")
    }

    /// As [`chat`], with a variable of the environment.
    fn chat_with(home: &Path, args: &[&str], variable: &str, value: &str) -> PtySession {
        let mut command = Command::cargo_bin("bitnet").unwrap();
        command.args(["chat", "--temp", "0"]).args(args).env("XDG_STATE_HOME", home).env("HOME", home);
        command.current_dir(home).env("TERM", "xterm").env_remove("NO_COLOR").env_remove("CI");
        command.env(variable, value);
        spawn_command(command, Some(60_000)).unwrap()
    }

    /// Ends the chat; what it still printed.
    fn leave(mut session: PtySession) -> String {
        session.exp_string(">>> ").unwrap();
        session.send_control('d').unwrap();
        session.exp_eof().unwrap()
    }

    fn say(session: &mut PtySession, line: &str) {
        session.exp_string(">>> ").unwrap();
        session.send(line).unwrap();
        session.send("\r").unwrap();
        session.flush().unwrap();
    }

    fn expect(session: &mut PtySession, text: &str) -> String {
        session.exp_string(text).unwrap_or_else(|error| panic!("{text}: {error}"))
    }

    #[test]
    fn a_person_talks() {
        let home = tempfile::tempdir().unwrap();
        let mut s = chat(home.path(), &["-n", "12"]);
        expect(&mut s, "built-in demo, context of 1024 tokens, chat template: bitnet");
        say(&mut s, "Once upon a time");
        expect(&mut s, "first after");
        say(&mut s, "/save tale.json");
        expect(&mut s, "2 messages saved");
        say(&mut s, "/set temp 0.5");
        say(&mut s, "/set");
        expect(&mut s, "temp 0.5");
        say(&mut s, "/set temp hot");
        expect(&mut s, "is no number");
        say(&mut s, "/retry");
        expect(&mut s, "(1 read)");
        say(&mut s, "/system Be brief.");
        say(&mut s, "/system");
        expect(&mut s, "Be brief.");
        say(&mut s, "/clear now");
        expect(&mut s, "/clear takes no argument");
        say(&mut s, "/clear");
        say(&mut s, "/stats");
        expect(&mut s, "context          0 of 1024");
        say(&mut s, "/retry");
        expect(&mut s, "no question");
        say(&mut s, "/load tale.json");
        expect(&mut s, "2 messages loaded");
        say(&mut s, "/stats");
        expect(&mut s, "answers          2");
        say(&mut s, "/help");
        expect(&mut s, "/exit");
        say(&mut s, "/nonsense");
        expect(&mut s, "/help lists them");
        say(&mut s, "\"\"\"two\rlines\"\"\"");
        expect(&mut s, "ended by -n");
        say(&mut s, "/save tale.json");
        expect(&mut s, "4 messages saved");
        // Lines that come faster than they are read.
        s.exp_string(">>> ").unwrap();
        s.send("/set seed 9\r/set n 3\r/set\r").unwrap();
        s.flush().unwrap();
        for answer in ["seed is 9 now", "n is 3 now", "repeat-last-n"] {
            expect(&mut s, answer);
        }
        s.exp_string(">>> ").unwrap();
        s.send("/ex\t\r").unwrap();
        s.flush().unwrap();
        s.exp_eof().unwrap();
        let saved = fs::read_to_string(home.path().join("tale.json")).unwrap();
        assert!(saved.contains("two\\nlines") && saved.contains("Once upon a time"), "{saved}");
        let history =
            home.path().join(if cfg!(target_os = "macos") { "Library/Application Support" } else { "" });
        let history = fs::read_to_string(history.join("bitnet/chat_history")).unwrap();
        assert!(history.contains("Once upon a time"));

        // The next chat has the history of this one, and goes on with its conversation.
        let s = chat(home.path(), &["-n", "12", "--load", "tale.json", "--no-history", "-q"]);
        assert!(!leave(s).contains("context"));
    }

    #[test]
    fn ctrl_c_stops_the_answer_and_not_the_program() {
        let home = tempfile::tempdir().unwrap();
        let endless =
            ["--logit-bias", "4092=-inf", "--logit-bias", "4089=-inf", "-c", "200000", "--no-history"];
        let mut s = chat(home.path(), &endless);
        s.exp_string(">>> ").unwrap();
        s.send_control('c').unwrap();
        expect(&mut s, "Ctrl-D");
        say(&mut s, "Once upon a time");
        expect(&mut s, "king"); // it talks
        s.send_control('c').unwrap();
        expect(&mut s, "stopped");
        say(&mut s, "/set n 5");
        say(&mut s, "And then?");
        expect(&mut s, "5 tokens");
        leave(s);
        assert!(!home.path().join("bitnet").exists());
    }

    #[test]
    fn ctrl_c_stops_the_reading_of_a_long_conversation() {
        let home = tempfile::tempdir().unwrap();
        let tale = "once upon a time ".repeat(4000);
        let messages = serde_json::json!({ "messages": [{ "role": "user", "content": "Tell" }, { "role": "assistant", "content": tale }] });
        fs::write(home.path().join("tale.json"), messages.to_string()).unwrap();
        let slow = ["--kernels", "scalar", "-t", "1", "-c", "65536", "-n", "5", "--no-history"];
        let mut s = chat(home.path(), &[&slow[..], &["--load", "tale.json"]].concat());
        say(&mut s, "And then?");
        expect(&mut s, "\x1b[?2004l"); // the line was read, Ctrl-C is no key any more
        std::thread::sleep(std::time::Duration::from_millis(200));
        s.send_control('c').unwrap();
        expect(&mut s, "[stopped while it read");
        // The question stays without an answer, the conversation goes on.
        say(&mut s, "/save more.json");
        expect(&mut s, "3 messages saved");
        say(&mut s, "/clear");
        say(&mut s, "Once upon a time");
        expect(&mut s, "[5 tokens");
        say(&mut s, "/stats");
        expect(&mut s, "answers          1");
        leave(s);
    }

    #[test]
    fn a_request_to_end_finds_the_terminal_as_it_was() {
        let home = tempfile::tempdir().unwrap();
        for (signal, code) in [(Signal::SIGTERM, 143), (Signal::SIGHUP, 129)] {
            let mut s = chat(home.path(), &["--no-history"]);
            expect(&mut s, ">>> ");
            let status = s.process_mut().kill(signal).unwrap();
            assert!(matches!(status, WaitStatus::Exited(_, found) if found == code), "{status:?}");
            expect(&mut s, "\x1b[?2004l");
        }
    }

    #[test]
    fn colours_are_left_out_where_they_are_not_wanted() {
        let home = tempfile::tempdir().unwrap();
        for (variable, value, coloured) in
            [("X", "1", true), ("NO_COLOR", "1", false), ("TERM", "dumb", false)]
        {
            let mut s = chat_with(home.path(), &["--no-history"], variable, value);
            let before = s.exp_string("context of").unwrap();
            assert_eq!(before.contains("\x1b[2m"), coloured, "{variable}: {before:?}");
            leave(s);
        }
    }
}
