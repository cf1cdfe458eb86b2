//! A batch gives each request what it gets alone, whatever runs beside it and is shared with it.
#![allow(clippy::unwrap_used)]

mod common;

use bitnet::generate::{
    Batch, Ended, Event, FinishReason, Request, RequestId, Sampler, SamplerConfig, Speculation,
    StopConditions,
};
use bitnet::gguf::{Gguf, TensorInfo};
use bitnet::kernels::{KvType, PAGE, best};
use bitnet::model::Strategy;
use bitnet::text::Specials;
use bitnet::{Engine, EngineOptions, Error};
use common::masked::Chance;
use common::{build, generated, last, rewritten};
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

const CONTEXT: usize = 150;

fn engine(gguf: &Arc<Gguf>, threads: usize, max_rows: usize, sequences: usize, cache_type: KvType) -> Engine {
    let options = EngineOptions { context: CONTEXT, sequences, max_rows, cache_type, logits: 1 };
    build(gguf, Strategy::SPARSE, best(), threads, options)
}

/// Prompts with much, little and nothing in common, one of them twice, and all ways to end.
fn requests(engine: &Engine) -> Vec<(Vec<u32>, SamplerConfig, StopConditions)> {
    let tale =
        "Once upon a time there was a little girl who lived with her mother in a house near the wood. ";
    let texts = [
        format!("{tale}One day she went to"),
        format!("{tale}One day she went out and"),
        format!("{tale}{tale}Her mother"),
        "The king".to_owned(),
        format!("{tale}One day she went to"),
        "The king's daughter".to_owned(),
        tale[..40].to_owned(),
        "O".to_owned(),
    ];
    let end = StopConditions { max_tokens: Some(40), ..StopConditions::default() };
    let vocab = engine.model().config().vocab_size;
    let formed = |share, forced| StopConditions {
        constraint: Some(Arc::new(Chance { share, forced, text: Vec::new(), vocab })),
        ids: engine.model().special().stop.clone(),
        speculation: Speculation::Always,
        ..end.clone()
    };
    let always = StopConditions { speculation: Speculation::Always, ..StopConditions::default() };
    let mut all = Vec::new();
    for (i, text) in texts.iter().enumerate() {
        let prompt = engine.model().prompt(text, Specials::AsText).unwrap();
        for (config, stop) in [
            (SamplerConfig::greedy(), StopConditions { max_tokens: Some(3 * i), ..end.clone() }),
            (
                SamplerConfig { seed: i as u64, ..SamplerConfig::default() },
                if i % 3 == 0 { StopConditions::default() } else { end.clone() },
            ),
            (SamplerConfig { seed: i as u64, ..SamplerConfig::default() }, formed(9_000, 2)),
            (SamplerConfig::greedy(), if i % 4 == 1 { always.clone() } else { formed(60, 50) }),
            (
                SamplerConfig { seed: 9, temperature: 1.2, repeat_penalty: 1.2, ..SamplerConfig::default() },
                StopConditions {
                    ids: vec![20, 30, 40],
                    strings: vec!["the".into(), ", a".into()],
                    ..end.clone()
                },
            ),
        ] {
            all.push((prompt.clone(), config, stop));
        }
    }
    all
}

/// Text, tokens and end of a request.
type Told = (String, Vec<u32>, FinishReason);

fn alone(engine: &mut Engine, (prompt, config, stop): &(Vec<u32>, SamplerConfig, StopConditions)) -> Told {
    let (done, text) = generated(engine, prompt, config, stop).unwrap();
    (text, done.tokens, done.finish)
}

#[derive(Default)]
struct News {
    texts: HashMap<RequestId, String>,
    ended: HashMap<RequestId, Result<Ended, Error>>,
}

impl News {
    fn step(&mut self, batch: &mut Batch) -> Result<(), Error> {
        batch.step(&mut |id, event| match event {
            Event::Text(part) => {
                assert!(!part.is_empty() && !self.ended.contains_key(&id));
                self.texts.entry(id).or_default().push_str(part);
            }
            Event::Ended(result) => assert!(self.ended.insert(id, result).is_none()),
        })
    }

    fn told(&mut self, id: RequestId) -> Told {
        let Ended { finish, tokens, .. } = self.ended.remove(&id).unwrap().unwrap();
        (self.texts.remove(&id).unwrap_or_default(), tokens, finish)
    }
}

fn request((prompt, config, stop): &(Vec<u32>, SamplerConfig, StopConditions)) -> Request {
    Request { prompt: prompt.clone(), sampler: Sampler::new(config.clone()).unwrap(), stop: stop.clone() }
}

