//! `bitnet batch` through the real binary: what it gives for a row, and that nothing that ends it costs or doubles one.

#[cfg(target_os = "linux")]
use super::send;
use super::{DEMO, command, ended, with_tensor};
use serde_json::{Value as Json, json};
use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Child, Command};
use std::thread::sleep;
use std::time::Duration;
use tempfile::TempDir;

/// In a folder of its own.
struct Place(TempDir);

impl Place {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }
    fn write(&self, name: &str, text: impl AsRef<[u8]>) {
        let path = self.0.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }
    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.0.path().join(name)).unwrap()
    }
    fn rows(&self, name: &str) -> Vec<Json> {
        self.read(name).lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }
    fn spawn(&self, args: &[&str]) -> Child {
        command(args).current_dir(&self.0).spawn().unwrap()
    }
    fn output(&self, stdin: &[u8], args: &[&str]) -> (i32, String) {
        let (stdout, stderr, code) = ended(self.spawn(args), stdin);
        assert!(stdout.is_empty() || args[0] != "batch");
        (code, if args[0] == "batch" { stderr } else { stdout })
    }
    /// What a run that must succeed says.
    fn batch(&self, args: &[&str]) -> String {
        self.batch_ends(args, 0)
    }
    /// What a run that must end with this code says.
    fn batch_ends(&self, args: &[&str], expected: i32) -> String {
        let (code, stderr) = self.output(b"", &[&["batch"], args].concat());
        assert_eq!(code, expected, "{stderr}");
        stderr
    }
    /// The error of a run that must fail, after which the output is as it was.
    fn refused(&self, output: &str, args: &[&str]) -> String {
        let before = fs::read(self.0.path().join(output)).ok();
        let (code, stderr) = self.output(b"", &[&["batch"], args, &["-o", output]].concat());
        assert_eq!(code, 1, "{stderr}");
        assert!(fs::read(self.0.path().join(output)).ok() == before || before.is_none());
        stderr
    }
    fn run(&self, args: &[&str]) -> Json {
        let (code, stdout) = self.output(b"", &[&["run", "--json", "-q"], args].concat());
        assert_eq!(code, 0);
        serde_json::from_str(&stdout).unwrap()
    }
}

fn lines(rows: &[Json]) -> String {
    rows.iter().map(|row| format!("{row}\n")).collect()
}

/// Rows of different length and with different options; none of them fails.
fn prompts(count: usize) -> String {
    let texts = ["Once upon a time", "The king", "Once upon a time there was a girl. She", "A"];
    let row =
        |i: usize| json!({ "id": format!("row {i}"), "prompt": texts[i % 4], "max_tokens": 5 + i * 7 % 30 });
    lines(&(0..count).map(row).collect::<Vec<_>>())
}

