//! Text into the pieces that byte-pair encoding never merges across: as LLaMA-3, Falcon and SentencePiece do.
//!
//! Written by hand because a regex engine with lookahead is slower by a factor and must be compiled at start.

const OTHER: u8 = 0;
/// `\p{L}`
const LETTER: u8 = 1;
/// `\p{N}`
const NUMBER: u8 = 2;
/// `\s`
const SPACE: u8 = 3;

/// Code points where a new class begins, in order: code point << 2 | class. The classes are those of Unicode 16, asked of the
/// regex engine of Hugging Face's `tokenizers` code point by code point, by `tools/make_tokenizer_goldens.py`. A vocabulary is
/// bound to the split it was trained with, so they do not follow newer versions.
const BOUNDARIES: &[u32] = &include!("classes.in");

/// Where punctuation begins, and where it ends, in turns: that of the step "Punctuation", by an older version of Unicode.
const PUNCTUATION: &[u32] = &include!("punctuation.in");

/// How a text is cut before it is encoded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Split {
    /// By LLaMA-3's pattern.
    #[default]
    Llama3,
    /// Runs of punctuation on their own, the rest by GPT-2's pattern, and then numbers.
    Falcon {
        /// A piece for so many ASCII digits, 1 or 3.
        digits: usize,
        /// Whether numerals are cut off from other bytes before that: each, or in runs. What is a numeral is asked of GPT-2's
        /// byte alphabet, so six bytes that parts of other characters have are among them.
        numerals: Option<Numerals>,
    },
    /// SentencePiece's: not at all.
    Sentence {
        /// Where a space is put before it.
        prefix: Prefix,
        /// Whether it is cut before each space after all.
        at_spaces: bool,
    },
}

/// Where SentencePiece's tokenizers add a space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Prefix {
    /// Before each part of a text between special tokens, as SentencePiece itself and llama.cpp.
    Each,
    /// Before each part that begins with none.
    Always,
    /// Before a text that begins with none.
    First,
    /// Nowhere.
    Never,
}

impl Prefix {
    /// Whether there is one before `part`, with which a text begins or not.
    pub(super) fn adds(self, part: &str, begins: bool) -> bool {
        let lacks = !part.starts_with([' ', SPACE_MARK]);
        !part.is_empty()
            && match self {
                Self::Each => true,
                Self::Always => lacks,
                Self::First => lacks && begins,
                Self::Never => false,
            }
    }
}

/// What SentencePiece writes for a space.
pub(super) const SPACE_MARK: char = '\u{2581}';

/// The step "Digits" of a `tokenizer.json`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Numerals {
    /// `individual_digits`
    Each,
    /// Not so.
    Runs,
}

impl Split {
    /// Hands over the pieces of a text in order; together they are the text. Time is linear in its length.
    pub(super) fn pieces(self, text: &str, mut take: impl FnMut(&[u8])) {
        match self {
            Self::Llama3 => pieces(text, piece_len).for_each(|piece| take(piece.as_bytes())),
            Self::Sentence { at_spaces: false, .. } => take(text.as_bytes()),
            Self::Sentence { at_spaces: true, .. } => {
                let next =
                    |text: &str| text.char_indices().skip(1).find(|(_, c)| *c == ' ').map(|(at, _)| at);
                pieces(text, |text| next(text).unwrap_or(text.len()))
                    .for_each(|piece| take(piece.as_bytes()));
            }
            Self::Falcon { digits, numerals } => {
                for run in pieces(text, |text| run_end_by(text, is_punctuation)) {
                    let len = if run.starts_with(is_punctuation) { str::len } else { gpt2_len };
                    for piece in pieces(run, len) {
                        cut_numbers(piece.as_bytes(), digits, numerals, &mut take);
                    }
                }
            }
        }
    }
}

/// A key of our own in GGUF, for which llama.cpp's names have no room, and what it may say.
pub(crate) type Key<T> = (&'static str, [(&'static str, T); 3]);

pub(crate) const NUMERALS: Key<Option<Numerals>> = (
    "bitnet.tokenizer.numerals",
    [("none", None), ("each", Some(Numerals::Each)), ("runs", Some(Numerals::Runs))],
);
/// The names are those of `tokenizer.json`.
pub(crate) const PREFIX: Key<Prefix> = (
    "bitnet.tokenizer.prefix",
    [("always", Prefix::Always), ("first", Prefix::First), ("never", Prefix::Never)],
);
/// Another one: whether text is cut before spaces.
pub(crate) const AT_SPACES: &str = "bitnet.tokenizer.split_at_spaces";

/// The pattern that [`pieces`] follows, as `tokenizer.json` spells it.
pub(super) const PATTERN: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);

/// The pieces of a text, of which `len` gives the bytes of the first.
fn pieces(text: &str, len: impl Fn(&str) -> usize) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        let (piece, after) = rest.split_at(len(rest));
        rest = after;
        (!piece.is_empty()).then_some(piece)
    })
}