#[test]
fn company_changes_nothing() {
    let gguf = common::gguf("demo");
    // Width, rows of a step, full contexts that the cache holds.
    let ways = [(1, 1, 512, 1), (3, 8, 64, 2), (2, 3, 7, 3), (2, 16, 5, 16)];
    // What a page of the cache holds has no part in who shares it: some requests show the other two.
    for (cache_type, nth, ways) in
        [(KvType::F32, 1, &ways[..]), (KvType::F16, 4, &ways[1..2]), (KvType::Q8, 4, &ways[2..3])]
    {
        let mut single = engine(&gguf, 1, 512, 1, cache_type);
        let requests: Vec<_> = requests(&single).into_iter().step_by(nth).collect();
        let expected: Vec<Told> = requests.iter().map(|request| alone(&mut single, request)).collect();
        let finishes = |want: fn(&FinishReason) -> bool| expected.iter().any(|(.., finish)| want(finish));
        assert!(finishes(|f| *f == FinishReason::Length) && finishes(|f| *f == FinishReason::ContextFull));
        assert!(finishes(|f| matches!(f, FinishReason::StopToken(_) | FinishReason::StopString(_))));
        for &(threads, width, max_rows, sequences) in ways {
            let mut batch = Batch::new(engine(&gguf, threads, max_rows, sequences, cache_type), width);
            let mut news = News::default();
            let mut ids = Vec::new();
            for (i, one) in requests.iter().enumerate() {
                ids.push(batch.push(request(one)).unwrap());
                // What is cancelled, waiting or running, leaves the others alone.
                let gone = batch.push(request(&requests[requests.len() - 1 - i])).unwrap();
                for _ in 0..i % 3 {
                    news.step(&mut batch).unwrap();
                }
                batch.cancel(gone);
            }
            while !batch.is_idle() {
                news.step(&mut batch).unwrap();
            }
            for (i, (id, expected)) in ids.into_iter().zip(&expected).enumerate() {
                let told = news.told(id);
                assert!(
                    told == *expected,
                    "{cache_type:?}, width {width}, request {i}: {told:?}\n{expected:?}"
                );
            }
        }
    }
}

#[test]
fn what_prompts_have_in_common_is_computed_once() {
    let gguf = common::gguf("demo");
    for width in [1, 4] {
        let mut batch = Batch::new(engine(&gguf, 2, 64, width, KvType::F32), width);
        let (prompt, ..) = &requests(batch.engine())[0];
        for last in [1, 2, 3, 4] {
            let stop = StopConditions { max_tokens: Some(5), ..StopConditions::default() };
            let prompt = [&prompt[..], &[last]].concat();
            batch
                .push(Request { prompt, sampler: Sampler::new(SamplerConfig::greedy()).unwrap(), stop })
                .unwrap();
        }
        let mut news = News::default();
        while !batch.is_idle() {
            news.step(&mut batch).unwrap();
        }
        let counts = batch.counts();
        assert_eq!((counts.prompt_tokens, counts.shared_tokens), (prompt.len() + 4, 3 * prompt.len()));
        assert_eq!(counts.generated_tokens, 4 * 5);
        assert!(width == 1 || counts.steps < 4 * 5, "{counts:?}");
    }
}

#[test]
fn a_fork_shares_pages_until_one_writes() {
    let gguf = common::gguf("gqa");
    let tokens: Vec<u32> = (0..CONTEXT as u32).map(|i| 10 + i * 7 % 240).collect();
    for cache_type in [KvType::F32, KvType::Q8] {
        let mut single = engine(&gguf, 2, 512, 1, cache_type);
        let mut anew = |tokens: &[u32]| {
            let sequence = single.open();
            let logits = last(&mut single, sequence, tokens).unwrap();
            single.close(sequence);
            logits
        };
        for common in [1, PAGE - 1, PAGE, PAGE + 1, 2 * PAGE + 5] {
            let mut engine = engine(&gguf, 2, 512, 2, cache_type);
            let a = engine.open();
            last(&mut engine, a, &tokens[..100.max(common + 1)]).unwrap();
            let held = engine.tokens(a).len();
            let b = engine.fork(a, common);
            assert_eq!(engine.tokens(b), &tokens[..common]);
            // Each goes on in its own way, in turns.
            let of_b = [&tokens[..common], &[9, 8, 7]].concat();
            assert!(last(&mut engine, b, &of_b[common..]).unwrap() == anew(&of_b));
            let of_a = [&tokens[..held], &[5]].concat();
            assert!(last(&mut engine, a, &[5]).unwrap() == anew(&of_a));
            let c = engine.fork(b, usize::MAX);
            engine.close(a);
            assert!(last(&mut engine, b, &[4]).unwrap() == anew(&[&of_b[..], &[4]].concat()));
            assert!(last(&mut engine, c, &[3]).unwrap() == anew(&[&of_b[..], &[3]].concat()));
            // All pages come back.
            engine.close(b);
            engine.close(c);
            let [a, b] = [engine.open(), engine.open()];
            last(&mut engine, a, &tokens).unwrap();
            last(&mut engine, b, &tokens).unwrap();
        }
    }
    // A cache that is full to the last page has none to copy to; nothing is changed by the attempt.
    let mut engine = engine(&gguf, 2, 512, 1, KvType::F32);
    let a = engine.open();
    last(&mut engine, a, &tokens[..CONTEXT - 1]).unwrap();
    let b = engine.fork(a, CONTEXT - 1);
    let full = last(&mut engine, b, &[1]);
    assert!(matches!(full, Err(Error::CacheFull { .. })), "{full:?}");
    assert_eq!(engine.tokens(b).len(), CONTEXT - 1);
    engine.close(b);
    last(&mut engine, a, &[1]).unwrap();
    // Whole pages are shared without room for a copy.
    engine.truncate(a, PAGE);
    let b = engine.fork(a, PAGE);
    last(&mut engine, b, &tokens[PAGE..]).unwrap();
}

