//! The `bitnet` command as scripts see it: stdout, stderr and exit codes of the real binary on the built-in demo.

use super::{DEMO, DEMO_PATH, bitnet, coded, json, refused, rewritten, text, with_tensor};
use bitnet::gguf::{Gguf, TensorType, Value, Writer};
use bitnet::kernels::supported;
use serde_json::Value as Json;
use std::fs;
use std::path::{Path, PathBuf};
#[cfg(unix)]
use std::process::Command;

const ONCE: [&str; 7] = ["run", "-p", "Once upon a time", "-n", "24", "--seed", "7"];

/// A tensor as it is.
fn all(name: &str, dims: &[u64]) -> Vec<(String, Vec<u64>)> {
    vec![(name.to_owned(), dims.to_vec())]
}

/// Or none.
fn kept(is_kept: bool, name: &str, dims: &[u64]) -> Vec<(String, Vec<u64>)> {
    if is_kept { all(name, dims) } else { Vec::new() }
}

/// stdout of a command that must succeed.
fn stdout(args: &[&str]) -> String {
    coded(args, 0).0
}

#[test]
fn run_prints_the_continuation_and_statistics() {
    let greedy = ["run", "-p", "Once upon a time", "-n", "24", "--temp", "0"];
    let (story, stderr) = coded(&greedy, 0);
    assert!(story.ends_with('\n') && !story.contains("Once upon a time"), "{story:?}");
    for word in ["prompt", "generated", "tokens/s", "accepted", "seed", "threads", "first token"] {
        assert!(stderr.contains(word), "{stderr}");
    }
    assert_eq!(stdout(&greedy), story);
    assert_eq!(stdout(&[&greedy[..], &["--no-speculation"]].concat()), story);
    assert_eq!(coded(&[&greedy[..], &["--quiet"]].concat(), 0), (story.clone(), String::new()));
    let object = json(&[&greedy[..], &["--json"]].concat());
    assert_eq!(object["text"].as_str().unwrap().trim_end(), story.trim_end());
    assert_eq!(
        (object["finish"].as_str(), object["tokens"].as_array().map(Vec::len)),
        (Some("length"), Some(24))
    );
}

#[test]
fn a_seed_gives_one_text_on_all_kernels_and_threads() {
    let expected = stdout(&ONCE);
    for kernels in supported() {
        for threads in ["1", "2"] {
            let args = [&ONCE[..], &["--kernels", kernels.name(), "-t", threads]].concat();
            assert_eq!(stdout(&args), expected, "{} {threads}", kernels.name());
        }
    }
}

#[test]
fn prompts_come_from_file_and_stdin() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("prompt.txt");
    fs::write(&file, "Once upon a time\n").unwrap();
    let expected = stdout(&ONCE);
    assert_eq!(stdout(&["run", "-f", text(&file), "-n", "24", "--seed", "7"]), expected);
    assert_eq!(bitnet("Once upon a time\n", &["run", "-n", "24", "--seed", "7"]).0, expected);
}

#[test]
fn generation_ends_where_it_is_told() {
    let whole = stdout(&ONCE);
    let word = whole.split_whitespace().nth(5).unwrap();
    let cut = json(&[&ONCE[..], &["--json", "--stop", word]].concat());
    assert_eq!(cut["finish"], "stop_string");
    assert_eq!(cut["text"].as_str().unwrap(), &whole[..whole.find(word).unwrap()]);
    let full = json(&["run", "-p", "Once upon a time", "-n", "-1", "-c", "12", "--ignore-eos", "--json"]);
    assert_eq!(full["finish"], "context_full");
    assert_eq!(stdout(&["run", "-p", "Once", "-n", "0"]), "\n");
    let forced = json(&["run", "-p", "Once", "-n", "3", "--temp", "0", "--json", "--logit-bias", "4089=1e9"]);
    assert_eq!((&forced["finish"], &forced["text"]), (&Json::from("stop_token"), &Json::from("")));
}

#[test]
fn text_survives_tokens_and_back() {
    for source in ["Once upon a time", "  naïve 🦊\n\n\tx", "<|eot_id|> is text"] {
        let ids = stdout(&["tokenize", source]);
        assert!(ids.starts_with("4088 "), "{ids}");
        let ids: Vec<&str> = ids.split_whitespace().collect();
        assert_eq!(stdout(&[&["detokenize"], &ids[..]].concat()), source);
        for between in [",", " ", ", ", "\n"] {
            assert_eq!(stdout(&["detokenize", &ids.join(between)]), source);
        }
    }
    let object = json(&["tokenize", "--json", "--special", "--no-bos", "a<|eot_id|>"]);
    assert_eq!(object["pieces"].as_array().unwrap().last().unwrap(), "<|eot_id|>");
    assert_eq!(bitnet("Once", &["tokenize"]).0, stdout(&["tokenize", "Once"]));
}

