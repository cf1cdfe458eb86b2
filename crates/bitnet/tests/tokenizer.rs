//! The tokenizer against Hugging Face's, on fixtures from `tools/make_tokenizer_goldens.py`, and its properties.
#![allow(clippy::unwrap_used)] // a test fails by panicking

use std::sync::LazyLock;

use bitnet::text::{
    HfVocab, Numerals, Prefix, Specials, Split, StopStrings, TextStream, Tokenizer, TokenizerError, Vocab,
};
use proptest::prelude::*;
use serde::Deserialize;
use serde_json::{Value, json};

const DEMO_JSON: &[u8] = include_bytes!("fixtures/tokenizer/demo-tokenizer.json");

static DEMO: LazyLock<Tokenizer> =
    LazyLock::new(|| Tokenizer::new(&HfVocab::parse(DEMO_JSON).unwrap()).unwrap());

#[derive(Deserialize)]
struct Case {
    text: String,
    ids: Vec<u32>,
    /// With special tokens recognised, where that differs.
    parsed: Option<Vec<u32>>,
}

/// The part of the LLaMA-3 vocabulary that the cases can touch.
#[derive(Deserialize)]
struct Extract {
    n_vocab: usize,
    ids: Vec<u32>,
    tokens: Vec<String>,
    special_ids: Vec<u32>,
    specials: Vec<String>,
    merges: Vec<String>,
    cases: Vec<Case>,
}

fn assert_cases(tokenizer: &Tokenizer, cases: &[Case]) {
    assert!(cases.len() > 100);
    for Case { text, ids, parsed } in cases {
        assert_eq!(&tokenizer.encode(text, Specials::AsText), ids, "{text:?} as text");
        let parsed = parsed.as_ref().unwrap_or(ids);
        assert_eq!(&tokenizer.encode(text, Specials::Parse), parsed, "{text:?} parsed");
        assert_eq!(tokenizer.decode(ids, false).unwrap(), text.as_bytes());
        assert_eq!(tokenizer.decode(parsed, true).unwrap(), text.as_bytes());
    }
}

#[test]
fn demo_tokenizer_equals_reference() {
    assert_cases(
        &DEMO,
        &serde_json::from_str::<Vec<Case>>(include_str!("fixtures/tokenizer/demo-cases.json")).unwrap(),
    );
}

#[test]
fn llama3_extract_equals_reference() {
    let extract: Extract =
        serde_json::from_str(include_str!("fixtures/tokenizer/llama3-extract.json")).unwrap();
    // All ids are as in the whole vocabulary; those between are unused.
    let mut tokens = vec![""; extract.n_vocab];
    let mut token_types = vec![5; extract.n_vocab];
    let normal = extract.ids.iter().zip(&extract.tokens).map(|pair| (pair, 1));
    let control = extract.special_ids.iter().zip(&extract.specials).map(|pair| (pair, 3));
    for ((&id, token), token_type) in normal.chain(control) {
        tokens[id as usize] = token;
        token_types[id as usize] = token_type;
    }
    let merges = extract.merges.iter().map(String::as_str).collect();
    let tokenizer =
        Tokenizer::new(&Vocab { tokens, token_types, merges, ignore_merges: true, ..Vocab::default() })
            .unwrap();
    assert_cases(&tokenizer, &extract.cases);
    assert_eq!(tokenizer.n_vocab(), 128_256);
    assert_eq!(tokenizer.token_id("<|eot_id|>"), Some(128_009));
    assert_eq!(tokenizer.token_id(" the"), Some(279));
    assert!(tokenizer.is_control(128_009) && !tokenizer.is_control(279) && !tokenizer.is_control(u32::MAX));
    assert_eq!(tokenizer.token_bytes(128_009), Some(&b"<|eot_id|>"[..]));
    assert_eq!(tokenizer.decode(&[128_000, 279, 128_009], false).unwrap(), b" the");
    assert!(matches!(
        tokenizer.decode(&[128_256], true),
        Err(TokenizerError::UnknownId { id: 128_256, n_vocab: 128_256 })
    ));
}