#[test]
fn rows_get_what_run_gives() {
    let place = Place::new();
    let rows = [
        json!({ "id": "a", "prompt": "Once upon a time" }),
        json!({ "prompt": "The king", "n_predict": 7, "temp": 0, "logit_bias": { "20": -5.5 } }),
        json!({ "id": 17, "prompt": "The king", "seed": 99, "max_tokens": 40, "stop": ["and", "the"] }),
        json!({ "id": 18.5, "prompt": "Once upon", "top_k": 5, "top_p": 0.5, "min_p": 0.1, "repeat_penalty": 1.3,
                "repeat_last_n": 9, "frequency_penalty": 0.1, "presence_penalty": 0.2, "ignore_eos": true, "max_tokens": 60 }),
        json!({ "id": null, "prompt": "O", "max_completion_tokens": -1, "stop": null }),
        json!({ "prompt": "Nothing", "n": 1, "max_tokens": 0, "stop": "x" }),
    ];
    // An empty line is no row, but is counted.
    place.write("in.jsonl", lines(&rows).replace("{\"id\":17", "\n{\"id\":17"));
    let stderr =
        place.batch(&["in.jsonl", "-o", "out.jsonl", "-n", "12", "-c", "80", "--seed", "5", "-t", "2"]);
    assert!(stderr.starts_with("6 rows\n"), "{stderr}");
    let base = ["-c", "80"];
    let options = "-n 60 --seed 8 --top-k 5 --top-p 0.5 --min-p 0.1 --repeat-penalty 1.3 --repeat-last-n 9 \
                   --frequency-penalty 0.1 --presence-penalty 0.2 --ignore-eos";
    let many: Vec<_> = ["-p", "Once upon"].into_iter().chain(options.split(' ')).collect();
    let as_run = [
        &["-p", "Once upon a time", "-n", "12", "--seed", "5"][..],
        &["-p", "The king", "-n", "7", "--temp", "0", "--logit-bias", "20=-5.5", "--seed", "6"],
        &["-p", "The king", "-n", "40", "--seed", "99", "--stop", "and", "--stop", "the"],
        &many,
        &["-p", "O", "-n", "-1", "--seed", "9"],
        &["-p", "Nothing", "-n", "0", "--seed", "10"],
    ];
    let ids = [json!("a"), json!(2), json!(17), json!(18.5), json!(6), json!(7)];
    let out = place.rows("out.jsonl");
    for ((got, args), id) in out.iter().zip(as_run).zip(ids) {
        let expected = place.run(&[args, &base].concat());
        let finish = expected["finish"].as_str().unwrap();
        let finish = if finish.starts_with("stop") { "stop" } else { finish };
        let tokens = expected["tokens"].as_array().unwrap().len();
        let keys = ["id", "text", "finish_reason", "prompt_tokens", "completion_tokens", "seed"];
        assert_eq!(
            json!(keys.map(|key| &got[key])),
            json!([id, expected["text"], finish, expected["prompt_tokens"], tokens, expected["seed"]]),
        );
        let keys: Vec<_> = got.as_object().unwrap().keys().collect();
        assert_eq!(keys.len(), 7);
    }
    assert!(place.read("out.jsonl").starts_with("{\"id\":\"a\",\"text\":"));
    // Neither the company nor the cache's room changes a byte.
    for options in [&["-b", "1"][..], &["-b", "3", "-t", "1", "--kernels", "scalar"]] {
        place.batch(
            &[
                &["in.jsonl", "-o", "again.jsonl", "--overwrite", "-n", "12", "-c", "80", "--seed", "5"],
                options,
            ]
            .concat(),
        );
        assert_eq!(place.read("again.jsonl"), place.read("out.jsonl"));
    }
}

#[test]
fn rows_have_forms_of_their_own() {
    let place = Place::new();
    let schema = json!({ "type": "object", "properties": { "z": { "enum": ["one", "two"] }, "a": { "type": "integer",
        "maximum": 99, "minimum": 0 } }, "required": ["z", "a"], "additionalProperties": false });
    let grammar = "start: \"yes\" | \"no\" \"!\"+";
    place.write("g.lark", grammar);
    let once = "Once upon a time";
    let rows = [
        json!({ "prompt": once }),
        json!({ "prompt": once, "json_schema": schema }),
        json!({ "prompt": once, "grammar": grammar, "regex": null }),
        json!({ "prompt": once, "regex": "[0-9]{3}-[0-9]{90}" }),
        json!({ "prompt": once, "regex": "(a" }),
        json!({ "prompt": once, "json_schema": { "type": "array", "uniqueItems": true } }),
        json!({ "prompt": once, "json_schema": "object" }),
        json!({ "prompt": once, "json_schema": schema, "regex": "a" }),
        json!({ "prompt": once, "json_schema": schema, "seed": 1 }),
        json!({ "prompt": once, "json_schema": schema, "max_tokens": 0 }),
        json!({ "prompt": once, "regex": "a*", "max_tokens": 0 }),
    ];
    place.write("in.jsonl", lines(&rows));
    place.batch_ends(&["in.jsonl", "-o", "out.jsonl", "-n", "60"], 1);
    let out = place.rows("out.jsonl");
    let schema = schema.to_string();
    let as_run: [&[&str]; 4] =
        [&[], &["--json-schema", &schema], &["--grammar", "g.lark"], &["--regex", "[0-9]{3}-[0-9]{90}"]];
    for (seed, (got, args)) in ["0", "1", "2", "3"].into_iter().zip(out.iter().zip(as_run)) {
        let expected = place.run(&[&["-p", once, "--seed", seed, "-n", "60"], args].concat());
        assert_eq!(got["text"], expected["text"]);
        assert_eq!(got["completion_tokens"], expected["tokens"].as_array().unwrap().len());
        assert_eq!(got.get("complete").is_none(), expected["complete"] == true, "{got}");
    }
    assert!(out[1]["text"].as_str().unwrap().starts_with('{') && out[1]["finish_reason"] == "stop");
    assert!(out[3]["finish_reason"] == "length" && out[3]["complete"] == false);
    for (row, expected) in
        out[4..8].iter().zip(["unclosed", "uniqueItems", "must be an object", "more than one"])
    {
        assert!(row["error"].as_str().unwrap().contains(expected), "{row}");
    }
    assert_eq!(out[8]["text"], out[1]["text"]);
    // No text at all has the form or has it not.
    for (row, form) in out[9..].iter().zip([["--json-schema", &schema], ["--regex", "a*"]]) {
        let expected = place.run(&[&["-p", once, "-n", "0"], &form[..]].concat());
        assert_eq!(
            (&row["text"], &row["finish_reason"], &row["completion_tokens"]),
            (&json!(""), &json!("length"), &json!(0))
        );
        assert_eq!(row.get("complete").is_none(), expected["complete"] == true, "{row}");
        assert_eq!(expected["complete"], form[1] == "a*");
    }
    // One for all that have none of their own, and what it was is part of what made the output.
    place.batch_ends(&["in.jsonl", "-o", "all.jsonl", "-n", "60", "--regex", "[0-9]+", "-b", "1"], 1);
    let all = place.rows("all.jsonl");
    assert!(all[0]["text"].as_str().unwrap().bytes().all(|byte| byte.is_ascii_digit()));
    for (a, b) in all[1..].iter().zip(&out[1..]) {
        assert_eq!((&a["text"], &a["error"]), (&b["text"], &b["error"]));
    }
    assert!(place.refused("all.jsonl", &["in.jsonl", "-n", "60", "--regex", "[0-9]*"]).contains("not made"));
}

