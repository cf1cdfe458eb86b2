//! Keeps lists and maps small, and away from Jinja's text operators.
//!
//! `a ~ b` and `a in b` turn a list into text without a bound on its length, and a list may hold a long text many times at no
//! cost. So each operand of `~` and each left operand of `in` in a template is put into a call of [`PLAIN`], a function that
//! lets pass all but lists and maps.
//!
//! A list may hold the same list twice, that one another twice, and so on: few steps make what takes for ever to compare, or
//! is too deep for the stack. So what is in brackets or assigned is put into a call of [`SMALL`], which goes through all of it
//! and pays for that. A namespace could come to hold itself: its attributes are assigned through [`COPIED`].
//!
//! Hugging Face's block `generation` says which text is the model's, for those who train it; here it is a block like any other.

use std::ops::Range;

/// The functions' names. Templates may call them too; it does no harm.
pub(super) const PLAIN: &str = "plain_value";
pub(super) const SMALL: &str = "small_value";
pub(super) const COPIED: &str = "copied_value";

/// Brackets in brackets: the engine's parser takes fewer.
const MAX_DEPTH: usize = 200;

/// The template with the calls put in; None where brackets are nested too deep. What is not Jinja comes out as it went in, as
/// far as it was understood.
pub(super) fn guard_operators(source: &str) -> Option<String> {
    let mut edits = Vec::new();
    let mut at = 0;
    while let Some(start) = source[at..].find('{').map(|found| at + found) {
        at = start + 1;
        match source.as_bytes().get(at) {
            Some(b'#') => at = source[at..].find("#}").map_or(source.len(), |end| at + end + 2),
            Some(kind @ (b'{' | b'%')) => {
                let tokens = tokens(source, at + 1);
                if tokens.iter().any(|token| token.depth > MAX_DEPTH) {
                    return None;
                }
                at = tokens.last().map_or(source.len(), |last| last.end);
                let signed = tokens.first().is_some_and(|first| ["-", "+"].contains(&first.text(source)));
                let name = tokens.get(usize::from(signed)).filter(|_| *kind == b'%');
                let block = match name.map_or("", |name| name.text(source)) {
                    "raw" => {
                        at = source[at..].find("endraw").map_or(source.len(), |end| at + end);
                        None
                    }
                    "generation" => Some("with"),
                    "endgeneration" => Some("endwith"),
                    _ => None,
                };
                edits.extend(name.zip(block).map(|(name, block)| (name.start, name.end, block)));
                guard(source, &tokens, &mut edits);
            }
            _ => {}
        }
    }
    // Of what begins in one place the outer was put in first.
    edits.sort_by_key(|edit| edit.0);
    let (mut out, mut from) = (String::with_capacity(source.len() + 16 * edits.len()), 0);
    for (start, end, text) in edits {
        out.push_str(&source[from..start]);
        out.push_str(text);
        from = end;
    }
    Some(out + &source[from..])
}

/// Text in place of what is between two places of a template.
type Edit = (usize, usize, &'static str);

struct Token {
    start: usize,
    end: usize,
    /// Brackets around it; a bracket itself is outside of its pair.
    depth: usize,
}

impl Token {
    fn text<'a>(&self, source: &'a str) -> &'a str {
        &source[self.start..self.end]
    }
}

/// The tokens of a tag from `at` on, with its end as the last.
fn tokens(source: &str, mut at: usize) -> Vec<Token> {
    let bytes = source.as_bytes();
    let mut tokens = Vec::new();
    let mut depth = 0_usize;
    while at < bytes.len() {
        let start = at;
        let name = |byte: &u8| byte.is_ascii_alphanumeric() || *byte == b'_' || *byte >= 0x80;
        let pair = &bytes[at..bytes.len().min(at + 2)];
        at += match bytes[at] {
            byte if byte.is_ascii_whitespace() => {
                at += 1;
                continue;
            }
            quote @ (b'"' | b'\'') => {
                let mut len = 1;
                while bytes.get(at + len).is_some_and(|&byte| byte != quote) {
                    len += if bytes[at + len] == b'\\' { 2 } else { 1 };
                }
                (len + 1).min(bytes.len() - at)
            }
            byte if name(&byte) => bytes[at..].iter().take_while(|byte| name(byte)).count(),
            _ if depth == 0 && (pair == b"}}" || pair == b"%}") => {
                tokens.push(Token { start, end: at + 2, depth });
                return tokens;
            }
            _ if [&b"=="[..], b"!=", b"<=", b">="].contains(&pair) => 2,
            _ => 1,
        };
        let closes = matches!(bytes[start], b')' | b']' | b'}');
        depth = depth.saturating_sub(usize::from(closes));
        tokens.push(Token { start, end: at, depth });
        depth += usize::from(matches!(bytes[start], b'(' | b'[' | b'{'));
    }
    tokens
}