/// Bytes of the first piece. The branches stand in the order of the pattern's alternatives.
fn piece_len(text: &str) -> usize {
    let mut chars = text.chars();
    let Some(first) = chars.next() else { return 0 };
    let class = class_of(first);
    let rest = chars.as_str();
    let next = chars.next().map_or(SPACE, class_of);
    let start = first.len_utf8();

    if first == '\''
        && let Some(len) = contraction(rest)
    {
        return start + len;
    }
    let may_lead = class != NUMBER && first != '\r' && first != '\n';
    if class == LETTER || (may_lead && next == LETTER) {
        return run_end(text, start, LETTER);
    }
    if class == NUMBER {
        return text.chars().take(3).take_while(|&c| class_of(c) == NUMBER).map(char::len_utf8).sum();
    }
    if class == OTHER || (first == ' ' && next == OTHER) {
        let end = run_end(text, start, OTHER);
        return text[end..].find(|c| c != '\r' && c != '\n').map_or(text.len(), |n| end + n);
    }
    spaces_len(text)
}

/// `\s*[\r\n]+|\s+(?!\S)|\s+`: through the last line end of the run; else the run, less its last character if text follows.
fn spaces_len(text: &str) -> usize {
    let end = run_end(text, 0, SPACE);
    let run = &text[..end];
    if let Some(line_end) = run.rfind(['\r', '\n']) {
        return line_end + 1;
    }
    let last = run.chars().next_back().map_or(0, char::len_utf8);
    if end == text.len() || end == last { end } else { end - last }
}

/// Bytes of `s|t|re|ve|m|ll|d` in any case at the start of a text. The long s (U+017F) folds to s.
fn contraction(text: &str) -> Option<usize> {
    let mut chars = text.chars();
    let first = chars.next()?;
    match first.to_ascii_lowercase() {
        's' | 't' | 'm' | 'd' | 'ſ' => Some(first.len_utf8()),
        'r' | 'v' => chars.next().filter(|c| c.eq_ignore_ascii_case(&'e')).map(|_| 2),
        'l' => chars.next().filter(|c| c.eq_ignore_ascii_case(&'l')).map(|_| 2),
        _ => None,
    }
}

/// Bytes of the first piece by GPT-2's pattern, `'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+`, in a
/// text without apostrophes.
fn gpt2_len(text: &str) -> usize {
    let class = |at: usize| text[at..].chars().next().map_or(SPACE, class_of);
    let lead = usize::from(text.starts_with(' ') && class(1) != SPACE);
    if !text.is_empty() && class(lead) != SPACE {
        return run_end(text, lead, class(lead));
    }
    let end = run_end(text, 0, SPACE);
    let last = text[..end].chars().next_back().map_or(0, char::len_utf8);
    if end == text.len() || end == last { end } else { end - last }
}

fn cut_numbers(piece: &[u8], digits: usize, numerals: Option<Numerals>, take: &mut impl FnMut(&[u8])) {
    let numeral = |byte: &u8| matches!(byte, b'0'..=b'9' | 0xb2 | 0xb3 | 0xb9 | 0xbc..=0xbe);
    if !piece.iter().any(numeral) {
        return take(piece);
    }
    for run in piece.chunk_by(|a, b| numerals.is_none() || numeral(a) == numeral(b)) {
        if numerals == Some(Numerals::Each) && numeral(&run[0]) {
            run.chunks(1).for_each(&mut *take);
            continue;
        }
        let (mut from, mut at) = (0, 0);
        while let Some(group) = run.get(at..at + digits) {
            if group.iter().all(u8::is_ascii_digit) {
                [&run[from..at], group].into_iter().filter(|part| !part.is_empty()).for_each(&mut *take);
                at += digits;
                from = at;
            } else {
                at += 1;
            }
        }
        if from < run.len() {
            take(&run[from..]);
        }
    }
}

fn is_punctuation(c: char) -> bool {
    PUNCTUATION.partition_point(|&turn| turn <= u32::from(c)) % 2 == 1
}

/// End of the run at the start of a text in which `is` says the same of every character.
fn run_end_by(text: &str, is: impl Fn(char) -> bool) -> usize {
    let first = text.starts_with(&is);
    text.find(|c| is(c) != first).unwrap_or(text.len())
}

/// End of the run of one class that starts at `from`; `from` itself if there is none.
fn run_end(text: &str, from: usize, class: u8) -> usize {
    text[from..].find(|c| class_of(c) != class).map_or(text.len(), |n| from + n)
}

fn class_of(c: char) -> u8 {
    const ASCII: [u8; 128] = {
        let mut table = [0; 128];
        let mut c = 0;
        while c < table.len() {
            table[c] = search(c as u32);
            c += 1;
        }
        table
    };
    if c.is_ascii() { ASCII[c as usize] } else { search(c as u32) }
}

/// The class of the last boundary at or below `c`.
const fn search(c: u32) -> u8 {
    let (mut low, mut high) = (0, BOUNDARIES.len()); // the first boundary is 0
    while high - low > 1 {
        let middle = (low + high) / 2;
        if BOUNDARIES[middle] >> 2 <= c {
            low = middle;
        } else {
            high = middle;
        }
    }
    (BOUNDARIES[low] & 3) as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_are_those_of_unicode_16() {
        let mut counts = [0; 4];
        ('\0'..=char::MAX).for_each(|c| counts[usize::from(class_of(c))] += 1);
        assert_eq!(counts[usize::from(LETTER)], 141_028);
        assert_eq!(counts[usize::from(NUMBER)], 1_911);
        assert_eq!(counts[usize::from(SPACE)], 25);
        assert!(('\0'..=char::MAX).all(|c| c.is_whitespace() == (class_of(c) == SPACE)));
    }
}