#[test]
fn sentencepiece_agrees_with_its_library() {
    let model = include_bytes!("fixtures/tokenizer/sentencepiece.model");
    let vocab = HfVocab::parse_sentencepiece(model).unwrap();
    let tokenizer = Tokenizer::new(&vocab).unwrap();
    // Hugging Face's form of the same, which gives the same tokens there too.
    let json = include_bytes!("fixtures/tokenizer/sentencepiece-tokenizer.json");
    let other = HfVocab::parse(json).unwrap();
    assert!(other.merges.len() == 349 && other.tokens == vocab.tokens);
    let types = |vocab: &HfVocab| {
        vocab.token_types.iter().map(|ty| if *ty == 2 { 3 } else { *ty }).collect::<Vec<_>>()
    };
    assert_eq!(types(&other), types(&vocab));
    let by_merges = Tokenizer::new(&other).unwrap();
    let by_scores = Tokenizer::new(&Vocab { merges: Vec::new(), ..other.clone() }).unwrap();
    let cases: Vec<(String, Vec<u32>)> =
        serde_json::from_str(include_str!("fixtures/tokenizer/sentencepiece.json")).unwrap();
    assert!(cases.len() > 100);
    for (text, ids) in cases {
        for tokenizer in [&tokenizer, &by_merges, &by_scores] {
            assert_eq!(tokenizer.encode(&text, Specials::AsText), ids, "{text:?}");
        }
        let back = tokenizer.decode(&ids, false).unwrap();
        assert_eq!(String::from_utf8(back).unwrap(), text.replace('▁', " "));
    }
    assert_eq!(other.split, vocab.split);
    // Each part between control tokens begins with a space of its own, as in llama.cpp.
    let parts = ["a", "</s>", "b"].map(|part| tokenizer.encode(part, Specials::Parse));
    assert_eq!(tokenizer.encode("a</s>b", Specials::Parse), parts.concat());
    assert!(tokenizer.is_control(parts[1][0]) && tokenizer.decode(&parts[2], true).unwrap() == b"b");
    // What it says of the text before: 3, 4 and 5 are booleans, 2 is a table.
    let with = |more: &[u8]| {
        let mut changed = model.to_vec();
        changed.extend([&[0x1a, more.len() as u8], more].concat());
        HfVocab::parse_sentencepiece(&changed)
    };
    assert_eq!(with(&[]).unwrap(), vocab);
    assert_eq!(with(&[0x18, 0]).unwrap().split, Split::Sentence { prefix: Prefix::Never, at_spaces: false });
    assert!([&[0x12, 1, 7][..], &[0x20, 1], &[0x28, 0]].map(with).iter().all(Option::is_none));
    for cut in 0..model.len() {
        let _ = HfVocab::parse_sentencepiece(&model[..cut]);
    }
}

#[test]
fn metaspace_equals_the_reference() {
    #[derive(Deserialize)]
    struct Variant {
        pre_tokenizer: Value,
        cases: Vec<(String, Vec<u32>, Vec<u32>)>,
    }
    let variants: Vec<Variant> =
        serde_json::from_str(include_str!("fixtures/tokenizer/metaspace-cases.json")).unwrap();
    let mut file: Value =
        serde_json::from_str(include_str!("fixtures/tokenizer/sentencepiece-tokenizer.json")).unwrap();
    let normalizer = file["normalizer"].take();
    let parse = |file: &Value| HfVocab::parse(file.to_string().as_bytes());
    let mut splits = Vec::new();
    for Variant { pre_tokenizer, cases } in variants {
        file["pre_tokenizer"] = pre_tokenizer;
        let vocab = parse(&file).unwrap();
        let tokenizer = Tokenizer::new(&vocab).unwrap();
        assert!(cases.len() > 40);
        for (text, ids, parsed) in cases {
            assert_eq!(tokenizer.encode(&text, Specials::AsText), ids, "{text:?} with {:?}", vocab.split);
            assert_eq!(tokenizer.encode(&text, Specials::Parse), parsed, "{text:?} with {:?}", vocab.split);
        }
        let plain = tokenizer.encode("a", Specials::AsText);
        assert_eq!(tokenizer.decode(&plain, false).unwrap(), b"a");
        splits.push(vocab.split);
    }
    let expected = [Prefix::Always, Prefix::First, Prefix::Never]
        .map(|prefix| [false, true].map(|at_spaces| Split::Sentence { prefix, at_spaces }));
    assert_eq!(splits, expected.concat());
    // Older files, and what is left out.
    for (fields, split) in [
        (json!({}), expected[0][1]),
        (json!({"add_prefix_space": true}), expected[0][1]),
        (json!({"add_prefix_space": false, "split": false}), expected[2][0]),
    ] {
        file["pre_tokenizer"] = json!({"type": "Metaspace", "replacement": "\u{2581}"});
        file["pre_tokenizer"].as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        assert_eq!(parse(&file).unwrap().split, split);
    }
    file["model"]["ignore_merges"] = true.into();
    let refused = |file: &Value| match parse(file) {
        Err(TokenizerError::Unsupported { what, .. }) => what,
        _ => "",
    };
    assert_eq!(refused(&file), "model.ignore_merges");
    file["pre_tokenizer"]["prepend_scheme"] = "last".into();
    assert_eq!(refused(&file), "pre_tokenizer");
    file["pre_tokenizer"]["prepend_scheme"] = "first".into();
    file["normalizer"] = normalizer;
    assert_eq!(refused(&file), "pre_tokenizer");
}

