//! Memory budgets and saved prompts, as a user of the real binary meets them.

use super::{DEMO, bitnet, coded, json, refused, rewritten, text};
use bitnet::gguf::Value;
use std::fs;

#[test]
fn a_budget_is_kept_or_refused() {
    let all = json(&["inspect", "--json"])["memory"].clone();
    let bytes = |key: &str| all[key].as_u64().unwrap();
    let parts = ["weights", "head_copy", "kv_cache", "scratch", "vocabulary"];
    let total = bytes("total_bytes");
    assert_eq!(parts.iter().map(|part| bytes(&format!("{part}_bytes"))).sum::<u64>(), total);
    let (least, enough) = (format!("{}", total - bytes("kv_cache_bytes") / 4), total.to_string());

    fn run<'a>(more: &[&'a str]) -> Vec<&'a str> {
        [&["run", "-p", "Once", "-n", "4", "--temp", "0"], more].concat()
    }
    let (expected, ..) = bitnet("", &run(&["-q"]));
    let (same, stderr, _) = bitnet("", &run(&["--max-memory", &enough]));
    assert!(same == expected && !stderr.contains("note:"), "{stderr}");
    // Rows and context give way, the text does not.
    let (same, stderr, code) = bitnet("", &run(&["--max-memory", &least]));
    assert_eq!((&same, code), (&expected, 0), "{stderr}");
    let note = stderr.lines().next().unwrap();
    assert!(note.starts_with("note: --max-memory allows") && note.contains("steps of 128"), "{note}");
    let fitting = |size: &str| json(&["inspect", "--json", "--max-memory", size])["memory"].clone();
    assert!(coded(&["inspect", "--max-memory", &least], 0).0.contains("steps of 128"));
    let few_rows = fitting(&least)["total_bytes"].as_u64().unwrap();
    let tight = format!("{}", few_rows - bytes("kv_cache_bytes") / 4);
    let shrunk = fitting(&tight);
    assert!(shrunk["total_bytes"].as_u64().unwrap() <= tight.parse().unwrap());
    let context = shrunk["context"].as_u64().unwrap();
    assert!((512..1024).contains(&context), "{context}");
    let (same, stderr, _) = bitnet("", &run(&["--max-memory", &tight]));
    assert!(same == expected && stderr.contains(&format!("{context} tokens instead of 1024")), "{stderr}");
    // What was asked for does not, unless it may.
    let args = run(&["--max-memory", &tight, "-c", "1024"]);
    for words in
        ["needs", "weights", "cache of 1024 tokens in f32", "--max-memory allows", "-c ", "--cache-type q8"]
    {
        refused("", &args, words);
    }
    let (_, stderr, code) = bitnet("", &run(&["--max-memory", &tight, "-c", "1024", "--cache-type", "auto"]));
    assert!(code == 0 && stderr.contains("a cache in f16"), "{stderr}");
    for command in [
        &["run", "-p", "x"][..],
        &["chat"],
        &["bench", "-p", "4", "-n", "0"],
        &["bench", "--synthetic", "2b-4t"],
        &["perplexity", "-f", "Cargo.toml"],
        &["logits", "--tokens", "1,2", "-o", "never.npy"],
        &["verify"],
    ] {
        let args = [command, &["--max-memory", "1M"]].concat();
        let (_, stderr, code) = bitnet("", &args);
        let last = stderr.lines().last().unwrap();
        assert!(
            code == 1 && last.contains("--max-memory allows 1.0 MiB: what helps is a smaller model"),
            "{args:?}: {stderr}"
        );
    }
    for wrong in ["", "much", "-1", "1X"] {
        assert_eq!(bitnet("", &run(&[&format!("--max-memory={wrong}")])).2, 2);
    }
}