#[test]
fn rows_do_not_wait_for_input_that_does_not_come() {
    let place = Place::new();
    let mut child = place.spawn(&["batch", "-", "-o", "out.jsonl", "-n", "5"]);
    let mut stdin = child.stdin.take().unwrap();
    let done = || fs::read_to_string(place.0.path().join("out.jsonl")).unwrap_or_default().lines().count();
    for row in 1..4 {
        stdin.write_all(b"{\"prompt\": \"Once\"}\n").unwrap();
        while done() < row {
            assert!(child.try_wait().unwrap().is_none());
            sleep(Duration::from_millis(5));
        }
    }
    drop(stdin);
    assert!(child.wait().unwrap().success());
    assert_eq!(done(), 3);
}

/// A limit on the size of files is as good as a disk that is full.
#[test]
#[cfg(target_os = "linux")]
fn a_full_disk_leaves_what_can_be_continued() {
    let place = Place::new();
    place.write("in.jsonl", prompts(20));
    place.batch(&["in.jsonl", "-o", "whole.jsonl"]);
    let program = command(&["batch", "in.jsonl", "-o", "out.jsonl"]);
    if !Path::new(program.get_program()).ends_with("bitnet") {
        return; // an emulator makes larger files of its own before the program begins
    }
    let mut limited = Command::new("sh");
    limited
        .args(["-c", "ulimit -f 1; exec \"$@\"", "sh"])
        .arg(program.get_program())
        .args(program.get_args());
    let output = limited.current_dir(&place.0).output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.starts_with("error: out.jsonl: cannot write: "), "{stderr}");
    assert!((1..=1024).contains(&place.read("out.jsonl").len()));
    place.batch(&["in.jsonl", "-o", "out.jsonl"]);
    assert_eq!(place.read("out.jsonl"), place.read("whole.jsonl"));
}

