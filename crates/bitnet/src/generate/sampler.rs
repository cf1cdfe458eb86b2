//! From logits to a token.
//!
//! The steps and their order are those of llama.cpp (`common/sampling.cpp`):
//! logit bias, penalties, top-k, top-p, min-p, temperature, draw. So the filters see the probabilities at temperature 1.
//! The penalties are those of `llama_sampler_penalties`: a token that occurs `count` times among the last
//! `repeat_last_n` has its logit divided by `repeat_penalty` if positive, multiplied otherwise, and then reduced by
//! `count * frequency_penalty + presence_penalty`.
//!
//! Logits and seed determine the token on every machine: tokens of equal logit rank by id, the exponential is our own,
//! and the random numbers are SplitMix64's (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014).

use std::cmp::Ordering;
use std::convert::Infallible;

use bitnet_kernels::Logits;
use bitnet_kernels::math::exp64;

/// How tokens are chosen. The default is llama.cpp's.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplerConfig {
    /// Divides the logits before the draw; 0 always takes the most probable token.
    pub temperature: f32,
    /// Keeps this many tokens of the highest logits; 0 keeps all.
    pub top_k: u32,
    /// Keeps the fewest of the most probable tokens whose probabilities sum to this; 1 keeps all, 0 one.
    pub top_p: f32,
    /// Keeps the tokens whose probability is at least this share of the highest one; 0 keeps all.
    pub min_p: f32,
    /// Factor against tokens that occurred already; 1 is none.
    pub repeat_penalty: f32,
    /// How many of the last tokens the three penalties look at.
    pub repeat_last_n: u32,
    /// Taken off a logit for each time the token occurred.
    pub frequency_penalty: f32,
    /// Taken off the logit of a token that occurred.
    pub presence_penalty: f32,
    /// Added to the logits of single tokens; negative infinity forbids a token.
    pub logit_bias: Vec<(u32, f32)>,
    /// Start of the random numbers.
    pub seed: u64,
}

impl Default for SamplerConfig {
    fn default() -> Self {
        Self {
            temperature: 0.8,
            top_k: 40,
            top_p: 0.95,
            min_p: 0.05,
            repeat_penalty: 1.0,
            repeat_last_n: 64,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: 0,
        }
    }
}

impl SamplerConfig {
    fn penalises(&self) -> bool {
        self.repeat_penalty != 1.0 || self.frequency_penalty != 0.0 || self.presence_penalty != 0.0
    }

    /// The most probable token each time.
    pub fn greedy() -> Self {
        Self { temperature: 0.0, ..Self::default() }
    }
}

/// A setting outside its range; the caller's fault.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{setting} is {found}; expected {expected}")]
pub struct SamplerConfigError {
    /// The field, or `logit_bias` of a token.
    pub setting: String,
    /// Its value.
    pub found: f32,
    /// Its range.
    pub expected: &'static str,
}