/// Puts the operands, the brackets and the assigned value of a tag into calls.
fn guard(source: &str, tokens: &[Token], edits: &mut Vec<Edit>) {
    let text = |index: usize| tokens.get(index).map_or("", |token| token.text(source));
    let mut call = |operand: Range<usize>, call, end| {
        if let Some([first, .., last] | [first @ last]) = tokens.get(operand) {
            edits.extend([(first.start, first.start, call), (last.end, last.end, end)]);
        }
    };
    let first = usize::from(text(0) == "-" || text(0) == "+");
    let mut loop_in = text(first) == "for";
    // What stands before it is assigned to.
    let assigns = match text(first) {
        "for" => "in",
        "set" => "=",
        _ => "",
    };
    let assigned = tokens.iter().position(|token| token.depth == 0 && token.text(source) == assigns);
    if let Some(at) = assigned.filter(|_| assigns == "=") {
        let end =
            tokens.len() - if ["-", "+"].contains(&text(tokens.len().saturating_sub(2))) { 2 } else { 1 };
        let attribute = (first..at).any(|index| text(index) == ".");
        call(at + 1..end, if attribute { "copied_value((" } else { "small_value((" }, "))");
    }
    for (at, token) in tokens.iter().enumerate() {
        let concat = token.text(source) == "~";
        if !concat && (token.text(source) != "in" || at > 0 && text(at - 1) == ".") {
            continue;
        }
        if !concat && token.depth == 0 && std::mem::take(&mut loop_in) {
            continue;
        }
        let inside = |index: &usize| {
            let other = &tokens[*index];
            other.depth > token.depth
                || other.depth == token.depth && !ends_operand(tokens, source, *index, concat)
        };
        let end = if !concat && at > 0 && text(at - 1) == "not" { at - 1 } else { at };
        let left = (0..end).rev().take_while(inside).last();
        let right = (at + 1..tokens.len()).take_while(inside).last().filter(|_| concat);
        let operands = [left.map(|first| first..end), right.map(|last| at + 1..last + 1)];
        operands.into_iter().flatten().for_each(|operand| call(operand, "plain_value(", ")"));
    }
    // Brackets that are no call, no index, and not assigned to.
    for (at, token) in tokens.iter().enumerate().skip(assigned.map_or(first, |at| at + 1)) {
        let before = at.checked_sub(1).map_or("", text);
        let value = before.ends_with(|c: char| c.is_alphanumeric() || "_\"')]}".contains(c) || !c.is_ascii())
            && !KEYWORDS.split(' ').any(|keyword| keyword == before);
        if ["(", "[", "{"].contains(&text(at)) && !value && before != "call" {
            let inside = tokens[at + 1..].iter().take_while(|other| other.depth > token.depth).count();
            call(at..at + inside + 2, "small_value(", ")");
        }
    }
}

/// Whether a token ends an operand of `~`, or else the left one of `in`, that it is not in brackets of.
fn ends_operand(tokens: &[Token], source: &str, index: usize, concat: bool) -> bool {
    let before = index.checked_sub(1).map_or("", |before| tokens[before].text(source));
    match tokens[index].text(source) {
        "==" | "!=" | "<=" | ">=" | "<" | ">" | "," | ":" | "=" | "}}" | "%}" => true,
        "~" => concat,
        // A sign belongs to its operand, and the mark that trims white space to the tag.
        "+" | "-" => index == 0 || index + 2 == tokens.len() || concat && !WORDS_AND_SIGNS.contains(&before),
        word => KEYWORDS.split(' ').any(|keyword| keyword == word) && before != ".",
    }
}

const WORDS_AND_SIGNS: [&str; 10] = ["~", "+", "-", "(", "[", ",", "=", "in", "if", "else"];
const KEYWORDS: &str = "and or not in is if elif else set for with recursive filter call do";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operands_are_found() {
        for (source, expected) in [
            ("{{ a ~ b }}", "{{ <a> ~ <b> }}"),
            ("{{- a ~ b.c[0] | f(x ~ 'y') ~ 3 -}}", "{{- <a> ~ <<b.c[0] | f(<x> ~ <'y'>)>> ~ <3> -}}"),
            ("{% set x = a ~ ('b' ~ c) %}", "{% set x = «(<a> ~ <«(<'b'> ~ <c>)»>)» %}"),
            (
                "{%- set n.a, b = (c, d) -%}{% for (e, f) in [g] %}{% set h %}{% call(i) j([k][0]) %}",
                "{%- set n.a, b = copied_value((«(c, d)»)) -%}{% for (e, f) in «[g]» %}{% set h %}{% call(i) j(«[k]»[0]) %}",
            ),
            (
                "{% if not a in b and c not in [d, e ~ f] %}",
                "{% if not <a> in b and <c> not in «[d, <e> ~ <f>]» %}",
            ),
            ("{%- for m in a ~ b if 'x' in m %}", "{%- for m in <a> ~ <b> if <'x'> in m %}"),
            ("{{ a + b ~ c == d ~ -e }}", "{{ a + <b> ~ <c> == <d> ~ <-e> }}"),
            ("{{ a + b in c }}", "{{ <a + b> in c }}"),
            (
                "{{ f(k=a ~ b) if {'~': {'in': 1}} else x.in ~ '}}' }}",
                "{{ f(k=<a> ~ <b>) if «{'~': «{'in': 1}»}» else <x.in> ~ <'}}'> }}",
            ),
            (
                "{# a ~ b #}~{% raw %}{{ a ~ b }}{% endraw %}{{ a ~ b",
                "{# a ~ b #}~{% raw %}{{ a ~ b }}{% endraw %}{{ <a> ~ <b>",
            ),
            (
                "{%- raw -%}{{ a ~ b }}{% endraw %}{{ raw }}{{ a ~ b }}",
                "{%- raw -%}{{ a ~ b }}{% endraw %}{{ raw }}{{ <a> ~ <b> }}",
            ),
            (
                "{%- generation %}{{ generation }}{% endgeneration -%}",
                "{%- with %}{{ generation }}{% endwith -%}",
            ),
            ("{'a' ~ b} ~ {{ \"\\\"~\" ~ é }}", "{'a' ~ b} ~ {{ <\"\\\"~\"> ~ <é> }}"),
        ] {
            let expected = expected.replace('<', &format!("{PLAIN}(")).replace(['>', '»'], ")");
            assert_eq!(guard_operators(source), Some(expected.replace('«', &format!("{SMALL}("))));
        }
        assert_eq!(guard_operators(&format!("{{{{ {}a", "(".repeat(MAX_DEPTH + 2))), None);
    }
}