#[test]
fn a_bad_row_costs_itself() {
    let place = Place::new();
    let long = "once ".repeat(300);
    let bad = [
        ("{\"prompt\": ", "not JSON"),
        ("[1]", "expected an object"),
        ("{\"id\": [1], \"prompt\": \"x\"}", "the id must be"),
        ("{\"id\": 5, \"promt\": \"x\"}", "unknown field `promt`"),
        ("{\"id\": 6}", "either \"prompt\" or \"messages\""),
        ("{\"prompt\": \"x\", \"messages\": []}", "either \"prompt\" or \"messages\""),
        ("{\"prompt\": \"x\", \"temperature\": -1}", "temperature is -1"),
        ("{\"prompt\": \"x\", \"temp\": \"hot\"}", "expected f32 at column 29"),
        ("{\"prompt\": \"x\", \"max_tokens\": -2}", "max_tokens is -2"),
        ("{\"prompt\": \"x\", \"stop\": \"\"}", "an empty stop string"),
        ("{\"prompt\": \"x\", \"stop\": 3}", "stop must be a string"),
        ("{\"prompt\": \"x\", \"logit_bias\": {\"99999999\": 1}}", "logit_bias has token 99999999"),
        ("{\"messages\": []}", "no messages"),
        ("{\"prompt\": \"x\", \"n\": 2}", "n is 2"),
        (
            "{\"messages\": [{\"role\": \"user\", \"content\": [{\"type\": \"image_url\", \"image_url\": {}}]}]}",
            "content of type \"image_url\"",
        ),
        ("{\"messages\": [{\"role\": \"judge\", \"content\": \"x\"}]}", "unknown variant `judge`"),
        (&format!("{{\"id\": \"long\", \"prompt\": \"{long}\"}}"), "do not fit in the context of 64"),
    ];
    let mut input = Vec::new();
    for (row, _) in bad {
        input.extend(format!("{row}\n{{\"prompt\": \"Good\"}}\n").bytes());
    }
    input.extend(b"{\"prompt\": \"\xff\"}\n\xff\xfe\n");
    place.write("in.jsonl", input);
    let stderr = place.batch_ends(&["in.jsonl", "-o", "out.jsonl", "-n", "3", "-c", "64"], 1);
    assert!(stderr.starts_with("36 rows, 19 of them with an error\n"), "{stderr}");
    let rows = place.rows("out.jsonl");
    for (pair, (row, expected)) in rows.chunks(2).zip(bad) {
        assert!(pair[0]["error"].as_str().unwrap().contains(expected), "{row}: {}", pair[0]);
        assert!(pair[0].as_object().unwrap().len() == 3);
        assert_eq!(pair[1]["completion_tokens"], 3);
    }
    assert!(rows[34..].iter().all(|row| row["error"].as_str().unwrap().contains("not UTF-8")));
    let ids: Vec<_> = [0, 6, 8, 32].map(|i: usize| rows[i]["id"].clone()).into();
    assert_eq!(json!(ids), json!([1, 5, 6, "long"]));
    // Errors are rows that are done, too.
    let stderr = place.batch_ends(&["in.jsonl", "-o", "out.jsonl", "-n", "3", "-c", "64"], 1);
    assert_eq!(
        stderr,
        "note: all rows are there: 36, 19 of them with an error\nerror: 19 rows have an error, see out.jsonl\n"
    );
    assert_eq!(place.rows("out.jsonl"), rows);
}

#[test]
fn killed_at_any_moment_it_goes_on() {
    let place = Place::new();
    place.write("in.jsonl", prompts(60));
    place.batch(&["in.jsonl", "-o", "whole.jsonl", "-b", "4"]);
    let whole = place.read("whole.jsonl");
    // Slow enough to be killed.
    let args = ["batch", "in.jsonl", "-o", "out.jsonl", "-b", "4", "--kernels", "scalar", "-t", "1"];
    let len = || fs::metadata(place.0.path().join("out.jsonl")).map_or(0, |m| m.len());
    let mut kills = 0;
    for round in 1.. {
        let (mut child, before) = (place.spawn(&args), len());
        // At different moments: before anything is written, and after some rows of this run.
        let more = 300 * (round % 3);
        while more > 0 && len() <= before + more && child.try_wait().unwrap().is_none() {
            sleep(Duration::from_millis(1));
        }
        sleep(Duration::from_millis(5 * round));
        kills += usize::from(child.try_wait().unwrap().is_none());
        child.kill().unwrap();
        child.wait().unwrap();
        let now = place.read("out.jsonl");
        assert!(whole.starts_with(&now));
        if now == whole || kills == 6 {
            break;
        }
    }
    assert!(kills >= 3 && len() > 0, "{kills}");
    let had = place.read("out.jsonl").matches('\n').count();
    let stderr = place.batch(&["in.jsonl", "-o", "out.jsonl"]);
    assert!(
        had == 60 || stderr.starts_with(&format!("{} rows after {had} that were there\n", 60 - had)),
        "{stderr}"
    );
    assert_eq!(place.read("out.jsonl"), whole);
    // What a write that was cut leaves behind.
    for cut in [1, 7, 30, whole.len() / 2, whole.len() - 1] {
        place.write("out.jsonl", &whole[..cut]);
        place.batch(&["in.jsonl", "-o", "out.jsonl"]);
        assert_eq!(place.read("out.jsonl"), whole);
    }
    place.write("empty.jsonl", "\n");
    assert_eq!(place.batch(&["empty.jsonl", "-o", "empty"]), "note: there are no rows\n");
    // Done is done, and more rows make more.
    assert_eq!(place.batch(&["in.jsonl", "-o", "out.jsonl"]), "note: all rows are there: 60\n");
    place.write("in.jsonl", prompts(62));
    let stderr = place.batch(&["in.jsonl", "-o", "out.jsonl"]);
    assert!(
        stderr.starts_with("2 rows after 60 that were there\n")
            && place.read("out.jsonl").starts_with(&whole)
    );
}