#[test]
fn logits_are_a_numpy_file() {
    let folder = tempfile::tempdir().unwrap();
    let (list, file) = (folder.path().join("list.npy"), folder.path().join("file.npy"));
    let ids: Vec<String> = (100..170).map(|id| id.to_string()).collect();
    stdout(&["logits", "--tokens", &ids.join(", "), "-o", text(&list)]);
    let bytes = fs::read(&list).unwrap();
    let header = 10 + usize::from(u16::from_le_bytes([bytes[8], bytes[9]]));
    assert!(bytes.starts_with(b"\x93NUMPY\x01\x00"));
    assert!(String::from_utf8_lossy(&bytes[..header]).contains("'<f4'"));
    assert!(String::from_utf8_lossy(&bytes[..header]).contains("(70, 4096)"));
    assert_eq!(bytes.len(), header + 70 * 4096 * 4);
    assert!(bytes[header..].chunks_exact(4).all(|b| f32::from_le_bytes(b.try_into().unwrap()).is_finite()));
    let ids_file = folder.path().join("ids.txt");
    fs::write(&ids_file, ids.join("\n")).unwrap();
    stdout(&["logits", "--tokens-file", text(&ids_file), "-o", text(&file)]);
    assert!(fs::read(&file).unwrap() == bytes);
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 3);
}

#[test]
fn perplexity_of_a_story_is_low() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("story.txt");
    let story = stdout(&["run", "-p", "Once upon a time", "-n", "200", "--seed", "3", "--ignore-eos"]);
    fs::write(&file, story).unwrap();
    let args = ["perplexity", "-f", text(&file), "-c", "64"];
    let object = json(&[&args[..], &["--json"]].concat());
    let perplexity = object["perplexity"].as_f64().unwrap();
    assert!((1.0..200.0).contains(&perplexity), "{perplexity}");
    assert_eq!(object["tokens_scored"].as_u64(), object["windows"].as_u64().map(|n| n * 31));
    let line = stdout(&args);
    assert!(
        line.starts_with(&format!("perplexity: {perplexity:.4} ± ")) && line.lines().count() == 1,
        "{line}"
    );
    refused("too short", &["perplexity"], "1024");
}

#[test]
fn inspect_shows_sound_and_refused_files() {
    let object = json(&["inspect", "--json"]);
    assert_eq!(object["config"]["vocab_size"], 4096);
    assert!(object["repairs"].is_array() && object["memory"]["total_bytes"].as_u64() > Some(1 << 20));
    assert!(stdout(&["inspect", "--tensors"]).contains("token_embd.weight"));
    assert_eq!(stdout(&["inspect", "-m", DEMO_PATH]), stdout(&["inspect", DEMO_PATH]));
    let folder = tempfile::tempdir().unwrap();
    let path =
        rewritten(folder.path(), |_, v| Some(v), |name, dims| kept(name != "output_norm.weight", name, dims));
    let (object, stderr) = coded(&["inspect", text(&path), "--json"], 1);
    let object: Json = serde_json::from_str(&object).unwrap();
    assert!(object["error"].as_str().unwrap().contains("output_norm.weight"), "{}", object["error"]);
    assert!(stderr.contains("output_norm.weight"));
    assert!(coded(&["inspect", text(&path)], 1).0.contains("general.architecture"));
}

#[test]
fn repairs_are_told_in_a_line_each() {
    let folder = tempfile::tempdir().unwrap();
    let path = rewritten(folder.path(), |k, v| (k != "tokenizer.ggml.pre").then_some(v), all);
    let (_, told) = coded(&["tokenize", "-m", text(&path), "Once"], 0);
    assert!(told.lines().any(|line| line.starts_with("note: ") && line.contains("pre-tokenizer")), "{told}");
    assert!(coded(&["tokenize", "-q", "-m", text(&path), "Once"], 0).1.is_empty());
}

#[test]
fn damaged_files_are_refused_in_one_line() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("bad.gguf");
    for (bytes, expected) in [(&[][..], "bad.gguf"), (&DEMO[..DEMO.len() / 2], "truncated")] {
        fs::write(&path, bytes).unwrap();
        for args in [&["run", "-p", "x", "-m"][..], &["inspect"], &["tokenize", "x", "-m"]] {
            refused("", &[args, &[text(&path)]].concat(), expected);
        }
    }
}