/// Why no token could be chosen.
#[allow(missing_docs)] // the names and messages of the fields say it all
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum SampleError {
    /// The model computed garbage, or a bias or penalty overflowed.
    #[error("the logit of token {id} is {value}; expected a finite number or negative infinity")]
    Logit { id: usize, value: f32 },
    #[error("none of {n_vocab} tokens is allowed: each logit is negative infinity")]
    NothingAllowed { n_vocab: usize },
    /// A token of the history or of `logit_bias` that has no logit; the caller's fault.
    #[error("{what} has token {id}; there are {n_vocab} logits")]
    UnknownToken { what: &'static str, id: u32, n_vocab: usize },
}

/// Chooses tokens; its only state is that of the random numbers, of which each token not chosen greedily takes one.
pub struct Sampler {
    config: SamplerConfig,
    state: u64,
    // Buffers, kept so that nothing is allocated per token.
    logits: Vec<f32>,
    window: Vec<u32>,
    also: Vec<u32>,
    candidates: Vec<Candidate>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct Candidate {
    /// Not yet normalised probability; the most probable token has 1.
    weight: f64,
    logit: f32,
    id: u32,
}

/// Higher logits first; a lower id breaks the tie. Total, as NaN was refused.
fn rank(a: &Candidate, b: &Candidate) -> Ordering {
    b.logit.partial_cmp(&a.logit).unwrap_or(Ordering::Equal).then(a.id.cmp(&b.id))
}

impl Sampler {
    /// Fails if a setting is outside its range.
    pub fn new(config: SamplerConfig) -> Result<Self, SamplerConfigError> {
        let c = &config;
        let finite = (f32::MIN..=f32::MAX, "a finite number");
        let share = (0.0..=1.0, "a number from 0 to 1");
        let settings = [
            ("temperature", c.temperature, (0.0..=f32::MAX, "0 or a positive, finite number")),
            ("top_p", c.top_p, share.clone()),
            ("min_p", c.min_p, share),
            ("repeat_penalty", c.repeat_penalty, (f32::from_bits(1)..=f32::MAX, "a finite number above 0")),
            ("frequency_penalty", c.frequency_penalty, finite.clone()),
            ("presence_penalty", c.presence_penalty, finite),
        ]
        .map(|(setting, found, range)| (setting.to_owned(), found, range));
        let biases = c.logit_bias.iter().map(|&(id, bias)| {
            let range = (f32::NEG_INFINITY..=f32::MAX, "a finite number or negative infinity");
            (format!("logit_bias of token {id}"), bias, range)
        });
        for (setting, found, (range, expected)) in settings.into_iter().chain(biases) {
            if !range.contains(&found) {
                return Err(SamplerConfigError { setting, found, expected });
            }
        }
        Ok(Self {
            state: config.seed,
            config,
            logits: Vec::new(),
            window: Vec::new(),
            also: Vec::new(),
            candidates: Vec::new(),
        })
    }

    /// The settings.
    pub fn config(&self) -> &SamplerConfig {
        &self.config
    }

    /// Other settings but for the seed: the random numbers go on.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn configure(&mut self, config: SamplerConfig) -> Result<(), SamplerConfigError> {
        *self = Self { state: self.state, ..Self::new(config)? };
        Ok(())
    }

    /// Which logits the next choice looks at: where only so many of the greatest can be chosen, those, and those that biases
    /// and penalties change.
    pub fn wanted(&mut self, history: &[u32]) -> Logits<'_> {
        self.wanted_while(history, &[])
    }

    /// The same for the choices after `history` and after each further token of `proposed`, all in one.
    pub(crate) fn wanted_while(&mut self, history: &[u32], proposed: &[u32]) -> Logits<'_> {
        let c = &self.config;
        let top = match c.top_k {
            _ if c.temperature == 0.0 => 1,
            0 => return Logits::Every,
            k => k as usize,
        };
        self.also.clear();
        self.also.extend(c.logit_bias.iter().map(|(id, _)| id));
        if c.penalises() {
            self.also.extend(&history[history.len().saturating_sub(c.repeat_last_n as usize)..]);
            self.also.extend(proposed);
        }
        self.also.sort_unstable();
        self.also.dedup();
        Logits::Best { top, also: &self.also, among: None }
    }

    /// Chooses the next token, from logits `[vocab]`. `history` holds the tokens so far, the latest last.
    pub fn sample(&mut self, logits: &[f32], history: &[u32]) -> Result<u32, SampleError> {
        self.sample_among(logits, history, None)
    }

    /// The same from the `allowed` tokens only, a bit for each, 32 a word: as if the other logits were negative infinity.
    pub fn sample_among(
        &mut self,
        logits: &[f32],
        history: &[u32],
        allowed: Option<&[u32]>,
    ) -> Result<u32, SampleError> {
        let c = &self.config;
        let penalises = c.penalises();
        if !penalises && c.logit_bias.is_empty() && allowed.is_none() {
            return self.choose(logits);
        }
        let mut edited = std::mem::take(&mut self.logits);
        edited.clear();
        edited.extend_from_slice(logits);
        if let Some(allowed) = allowed {
            for (w, logits) in edited.chunks_mut(32).enumerate() {
                match allowed.get(w).copied().unwrap_or(0) {
                    u32::MAX => {}
                    0 => logits.fill(f32::NEG_INFINITY),
                    word => {
                        for (i, logit) in logits.iter_mut().enumerate() {
                            *logit = if word >> i & 1 == 1 { *logit } else { f32::NEG_INFINITY };
                        }
                    }
                }
            }
        }
        let chosen = self.edit(&mut edited, history, penalises).and_then(|()| self.choose(&edited));
        self.logits = edited;
        chosen
    }

    /// Takes a token that is the only one allowed, as [`Self::sample_among`] would without looking at its logit. False
    /// where a bias forbids it.
    pub(super) fn force(&mut self, id: u32) -> bool {
        if self.config.logit_bias.contains(&(id, f32::NEG_INFINITY)) {
            return false;
        }
        if self.config.temperature != 0.0 {
            random(&mut self.state);
        }
        true
    }

    /// Adds the biases and applies the penalties.
    fn edit(&mut self, logits: &mut [f32], history: &[u32], penalises: bool) -> Result<(), SampleError> {
        let c = &self.config;
        let n_vocab = logits.len();
        for &(id, bias) in &c.logit_bias {
            let unknown = SampleError::UnknownToken { what: "logit_bias", id, n_vocab };
            *logits.get_mut(id as usize).ok_or(unknown)? += bias;
        }
        if !penalises {
            return Ok(());
        }
        self.window.clear();
        self.window.extend_from_slice(&history[history.len().saturating_sub(c.repeat_last_n as usize)..]);
        self.window.sort_unstable();
        for same in self.window.chunk_by(|a, b| a == b) {
            let unknown = SampleError::UnknownToken { what: "the history", id: same[0], n_vocab };
            let logit = logits.get_mut(same[0] as usize).ok_or(unknown)?;
            if *logit <= 0.0 {
                *logit *= c.repeat_penalty;
            } else {
                *logit /= c.repeat_penalty;
            }
            *logit -= same.len() as f32 * c.frequency_penalty + c.presence_penalty;
        }
        Ok(())
    }

    fn choose(&mut self, logits: &[f32]) -> Result<u32, SampleError> {
        let best = argmax(logits)?;
        if self.config.temperature == 0.0 {
            return Ok(best as u32);
        }
        self.filter(logits, logits[best]);
        let candidates = &self.candidates;
        let total: f64 = candidates.iter().map(|c| c.weight).sum();
        let mut left = random(&mut self.state) * total;
        for c in candidates {
            left -= c.weight;
            if left < 0.0 {
                return Ok(c.id);
            }
        }
        // Only rounding leads here: the last that could have been drawn.
        Ok(candidates.iter().rfind(|c| c.weight > 0.0).map_or(best as u32, |c| c.id))
    }

    /// Leaves in `candidates` what passes the filters, weighted for the draw.
    fn filter(&mut self, logits: &[f32], max: f32) {
        let (c, candidates) = (&self.config, &mut self.candidates);
        let k = c.top_k as usize;
        if k > 0 && k < logits.len() {
            select_top(candidates, logits, k);
        } else {
            candidates.clear();
            candidates.extend((0..).zip(logits).map(|(id, &logit)| Candidate { weight: 0.0, logit, id }));
        }
        for c in candidates.iter_mut() {
            c.weight = exp64(f64::from(c.logit) - f64::from(max));
        }
        // Both filters keep a prefix of the ranking, so they may be applied in either order, but top-p's share is one
        // of all that top-k left.
        let total: f64 = candidates.iter().map(|c| c.weight).sum();
        let min_weight = f64::from(c.min_p);
        if min_weight > 0.0 {
            candidates.retain(|c| c.weight >= min_weight);
        }
        if c.top_p < 1.0 {
            let share = f64::from(c.top_p) * total;
            let left: f64 = candidates.iter().map(|c| c.weight).sum();
            // All that is below this sums to less than what the share leaves: few tokens are left to be ranked.
            let least = (left - share) / candidates.len() as f64;
            candidates.retain(|c| c.weight >= least);
            candidates.sort_unstable_by(rank);
            let mut sum = 0.0;
            let last = candidates.iter().position(|c| {
                sum += c.weight;
                sum >= share
            });
            candidates.truncate(last.map_or(usize::MAX, |last| last + 1));
        }
        if c.temperature != 1.0 {
            let temperature = f64::from(c.temperature);
            for c in candidates.iter_mut() {
                c.weight = exp64((f64::from(c.logit) - f64::from(max)) / temperature);
            }
        }
    }
}

