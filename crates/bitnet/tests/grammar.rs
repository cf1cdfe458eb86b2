//! Texts that follow schemas and grammars, by the built-in demo model.
#![cfg(feature = "grammar")]
#![allow(clippy::unwrap_used)]

mod common;

use bitnet::generate::{
    Chat, Constraint, ConstraintError, FinishReason, Sampler, SamplerConfig, StopConditions,
};
use bitnet::grammar::{Grammar, Vocabulary};
use bitnet::kernels::best;
use bitnet::text::{HfVocab, Tokenizer};
use bitnet::{Engine, Error};
use common::masked::same_as_masked;
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::{Duration, Instant};

fn engine() -> (Engine, Vocabulary) {
    let engine = common::engine(&common::gguf("demo"), best(), 2, 512, 1);
    let vocabulary = Vocabulary::new(engine.model().tokenizer().unwrap()).unwrap();
    (engine, vocabulary)
}

struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        (self.0 >> 33) % n
    }
}

/// A schema whose texts are short.
fn schema(random: &mut Random, depth: u64) -> Value {
    match random.below(if depth == 0 { 6 } else { 9 }) {
        0 => json!({ "type": "boolean" }),
        1 => {
            let least = random.below(200) as i64 - 100;
            json!({ "type": "integer", "minimum": least, "maximum": least + random.below(5000) as i64 })
        }
        2 => json!({ "type": "string", "maxLength": random.below(12), "minLength": 0 }),
        3 => json!({ "enum": ["tree", 12, null, "a\"b\\c", "Straße 7"] }),
        4 => json!({ "const": random.below(1000) }),
        5 => json!({ "type": "string", "pattern": "^[a-f]{2,5}-[0-9]+x$", "maxLength": 12 }),
        6 => {
            let (least, more) = (random.below(3), random.below(3));
            let items = schema(random, depth - 1);
            json!({ "type": "array", "items": items, "minItems": least, "maxItems": least + more })
        }
        7 => json!({ "anyOf": [schema(random, depth - 1), schema(random, depth - 1)] }),
        _ => {
            let names = ["name", "x", "Größe", "a b"];
            let count = random.below(5) as usize;
            let properties: serde_json::Map<String, Value> =
                names[..count].iter().map(|name| ((*name).to_owned(), schema(random, depth - 1))).collect();
            let required: Vec<_> = names[..count].iter().filter(|_| random.below(2) == 0).collect();
            json!({ "type": "object", "properties": properties, "required": required,
                    "additionalProperties": false })
        }
    }
}

/// Whether a value satisfies a schema of [`schema`].
fn satisfies(schema: &Value, value: &Value) -> bool {
    if let Some(any) = schema["anyOf"].as_array() {
        return any.iter().any(|schema| satisfies(schema, value));
    }
    if let Some(values) = schema["enum"].as_array() {
        return values.contains(value);
    }
    if !schema["const"].is_null() {
        return schema["const"] == *value;
    }
    match schema["type"].as_str().unwrap() {
        "boolean" => value.is_boolean(),
        "integer" => value.as_i64().is_some_and(|n| {
            (schema["minimum"].as_i64().unwrap()..=schema["maximum"].as_i64().unwrap()).contains(&n)
        }),
        "string" => value.as_str().is_some_and(|text| {
            let pattern = schema["pattern"].is_null() || text.ends_with('x') && text.contains('-');
            text.chars().count() as u64 <= schema["maxLength"].as_u64().unwrap() && pattern
        }),
        "array" => value.as_array().is_some_and(|items| {
            let range = schema["minItems"].as_u64().unwrap()..=schema["maxItems"].as_u64().unwrap();
            range.contains(&(items.len() as u64))
                && items.iter().all(|item| satisfies(&schema["items"], item))
        }),
        "object" => value.as_object().is_some_and(|object| {
            let required = schema["required"].as_array().unwrap();
            required.iter().all(|name| object.contains_key(name.as_str().unwrap()))
                && object.iter().all(|(name, value)| {
                    schema["properties"].get(name).is_some_and(|schema| satisfies(schema, value))
                })
        }),
        other => panic!("{other}"),
    }
}

