//! Chat templates against Hugging Face's `apply_chat_template`, on fixtures from `tools/make_chat_goldens.py`; templates and
//! messages that mean harm; and conversations on the demo model.
#![allow(clippy::unwrap_used)]

mod common;

use bitnet::generate::{
    Answer, Chat, Constraint, ConstraintError, FinishReason, Guide, Sampler, SamplerConfig, StopConditions,
};
use bitnet::kernels::best;
use bitnet::text::{ChatTemplate, HfVocab, Message, Role, Specials, TemplateError, TemplateModel, Tokenizer};
use bitnet::{Engine, EngineOptions, Error};
use common::{OPTIONS, build, writing};
use proptest::prelude::*;
use serde::Deserialize;
use std::collections::HashMap;
use std::ops::ControlFlow;
use std::sync::{Arc, LazyLock};
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
static TOKENIZER: LazyLock<Tokenizer> = LazyLock::new(|| tokenizer(&[], 3));

fn tokenizer(without: &[&str], token_type: i32) -> Tokenizer {
    let mut vocab = HfVocab::parse(include_bytes!("fixtures/tokenizer/demo-tokenizer.json")).unwrap();
    vocab.tokens.extend(GOLDENS.tokens.iter().cloned());
    vocab.token_types.resize(vocab.tokens.len(), token_type);
    for token in vocab.tokens.iter_mut().filter(|token| without.contains(&token.as_str())) {
        token.push_str(" (none)");
    }
    Tokenizer::new(&vocab).unwrap()
}

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
        assert_eq!(built_in.is_some(), !["blocks", "methods", "generation"].contains(&name.as_str()));
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
    for (family, missing) in [
        ("falcon3", &["<|start_header_id|>"][..]),
        ("chatml", &["<|start_header_id|>", "<|assistant|>"]), // Falcon-E
    ] {
        let tokenizer = &tokenizer(missing, 3);
        let template = ChatTemplate::of_model(None, TemplateModel { tokenizer, ..model("llama") });
        assert_eq!(name(template), family);
    }
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