/// Calls `take` with every logit that is above what it returned last, or NaN, and its index, in order.
fn each_above<E>(logits: &[f32], mut take: impl FnMut(usize, f32) -> Result<f32, E>) -> Result<(), E> {
    let mut floor = f32::NEG_INFINITY;
    for (block, logits) in logits.chunks(64).enumerate() {
        // Almost every block has none, and all its logits are compared at once.
        if !logits.iter().fold(false, |any, &x| any | (x > floor) | x.is_nan()) {
            continue;
        }
        for (i, &logit) in logits.iter().enumerate() {
            if logit > floor || logit.is_nan() {
                floor = take(64 * block + i, logit)?;
            }
        }
    }
    Ok(())
}

/// The lowest index of the highest logit. Fails on NaN and infinity.
fn argmax(logits: &[f32]) -> Result<usize, SampleError> {
    let mut best = None;
    each_above(logits, |id, value| {
        best = Some(id);
        if value.is_finite() { Ok(value) } else { Err(SampleError::Logit { id, value }) }
    })?;
    best.ok_or(SampleError::NothingAllowed { n_vocab: logits.len() })
}

/// The `k` first by rank, in order; `k` below the number of logits.
fn select_top(top: &mut Vec<Candidate>, logits: &[f32], k: usize) {
    top.clear();
    let room = (2 * k).max(256);
    // The lowest logit that still ranks among the first k. A later equal has a higher id and ranks behind.
    let mut floor = f32::NEG_INFINITY;
    let Ok(()) = each_above(logits, |id, logit| {
        top.push(Candidate { weight: 0.0, logit, id: id as u32 });
        if top.len() == room {
            floor = top.select_nth_unstable_by(k - 1, rank).1.logit;
            top.truncate(k);
        }
        Ok::<_, Infallible>(floor)
    });
    top.sort_unstable_by(rank);
    top.truncate(k);
}