#[test]
fn verbose_tells_what_was_taken() {
    let (_, stderr, code) = bitnet("", &["run", "-p", "Once", "-n", "4", "--verbose"]);
    let line = |start: &str| stderr.lines().find(|line| line.starts_with(start)).unwrap().to_owned();
    assert_eq!(code, 0);
    for words in ["weights", "head copy", "cache of 1024 tokens in f32", "scratch", "vocabulary"] {
        assert!(line("memory planned: ").contains(words), "{stderr}");
    }
    assert!(line("load ").contains(" s between tokens, "), "{stderr}");
    for words in ["weights", "head copy", "in use", "scratch", "vocabulary", "peak"] {
        assert!(line("memory: ").contains(words), "{stderr}");
    }
    // Every weight is read for every token as it lies in memory from the start.
    let (_, stderr, _) = bitnet("", &["run", "-p", "Once", "-n", "4", "--dense"]);
    assert!(stderr.contains("\nload ") && !stderr.contains("between tokens"), "{stderr}");
    let (_, stderr, _) = bitnet("Once\n", &["chat", "-n", "4", "--verbose"]);
    assert!(stderr.contains("memory planned: ") && stderr.contains("memory: "), "{stderr}");
}

/// What the system counts beyond the program itself is what was planned: no page of the file stays.
#[test]
#[cfg(target_os = "linux")]
fn the_system_counts_what_was_planned() {
    let resident = |model: &[&str]| {
        let prompt = "once upon a time ".repeat(60);
        let (_, stderr, code) = bitnet(
            &prompt,
            &[&["run", "-n", "30", "--verbose", "-c", "256", "--ignore-eos"], model].concat(),
        );
        assert_eq!(code, 0, "{stderr}");
        let after = stderr.split("the system counts ").nth(1).unwrap();
        let mut words = after.split([' ', ',']);
        let number: f64 = words.next().unwrap().parse().unwrap();
        (number
            * match words.next() {
                Some("MiB") => 1e6 * 1.048_576,
                unit => panic!("{unit:?}"),
            }) as u64
    };
    // The demo made larger by copies of its layers.
    let folder = tempfile::tempdir().unwrap();
    const TIMES: usize = 40;
    let path = rewritten(
        folder.path(),
        |name, value| {
            let more = |layers| Value::U32((layers as usize * TIMES) as u32);
            Some(if name.ends_with(".block_count") { value.as_int().map(more)? } else { value })
        },
        |name, dims| match name.strip_prefix("blk.").and_then(|rest| rest.split_once('.')) {
            Some((layer, rest)) => {
                let layer: usize = layer.parse().unwrap();
                let name = |i| format!("blk.{}.{rest}", layer * TIMES + i);
                (0..TIMES).map(|i| (name(i), dims.to_vec())).collect()
            }
            None => vec![(name.to_owned(), dims.to_vec())],
        },
    );
    let plan = |model: &[&str]| {
        let all = json(&[&["inspect", "--json", "-c", "256"], model].concat());
        all["memory"]["total_bytes"].as_u64().unwrap()
    };
    let large = [text(&path)];
    let planned = plan(&large) - plan(&[]);
    let counted = resident(&["-m", large[0]]) - resident(&[]);
    // The prompt fills nearly all of the context, and huge pages round.
    assert!(planned > 50 << 20, "{planned}");
    assert!(counted.abs_diff(planned) < planned / 4, "planned {planned}, counted {counted}");
}