#[test]
fn long_pieces_take_little_more_than_linear_time() {
    // Quadratic time would be hours.
    let n = 1 << 20;
    for unit in ["a", "ab", "abcdefghij", "ж", "!", " ", "\n ", "日", "<"] {
        let text = unit.repeat(n / unit.len());
        let ids = DEMO.encode(&text, Specials::Parse);
        assert_eq!(DEMO.decode(&ids, false).unwrap(), text.as_bytes());
    }
}

/// All bytes, then `tokens` with their types, then merges.
fn build(tokens: &[(&str, i32)], merges: &[&str], ignore_merges: bool) -> Result<Tokenizer, TokenizerError> {
    let demo = HfVocab::parse(DEMO_JSON).unwrap();
    let bytes =
        demo.tokens.iter().filter(|token| token.chars().count() == 1).map(|token| (token.as_str(), 1));
    let (tokens, token_types) = bytes.chain(tokens.iter().copied()).unzip();
    Tokenizer::new(&Vocab { tokens, token_types, merges: merges.to_vec(), ignore_merges, ..Vocab::default() })
}

fn spell(tokenizer: &Tokenizer, text: &str, specials: Specials) -> Vec<String> {
    let ids = tokenizer.encode(text, specials);
    ids.iter().map(|&id| String::from_utf8_lossy(tokenizer.token_bytes(id).unwrap()).into_owned()).collect()
}

#[test]
fn merges_apply_by_rank_whatever_the_ids() {
    let tokens = [("abc", 1), ("bc", 1), ("ab", 1), ("abcd", 1)];
    let by_merges = build(&tokens, &["b c", "a b", "ab c"], false).unwrap();
    assert_eq!(spell(&by_merges, "abc", Specials::AsText), ["a", "bc"]);
    assert_eq!(spell(&by_merges, "abab", Specials::AsText), ["ab", "ab"]);
    let whole = build(&tokens, &["b c", "a b", "ab c"], true).unwrap();
    assert_eq!(spell(&whole, "abc abcd", Specials::AsText), ["abc", " ", "a", "bc", "d"]);
    let triple = build(&[("aa", 1), ("aaa", 1)], &["a a", "aa a"], false).unwrap();
    assert_eq!(spell(&triple, "aaaaa", Specials::AsText), ["aa", "aaa"]);
}

#[test]
fn special_tokens_are_leftmost_longest_and_opt_in() {
    let tokens = [("<s>", 3), ("<s><t>", 3), ("<sx", 3), ("{u v}", 4), ("{u", 4), ("<unused>", 5), ("é!", 3)];
    let tokenizer = build(&tokens, &[], true).unwrap();
    assert_eq!(spell(&tokenizer, "<s><t><s><s<sx", Specials::Parse), ["<s><t>", "<s>", "<", "s", "<sx"]);
    assert_eq!(spell(&tokenizer, "{u v{u v}<s>", Specials::AsText), ["{u", " ", "v", "{u v}", "<", "s", ">"]);
    assert_eq!(spell(&tokenizer, "éé!", Specials::Parse).last().unwrap(), "é!");
    assert_eq!(spell(&tokenizer, "<unused>", Specials::Parse).len(), 8);
    assert_eq!(tokenizer.token_id("{u v}").map(|id| tokenizer.is_control(id)), Some(false));
}