#[test]
fn json_satisfies_its_schema() {
    let (mut engine, vocabulary) = engine();
    let mut random = Random(1);
    let mut complete = 0;
    for round in 0..36 {
        let schema = schema(&mut random, 3);
        let grammar =
            Grammar::json_schema(&schema.to_string()).unwrap_or_else(|error| panic!("{schema}: {error}"));
        let constraint = vocabulary.constraint(&grammar).unwrap();
        let config = SamplerConfig {
            seed: round,
            temperature: [0.0, 0.8, 3.0][round as usize % 3],
            top_k: [1, 5, 0][round as usize / 3 % 3],
            ..SamplerConfig::default()
        };
        let (text, finish) = same_as_masked(&mut engine, &constraint, &config, 120, "Once upon a time");
        if finish == FinishReason::Length {
            continue;
        }
        complete += 1;
        let value = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{schema}: {text}: {error}"));
        assert!(satisfies(&schema, &value), "{schema}: {text}");
    }
    assert!(complete >= 30, "only {complete} came to an end");
}

/// The text of a grammar, which must come to an end.
fn text(engine: &mut Engine, vocabulary: &Vocabulary, grammar: &Grammar, seed: u64) -> String {
    let constraint = vocabulary.constraint(grammar).unwrap();
    let config = SamplerConfig { seed, temperature: 1.5, top_k: 5, ..SamplerConfig::default() };
    let (text, finish) = same_as_masked(engine, &constraint, &config, 200, "Once upon a time");
    assert_ne!(finish, FinishReason::Length, "{text}");
    text
}

#[test]
fn texts_follow_grammars() {
    let (mut engine, vocabulary) = engine();
    let sum = Grammar::lark(
        "start: term (\" + \" term){0,3}\nterm: NUMBER | \"(\" start \")\"\nNUMBER: /[0-9]{1,3}/",
    )
    .unwrap();
    let when = Grammar::regex("[0-9]{4}-(0[1-9]|1[0-2])-[0-3][0-9]|heute|昨日").unwrap();
    let fixed = Grammar::lark("start: \"The quick brown fox jumps over the lazy dog. Größer 昨日\"").unwrap();
    for seed in 0..12 {
        let sum = text(&mut engine, &vocabulary, &sum, seed);
        let depth = sum.chars().try_fold(0i32, |depth, c| {
            let depth = depth + i32::from(c == '(') - i32::from(c == ')');
            (depth >= 0 && "0123456789 +()".contains(c)).then_some(depth)
        });
        assert_eq!(depth, Some(0), "{sum}");
        let when = text(&mut engine, &vocabulary, &when, seed);
        assert!(
            ["heute", "昨日"].contains(&&*when) || when.len() == 10 && when.as_bytes()[7] == b'-',
            "{when}"
        );
        // What is certain takes no step of the model.
        let fixed = text(&mut engine, &vocabulary, &fixed, seed);
        assert_eq!(fixed, "The quick brown fox jumps over the lazy dog. Größer 昨日");
    }
}

#[test]
fn control_tokens_are_in_no_text() {
    let (engine, vocabulary) = engine();
    let model = engine.model();
    let tokenizer = model.tokenizer().unwrap();
    let mut mask = vec![0u32; model.config().vocab_size.div_ceil(32)];
    let all = vocabulary.constraint(&Grammar::lark("start: /(.|\\n)*/").unwrap()).unwrap();
    assert!(all.start().mask(&mut mask).unwrap());
    let allowed = |id: u32| mask[id as usize / 32] >> (id % 32) & 1 == 1;
    for id in 0..model.config().vocab_size as u32 {
        let begins_a_text = !matches!(tokenizer.token_bytes(id), Some([0x80..=0xc1 | 0xf5.., ..]) | None);
        assert!(!(allowed(id) && tokenizer.is_control(id)), "{id}");
        assert!(allowed(id) || tokenizer.is_control(id) || !begins_a_text || id > 300, "{id}");
    }
    // Not even by their numbers.
    for grammar in
        ["start: <[0]>", "start: <[0-4000]>", "start: \"a\" <|eot_id|>", "start: <[*]>", "start: <[^0]>"]
    {
        assert!(Grammar::lark(grammar).is_err_and(|error| error.0.contains("token")), "{grammar}");
    }
}