#[test]
#[cfg(target_os = "linux")]
fn an_interrupt_keeps_what_is_finished() {
    let place = Place::new();
    // The third is done at once and waits for the second; the others are not needed. That the first is written shows that the
    // rest is under way.
    let rows = [("A", 20), ("Once", 400), ("The", 0), ("A", 400), ("B", 400)];
    let rows = rows.map(|(prompt, n)| json!({ "prompt": prompt, "max_tokens": n, "ignore_eos": true }));
    place.write("in.jsonl", lines(&rows));
    place.batch(&["in.jsonl", "-o", "whole.jsonl"]);
    let args = ["batch", "in.jsonl", "-o", "out.jsonl", "-b", "3", "--kernels", "scalar", "-t", "1"];
    let mut child = place.spawn(&args);
    while !fs::read(place.0.path().join("out.jsonl")).is_ok_and(|rows| rows.ends_with(b"\n")) {
        sleep(Duration::from_millis(1));
    }
    let running = child.try_wait().unwrap().is_none();
    send("-INT", &child);
    let output = child.wait_with_output().unwrap();
    assert!(running && output.status.code() == Some(130), "{output:?}");
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(stderr.starts_with("note: 1 row is computed to the end"), "{stderr}");
    let (whole, out) = (place.read("whole.jsonl"), place.read("out.jsonl"));
    assert!(whole.starts_with(&out) && out.lines().count() == 3);
    place.batch(&["in.jsonl", "-o", "out.jsonl"]);
    assert_eq!(place.read("out.jsonl"), whole);
}

#[test]
fn what_is_not_this_runs_is_left_alone() {
    let place = Place::new();
    place.write("in.jsonl", prompts(4));
    place.batch(&["in.jsonl", "-o", "out.jsonl"]);
    // Other settings, another row, fewer rows, another model.
    for args in
        [&["-n", "5"][..], &["--temp", "0.5"], &["--seed", "1"], &["--cache-type", "f16"], &["--stop", "x"]]
    {
        let stderr = place.refused("out.jsonl", &[&["in.jsonl"], args].concat());
        assert!(
            stderr.contains("out.jsonl:1: not made by this run") && stderr.contains("in.jsonl:1"),
            "{stderr}"
        );
    }
    place.write("other.jsonl", prompts(4).replace("row 2", "row two"));
    assert!(place.refused("out.jsonl", &["other.jsonl"]).contains("out.jsonl:3: not made by this run"));
    place.write("other.jsonl", prompts(3));
    assert!(place.refused("out.jsonl", &["other.jsonl"]).contains("out.jsonl:4: not made"));
    let mut model = DEMO.to_vec();
    let name = model.windows(10).position(|bytes| bytes == b"demo-model").unwrap();
    model[name] = b'D';
    place.write("other.gguf", model);
    // Only the scale behind the codes of a matrix is another.
    with_tensor(place.0.path(), "blk.2.ffn_up.weight", |bytes| bytes[768 * 256 / 4] ^= 1);
    for model in ["other.gguf", "changed.gguf"] {
        let stderr = place.refused("out.jsonl", &["in.jsonl", "-m", model]);
        assert!(stderr.contains("out.jsonl:1: not made"), "{stderr}");
    }
    // A run that cannot begin.
    for start in
        [&["--overwrite", "--logit-bias", "99999=1"][..], &["--overwrite", "--chat-template", "chatml"]]
    {
        place.refused("out.jsonl", &[&["in.jsonl"], start].concat());
        place.refused("never", &[&["in.jsonl"], start].concat());
    }
    assert!(!place.0.path().join("never").exists());
    // Files of other kinds.
    for foreign in ["{\"a\": 1}\n", "My novel", "{\"id\":1}\n", "\n", "{\"idea\": 1"] {
        place.write("foreign", foreign);
        assert!(place.refused("foreign", &["in.jsonl"]).contains("not a row of a batch"), "{foreign}");
    }
    assert!(place.refused("in.jsonl", &["in.jsonl"]).contains("both input and output"));
    assert!(place.refused("none", &["missing.jsonl"]).contains("missing.jsonl: cannot read"));
    // A run that is under way.
    let mut child = place.spawn(&["batch", "-", "-o", "out.jsonl", "--overwrite"]);
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(prompts(1).as_bytes()).unwrap();
    while place.read("out.jsonl").matches('\n').count() != 1 {
        sleep(Duration::from_millis(5));
    }
    assert!(place.refused("out.jsonl", &["in.jsonl"]).contains("another batch is writing it"));
    drop(stdin);
    assert!(child.wait().unwrap().success());
    assert!(place.batch(&["in.jsonl", "-o", "out.jsonl", "--overwrite"]).starts_with("4 rows\n"));
}