#[test]
fn hostile_vocabularies_are_refused() {
    const FORM: &str = "is not of the form";
    for (tokens, merges, problem) in [
        (&[("ab", 1)][..], &["ab"][..], FORM),
        (&[("ab", 1)], &["a b c"], FORM),
        (&[("ab", 1)], &["a b", ""], "merge 1 (\"\") is not of the form"),
        (&[("ab", 1)], &["a b", " "], FORM),
        (&[("ab", 1)], &["a b", "a "], FORM),
        (&[("ab", 1)], &["a b", " b"], FORM),
        (&[("ab", 1)], &["a b", "a\u{200b} b"], FORM),
        (&[("ab", 1)], &["xy a"], "its left part"),
        (&[("ab", 1)], &["a xy"], "its right part"),
        (&[("ab", 1)], &["a c"], "its result"),
        (&[("ab", 1), ("<s>", 3)], &["< s>"], "its right part"),
        (&[("ab", 1)], &["a b", "a b"], "merge 1 (\"a b\") is the same as merge 0"),
        (&[("a", 1)], &[], "token 256 is the same as token "),
        (&[("<s>", 3), ("<s>", 4)], &[], "token 257 is the same as token 256"),
        (&[("", 3)], &[], "token 256 is empty"),
        (&[("a b", 1)], &[], "has the character ' '"),
        (&[("漢", 1)], &[], "has the character '漢'"),
        (&[("x", 6)], &[], "is of type 6"),
    ] {
        let error = build(tokens, merges, true).err().unwrap().to_string();
        assert!(error.contains(problem), "{error}");
    }
    let short = Vocab { tokens: vec!["a"], ..Vocab::default() };
    assert!(matches!(Tokenizer::new(&short), Err(TokenizerError::Lengths { tokens: 1, types: 0 })));
    let no_bytes = Vocab { token_types: vec![1], ..short };
    assert!(matches!(Tokenizer::new(&no_bytes), Err(TokenizerError::MissingByte { byte: 0 })));
}

#[test]
fn falcon_splits_equal_the_reference() {
    #[derive(Deserialize)]
    struct Variant {
        pre_tokenizer: Value,
        cases: Vec<(String, Vec<u32>)>,
    }
    let variants: Vec<Variant> =
        serde_json::from_str(include_str!("fixtures/tokenizer/falcon-cases.json")).unwrap();
    let mut demo: Value = serde_json::from_slice(DEMO_JSON).unwrap();
    demo["model"]["ignore_merges"] = false.into();
    let mut splits = Vec::new();
    for Variant { pre_tokenizer, cases } in variants {
        demo["pre_tokenizer"] = pre_tokenizer;
        let vocab = HfVocab::parse(demo.to_string().as_bytes()).unwrap();
        splits.push(vocab.split);
        let tokenizer = Tokenizer::new(&vocab).unwrap();
        assert!(cases.len() > 50);
        for (text, ids) in cases {
            assert_eq!(tokenizer.encode(&text, Specials::AsText), ids, "{text:?} with {:?}", vocab.split);
        }
    }
    let falcon = |digits, numerals| Split::Falcon { digits, numerals };
    let expected =
        [falcon(3, Some(Numerals::Runs)), falcon(1, None), falcon(1, Some(Numerals::Each)), falcon(3, None)];
    assert_eq!(splits, expected);
    // Other steps are not guessed at.
    let steps = demo["pre_tokenizer"]["pretokenizers"].as_array().unwrap().clone();
    for wrong in [&steps[1..], &steps[..1], &steps[..2], &[&steps[..], &steps[2..]].concat()] {
        demo["pre_tokenizer"]["pretokenizers"] = wrong.into();
        let parsed = HfVocab::parse(demo.to_string().as_bytes());
        assert!(matches!(parsed, Err(TokenizerError::Unsupported { what: "pre_tokenizer", .. })));
    }
}

