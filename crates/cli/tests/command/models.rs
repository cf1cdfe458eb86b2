//! `convert`, `verify` and `doctor` as a user runs them.

use super::{DEMO, DEMO_PATH, coded};
use std::fs;

#[test]
fn a_converted_model_writes_the_same_text() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let run = ["run", "-q", "-p", "Once upon a time", "-n", "16", "--seed", "7"];
    let expected = coded(&run, 0).0;
    let mut hashes = Vec::new();
    let mut from = DEMO_PATH.to_owned();
    for ty in ["tq1_0", "IQ2_BN", "i2_s"] {
        let out = path(&format!("{ty}.gguf"));
        fs::write(path(&format!(".{ty}.gguf.killed.tmp")), "").unwrap();
        let (stdout, stderr) = coded(&["convert", &from, &out, "--type", ty], 0);
        assert_eq!(coded(&["convert", "-q", &from, &out, "--type", ty], 0), (stdout.clone(), String::new()));
        assert!(stderr.contains("verified") && stderr.contains(&ty.to_uppercase()), "{stderr}");
        hashes.push(stdout);
        assert_eq!(coded(&[&run[..], &["-m", &out]].concat(), 0).0, expected, "{ty}");
        from = out;
    }
    assert!(hashes[0].starts_with("trits ") && hashes.iter().all(|hash| *hash == hashes[0]), "{hashes:?}");
    let (verified, _) = coded(&["verify", &from], 0);
    assert!(verified.contains(hashes[0].trim_end().trim_start_matches("trits ")), "{verified}");
    let hidden = fs::read_dir(folder.path())
        .unwrap()
        .filter(|file| file.as_ref().unwrap().file_name().to_str().unwrap().starts_with('.'));
    assert!(cfg!(not(unix)) || hidden.count() == 0, "what a killed conversion left");
    let refused = coded(&["convert", &from, &from], 1).1;
    assert!(refused.contains("this is the input"), "{refused}");
    coded(&["convert", &from, &path("x.gguf"), "--type", "q4_0"], 2);
}

#[test]
fn verify_tells_sound_from_damaged() {
    let folder = tempfile::tempdir().unwrap();
    let (found, _) = coded(&["verify"], 0);
    for word in
        ["structure", "weights", "scales", "trits", "generation", "Once upon a time", "the model is sound"]
    {
        assert!(found.contains(word), "{word}: {found}");
    }
    // In the hub's cache a file is called by its checksum.
    let wrong = folder.path().join("0".repeat(64));
    fs::write(&wrong, DEMO).unwrap();
    assert!(coded(&["verify", wrong.to_str().unwrap()], 1).1.contains("SHA-256"));
    let found = coded(&["verify", DEMO_PATH], 0).0;
    assert!(found.contains("there is no checksum to compare"), "{found}");
    let cut = folder.path().join("cut.gguf");
    fs::write(&cut, &DEMO[..DEMO.len() - 100]).unwrap();
    let (found, error) = coded(&["verify", cut.to_str().unwrap()], 1);
    assert!(
        found.starts_with("verdict     the model did not pass") && error.contains("truncated"),
        "{found}{error}"
    );
}

#[test]
fn doctor_says_what_there_is_and_proves_the_kernels() {
    let (found, _) = coded(&["doctor"], 0);
    let has = |start: &str, words: &str| {
        found.lines().any(|line| line.starts_with(&format!("{start:<12}")) && line.contains(words))
    };
    for start in "cpu features cores arithmetic kernel rows limit".split(' ') {
        assert!(has(start, ""), "{start}: {found}");
    }
    assert!(has("bandwidth", "GB/s") && has("speed", "tokens/s") && has("proof", "scalar"), "{found}");
    assert!(found.lines().count() <= 24 && found.contains("2B-4T"), "{found}");
    let named = coded(&["doctor", DEMO_PATH, "--kernels", "scalar", "-t", "1"], 0).0;
    assert!(named.contains("as asked for") || named.contains("scalar: the best"), "{named}");
    assert!(!named.contains("2B-4T"), "{named}");
}