/// Uniform in [0, 1), a multiple of 2^-53: the upper bits of SplitMix64.
fn random(state: &mut u64) -> f64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((z ^ (z >> 31)) >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// No filters, no penalties.
    fn plain() -> SamplerConfig {
        SamplerConfig { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0, ..SamplerConfig::default() }
    }

    fn sampler(config: SamplerConfig) -> Sampler {
        Sampler::new(config).unwrap()
    }

    /// The distribution as the documentation defines it: (id, probability), most probable first.
    fn naive(c: &SamplerConfig, logits: &[f32], history: &[u32]) -> Vec<(u32, f64)> {
        let mut logits = logits.to_vec();
        for &(id, bias) in &c.logit_bias {
            logits[id as usize] += bias;
        }
        let window = &history[history.len().saturating_sub(c.repeat_last_n as usize)..];
        for (id, logit) in logits.iter_mut().enumerate() {
            let count = window.iter().filter(|&&token| token as usize == id).count();
            if count > 0 {
                *logit = if *logit > 0.0 { *logit / c.repeat_penalty } else { *logit * c.repeat_penalty };
                *logit -= count as f32 * c.frequency_penalty + c.presence_penalty;
            }
        }
        let mut ids: Vec<u32> =
            (0..logits.len() as u32).filter(|&id| logits[id as usize] > f32::NEG_INFINITY).collect();
        ids.sort_by(|&a, &b| logits[b as usize].total_cmp(&logits[a as usize]).then(a.cmp(&b)));
        if c.top_k > 0 {
            ids.truncate(c.top_k as usize);
        }
        let softmax = |ids: &[u32], temperature: f64| -> Vec<f64> {
            let max = f64::from(logits[ids[0] as usize]);
            let w: Vec<f64> =
                ids.iter().map(|&id| exp64((f64::from(logits[id as usize]) - max) / temperature)).collect();
            let sum: f64 = w.iter().sum();
            w.iter().map(|w| w / sum).collect()
        };
        if c.top_p < 1.0 {
            let (mut sum, mut kept) = (0.0, 0);
            for p in softmax(&ids, 1.0) {
                sum += p;
                kept += 1;
                if sum >= f64::from(c.top_p) {
                    break;
                }
            }
            ids.truncate(kept);
        }
        if c.min_p > 0.0 {
            let p = softmax(&ids, 1.0);
            ids.truncate(p.iter().filter(|&&x| x >= f64::from(c.min_p) * p[0]).count());
        }
        let p = softmax(&ids, f64::from(c.temperature));
        ids.into_iter().zip(p).collect()
    }

    /// The sampler's own distribution, in the same form.
    fn distribution(s: &mut Sampler, logits: &[f32], history: &[u32]) -> Vec<(u32, f64)> {
        s.sample(logits, history).unwrap();
        s.candidates.retain(|c| c.logit > f32::NEG_INFINITY);
        s.candidates.sort_by(rank);
        let sum: f64 = s.candidates.iter().map(|c| c.weight).sum();
        s.candidates.iter().map(|c| (c.id, c.weight / sum)).collect()
    }

    /// Logits with ties and forbidden tokens.
    fn logit() -> impl Strategy<Value = f32> {
        prop_oneof![
            6 => -12.0f32..12.0,
            3 => (-8i8..8).prop_map(|x| f32::from(x) * 0.5),
            1 => Just(f32::NEG_INFINITY),
        ]
    }

    proptest! {
        #[test]
        fn filters_agree_with_their_definition(
            mut logits in proptest::collection::vec(logit(), 1..3000),
            history in proptest::collection::vec(0u32..40, 0..100),
            top_k in prop_oneof![Just(0u32), 1u32..60, 1u32..4000],
            top_p in prop_oneof![Just(1.0f32), 0.0f32..1.0],
            min_p in prop_oneof![Just(0.0f32), 0.0f32..1.0],
            temperature in prop_oneof![Just(1.0f32), 0.05f32..3.0],
            (repeat_penalty, frequency_penalty, presence_penalty) in (0.5f32..2.0, -1.0f32..1.0, -1.0f32..1.0),
            repeat_last_n in 0u32..120,
            bias in -5.0f32..5.0,
        ) {
            logits.resize(logits.len().max(40), 0.25);
            let config = SamplerConfig {
                temperature, top_k, top_p, min_p, repeat_penalty, repeat_last_n, frequency_penalty, presence_penalty,
                logit_bias: vec![(0, bias), (3, f32::NEG_INFINITY)], seed: 1,
            };
            let want = naive(&config, &logits, &history);
            let mut greedy = sampler(SamplerConfig { temperature: 0.0, ..config.clone() });
            prop_assert_eq!(greedy.sample(&logits, &history), Ok(want[0].0));
            let mut s = sampler(config);
            let got = distribution(&mut s, &logits, &history);
            prop_assert_eq!(got.len(), want.len());
            for (got, want) in got.iter().zip(&want) {
                prop_assert_eq!(got.0, want.0);
                prop_assert!((got.1 - want.1).abs() < 1e-12, "{:?} {:?}", got, want);
            }
            let chosen = s.sample(&logits, &history).unwrap();
            prop_assert!(want.iter().any(|&(id, p)| id == chosen && p > 0.0));
        }
    }

    #[test]
    fn draws_follow_the_probabilities() {
        let logits: Vec<f32> = (0..12u8).map(|i| f32::from(i * 7 % 12) * 0.3).collect();
        for config in [
            plain(),
            SamplerConfig { temperature: 0.6, ..plain() },
            SamplerConfig { top_k: 6, ..plain() },
            SamplerConfig { top_p: 0.8, min_p: 0.1, temperature: 1.7, ..plain() },
        ] {
            let config = SamplerConfig { seed: 20_260_701, ..config };
            let want = naive(&config, &logits, &[]);
            let mut s = sampler(config);
            let mut counts = [0u32; 12];
            let draws = 100_000;
            for _ in 0..draws {
                counts[s.sample(&logits, &[]).unwrap() as usize] += 1;
            }
            let deviation = |&(id, p): &(u32, f64)| {
                let expected = p * f64::from(draws);
                (f64::from(counts[id as usize]) - expected).powi(2) / expected
            };
            let (chi2, freedom) = (want.iter().map(deviation).sum::<f64>(), (want.len() - 1) as f64);
            // 5 standard deviations above the mean of chi-square.
            assert!(chi2 < freedom + 5.0 * (2.0 * freedom).sqrt(), "{chi2} of {freedom} degrees of freedom");
            assert_eq!(want.iter().map(|&(id, _)| counts[id as usize]).sum::<u32>(), draws);
        }
    }

    #[test]
    fn penalties_follow_llama_cpp() {
        let config = SamplerConfig {
            repeat_penalty: 2.0,
            frequency_penalty: 0.25,
            presence_penalty: 0.5,
            repeat_last_n: 4,
            ..plain()
        };
        let mut s = sampler(config);
        // Token 3 is outside the window of 4; token 0 occurs twice, token 1 twice.
        s.sample(&[4.0, -1.0, 1.5, 2.0], &[3, 0, 1, 1, 0]).unwrap();
        let logits: Vec<f32> = s.candidates.iter().map(|c| c.logit).collect();
        assert_eq!(logits, [4.0 / 2.0 - 0.5 - 0.5, -2.0 - 0.5 - 0.5, 1.5, 2.0]);
    }

    #[test]
    fn a_seed_is_a_sequence() {
        // The first outputs of SplitMix64 for seed 1234567, as published with the algorithm.
        let mut state = 1_234_567;
        let want = [6_457_827_717_110_365_317u64, 3_203_168_211_198_807_973, 9_817_491_932_198_370_423];
        assert!(want.iter().all(|&w| random(&mut state) == (w >> 11) as f64 / (1u64 << 53) as f64));

        let logits = vec![0.0; 1000];
        let tokens = |seed| {
            let mut s = sampler(SamplerConfig { seed, ..plain() });
            std::array::from_fn::<u32, 6, _>(|_| {
                s.configure(plain()).unwrap(); // which does not begin anew
                s.sample(&logits, &[]).unwrap()
            })
        };
        assert_eq!(tokens(7), tokens(7));
        assert_ne!(tokens(7), tokens(8));
        // With equal logits the draw is the random number itself.
        assert_eq!(
            tokens(1_234_567)[..3],
            want.map(|w| ((w >> 11) as f64 / (1u64 << 53) as f64 * 1000.0) as u32)
        );
    }

    #[test]
    fn bad_logits_are_named() {
        for temperature in [0.0, 1.0] {
            let mut s = sampler(SamplerConfig { temperature, ..plain() });
            for (bad, at) in [(f32::NAN, 1030), (f32::INFINITY, 5), (f32::NAN, 4998)] {
                let mut logits = vec![0.5; 5000];
                logits[at] = bad;
                let error = s.sample(&logits, &[]);
                assert!(matches!(error, Err(SampleError::Logit { id, .. }) if id == at), "{error:?}");
            }
            assert_eq!(s.sample(&[], &[]), Err(SampleError::NothingAllowed { n_vocab: 0 }));
            assert_eq!(
                s.sample(&[f32::NEG_INFINITY; 3], &[]),
                Err(SampleError::NothingAllowed { n_vocab: 3 })
            );
            assert_eq!(s.sample(&[f32::NEG_INFINITY, f32::MIN, f32::NEG_INFINITY], &[]), Ok(1));
        }
        let bias = |id, bias| {
            sampler(SamplerConfig { logit_bias: vec![(id, bias)], ..plain() }).sample(&[f32::MAX], &[])
        };
        assert!(matches!(bias(0, f32::MAX), Err(SampleError::Logit { id: 0, .. })));
        assert!(matches!(bias(1, 0.0), Err(SampleError::UnknownToken { id: 1, n_vocab: 1, .. })));
        let mut s = sampler(SamplerConfig { presence_penalty: 1.0, ..plain() });
        assert!(matches!(s.sample(&[0.0], &[0, 9]), Err(SampleError::UnknownToken { id: 9, .. })));
    }

    #[test]
    fn settings_out_of_range_are_refused() {
        for bad in [
            SamplerConfig { temperature: -0.1, ..plain() },
            SamplerConfig { temperature: f32::INFINITY, ..plain() },
            SamplerConfig { top_p: f32::NAN, ..plain() },
            SamplerConfig { top_p: 1.01, ..plain() },
            SamplerConfig { min_p: -0.5, ..plain() },
            SamplerConfig { repeat_penalty: 0.0, ..plain() },
            SamplerConfig { frequency_penalty: f32::NAN, ..plain() },
            SamplerConfig { presence_penalty: f32::INFINITY, ..plain() },
            SamplerConfig { logit_bias: vec![(1, f32::INFINITY)], ..plain() },
        ] {
            assert!(Sampler::new(bad.clone()).is_err(), "{bad:?}");
        }
        let error = Sampler::new(SamplerConfig { top_p: 2.0, ..plain() }).err().unwrap();
        assert_eq!(error.to_string(), "top_p is 2; expected a number from 0 to 1");
    }
}