#[test]
fn tokenizer_json_of_another_kind_is_refused() {
    let parse = |from: &str, to: &str| {
        let json = std::str::from_utf8(DEMO_JSON).unwrap();
        assert!(json.contains(from), "{from}");
        HfVocab::parse(json.replacen(from, to, 1).as_bytes())
    };
    let refused = |from, to| match parse(from, to) {
        Err(TokenizerError::Unsupported { what, .. }) => what,
        _ => "",
    };
    assert_eq!(refused(r"\\p{N}{1,3}", r"\\p{N}"), "pre_tokenizer");
    assert_eq!(refused(r#""use_regex":false"#, r#""use_regex":true"#), "pre_tokenizer");
    assert_eq!(refused(r#""normalizer":null"#, r#""normalizer":{"type":"NFC"}"#), "normalizer");
    assert_eq!(refused(r#""type":"BPE""#, r#""type":"Unigram""#), "model.type");
    assert_eq!(refused(r#""byte_fallback":false"#, r#""byte_fallback":true"#), "pre_tokenizer");
    assert_eq!(refused(r#""lstrip":false"#, r#""lstrip":true"#), "an added token");
    assert!(matches!(parse(r#""\"":1"#, r#""\"":4294967295"#), Err(TokenizerError::Ids { count: 4096, .. })));
    assert!(matches!(parse(r#""\"":1"#, r#""\"":2"#), Err(TokenizerError::Ids { count: 4096, .. })));
    assert!(matches!(HfVocab::parse(b"{}"), Err(TokenizerError::Json(_))));

    // Merges as text, and added tokens that are not special, are the same to us.
    let vocab = HfVocab::parse(DEMO_JSON).unwrap();
    assert!(vocab.ignore_merges && vocab.merges.len() == 3832);
    assert_eq!(
        (vocab.tokens.len(), vocab.tokens[4092].as_str(), vocab.token_types[4092]),
        (4096, "<|eot_id|>", 3)
    );
    assert_eq!(parse(r#"["h","e"]"#, r#""h e""#).unwrap(), vocab);
    assert_eq!(parse(r#""special":true"#, r#""special":false"#).unwrap().token_types[4088], 4);
}

/// Strings with much of what the split and the special tokens look for.
fn any_text() -> impl Strategy<Value = String> {
    let bits = " /  /\n/\r\n/\t/'/'s/'LL/ſ/the/ king/123/²/é/e\u{301}/日本/👩‍🚀/<|eot_id|>/<|/|>/\u{a0}/\u{3000}/\u{85}/!?/\0";
    let bits = prop::sample::select(bits.split('/').collect::<Vec<_>>());
    let part = prop_oneof![bits.prop_map(str::to_owned), any::<char>().prop_map(String::from), ".{0,8}"];
    prop::collection::vec(part, 0..40).prop_map(|parts| parts.concat())
}

/// Cuts into parts at any of the given places that `allowed` allows.
fn cut<'a>(bytes: &'a [u8], cuts: &[usize], allowed: impl Fn(usize) -> bool) -> Vec<&'a [u8]> {
    let mut ends: Vec<usize> =
        cuts.iter().map(|cut| cut % (bytes.len() + 1)).filter(|&at| allowed(at)).collect();
    ends.push(bytes.len());
    ends.sort_unstable();
    let mut start = 0;
    ends.into_iter().map(|end| &bytes[std::mem::replace(&mut start, end)..end]).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn decode_of_encode_is_the_text(text in any_text()) {
        let plain = DEMO.encode(&text, Specials::AsText);
        prop_assert!(!plain.iter().any(|&id| DEMO.is_control(id)));
        prop_assert_eq!(DEMO.decode(&plain, false).unwrap(), text.as_bytes());
        prop_assert_eq!(DEMO.decode(&DEMO.encode(&text, Specials::Parse), true).unwrap(), text.as_bytes());
    }

    #[test]
    fn heap_equals_merging_one_pair_at_a_time(text in "[a-c]{0,24}", seed in prop::collection::vec(any::<usize>(), 30)) {
        let (tokens, merges) = random_merges(&seed);
        let types: Vec<(&str, i32)> = tokens.iter().map(|token| (token.as_str(), 1)).collect();
        let list: Vec<String> = merges.iter().map(|(left, right)| format!("{left} {right}")).collect();
        let tokenizer = build(&types, &list.iter().map(String::as_str).collect::<Vec<_>>(), false).unwrap();
        let mut parts: Vec<String> = text.chars().map(String::from).collect();
        while let Some((_, at)) = (1..parts.len())
            .filter_map(|at| {
                let same = |(left, right): &(String, String)| *left == parts[at - 1] && *right == parts[at];
                Some((merges.iter().position(same)?, at))
            })
            .min()
        {
            let right = parts.remove(at);
            parts[at - 1].push_str(&right);
        }
        prop_assert_eq!(spell(&tokenizer, &text, Specials::AsText), parts);
    }

    #[test]
    fn stream_gives_whole_characters(
        text in any_text(),
        noise in prop::collection::vec((any::<usize>(), any::<u8>()), 0..4),
        cuts in prop::collection::vec(any::<usize>(), 0..60),
    ) {
        let mut bytes = text.into_bytes();
        for (at, byte) in noise {
            bytes.insert(at % (bytes.len() + 1), byte);
        }
        let mut stream = TextStream::default();
        let mut out = String::new();
        let mut fed = 0;
        for part in cut(&bytes, &cuts, |_| true) {
            fed += part.len();
            out.push_str(stream.push(part));
            // All but the start of one character is out.
            let due = String::from_utf8_lossy(&bytes[..fed]);
            let whole = due.strip_suffix(char::REPLACEMENT_CHARACTER);
            prop_assert!(due == out || whole == Some(&out));
        }
        out.push_str(stream.finish());
        prop_assert_eq!(out, String::from_utf8_lossy(&bytes));
        prop_assert_eq!(stream.finish(), "");
    }

    #[test]
    fn stop_strings_equal_a_naive_search(
        text in "[abé]{0,30}",
        stops in prop::collection::vec("[abé]{0,5}", 0..4),
        cuts in prop::collection::vec(any::<usize>(), 0..30),
    ) {
        // The first end of a stop string, and the longest that ends there.
        let found = (0..=text.len()).filter(|&end| text.is_char_boundary(end)).find_map(|end| {
            let here = stops.iter().filter(|stop| !stop.is_empty() && text[..end].ends_with(stop.as_str()));
            here.map(|stop| &text[..end - stop.len()]).min_by_key(|before| before.len())
        });
        let mut matcher = StopStrings::new(&stops);
        for _ in 0..2 {
            let (mut out, mut stop, mut fed) = (String::new(), None, 0);
            for part in cut(text.as_bytes(), &cuts, |at| text.is_char_boundary(at)) {
                fed += part.len();
                let (part, found) = matcher.push(std::str::from_utf8(part).unwrap());
                out.push_str(part);
                stop = found;
                // No more is held back than the start of a stop string.
                let held = &text[out.len()..fed.max(out.len())];
                prop_assert!(stop.is_some() || held.is_empty() || stops.iter().any(|stop| stop.starts_with(held)));
            }
            prop_assert_eq!(stop.is_some(), found.is_some());
            let text_of = |index: usize| stops[index].as_str();
            prop_assert!(stop.is_none_or(|index| text[out.len()..].starts_with(text_of(index))));
            out.push_str(&matcher.finish());
            prop_assert_eq!(&out, found.unwrap_or(&text));
        }
    }
}

/// Tokens of a, b, c and merges that lead to them, in no order of length.
fn random_merges(seed: &[usize]) -> (Vec<String>, Vec<(String, String)>) {
    let mut tokens: Vec<String> = ["a", "b", "c"].map(String::from).to_vec();
    let mut merges = Vec::new();
    for pair in seed.chunks_exact(2) {
        let merge = (tokens[pair[0] % tokens.len()].clone(), tokens[pair[1] % tokens.len()].clone());
        let merged = format!("{}{}", merge.0, merge.1);
        if !merges.contains(&merge) && merged.len() <= 8 {
            if !tokens.contains(&merged) {
                tokens.push(merged);
            }
            let at = pair[0] / 7 % (merges.len() + 1);
            merges.insert(at, merge);
        }
    }
    (tokens.split_off(3), merges)
}