/// The demo with a broken embedding of `token`, and a head of its own that is whole.
fn broken(token: usize) -> Arc<Gguf> {
    let demo = common::gguf("demo");
    let embedding = demo.tensor("token_embd.weight").unwrap();
    let edit = |t: &TensorInfo, bytes: &mut Vec<u8>| {
        if t == embedding {
            let row = bytes.len() / t.dims[1] as usize;
            bytes[token * row..][..row].fill(0xff);
        }
    };
    let head = ("output.weight".into(), embedding.ty, &embedding.dims[..], demo.tensor_bytes(embedding));
    Arc::new(Gguf::from_vec("broken", rewritten(&demo, edit, &[head])).unwrap())
}

#[test]
fn a_fault_ends_its_own_request_only() {
    let gguf = broken(300);
    let mut single = engine(&gguf, 2, 512, 1, KvType::F32);
    let all = requests(&single);
    let mut batch = Batch::new(engine(&gguf, 2, 64, 4, KvType::F32), 4);
    let mut news = News::default();
    let forbidden = SamplerConfig {
        logit_bias: (0..batch.engine().model().config().vocab_size as u32)
            .map(|id| (id, f32::NEG_INFINITY))
            .collect(),
        ..SamplerConfig::default()
    };
    let mut good = Vec::new();
    let mut bad = Vec::new();
    for (i, one) in all.iter().enumerate().filter(|(_, (prompt, ..))| !prompt.contains(&300)).take(9) {
        good.push((batch.push(request(one)).unwrap(), i));
        let prompt = [&one.0[..], &[300, 5, 6, 7]].concat();
        bad.push(batch.push(request(&(prompt, one.1.clone(), all[1].2.clone()))).unwrap());
        bad.push(batch.push(request(&(one.0.clone(), forbidden.clone(), all[1].2.clone()))).unwrap());
    }
    while !batch.is_idle() {
        news.step(&mut batch).unwrap();
    }
    for (id, i) in good {
        assert_eq!(news.told(id), alone(&mut single, &all[i]));
    }
    for pair in bad.chunks(2) {
        let [a, b] = [pair[0], pair[1]].map(|id| news.ended.remove(&id).unwrap());
        assert!(matches!(a, Err(Error::BadEmbedding { token: 300, .. })), "{a:?}");
        assert!(matches!(b, Err(Error::Sample(_))), "{b:?}");
    }
}

#[test]
fn impossible_requests_are_refused_and_a_cancelled_step_can_be_repeated() {
    let gguf = common::gguf("demo");
    let mut engine = engine(&gguf, 2, 64, 2, KvType::F32);
    let all = requests(&engine);
    let flag = Arc::new(AtomicBool::new(false));
    engine.cancel_by(flag.clone());
    let mut batch = Batch::new(engine, 2);
    let (mut too_long, mut empty, mut unknown) = (all[0].clone(), all[0].clone(), all[0].clone());
    too_long.0 = vec![1; CONTEXT + 1];
    empty.0.clear();
    unknown.1.logit_bias.push((1 << 20, 1.0));
    assert!(matches!(batch.push(request(&too_long)), Err(Error::ContextFull { .. })));
    assert!(matches!(batch.push(request(&empty)), Err(Error::EmptyPrompt)));
    assert!(matches!(batch.push(request(&unknown)), Err(Error::TokenOutOfRange { .. })));
    assert!(batch.is_idle());

    let mut news = News::default();
    let ids: Vec<RequestId> = all[..4].iter().map(|one| batch.push(request(one)).unwrap()).collect();
    let mut step = 0;
    while !batch.is_idle() {
        step += 1;
        if step % 3 == 0 {
            flag.store(true, Relaxed);
            assert!(matches!(news.step(&mut batch), Err(Error::Cancelled)));
            flag.store(false, Relaxed);
        }
        news.step(&mut batch).unwrap();
    }
    let mut single = self::engine(&gguf, 2, 512, 1, KvType::F32);
    for (id, one) in ids.into_iter().zip(&all) {
        assert_eq!(news.told(id), alone(&mut single, one));
    }
}
