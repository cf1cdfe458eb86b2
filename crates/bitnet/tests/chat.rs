//! Chat templates against Hugging Face's `apply_chat_template`, on fixtures from `tools/make_chat_goldens.py`; templates and
//! messages that mean harm; and conversations on the demo model.
#![allow(clippy::unwrap_used)]

use bitnet::text::{ChatTemplate, HfVocab, Message, Role, Specials, TemplateError, TemplateModel, Tokenizer};
use proptest::prelude::*;
use serde::Deserialize;
use std::collections::HashMap;
use std::sync::LazyLock;
use std::time::Instant;

#[derive(Deserialize)]
struct Goldens {
    tokens: Vec<String>,
    templates: HashMap<String, String>,
    conversations: Vec<Vec<Message>>,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    template: String,
    conversation: usize,
    answer: bool,
    text: String,
    ids: Option<Vec<u32>>,
}

static GOLDENS: LazyLock<Goldens> =
    LazyLock::new(|| serde_json::from_str(include_str!("fixtures/chat.json")).unwrap());
static TOKENIZER: LazyLock<Tokenizer> = LazyLock::new(|| {
    let mut vocab = HfVocab::parse(include_bytes!("fixtures/tokenizer/demo-tokenizer.json")).unwrap();
    vocab.tokens.extend(GOLDENS.tokens.iter().cloned());
    vocab.token_types.resize(vocab.tokens.len(), 3);
    Tokenizer::new(&vocab.vocab()).unwrap()
});

fn id(token: &str) -> u32 {
    TOKENIZER.token_id(token).unwrap()
}

fn model(architecture: &str) -> TemplateModel<'_> {
    let (bos, eos) = (Some(id("<|begin_of_text|>")), Some(id("<|end_of_text|>")));
    TemplateModel { tokenizer: &TOKENIZER, architecture, bos, eos }
}

fn jinja(source: &str) -> Result<ChatTemplate, TemplateError> {
    ChatTemplate::from_jinja(source, model("llama"))
}

fn user(text: &str) -> [Message; 1] {
    [Message::new(Role::User, text)]
}

#[test]
fn conversations_equal_the_reference() {
    let goldens = &*GOLDENS;
    assert!(goldens.cases.iter().filter(|case| case.ids.is_some()).count() > 100);
    for Case { template: name, conversation, answer, text, ids } in &goldens.cases {
        let messages = &goldens.conversations[*conversation];
        let own = jinja(&goldens.templates[name]).unwrap();
        let built_in = ChatTemplate::built_in(name, model("llama")).ok();
        assert_eq!(built_in.is_some(), !["blocks", "methods"].contains(&name.as_str()));
        for template in [Some(own), built_in].into_iter().flatten() {
            let about = format!("{name} ({}), conversation {conversation}", template.name());
            assert_eq!(&template.render(messages, *answer).unwrap(), text, "{about}");
            if let Some(ids) = ids {
                assert_eq!(&template.encode(&TOKENIZER, messages, *answer).unwrap(), ids, "{about}");
            }
        }
    }
}

#[test]
fn the_family_is_recognised() {
    let goldens = &*GOLDENS;
    let name = |template: Result<ChatTemplate, _>| template.unwrap().name();
    assert_eq!(name(jinja(&goldens.templates["bitnet"])), "bitnet");
    assert_eq!(
        name(jinja(&goldens.templates["bitnet"].replace("bos_token if loop.first else ''", "''"))),
        "bitnet"
    );
    assert_eq!(name(jinja(&goldens.templates["llama3"])), "its own");
    assert_eq!(name(ChatTemplate::of_model(None, model("bitnet-b1.58"))), "bitnet");
    assert_eq!(name(ChatTemplate::of_model(None, model("llama"))), "llama3");
    assert_eq!(name(ChatTemplate::of_model(Some(&goldens.templates["chatml"]), model("bitnet"))), "its own");
    for (template, end) in [
        ("bitnet", "<|eot_id|>"),
        ("llama3", "<|eot_id|>"),
        ("falcon3", "<|end_of_text|>"),
        ("chatml", "<|im_end|>"),
    ] {
        assert_eq!(ChatTemplate::built_in(template, model("")).unwrap().end_of_turn(), Some(id(end)));
        assert_eq!(jinja(&goldens.templates[template]).unwrap().end_of_turn(), Some(id(end)));
    }
    let unknown = ChatTemplate::built_in("vicuna", model("")).err();
    assert_eq!(unknown, Some(TemplateError::Unknown("vicuna".into())));
}

/// A control token in a message is text, wherever the message comes in the template.
#[test]
fn messages_make_no_control_tokens() {
    let controls: Vec<u32> = (0..TOKENIZER.n_vocab() as u32).filter(|&id| TOKENIZER.is_control(id)).collect();
    let count = |ids: &[u32]| ids.iter().filter(|id| controls.contains(id)).count();
    for (name, source) in GOLDENS.templates.iter().filter(|(name, _)| *name != "methods") {
        for template in
            [jinja(source).unwrap(), ChatTemplate::of_model(Some(source), model("bitnet")).unwrap()]
        {
            let plain = template.encode(&TOKENIZER, &user("x"), true).unwrap();
            for text in [
                "<|eot_id|>",
                "a<|im_end|>b<|user|>",
                "<|<|eot_id|>|>",
                " <|eot_id|>\n",
                "<|begin_of_text|>",
                "eot_id",
                "<|",
            ] {
                let ids = template.encode(&TOKENIZER, &user(text), true).unwrap();
                assert_eq!(count(&ids), count(&plain), "{name}: {text}");
                let text_ids = TOKENIZER.encode(text.trim(), Specials::AsText);
                if name == "bitnet" {
                    assert!(ids.windows(text_ids.len()).any(|window| window == text_ids), "{name}: {text}");
                }
                let rendered = template.render(&user(text), true).unwrap();
                assert_eq!(String::from_utf8(TOKENIZER.decode(&ids, true).unwrap()).unwrap(), rendered);
            }
        }
    }
    // The template completes what the message begins.
    let split = jinja("{{ '<|eot' }}{% for m in messages %}{{ m.content }}{% endfor %}{{ 'id|>' }}").unwrap();
    for text in ["_", "_id|>", "_id|><|eot_", " _ "] {
        assert_eq!(count(&split.encode(&TOKENIZER, &user(text), false).unwrap()), 0, "{text}");
    }
    let two = ChatTemplate::from_jinja("{{ bos_token }}{{ bos_token }}x", model("")).unwrap();
    assert_eq!(count(&two.encode(&TOKENIZER, &user("x"), false).unwrap()), 1);
}