/// SentencePiece puts a space before what it encodes, and has some texts in two tokens.
#[test]
fn sentencepiece_vocabularies() {
    let vocab =
        HfVocab::parse_sentencepiece(include_bytes!("fixtures/tokenizer/sentencepiece.model")).unwrap();
    let tokenizer = Arc::new(Tokenizer::new(&vocab).unwrap());
    let vocabulary = Vocabulary::new(&tokenizer).unwrap();
    let wanted = "{\"Größe\": 12, \"the end\": \"昨日\"}";
    let fixed = Grammar::lark(&format!("start: {wanted:?} \"a\"?")).unwrap();
    let fixed = vocabulary.constraint(&fixed).unwrap();
    let mut random = Random(3);
    let mut mask = vec![0u32; tokenizer.n_vocab().div_ceil(32)];
    for _ in 0..20 {
        let (mut guide, mut bytes, mut ends) = (fixed.start(), Vec::<u8>::new(), Vec::new());
        loop {
            if guide.mask(&mut mask).unwrap() {
                ends.push(bytes.clone());
            }
            let allowed: Vec<u32> = (0..tokenizer.n_vocab() as u32)
                .filter(|id| mask[*id as usize / 32] >> (id % 32) & 1 == 1)
                .collect();
            if allowed.is_empty() {
                break;
            }
            let id = allowed[random.below(allowed.len() as u64) as usize];
            bytes.extend(tokenizer.token_bytes(id).unwrap());
            guide.push(id).unwrap();
        }
        assert_eq!(ends, [wanted.as_bytes(), format!("{wanted}a").as_bytes()]);
    }
}

#[test]
fn what_is_wrong_is_told_in_a_line() {
    for (result, expected) in [
        (Grammar::json_schema("{\"type\": }"), "line 1 column 10"),
        (Grammar::json_schema("{\"type\": \"strng\"}"), "strng"),
        (Grammar::json_schema("{\"not\": {\"type\": \"string\"}}"), "not"),
        (Grammar::json_schema("{\"type\": \"array\", \"uniqueItems\": true}"), "uniqueItems"),
        (Grammar::json_schema("{\"$ref\": \"https://example.org/schema\"}"), "https://example.org/schema"),
        (Grammar::json_schema("{\"$ref\": \"#/$defs/x\"}"), "x"),
        (Grammar::json_schema("{\"type\": \"integer\", \"minimum\": 5, \"maximum\": 4}"), "minimum"),
        (Grammar::json_schema("false"), "nsatisfiable"),
        (Grammar::lark("start: \"a\"\nb: ("), "line 2"),
        (Grammar::lark("start: thing"), "thing"),
        (Grammar::lark("root ::= \"a\""), "GBNF"),
        (Grammar::regex("a(b"), "unclosed"),
        (Grammar::lark(&"#".repeat(1 << 20)), "bytes"),
    ] {
        let Err(error) = result else { panic!("{expected} was accepted") };
        let message = error.to_string();
        assert!(message.contains(expected) && !message.contains('\n'), "{expected}: {message}");
    }
}