#[test]
fn models_that_do_not_fit_together_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let fails = |path: PathBuf, words: &str| drop(refused("", &["run", "-p", "x", "-m", text(&path)], words));
    for missing in
        ["token_embd.weight", "blk.3.attn_k.weight", "blk.0.ffn_sub_norm.weight", "output_norm.weight"]
    {
        let path = rewritten(folder.path(), |_, v| Some(v), |name, dims| kept(name != missing, name, dims));
        fails(path, missing);
    }
    let short = |name: &str, dims: &[u64]| {
        let rows = if name == "blk.1.ffn_up.weight" { dims[1] / 2 } else { dims[dims.len() - 1] };
        all(name, &[&dims[..dims.len() - 1], &[rows]].concat())
    };
    fails(rewritten(folder.path(), |_, v| Some(v), short), "blk.1.ffn_up.weight");
    for missing in ["general.architecture", "bitnet-b1.58.embedding_length", "bitnet-b1.58.block_count"] {
        fails(rewritten(folder.path(), |k, v| (k != missing).then_some(v), all), missing);
    }
    for (key, value) in [
        ("bitnet-b1.58.block_count", Value::U32(u32::MAX)),
        ("bitnet-b1.58.attention.head_count", Value::U32(0)),
        ("general.architecture", Value::Str("gpt2")),
        ("tokenizer.ggml.bos_token_id", Value::U32(1 << 30)),
    ] {
        let path = rewritten(folder.path(), |k, v| Some(if k == key { value } else { v }), all);
        fails(path, key);
    }
    let path = folder.path().join("empty.gguf");
    let mut writer = Writer::new(&path);
    writer.tensor("x", &[4], TensorType::F32).unwrap();
    let mut data = writer.create().unwrap();
    data.tensor("x", &[0; 16]).unwrap();
    data.finish().unwrap();
    fails(path, "general.architecture");
}

#[test]
fn what_cannot_be_read_is_named() {
    refused(b"Once \xff", &["run"], "offset 5");
    for (model, expected) in [
        ("hf:owner/repo/more", "expected hf:OWNER/NAME"),
        ("./no/such.gguf", "no/such.gguf: no such file"),
        ("/", "folder"),
    ] {
        refused("", &["run", "-p", "x", "-m", model], expected);
    }
    for command in ["run", "tokenize", "perplexity"] {
        refused(b"Once \xff", &[command, "-m", "./no/such.gguf"], "no such file");
    }
    refused("", &["run", "-f", "/no/such/prompt"], "/no/such/prompt");
}

#[test]
fn tokens_and_prompts_out_of_range_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let npy = folder.path().join("x.npy");
    let words = "token 2 of the input is 4096";
    refused("", &["logits", "--tokens", "1,2,4096", "-o", text(&npy)], words);
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    refused("", &["detokenize", "5", "99999"], "99999");
    refused("", &["run", "-p", "x", "--logit-bias", "4096=1"], "4096");
    refused("word ".repeat(2000), &["run"], "the context 1024");
}

#[test]
fn usage_errors_are_2() {
    for (args, words) in [
        (&[][..], "Usage"),
        (&["nonsense"], "unrecognized"),
        (&["run", "-p", "x", "-n", "-2"], "-1.."),
        (&["run", "-p", "x", "--temp", "-1"], "temperature is -1"),
        (&["run", "-p", "x", "--top-p", "1.5"], "top_p is 1.5"),
        (&["run", "-p", "x", "-f", "y"], "cannot be used with"),
        (&["run", "-p", "x", "-t", "0"], "1.."),
        (&["logits", "-o", "x.npy"], "--tokens"),
        (&["logits", "--tokens", "1", "-o", "-"], "written to a file"),
        (&["detokenize", "1,x"], "\"x\" is no token id"),
        (&["detokenize"], "<IDS>"),
        (&["run", "-p", "x", "--kernels", "sse"], "scalar"),
        (&["run", "Once upon"], "-p \"Once upon\""),
        (&["run", "model.gguf"], "-m \"model.gguf\""),
        (&["chat", "model.gguf"], "-m \"model.gguf\""),
        (&["run", "-s", "-1"], "'--seed <S>': expected a number that is not negative"),
        (&["run", "--temp", "hot"], "'--temp <T>': expected a number"),
        (&["batch", "-", "-o", "x", "--top-k", "0.5"], "expected a whole number"),
        (&["batch", "-", "-o", "-"], "so it is a file"),
        (&["rnu"], "did you mean run?"),
        (&["inspect", "a", "-m", "b"], "cannot be used with"),
        (&["run", "--cache-type", "q4"], "q8"),
        (&["run", "--cache-type-k", "q8_0", "--cache-type-v", "f16"], "one type"),
        (&["bench", "-p", "0", "-n", "0"], "nothing to measure"),
        (&["bench", "-n", "18446744073709551615"], "18446744073709551615"),
    ] {
        let (stdout, stderr) = coded(args, 2);
        assert!(stdout.is_empty() && stderr.contains(words), "{args:?}: {stderr}");
    }
    assert!(stdout(&["--help"]).contains("perplexity"));
    assert!(
        stdout(&["perplexity", "--help"])
            .contains("Perplexity as llama.cpp defines it: the text is cut into windows")
    );
}

