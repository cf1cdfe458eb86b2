//! Keeps lists and maps away from Jinja's text operators.
//!
//! `a ~ b` and `a in b` turn a list into text without a bound on its length, and a list may hold a long text many times at no
//! cost. So each operand of `~` and each left operand of `in` in a template is put into a call of [`PLAIN`], a function that
//! lets pass all but lists and maps.
//!
//! Hugging Face's block `generation` says which text is the model's, for those who train it; here it is a block like any other.

/// The function's name. Templates may call it too; it does no harm.
pub(super) const PLAIN: &str = "plain_value";
const CALL: &str = "plain_value(";

/// The template with the calls put in. What is not Jinja comes out as it went in, as far as it was understood.
pub(super) fn guard_operators(source: &str) -> String {
    let mut edits = Vec::new();
    let mut at = 0;
    while let Some(start) = source[at..].find('{').map(|found| at + found) {
        at = start + 1;
        match source.as_bytes().get(at) {
            Some(b'#') => at = source[at..].find("#}").map_or(source.len(), |end| at + end + 2),
            Some(kind @ (b'{' | b'%')) => {
                let tokens = tokens(source, at + 1);
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
    // Operands that end somewhere end before those that begin there.
    edits.sort_unstable();
    let (mut out, mut from) = (String::with_capacity(source.len() + 16 * edits.len()), 0);
    for (start, end, text) in edits {
        out.push_str(&source[from..start]);
        out.push_str(text);
        from = end;
    }
    out + &source[from..]
}

/// Text in place of what is between two places of a template. Of two calls in one place `)` sorts first.
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

/// Puts the operands of a tag into calls.
fn guard(source: &str, tokens: &[Token], edits: &mut Vec<Edit>) {
    let text = |index: usize| tokens.get(index).map_or("", |token| token.text(source));
    let mut loop_in = text(usize::from(text(0) == "-" || text(0) == "+")) == "for";
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
        for operand in operands.into_iter().flatten() {
            let (start, end) = (tokens[operand.start].start, tokens[operand.end - 1].end);
            edits.extend([(start, start, CALL), (end, end, ")")]);
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
            ("{% set x = a ~ ('b' ~ c) %}", "{% set x = <a> ~ <('b' ~ <c>)> %}"),
            (
                "{% if not a in b and c not in [d, e ~ f] %}",
                "{% if not <a> in b and <c> not in [d, <e> ~ <f>] %}",
            ),
            ("{%- for m in a ~ b if 'x' in m %}", "{%- for m in <a> ~ <b> if <'x'> in m %}"),
            ("{{ a + b ~ c == d ~ -e }}", "{{ a + <b> ~ <c> == <d> ~ <-e> }}"),
            ("{{ a + b in c }}", "{{ <a + b> in c }}"),
            (
                "{{ f(k=a ~ b) if {'~': {'in': 1}} else x.in ~ '}}' }}",
                "{{ f(k=<a> ~ <b>) if {'~': {'in': 1}} else <x.in> ~ <'}}'> }}",
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
            let expected = expected.replace("('b' ~ <c>)", "(<'b'> ~ <c>)");
            let expected = expected.replace('<', &format!("{PLAIN}(")).replace('>', ")");
            assert_eq!(guard_operators(source), expected);
        }
    }
}