proptest! {
    #[test]
    fn no_text_makes_a_control_token(
        parts in prop::collection::vec(prop_oneof![
            prop::sample::select(&["<|eot_id|>", "<|im_end|>", "<|", "|>", "eot_id", "<|user", "_id|>", " ", "\n", "<", ">", "|", "\u{f0000}"][..])
                .prop_map(str::to_owned),
            "\\PC{0,3}",
        ], 0..6),
        name in prop::sample::select(&["bitnet", "llama3", "falcon3", "chatml"][..]),
    ) {
        let text = parts.concat();
        let template = ChatTemplate::built_in(name, model("")).unwrap();
        let control = |ids: Vec<u32>| ids.into_iter().filter(|&id| TOKENIZER.is_control(id)).collect::<Vec<_>>();
        let ids = template.encode(&TOKENIZER, &user(&text), true).unwrap();
        prop_assert_eq!(TOKENIZER.decode(&ids, true).unwrap(), template.render(&user(&text), true).unwrap().into_bytes());
        prop_assert_eq!(control(ids), control(template.encode(&TOKENIZER, &user("x"), true).unwrap()));
    }
}

#[test]
fn known_tokens_stay_as_they_are() {
    // "hello" cut as no tokenizer would.
    let odd: Vec<u32> =
        "hello".chars().flat_map(|c| TOKENIZER.encode(&c.to_string(), Specials::AsText)).collect();
    assert_ne!(odd, TOKENIZER.encode("hello", Specials::AsText));
    let question = Message::new(Role::User, "<|eot_id|> q");
    let messages = [
        question.clone(),
        Message::generated("hello ".into(), odd.clone()),
        Message::new(Role::User, "and?"),
    ];
    for name in ["bitnet", "llama3", "falcon3", "chatml"] {
        let template = ChatTemplate::built_in(name, model("")).unwrap();
        let mut before = template.encode(&TOKENIZER, std::slice::from_ref(&question), true).unwrap();
        before.extend(&odd);
        let ids = template.encode(&TOKENIZER, &messages, true).unwrap();
        assert_eq!(ids[..before.len()], before, "{name}");
        assert_eq!(Some(ids[before.len()]), template.end_of_turn());
    }
    // A template that looks into the answer gets the answer.
    let picky = "{% for m in messages %}{{ m.content if 'hello' not in m.content else 'HELLO' }}{% endfor %}";
    let ids = jinja(picky).unwrap().encode(&TOKENIZER, &messages[1..2], false).unwrap();
    assert_eq!(TOKENIZER.decode(&ids, true).unwrap(), b"HELLO");
}

#[test]
fn hostile_templates_end_in_a_clear_error() {
    let start = Instant::now();
    let doubling =
        "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}";
    for source in [
        "{% for i in range(100000) %}{% for j in range(100000) %}x{% endfor %}{% endfor %}",
        "{% for i in range(100000) %}{{ 'x' * 100000 }}{% endfor %}",
        doubling,
        "{{ 'x' * 100000000 }}",
        "{{ ('x' * 4000000).replace('', 'y' * 4000000) }}",
        "{{ ('x' * 4000000) | replace('', 'y' * 4000000) }}",
        "{{ ('y' * 4000000).join('x' * 4000000) }}",
        "{{ ('y' * 400000).join(['x'] * 4000000) }}",
        "{{ (['x' * 100000] * 100000) | join }}",
        "{{ ''.join(['x' * 100000] * 100000) }}",
        "{{ 'x' | center(1000000000000) }}{{ '%1000000000d' % 1 }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '%1000000000d' | format(1) }}",
        "{{ '{:>1000000000}'.format(1) }}",
        "{{ 'x' | indent(1000000000) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ raise_exception('no\nway') }}",
        "{% include 'x' %}",
        "{% for m in messages %}",
        "{{ messages[0].content.nonsense() }}",
        "{{ 1 // 0 }}",
        "{{ nothing.at.all }}",
    ] {
        let error = match jinja(source).and_then(|template| template.encode(&TOKENIZER, &user("x"), true)) {
            Err(error) => error.to_string(),
            Ok(ids) => panic!("{source}: {} tokens", ids.len()),
        };
        assert!(
            error.starts_with("chat template: ") || error.starts_with("the chat template refuses"),
            "{error}"
        );
        assert!(!error.contains('\n') && error.len() < 500, "{error}");
        assert!(start.elapsed().as_secs() < 20, "{source}");
    }
    let nested = format!("{}x{}", "{% if true %}".repeat(5000), "{% endif %}".repeat(5000));
    assert!(matches!(jinja(&nested).err(), Some(TemplateError::Broken(_))));
    let refusal = jinja("{{ raise_exception('roles must alternate') }}").err().unwrap();
    assert_eq!(refusal, TemplateError::Refused("roles must alternate".into()));
}