#[test]
fn outputs_that_cannot_be_written_fail() {
    for path in ["/no/such/folder/x.npy", "/dev/full", "/"] {
        refused("", &["logits", "--tokens", "1", "-o", path], path);
    }
    // Before anything is generated.
    #[cfg(target_os = "linux")]
    refused("", &["run", "-p", "x", "--prompt-cache", "/proc/cache"], "/proc/cache: cannot write: ");
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_fails_and_a_reader_that_leaves_does_not() {
    let command = || super::command(&["run", "-p", "Once", "-n", "500", "--ignore-eos"]);
    let full = fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let output = command().stdout(full).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("error: cannot write to stdout"));
    let mut child = command().spawn().unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), String::from_utf8_lossy(&output.stderr).as_ref()), (Some(0), ""));
}

#[test]
fn weights_that_make_no_sense_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let fails = |path: &Path, words: &str| drop(refused("", &["run", "-p", "x", "-m", text(path)], words));
    let up = "blk.2.ffn_up.weight";
    let codes = 768 * 256 / 4;
    for scale in [f32::NAN, f32::INFINITY] {
        let path =
            with_tensor(folder.path(), up, |b| b[codes..codes + 4].copy_from_slice(&scale.to_le_bytes()));
        fails(&path, "the scale at byte");
    }
    let path = with_tensor(folder.path(), up, |b| b[1000] = 0x1b);
    fails(&path, "blk.2.ffn_up.weight");
    fails(&path, "code 3");
    // What can be computed, and is odd all the same.
    let path =
        with_tensor(folder.path(), up, |b| b[codes..codes + 4].copy_from_slice(&(-1f32).to_le_bytes()));
    let (bad, why) = coded(&["verify", text(&path)], 1);
    assert!(why.contains(up) && why.contains("changed.gguf"), "{why}");
    assert!(bad.lines().last().unwrap().starts_with("verdict "), "{bad}");
    let path = with_tensor(folder.path(), up, |b| {
        b[..codes].fill(0x55);
        b[codes..codes + 4].copy_from_slice(&1e9f32.to_le_bytes());
    });
    let (odd, why) = coded(&["verify", text(&path)], 0);
    assert!(odd.contains(" to 1.000000e9\n") && odd.contains("sound"), "{odd}");
    assert!(why.contains("note: tensor \"blk.2.ffn_up.weight\": all weights are zero"), "{why}");
    let path = with_tensor(folder.path(), up, |b| b[1000] = 0x1b);
    // Who asks for tokens does not wait for the weights.
    assert_eq!(stdout(&["tokenize", "-m", text(&path), "Once"]), stdout(&["tokenize", "Once"]));
    let path = with_tensor(folder.path(), "blk.1.attn_norm.weight", |b| {
        b[40..44].copy_from_slice(&f32::NAN.to_le_bytes());
    });
    fails(&path, "blk.1.attn_norm.weight");
    fails(&path, "element 10 is NaN");
    // A token whose embedding is not finite, once it is used.
    let path = with_tensor(folder.path(), "token_embd.weight", |b| {
        for row in b.chunks_mut(512) {
            row[..2].copy_from_slice(&[0xc0, 0x7f]);
        }
    });
    fails(&path, "holds a NaN or an infinity");
}

