//! How much memory a command may take, and what it takes.

use crate::machine;
use crate::output::{bytes, notice};
use crate::usage_error;
use anyhow::bail;
use bitnet::kernels::{KvType, MemoryPart, PAGE, memory_use};
use bitnet::{Engine, EngineOptions, MemoryPlan};
use clap::error::ErrorKind;

/// How keys and values are kept, and how much memory there is.
#[derive(clap::Args)]
pub struct MemoryArgs {
    /// How the cache stores keys and values: f16 takes half of the memory, q8 a quarter and a bit; auto is the first of the
    /// three with which the context fits
    #[arg(long, value_name = "TYPE", value_enum, default_value = "f32", aliases = ["cache-type-k", "cache-type-v"])]
    cache_type: Vec<CacheType>,
    /// Take no more memory than this, such as 1.5G or 800M: a context that was not asked for becomes shorter, and what does
    /// not fit is refused [default: what the machine or the control group has available]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    max_memory: Option<u64>,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum CacheType {
    F32,
    F16,
    #[value(alias = "q8_0")]
    Q8,
    Auto,
}

/// A context that was not asked for is not made shorter than this.
const LEAST_CONTEXT: usize = 512;

impl MemoryArgs {
    /// The cache type; for `auto` the first that is tried.
    pub fn cache_type(&self) -> KvType {
        let first = self.cache_type[0];
        if self.cache_type.iter().any(|ty| *ty != first) {
            usage_error(
                ErrorKind::ArgumentConflict,
                "keys and values are kept in one type: give --cache-type once",
            );
        }
        match first {
            CacheType::F32 | CacheType::Auto => KvType::F32,
            CacheType::F16 => KvType::F16,
            CacheType::Q8 => KvType::Q8,
        }
    }

    /// `options`, or what is left of them where memory is short, and a notice that says so. `free` is whether the context
    /// may become shorter.
    ///
    /// # Errors
    /// Where `model` does not fit, with the sum.
    pub fn fit(
        &self,
        model: &str,
        options: EngineOptions,
        free: bool,
        plan: impl Fn(&EngineOptions) -> MemoryPlan,
    ) -> anyhow::Result<(EngineOptions, Option<String>)> {
        let budget = match self.max_memory {
            Some(size) => Some((size, "--max-memory allows")),
            None => machine::available(),
        };
        let Some((limit, whose)) = budget else { return Ok((options, None)) };
        let least = if free { LEAST_CONTEXT.min(options.context) } else { options.context };
        let types: &[KvType] =
            if self.cache_type[0] == CacheType::Auto { &[KvType::F16, KvType::Q8] } else { &[] };
        let total = |options: &EngineOptions| plan(options).total();
        let budget = usize::try_from(limit).unwrap_or(usize::MAX);
        let allows = format!("{whose} {}", bytes(limit));
        match options.fit(budget, least, types, total) {
            Some(fitting) if fitting == options => Ok((options, None)),
            Some(fitting) => {
                let mut changes = Vec::new();
                if fitting.context != options.context {
                    changes.push(format!(
                        "a context of {} tokens instead of {}",
                        fitting.context, options.context
                    ));
                }
                if fitting.cache_type != options.cache_type {
                    changes.push(format!("a cache in {}", fitting.cache_type.name()));
                }
                if fitting.max_rows != options.max_rows {
                    changes.push(format!("steps of {} tokens", fitting.max_rows));
                }
                let needed = bytes(total(&options) as u64);
                Ok((fitting, Some(format!("{allows} and {needed} were needed: {}", changes.join(", ")))))
            }
            None => {
                let mut types = vec![options.cache_type, KvType::Q8];
                types.dedup();
                let mut steps: Vec<_> = types
                    .into_iter()
                    .filter_map(|cache_type| {
                        let other = EngineOptions { cache_type, ..options };
                        let fitting = other.fit(budget, PAGE.min(options.context), &[], total)?;
                        let mut step = Vec::new();
                        if fitting.context != options.context {
                            step.push(format!("-c {}", fitting.context));
                        }
                        if cache_type != options.cache_type {
                            step.push(format!("--cache-type {}", cache_type.name()));
                        }
                        Some(step.join(" "))
                    })
                    .collect();
                if steps.is_empty() {
                    steps.push("a smaller model".to_owned());
                }
                if self.max_memory.is_none() {
                    steps.push("a --max-memory that you know to be right".to_owned());
                }
                let needs = sum(&plan(&options), &options);
                bail!("{model}: needs {needs}; {allows}: what helps is {}", steps.join(", or "))
            }
        }
    }
}

/// A plan as a sum.
pub fn sum(plan: &MemoryPlan, options: &EngineOptions) -> String {
    let parts = MemoryPart::ALL.iter().filter(|part| plan.of(**part) > 0).map(|&part| {
        let size = bytes(plan.of(part) as u64);
        match part {
            MemoryPart::Cache => {
                let sequences =
                    if options.sequences > 1 { format!("{} x ", options.sequences) } else { String::new() };
                format!(
                    "cache of {sequences}{} tokens in {} {size}",
                    options.context,
                    options.cache_type.name()
                )
            }
            part => format!("{} {size}", part.name()),
        }
    });
    format!("{} ({})", bytes(plan.total() as u64), parts.collect::<Vec<_>>().join(" + "))
}

/// What was taken so far, for `--verbose`.
pub fn tell(engine: &Engine) {
    let (parts, peak) = memory_use();
    let used: Vec<_> = MemoryPart::ALL
        .iter()
        .map(|&part| {
            let touched = match part {
                MemoryPart::Cache => format!(" ({} of them in use)", bytes(engine.cache_touched() as u64)),
                _ => String::new(),
            };
            format!("{} {}{touched}", part.name(), bytes(parts[part as usize] as u64))
        })
        .collect();
    let resident = machine::resident().map_or(String::new(), |(now, most)| {
        let [now, most] = [now, most].map(bytes);
        format!("; the system counts {now} now and {most} at most, pages of files included")
    });
    notice(format_args!("memory: {}; peak {}{resident}", used.join(", "), bytes(peak as u64)));
}

/// `800M`, `1.5G`, `1.5GiB`: powers of 1024.
fn parse_size(text: &str) -> Result<u64, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let power = match unit.to_ascii_uppercase().trim_end_matches('B').trim_end_matches('I') {
        "" if !unit.eq_ignore_ascii_case("ib") => Some(0),
        "K" => Some(10),
        "M" => Some(20),
        "G" => Some(30),
        "T" => Some(40),
        _ => None,
    };
    match (number.parse::<f64>(), power) {
        (Ok(number), Some(power)) if number.is_finite() => Ok((number * f64::from(2).powi(power)) as u64),
        _ => Err("expected a size such as 800M or 1.5G".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::parse_size;

    #[test]
    fn sizes() {
        for (text, size) in [
            ("1.5G", 3 << 29),
            ("800M", 800 << 20),
            ("2gib", 2 << 30),
            ("64KB", 65_536),
            ("17", 17),
            ("17B", 17),
        ] {
            assert_eq!(parse_size(text), Ok(size), "{text}");
        }
        for text in ["", "G", "-1G", "1.2.3M", "1X", "NaN", "inf", "1 G", "1iB"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }
}