#[test]
fn messages_of_tools_come_where_the_template_has_a_place_for_them() {
    let messages: Vec<Message> =
        serde_json::from_str(r#"[{"role": "user", "content": "7*6?"}, {"role": "tool", "content": "42"}]"#)
            .unwrap();
    let encode = |template: ChatTemplate| template.encode(&TOKENIZER, &messages, true);
    for name in ["bitnet", "llama3", "chatml"] {
        let ids = encode(ChatTemplate::built_in(name, model("")).unwrap()).unwrap();
        let text = TOKENIZER.decode(&ids, true).unwrap();
        assert!(String::from_utf8(text).unwrap().contains("42"), "{name}");
    }
    let deaf = "{% for m in messages if m.role != 'tool' %}{{ m.content }}{% endfor %}";
    assert_eq!(encode(ChatTemplate::built_in("falcon3", model("")).unwrap()), Err(TemplateError::NoTools));
    assert_eq!(encode(jinja(deaf).unwrap()), Err(TemplateError::NoTools));
    let strict = "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}{% endfor %}";
    assert_eq!(encode(jinja(strict).unwrap()), Err(TemplateError::Refused("no tools".into())));
    let calls = r#"{"role": "assistant", "content": "", "tool_calls": []}"#;
    assert!(serde_json::from_str::<Message>(calls).unwrap_err().to_string().contains("tool_calls"));
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
            let texts =
                "<|eot_id|>,a<|im_end|>b<|user|>,<|<|eot_id|>|>, <|eot_id|>\n,<|begin_of_text|>,eot_id,<|";
            for text in texts.split(',') {
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
    // The template deletes from the message, or changes its case.
    for (filter, text) in [("replace('<br>', '')", "<|eot<br>_id|>"), ("lower", "<|EOT_ID|>")] {
        let source = format!(
            "{{{{ bos_token }}}}{{% for m in messages %}}{{{{ m.content | {filter} }}}}{{% endfor %}}"
        );
        let ids = jinja(&source).unwrap().encode(&TOKENIZER, &user(text), false).unwrap();
        assert_eq!(count(&ids), 1, "{source}");
    }
    // A vocabulary may call its control tokens user-defined.
    let tokenizer = &tokenizer(&[], 4);
    let template = ChatTemplate::built_in("chatml", TemplateModel { tokenizer, ..model("") }).unwrap();
    let len = |text: &str| template.encode(tokenizer, &user(text), true).unwrap().len();
    let text = tokenizer.encode("<|im_end|>", Specials::AsText);
    assert!(text.len() > 1 && len("<|im_end|>") - len("x") == text.len() - 1);
    assert_eq!(template.end_of_turn(), Some(id("<|im_end|>")));
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
fn templates_may_ask_for_the_date() {
    let dated = jinja("{{ strftime_now('%d %b %Y')[-4:-2] }}").unwrap();
    let ids = dated.encode(&TOKENIZER, &user("x"), true).unwrap();
    assert_eq!(TOKENIZER.decode(&ids, true).unwrap(), b"20");
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
        "{{ strftime_now('%1000000000d') }}",
        "{{ strftime_now('%') }}",
        "{{ strftime_now('%d' * 51) }}",
        "{{ 'x\ny' | indent(1000000000) }}",
        "{{ 'x\ny' | indent(width=1000000000) }}",
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
        assert!(start.elapsed().as_secs() < 60, "{source}");
    }
    // One long text many times, and a list whose halves are the same list, sixty times over.
    let nest =
        "{% set ns = namespace(x=['ab']) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}";
    for (before, many) in [("", "(['x' * 100000] * 100000)"), (nest, "ns.x")] {
        let expressions = "L; L ~ 'y'; 'y' ~ (1, L); L in 'x'; L not in 'x'; L | string; L | tojson; L | join; \
             ''.join(L); '{}'.format(L); '%s' | format(L); L | upper; L | trim; L | replace('a', 'b'); \
             'x' | replace('x', L); 'x'.replace('x', L); L | safe; L | indent; L is in 'x'; 'x'[L]; \
             raise_exception(L); L.nothing(); L | pprint; [L, L]; {'a': L}";
        for expression in expressions.split("; ") {
            let source = format!("{before}{{{{ {} }}}}", expression.replace('L', many));
            let start = Instant::now();
            let error =
                jinja(&source).and_then(|template| template.encode(&TOKENIZER, &user("x"), true)).err();
            let clear = error.as_ref().is_some_and(|error| error.to_string().len() < 300);
            let empty = expression == "'x'[L]"; // no such character
            assert!((clear || empty) && start.elapsed().as_secs() < 60, "{source}: {error:?}");
        }
    }
    // What holds itself, is deep, or is short for something long ends in an error or a text, and soon.
    let halves = "a == b }}{% endif %}{% endmacro %}{{ f(['x'], ['x'], 60)";
    for source in [
        "{% set ns = namespace() %}{% set ns.x = ns %}{{ ns }}",
        "{% set ns = namespace() %}{% set ns.x = {'a': ns.items()} %}{{ ns }}{{ ns | tojson }}",
        "{% set ns = namespace() %}{% for i in range(5000) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x }}",
        &format!("{}{{{{ x }}}}", "{% set x = [x] %}".repeat(12_000)),
        &format!("{nest}{}{{{{ ns.x == m.x }}}}", nest.replace("ns", "m")),
        &format!(
            "{{% macro f(a, b, n) %}}{{% if n %}}{{{{ f([a, a], [b, b], n - 1) }}}}{{% else %}}{{{{ {halves} }}}}"
        ),
        &format!("{{{{ {}1{} }}}}", "(a~".repeat(100_000), ")".repeat(100_000)),
    ] {
        let start = Instant::now();
        let _ = jinja(source).and_then(|template| template.encode(&TOKENIZER, &user("x"), true));
        assert!(start.elapsed().as_secs() < 60, "{source:.300}");
    }
    // What would stand for a message whose tokens are known.
    for index in ["0", "7"] {
        let source = format!("a\u{f0001}{index}\u{f0001}b");
        let ids = jinja(&source).unwrap().encode(&TOKENIZER, &user("x"), true).unwrap();
        assert_eq!(TOKENIZER.decode(&ids, true).unwrap(), source.as_bytes());
    }
    let nested = format!("{}x{}", "{% if true %}".repeat(5000), "{% endif %}".repeat(5000));
    assert!(matches!(jinja(&nested).err(), Some(TemplateError::Broken(_))));
    let refusal = jinja("{{ raise_exception('roles must alternate') }}").err().unwrap();
    assert_eq!(refusal, TemplateError::Refused("roles must alternate".into()));
}

/// A chat with the demo model in a small context, which never ends an answer by itself.
struct Talk {
    engine: Engine,
    chat: Chat,
    sampler: Sampler,
    stop: StopConditions,
}

impl Talk {
    fn new(context: usize, max_tokens: usize) -> Self {
        let options = EngineOptions { context, max_rows: 64, ..OPTIONS };
        let mut engine = build(&common::gguf("demo"), bitnet::model::Strategy::default(), best(), 2, options);
        let template = engine.model().chat_template(None).unwrap();
        let chat = Chat::new(&mut engine, template);
        let logit_bias = [4089, 4092].map(|id| (id, f32::NEG_INFINITY)).to_vec();
        let sampler = Sampler::new(SamplerConfig { logit_bias, ..SamplerConfig::default() }).unwrap();
        let stop = StopConditions { max_tokens: Some(max_tokens), ..StopConditions::default() };
        Self { engine, chat, sampler, stop }
    }

    fn answer(&mut self) -> Result<(Answer, String), Error> {
        let mut text = String::new();
        let Self { engine, chat, sampler, stop } = self;
        let answer = chat.answer(engine, sampler, stop, &mut writing(&mut text))?;
        assert_eq!(chat.messages().last().unwrap().content, text);
        Ok((answer, text))
    }
}

#[test]
fn a_turn_costs_only_its_own_tokens() {
    let mut talk = Talk::new(640, 20);
    talk.chat.set_system("You tell tales.");
    talk.chat.ask("Once upon a time <|eot_id|>");
    let (first, text) = talk.answer().unwrap();
    assert_eq!((first.cached_tokens, first.generated.tokens.len(), first.dropped), (0, 20, 0));
    talk.chat.ask("And then?");
    let (second, _) = talk.answer().unwrap();
    // All but the last generated token, which was never fed, and what follows it.
    assert_eq!(second.cached_tokens, first.prompt_tokens + 19);
    assert!(second.prompt_tokens - second.cached_tokens < 20);

    // The same conversation from its text gives the same answer, however it came about.
    let mut again = Talk::new(640, 20);
    again.chat.set_messages(talk.chat.messages().to_vec());
    again.chat.set_messages(again.chat.messages()[..2].to_vec());
    assert!(again.chat.retry());
    assert_eq!(again.answer().unwrap().1, text);
    assert!(again.chat.retry());
    let (retried, other) = again.answer().unwrap();
    assert_eq!(retried.prompt_tokens - retried.cached_tokens, 1);
    assert_ne!(other, text, "the random numbers go on");
    again.chat.clear();
    assert_eq!((again.chat.messages().len(), again.chat.retry()), (1, false));
}

#[test]
fn the_oldest_turns_go_and_the_system_prompt_stays() {
    let mut talk = Talk::new(160, 30);
    talk.chat.set_system("You tell tales.");
    let mut dropped = 0;
    for turn in 0..12 {
        talk.chat.ask(format!("Question {turn}?"));
        let (answer, _) = talk.answer().unwrap();
        dropped += answer.dropped;
        assert_eq!(answer.generated.tokens.len(), 30);
        assert!(talk.chat.cached_tokens(&talk.engine) <= 160);
        assert_eq!(talk.chat.system(), Some("You tell tales."));
        let messages = talk.chat.messages();
        assert_eq!(messages[messages.len() - 2].content, format!("Question {turn}?"));
        assert_eq!(messages.len() + dropped, 1 + 2 * (turn + 1));
    }
    assert!(dropped >= 10);
    // An answer that fills the context goes on without the oldest turns.
    talk.stop.max_tokens = Some(100);
    talk.chat.ask("A long one.");
    let (answer, text) = talk.answer().unwrap();
    assert!(answer.dropped > 0 && answer.generated.tokens.len() == 100, "{answer:?}");
    let ids = &answer.generated.tokens;
    let decoded = talk.engine.model().tokenizer().unwrap().decode(ids, false).unwrap();
    assert_eq!(text, String::from_utf8_lossy(&decoded));
    assert_eq!(talk.chat.messages().len(), 3);
    // With nothing to leave out it ends.
    talk.chat.clear();
    talk.stop.max_tokens = None;
    talk.chat.ask("Endless.");
    assert_eq!(talk.answer().unwrap().0.generated.finish, FinishReason::ContextFull);
    talk.chat.ask("x ".repeat(200));
    assert!(matches!(talk.answer(), Err(Error::ContextFull { context: 160, .. })));
}

/// Leaves the choice of no token but the next of these.
#[derive(Clone, Debug)]
struct Script(Vec<u32>, usize);

impl Constraint for Script {
    fn start(&self) -> Box<dyn Guide> {
        Box::new(self.clone())
    }
}

impl Guide for Script {
    fn mask(&mut self, mask: &mut [u32]) -> Result<bool, ConstraintError> {
        mask.fill(0);
        let next = self.0.get(self.1);
        next.iter().for_each(|&&id| mask[id as usize / 32] |= 1 << (id % 32));
        Ok(next.is_none())
    }
    fn push(&mut self, _: u32) -> Result<(), ConstraintError> {
        self.1 += 1;
        Ok(())
    }
    fn pop(&mut self, count: usize) -> Result<(), ConstraintError> {
        self.1 -= count;
        Ok(())
    }
}

#[test]
fn neither_a_stop_string_nor_the_end_is_lost_at_a_pause() {
    let mut talk = Talk::new(100, 10);
    talk.chat.ask("Once upon a time");
    talk.answer().unwrap();
    talk.chat.ask("And?");
    let messages = talk.chat.messages().to_vec();
    let mut ids = TOKENIZER.encode(include_str!("fixtures/models/demo/tale.txt"), Specials::AsText);
    ids.truncate(80);
    let text = String::from_utf8(TOKENIZER.decode(&ids, false).unwrap()).unwrap();
    talk.stop = StopConditions { constraint: Some(Arc::new(Script(ids, 0))), ..StopConditions::default() };
    // The text up to a stop string, if it is not ended at a token before.
    let mut answer = |stop: &str, end: usize| {
        talk.chat.set_messages(messages.clone());
        talk.stop.strings = vec![stop.to_owned()];
        let (mut calls, mut found) = (0, String::new());
        let mut emit = |part: &str| {
            calls += 1;
            found.push_str(part);
            if calls == end { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        };
        let Talk { engine, chat, sampler, stop, .. } = &mut talk;
        let answer = chat.answer(engine, sampler, stop, &mut emit).unwrap();
        (found, answer)
    };
    let (found, whole) = answer("none", usize::MAX);
    assert!(whole.dropped == 2 && whole.prompt_tokens > 100 && found == text);
    for (at, _) in text.char_indices().take(text.len() - 40) {
        let (found, stop) =
            (answer(&text[at..at + 40], usize::MAX).0, text.find(&text[at..at + 40]).unwrap());
        assert_eq!(found, text[..stop]);
    }
    for end in 1..whole.generated.tokens.len() {
        assert_eq!(answer("e none", end).1.generated.tokens.len(), end);
    }
}

#[test]
fn a_prompt_that_names_its_first_token_has_it_once() {
    let talk = Talk::new(160, 1);
    let prompt = |text: &str| talk.engine.model().prompt(text, Specials::Parse).unwrap();
    assert_eq!(prompt("<|begin_of_text|>x"), prompt("x"));
}