#[test]
fn a_prompt_cache_changes_nothing_but_the_time() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("cache");
    let prompt = |count: usize| ["once upon a time there was a little fox"; 40][..count].join(" ");
    let run = |prompt: &str, more: &[&str]| {
        let args = ["run", "-p", prompt, "-n", "12", "--seed", "3", "--json", "--repeat-penalty", "1.3"];
        json(&[&args[..], more].concat())
    };
    let (short, long) = (prompt(20), prompt(40));
    let cached = ["--prompt-cache", text(&file)];
    let size = || fs::metadata(&file).unwrap().len();
    let expect = |prompt: &str, more: &[&str], cached_tokens: u64| {
        let (with, without) = (run(prompt, more), run(prompt, &[]));
        assert_eq!((&with["text"], &with["tokens"]), (&without["text"], &without["tokens"]));
        let (cached, all) = (&with["cached_tokens"], with["prompt_tokens"].as_u64().unwrap());
        assert_eq!(*cached, cached_tokens.min(all - 1));
        all
    };
    let tokens = expect(&short, &cached, 0);
    let first = size();
    assert_eq!(expect(&short, &cached, tokens), tokens);
    // It grows with the prompt, and not with --prompt-cache-ro.
    expect(&long, &[&cached[..], &["--prompt-cache-ro"]].concat(), tokens);
    assert_eq!(size(), first);
    let more = expect(&long, &cached, tokens);
    assert!(size() > first);
    let (grown, contents) = (size(), fs::read(&file).unwrap());
    assert_eq!(expect(&long, &cached, more), more);
    // A beginning of it is there already.
    expect(&short, &cached, tokens);
    assert_eq!((size(), fs::read(&file).unwrap() == contents), (grown, true));
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "nothing is left beside it");

    let args = |more: &[&str]| [&["run", "-p", &short, "-n", "1"], &cached[..], more].concat().join("\0");
    let fails = |more: &[&str], words: &str| {
        let line = refused("", &args(more).split('\0').collect::<Vec<_>>(), words);
        assert!(line.contains(text(&file)), "{line}");
    };
    fails(&["--cache-type", "q8"], "take --cache-type f32");
    // Another model: the same with another name.
    let other = folder.path().join("other.gguf");
    let mut bytes = DEMO.to_vec();
    let at = bytes.len() - 5; // a scale
    bytes[at] ^= 1;
    let name = bytes.windows(12).position(|w| w == b"general.name").unwrap() + 12 + 4 + 8;
    bytes[name] ^= 32;
    fs::write(&other, bytes).unwrap();
    fails(&["-m", text(&other)], "another model");
    let mut damaged = contents.clone();
    damaged[1000] ^= 1;
    fs::write(&file, &damaged).unwrap();
    fails(&[], "damaged");
    assert_eq!(fs::read(&file).unwrap(), damaged, "it was left alone");
    fs::write(&file, "some text").unwrap();
    fails(&[], "not a prompt cache");
    fs::remove_file(&file).unwrap();
    fails(&["--prompt-cache-ro"], "cannot read");
    let nowhere = folder.path().join("no/cache");
    refused("", &["run", "-p", "x", "--prompt-cache", text(&nowhere)], "no such folder");
    refused("", &["chat", "--prompt-cache", text(folder.path())], "not a regular file");
}

#[test]
fn a_chat_goes_on_from_its_cache() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("cache");
    let system = "You tell stories of a fox and a king. ".repeat(8);
    let args = ["chat", "-n", "8", "--temp", "0", "--system", &system];
    let cached = [&args[..], &["--prompt-cache", text(&file)]].concat();
    let (expected, ..) = bitnet("Once\nAnd then?\n", &args);
    let read = |stderr: &str| -> usize {
        let line = stderr.lines().find(|line| line.contains(" read)")).unwrap();
        line.split(" read)").next().unwrap().rsplit('(').next().unwrap().parse().unwrap()
    };
    let (first, before, code) = bitnet("Once\nAnd then?\n", &cached);
    assert_eq!((&first, code), (&expected, 0));
    let (second, after, _) = bitnet("Once\nAnd then?\n", &cached);
    assert_eq!(second, expected);
    assert!(read(&after) < 4 && read(&before) > 80, "{before}{after}");
    let contents = fs::read(&file).unwrap();
    assert_eq!(bitnet("", &cached).2, 0);
    assert_eq!(fs::read(&file).unwrap(), contents, "nothing new");
}