#[test]
fn the_layout_of_arm_builds_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let [path, out] = ["arm.gguf", "out.gguf"].map(|name| folder.path().join(name));
    let gguf = Gguf::from_static("demo", DEMO).unwrap();
    let mut bytes = DEMO.to_vec();
    for tensor in gguf.tensors().iter().filter(|t| t.ty == TensorType::I2S) {
        let start = tensor.offset as usize;
        let codes = &mut bytes[start..start + tensor.n_elements() as usize / 4];
        for block in codes.chunks_exact_mut(32) {
            // Weight j of the block in 64s: byte j % 16 of the half it is in, shift 6 - 2 (j % 64 / 16).
            let mut arm = [0u8; 32];
            for j in 0..128 {
                let code = block[j % 32] >> (6 - 2 * (j / 32)) & 3;
                arm[j / 64 * 16 + j % 16] |= code << (6 - 2 * (j % 64 / 16));
            }
            block.copy_from_slice(&arm);
        }
    }
    fs::write(&path, bytes).unwrap();
    for args in [&["run", "-p", "x", "-m", text(&path)][..], &["convert", text(&path), text(&out)]] {
        refused("", args, "layout of ARM builds");
    }
}

#[test]
fn bench_reports_what_scripts_rely_on() {
    let rows = json(&["bench", "-p", "16", "-n", "4", "-b", "2", "-r", "2", "-t", "1", "-o", "json"]);
    let tests: Vec<_> = rows.as_array().unwrap().iter().map(|row| row["test"].as_str().unwrap()).collect();
    assert_eq!(tests, ["pp16", "tg4"]);
    for row in rows.as_array().unwrap() {
        assert_eq!(row["n_threads"], 1);
        assert!(row["kernel"].is_string() && row["tokens_per_second_stddev"].is_number());
        for key in ["tokens_per_second_mean", "stream_read_gb_per_s"] {
            assert!(row[key].as_f64().unwrap() > 0.0, "{key}");
        }
    }
    assert!(rows[0]["roofline_share"].is_null() && rows[0]["n_batch"] == 1);
    assert!(rows[1]["roofline_share"].is_number() && rows[1]["n_batch"] == 2);
    assert_eq!(rows[0]["layout"], "2bit");
    let packed = json(&["bench", "-p", "4", "-n", "0", "-r", "1", "--layout", "base3", "-o", "json"]);
    assert_eq!(packed[0]["layout"], "base3");
    for key in ["live_up_rows", "live_down_columns"] {
        assert!(rows[0][key].is_null() && (0.0..1.0).contains(&rows[1][key].as_f64().unwrap()), "{key}");
    }
}

#[test]
fn the_cache_has_types() {
    let cache = |ty: &str| {
        let all = json(&["inspect", "--json", "--cache-type", ty]);
        all["memory"]["kv_cache_bytes"].as_u64().unwrap()
    };
    let (f32, f16, q8) = (cache("f32"), cache("f16"), cache("q8"));
    assert!(f32 * 2 > f16 * 3 && f16 * 2 > q8 * 3, "{f32} {f16} {q8}");
    let text = |ty: &str| stdout(&[&ONCE[..], &["--cache-type-k", ty]].concat());
    assert_eq!(text("f32"), stdout(&ONCE));
    assert!(!text("f16").is_empty() && text("q8") == text("q8_0"));
    let both = ["--cache-type-k", "q8_0", "--cache-type-v", "q8_0"];
    assert_eq!(stdout(&[&ONCE[..], &both].concat()), text("q8"));
    let rows =
        json(&["bench", "-p", "4", "-n", "2", "-d", "70", "-r", "1", "-o", "json", "--cache-type", "q8"]);
    assert_eq!((&rows[0]["test"], &rows[1]["test"]), (&"pp4 @ d70".into(), &"tg2 @ d70".into()));
}

/// The guide's lines, but for those that need a model, the network or the sources.
#[cfg(unix)]
#[test]
fn what_the_readme_says_works() {
    let folder = tempfile::tempdir().unwrap();
    let program = super::command(&[]);
    let words: Vec<_> = [program.get_program()].into_iter().chain(program.get_args()).collect();
    let readme = include_str!("../../../../README.md").replace("cargo run --release --", "bitnet");
    let needs = ["-m ", "cargo test", "bitnet convert"];
    let mut count = 0;
    for lines in readme.split("```sh\n").skip(1).filter_map(|rest| rest.split("```").next()) {
        if needs.iter().all(|word| !lines.contains(word)) {
            let script = format!("bitnet() {{ {} \"$@\"; }}\n{lines}", words.join(" ".as_ref()).display());
            let ran = Command::new("sh").args(["-ec", &script]).current_dir(&folder).output().unwrap();
            assert!(ran.status.success(), "{lines}: {}", String::from_utf8_lossy(&ran.stderr));
            count += 1;
        }
    }
    assert_eq!(count, 3);
    assert!(fs::read_to_string(folder.path().join("answers.jsonl")).unwrap().starts_with("{\"id\":\"a\""));
}