#[test]
fn hostile_grammars_end() {
    let (mut engine, vocabulary) = engine();
    let nested = |n: usize, open: &str, close: &str| open.repeat(n) + "1" + &close.repeat(n);
    let chain = |name: &str, n: usize| {
        let rules = (0..n).map(|i| format!("{name}{i}: {name}{} \"x\"\n", i + 1));
        rules.collect::<String>() + &format!("start: {name}0\n{name}{n}: \"y\"")
    };
    let refs = |n: usize| {
        let defs: Vec<_> = (0..n).map(|i| format!("\"{i}\":{{\"$ref\":\"#/$defs/{}\"}}", i + 1)).collect();
        format!("{{\"$ref\":\"#/$defs/0\",\"$defs\":{{{},\"{n}\":{{\"type\":\"null\"}}}}}}", defs.join(","))
    };
    type Make = fn(&str) -> Result<Grammar, ConstraintError>;
    let (lark, json, regex): (Make, Make, Make) = (Grammar::lark, Grammar::json_schema, Grammar::regex);
    for (what, make, text) in [
        ("brackets", lark, &*format!("start: {}", nested(60_000, "(", ")").replace('1', "\"1\""))),
        ("rules", lark, &chain("r", 7_500)),
        ("terminals", lark, &chain("T", 5_000)),
        ("references", json, &refs(4_500)),
        ("deep JSON", json, &nested(10_000, "{\"items\":", "}")),
        ("groups", regex, &nested(60_000, "(", ")")),
        ("repetition", regex, "((a{1000}){1000}){1000}"),
        ("backtracking", regex, "(a|aa)*b(a*)*c(.*a.{500}){50}"),
        ("lookahead", regex, "(.*a.{300}b)|(.*c.{300}d)"),
        ("ambiguity", lark, "start: start start | start start start | \"a\" | \"\""),
        ("left recursion", lark, "start: start"),
        ("self reference", json, "{\"$ref\": \"#\"}"),
        ("all of itself", json, "{\"allOf\": [{\"$ref\": \"#\"}, {\"type\": \"object\"}]}"),
        ("long string", json, "{\"type\": \"string\", \"minLength\": 100000000}"),
        ("many items", json, "{\"type\": \"array\", \"minItems\": 4000000000}"),
    ] {
        let start = Instant::now();
        let result = make(text).map_err(Error::from).and_then(|grammar| {
            let constraint = vocabulary.constraint(&grammar)?;
            let stop = StopConditions {
                max_tokens: Some(30),
                constraint: Some(constraint),
                ..StopConditions::default()
            };
            let config = SamplerConfig { top_k: 0, temperature: 2.0, ..SamplerConfig::default() };
            common::generated(&mut engine, &[1], &config, &stop)
        });
        let took = start.elapsed();
        eprintln!(
            "{what}: {took:?}: {:?}",
            result.as_ref().map(|(g, _)| (&g.finish, g.tokens.len())).map_err(ToString::to_string)
        );
        // Far longer than a fast machine takes: an emulated one may be busy too.
        assert!(took < Duration::from_secs(120), "{what}: {took:?}");
    }
}

#[test]
fn an_answer_keeps_its_form_when_old_messages_go() {
    let (_, vocabulary) = engine();
    let options = bitnet::EngineOptions { context: 128, ..common::OPTIONS };
    let mut engine =
        common::build(&common::gguf("demo"), bitnet::model::Strategy::SPARSE, best(), 2, options);
    let template = engine.model().chat_template(None).unwrap();
    let mut chat = Chat::new(&mut engine, template);
    let grammar = Grammar::json_schema(
        "{\"type\":\"array\",\"items\":{\"enum\":[1000,2000]},\"minItems\":9,\"maxItems\":9}",
    )
    .unwrap();
    let constraint: Arc<dyn Constraint> = vocabulary.constraint(&grammar).unwrap();
    let stop = StopConditions { constraint: Some(constraint), ..StopConditions::default() };
    let mut sampler = Sampler::new(SamplerConfig::default()).unwrap();
    let mut dropped = 0;
    for question in 0..6 {
        chat.ask(format!("Question {question}"));
        let mut text = String::new();
        let answer = chat.answer(&mut engine, &mut sampler, &stop, &mut common::writing(&mut text)).unwrap();
        dropped += answer.dropped;
        assert!(answer.generated.complete, "{text}");
        let items: Vec<u64> = serde_json::from_str(&text).unwrap();
        assert!(items.len() == 9 && items.iter().all(|item| [1000, 2000].contains(item)), "{text}");
    }
    assert!(dropped > 0);
}
