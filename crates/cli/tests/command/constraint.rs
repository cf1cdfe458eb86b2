//! Output of a given form.

use super::{bitnet, json};
use serde_json::Value;
use std::fs;

const SCHEMA: &str = r#"{"type":"object","properties":{"name":{"type":"string","maxLength":8},"n":{"enum":[1,22]}},
    "required":["name","n"],"additionalProperties":false}"#;
const ONCE: [&str; 5] = ["run", "-q", "-p", "Once upon a time", "--seed=5"];

fn check(json: &str) {
    let value: Value = serde_json::from_str(json).unwrap_or_else(|error| panic!("{json}: {error}"));
    assert!(
        value["name"].as_str().unwrap().chars().count() <= 8
            && [1, 22].contains(&value["n"].as_i64().unwrap())
    );
}

#[test]
fn a_schema_from_a_file_stdin_or_the_command_line() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("schema.json");
    fs::write(&file, SCHEMA).unwrap();
    let of = |stdin: &str, schema: &str| {
        let (stdout, stderr, code) = bitnet(stdin, &[&ONCE[..], &["--json-schema", schema]].concat());
        assert_eq!((code, &*stderr), (0, ""));
        check(&stdout);
        stdout
    };
    let text = of("", file.to_str().unwrap());
    assert_eq!(text, of(SCHEMA, "-"));
    assert_eq!(text, of("", SCHEMA));
    let mut all = [&ONCE[..], &["--json", "--json-schema", SCHEMA]].concat();
    let object = json(&all);
    assert!(object["finish"] == "complete" && object["complete"] == true);
    assert_eq!(object["text"].as_str().unwrap(), text.trim_end());
    // Too few tokens.
    all.extend(["-n", "4"]);
    let object = json(&all);
    assert!(object["finish"] == "length" && object["complete"] == false);
    let (_, stderr, code) = bitnet("", &["run", "-p", "x", "-n", "4", "--json-schema", SCHEMA]);
    assert!(code == 0 && stderr.contains("note: the output is incomplete"), "{stderr}");
}

#[test]
fn grammars_and_regular_expressions() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("yes.lark");
    fs::write(&file, "start: answer \"!\"\nanswer: \"yes\" | \"no\"\n").unwrap();
    let (stdout, ..) = bitnet("", &[&ONCE[..], &["--grammar", file.to_str().unwrap()]].concat());
    assert!(["yes!\n", "no!\n"].contains(&&*stdout), "{stdout}");
    let (stdout, ..) = bitnet("", &[&ONCE[..], &["--regex", "[0-9]{3}-[0-9]{2}"]].concat());
    assert!(stdout.len() == 7 && stdout.as_bytes()[3] == b'-', "{stdout}");
    let (stdout, stderr, code) = bitnet("Hi\nAnd you?\n", &["chat", "-q", "--json-schema", SCHEMA]);
    assert_eq!((code, &*stderr), (0, ""));
    // White space between the parts is the model's to choose, and with it where the lines end.
    let answers = serde_json::Deserializer::from_str(&stdout).into_iter::<Value>();
    let answers: Vec<_> = answers.collect::<Result<_, _>>().unwrap();
    assert_eq!(answers.len(), 2, "{stdout}");
    answers.iter().for_each(|answer| check(&answer.to_string()));
}

#[test]
fn wrong_ones_are_2_and_one_line() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("bad.lark");
    fs::write(&file, "start: word\nword: (\"a\" | \n").unwrap();
    let file = file.to_str().unwrap();
    for (args, expected) in [
        (["--json-schema", "{\"type\":\"object\",}"], "line 1 column 18"),
        (["--json-schema", "{\"uniqueItems\":true,\"type\":\"array\"}"], "uniqueItems"),
        (["--grammar", file], "bad.lark: line "),
        (["--regex", "(a"], "--regex: "),
    ] {
        for command in [&["run", "-p", "x"][..], &["chat"]] {
            let (stdout, stderr, code) = bitnet("", &[command, &args].concat());
            assert!(
                code == 2 && stdout.is_empty() && stderr.lines().count() == 1,
                "{code} {stdout} {stderr}"
            );
            assert!(stderr.starts_with("error: ") && stderr.contains(expected), "{stderr}");
        }
    }
    for command in [&["run"][..], &["chat"], &["batch", "-", "-o", "x"]] {
        assert_eq!(bitnet("", &[command, &["--json-schema", "-"]].concat()).2, 2);
    }
    assert_eq!(bitnet("", &["run", "-p", "x", "--regex", "a", "--grammar", file]).2, 2);
    assert_eq!(bitnet("", &["run", "-p", "x", "--json-schema", "/no/such"]).2, 1);
}