#[test]
fn folders_stdin_and_messages() {
    let place = Place::new();
    for (name, text) in [
        ("b.txt", "Once upon a time\n"),
        ("a/z.md", "The king"),
        (".hidden", "x"),
        ("c.ndjson", "{\"id\": 0, \"prompt\": \"A\"}"),
    ] {
        place.write(&format!("in/{name}"), text);
    }
    place.write("in/bad.txt", b"\xff");
    for _ in 0..2 {
        // The output is in the folder itself, which does not make it an input.
        let (code, stderr) =
            place.output(b"{\"prompt\": \"Last\"}", &["batch", "in", "-", "-o", "in/out.jsonl", "-n", "4"]);
        assert_eq!(code, 1, "{stderr}");
    }
    let rows = place.rows("in/out.jsonl");
    let ids: Vec<_> = rows.iter().map(|row| row["id"].clone()).collect();
    let sep = std::path::MAIN_SEPARATOR;
    assert_eq!(
        json!(ids),
        json!([format!("in{sep}a{sep}z.md"), format!("in{sep}b.txt"), format!("in{sep}bad.txt"), 0, 2])
    );
    assert!(rows[2]["error"].as_str().unwrap().contains("not UTF-8"));
    assert_eq!(rows[1]["text"], place.run(&["-p", "Once upon a time", "-n", "4", "--seed", "1"])["text"]);

    // A text with --chat is the question of a conversation, and as good as its messages.
    place.write("question.txt", "Once upon a time");
    let parts = json!([{ "type": "text", "text": "Once upon a time" }]);
    let messages = json!([{ "role": "system", "content": "Be brief." }, { "role": "user", "name": "Ann", "content": parts }]);
    place.write("q.jsonl", lines(&[json!({ "messages": messages, "seed": 0 })]));
    place.write(
        "t.jinja",
        "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:",
    );
    let args = ["--chat", "--system", "Be brief.", "--chat-template", "t.jinja", "-n", "9"];
    place.batch(&[&["question.txt", "q.jsonl", "-o", "chat.jsonl"], &args[..]].concat());
    let rows = place.rows("chat.jsonl");
    assert_eq!(rows[0]["text"], rows[1]["text"]);
    // A file does not hide a built-in template.
    place.write("chatml", "{{ 1 }}");
    let stderr = place.refused("none", &["question.txt", "--chat", "--chat-template", "chatml"]);
    assert!(stderr.contains("<|im_start|>"), "{stderr}");
    let plain =
        place.run(&["-p", "system: Be brief.\nuser: Once upon a time\nassistant:", "-n", "9", "--seed", "0"]);
    assert_eq!((&rows[0]["text"], &rows[0]["prompt_tokens"]), (&plain["text"], &plain["prompt_tokens"]));
}

#[test]
fn common_beginnings_are_computed_once() {
    let place = Place::new();
    let tale = "Once upon a time there was a little girl who lived near the wood. ".repeat(3);
    let rows: Vec<_> = (0..12).map(|i| json!({ "prompt": format!("{tale}{i}"), "max_tokens": 3 })).collect();
    place.write("in.jsonl", lines(&rows));
    let stderr = place.batch(&["in.jsonl", "-o", "out.jsonl"]);
    let prompts: u64 = place.rows("out.jsonl").iter().map(|row| row["prompt_tokens"].as_u64().unwrap()).sum();
    let line = stderr.lines().find(|line| line.starts_with("prompts")).unwrap();
    let numbers: Vec<u64> = line.split(' ').filter_map(|word| word.parse().ok()).collect();
    let [computed, shared] = numbers[..] else { panic!("{stderr}") };
    assert_eq!(computed + shared, prompts);
    assert!(computed < prompts / 12 + 12 * 4, "{stderr}");
}
