//! Chat templates: from messages to the tokens that a model was trained to see.
//!
//! A template comes from the model file, in Jinja, or is one of those built in. Neither the template nor a message is
//! trusted: a template may only do so much work, and what a message says never becomes a control token.
//!
//! Hugging Face renders the conversation to one text and encodes that, control tokens recognised. To get its tokens for
//! ordinary text, and yet keep `<|eot_id|>` in a message what it is, text, private characters are put into the messages
//! before the rendering: one in each place where a control token would be found. The template cannot tell them from
//! other text, so it may trim or cut a message as it likes. The rendered text is then cut at the control tokens that are
//! still found, and the private characters are taken out of the parts between before these are encoded.

use super::jinja::Jinja;
use super::tokenizer::{Specials, Tokenizer};
use serde::{Deserialize, Deserializer, Serialize, de};

/// Who says something.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Instructions for the whole conversation.
    System,
    /// The person.
    User,
    /// The model.
    Assistant,
    /// What a tool gave that the model asked for; few templates know it.
    Tool,
}

/// A part of a conversation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)] // the calls of tools must not get lost without a word
pub struct Message {
    /// Who says it.
    pub role: Role,
    /// What is said; read from a text, or from parts of a text as in OpenAI's format, which become lines.
    #[serde(deserialize_with = "content")]
    pub content: String,
    /// The speaker's name in OpenAI's format, which no template has a place for.
    #[serde(rename = "name", default, skip_serializing)]
    _name: Option<String>,
    /// The tokens of `content` as a model generated them. There are several ways to cut a text into tokens, and only the
    /// very tokens that the cache holds can be found in it.
    #[serde(skip)]
    tokens: Option<Vec<u32>>,
}

impl Message {
    /// A message of the system or the user, or one of the assistant whose tokens are not known.
    pub fn new(role: Role, content: impl Into<String>) -> Self {
        Self { role, content: content.into(), _name: None, tokens: None }
    }

    /// An answer as the model generated it, without the token that ended it.
    pub fn generated(content: String, tokens: Vec<u32>) -> Self {
        Self { role: Role::Assistant, content, _name: None, tokens: Some(tokens) }
    }
}

fn content<'de, D: Deserializer<'de>>(from: D) -> Result<String, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged, expecting = "content must be a text or a list of parts with a type")]
    enum Content {
        Text(String),
        Parts(Vec<Part>),
    }
    #[derive(Deserialize)]
    struct Part {
        #[serde(rename = "type")]
        kind: String,
        text: Option<String>,
    }
    let parts = match Content::deserialize(from)? {
        Content::Text(text) => return Ok(text),
        Content::Parts(parts) => parts,
    };
    let text = |part: Part| match part {
        Part { kind, text: Some(text) } if kind == "text" => Ok(text),
        Part { kind, .. } => {
            Err(de::Error::custom(format_args!("content of type {kind:?}, expected \"text\"")))
        }
    };
    Ok(parts.into_iter().map(text).collect::<Result<Vec<_>, _>>()?.join("\n"))
}

/// Why messages could not be made into a prompt. Every message is one line.
#[allow(missing_docs)] // the messages say it all
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TemplateError {
    /// The template is not Jinja, or does something that does not work out; the fault is in the template.
    #[error("chat template: {0}")]
    Broken(String),
    #[error("the chat template refuses the conversation: {0}")]
    Refused(String),
    #[error("chat template: stopped, it does not end or makes too much text")]
    Endless,
    #[error("the chat template {template:?} needs the token {token}, which the vocabulary lacks")]
    MissingToken { template: &'static str, token: &'static str },
    #[error("no chat template {0:?}; built in are bitnet, llama3, falcon3 and chatml")]
    Unknown(String),
    /// The model has none, and its vocabulary does not tell which it was trained with.
    #[error(
        "the model has no chat template; if it was trained to chat, --chat-template names one, else use `bitnet run`"
    )]
    None,
    /// The template has no place for what tools give.
    #[error("the chat template leaves out messages of the role tool; give them as the user's")]
    NoTools,
    #[error("the messages hold every private character of Unicode")]
    Private,
}

/// What a template needs to know of a model.
#[derive(Clone, Copy)]
pub struct TemplateModel<'a> {
    /// The vocabulary.
    pub tokenizer: &'a Tokenizer,
    /// `general.architecture`.
    pub architecture: &'a str,
    /// Begin of text.
    pub bos: Option<u32>,
    /// End of text.
    pub eos: Option<u32>,
}

/// A chat template, ready for use.
pub struct ChatTemplate {
    name: &'static str,
    jinja: Jinja,
    bos: Option<u32>,
    bos_text: String,
    eos_text: String,
    end_of_turn: Option<u32>,
}

/// The built-in ones: name, a control token that tells the family, Jinja.
const BUILT_IN: [(&str, &str, &str); 4] = [
    (
        BITNET,
        EOT,
        "{{ bos_token }}{% for m in messages %}{{ m.role | capitalize }}: {{ m.content | trim }}<|eot_id|>{% endfor %}\
         {% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}",
    ),
    (
        "llama3",
        "<|start_header_id|>",
        "{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n\
         {{ m.content | trim }}<|eot_id|>{% endfor %}\
         {% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
    ),
    (
        "falcon3",
        "<|assistant|>",
        "{% for m in messages if m.role != 'tool' %}<|{{ m.role }}|>\n{{ m.content }}\
         {% if m.role == 'assistant' %}{{ eos_token }}{% endif %}\
         {% if not loop.last or m.role != 'assistant' %}{{ '\\n' }}{% endif %}\
         {% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}",
    ),
    (
        "chatml",
        "<|im_start|>",
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{{ '\\n' }}{% endfor %}\
         {% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    ),
];
/// bitnet-b1.58-2B-4T: its reference encodes header and content apart, which no Jinja can express.
const BITNET: &str = "bitnet";
const EOT: &str = "<|eot_id|>";

impl ChatTemplate {
    /// A template in Jinja, such as `tokenizer.chat_template` of a model file. One that writes what the built-in
    /// `bitnet` writes becomes that one.
    ///
    /// # Errors
    /// [`TemplateError::Broken`], and whatever a short conversation shows.
    pub fn from_jinja(source: &str, model: TemplateModel<'_>) -> Result<Self, TemplateError> {
        let template = Self::new("its own", source, model)?;
        if let Ok(bitnet) = Self::built_in(BITNET, model) {
            let probe =
                [(Role::System, "S"), (Role::User, " u"), (Role::Assistant, "a"), (Role::User, "v\n")]
                    .map(|(role, content)| Message::new(role, content));
            let expected = bitnet.render(&probe, true)?;
            let found = template.render(&probe, true);
            if found.is_ok_and(|found| found == expected || found == expected[bitnet.bos_text.len()..]) {
                return Ok(bitnet);
            }
        }
        template.finished(model.tokenizer)
    }

    /// Whether a built-in template has this name.
    pub fn is_built_in(name: &str) -> bool {
        BUILT_IN.iter().any(|(known, ..)| *known == name)
    }

    /// One of the built-in templates: `bitnet` (bitnet-b1.58-2B-4T), `llama3`, `falcon3` or `chatml`.
    ///
    /// # Errors
    /// [`TemplateError::Unknown`] and [`TemplateError::MissingToken`].
    pub fn built_in(name: &str, model: TemplateModel<'_>) -> Result<Self, TemplateError> {
        let found = BUILT_IN.iter().find(|(known, ..)| *known == name);
        let &(template, token, source) = found.ok_or_else(|| TemplateError::Unknown(name.to_owned()))?;
        if !has(model.tokenizer, token) {
            return Err(TemplateError::MissingToken { template, token });
        }
        Self::new(template, source, model)?.finished(model.tokenizer)
    }

    /// The template of a model: the one in its file, or the built-in one that its architecture or vocabulary calls for.
    ///
    /// # Errors
    /// As [`Self::from_jinja`]; [`TemplateError::None`] where nothing tells which it is.
    pub fn of_model(source: Option<&str>, model: TemplateModel<'_>) -> Result<Self, TemplateError> {
        if let Some(source) = source {
            return Self::from_jinja(source, model);
        }
        let bitnet = model.architecture.starts_with("bitnet");
        let mut known = BUILT_IN.iter().filter(|(name, token, _)| {
            (*name != BITNET || bitnet) && has(model.tokenizer, token) // LLaMA-3's vocabulary has <|eot_id|> too
        });
        let (name, ..) = known.next().ok_or(TemplateError::None)?;
        Self::built_in(name, model)
    }

    fn new(name: &'static str, source: &str, model: TemplateModel<'_>) -> Result<Self, TemplateError> {
        let text = |id: Option<u32>| {
            let bytes = id.and_then(|id| model.tokenizer.token_bytes(id)).unwrap_or_default();
            String::from_utf8_lossy(bytes).into_owned()
        };
        let (bos_text, eos_text) = (text(model.bos), text(model.eos));
        let jinja = Jinja::new(source)?;
        Ok(Self { name, jinja, bos: model.bos, bos_text, eos_text, end_of_turn: None })
    }

    /// Finds out which token ends an answer: the first one after it.
    fn finished(mut self, tokenizer: &Tokenizer) -> Result<Self, TemplateError> {
        let probe = [(Role::User, "u"), (Role::Assistant, "answer"), (Role::User, "v")]
            .map(|(role, content)| Message::new(role, content));
        let text = self.render(&probe, true)?;
        let after = text.split_once("answer").map_or("", |(_, after)| after);
        self.end_of_turn =
            tokenizer.find_special(after).map(|(_, id)| id).filter(|&id| tokenizer.is_control(id));
        Ok(self)
    }

    /// `bitnet`, `llama3`, `falcon3`, `chatml`, or `its own`.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// The token that ends an answer, where the template shows one.
    pub fn end_of_turn(&self) -> Option<u32> {
        self.end_of_turn
    }

    /// The conversation as one text, as Hugging Face's `apply_chat_template` has it; `answer` adds what an answer begins
    /// with. Only for people to read: encoding it would make control tokens of what users wrote.
    pub fn render(&self, messages: &[Message], answer: bool) -> Result<String, TemplateError> {
        let contents: Vec<&str> = messages.iter().map(|message| message.content.as_str()).collect();
        self.render_contents(messages, &contents, answer)
    }

    /// The conversation's tokens; `answer` adds those that an answer begins with.
    ///
    /// # Errors
    /// [`TemplateError::Refused`] where the template wants another order of roles, say; [`TemplateError::NoTools`],
    /// [`TemplateError::Broken`] and [`TemplateError::Endless`].
    pub fn encode(
        &self,
        tokenizer: &Tokenizer,
        messages: &[Message],
        answer: bool,
    ) -> Result<Vec<u32>, TemplateError> {
        if messages.iter().any(|message| message.role == Role::Tool) {
            let probe = [(Role::User, "u"), (Role::Assistant, "a"), (Role::Tool, "4711")]
                .map(|(role, content)| Message::new(role, content));
            if !self.render(&probe, true)?.contains("4711") {
                return Err(TemplateError::NoTools);
            }
        }
        let mut ids = match self.name {
            BITNET => self.encode_bitnet(tokenizer, messages, answer),
            _ => self.encode_rendered(tokenizer, messages, answer)?,
        };
        if let (Some(bos), [first, second, ..]) = (self.bos, &ids[..])
            && *first == bos
            && *second == bos
        {
            ids.remove(0);
        }
        Ok(ids)
    }

    fn encode_bitnet(&self, tokenizer: &Tokenizer, messages: &[Message], answer: bool) -> Vec<u32> {
        let mut ids: Vec<u32> = self.bos.into_iter().collect();
        for message in messages {
            ids.extend(tokenizer.encode(header(message.role), Specials::AsText));
            match &message.tokens {
                Some(tokens) => ids.extend(tokens),
                None => ids.extend(tokenizer.encode(message.content.trim(), Specials::AsText)),
            }
            ids.extend(tokenizer.token_id(EOT));
        }
        if answer {
            ids.extend(tokenizer.encode(header(Role::Assistant), Specials::AsText));
        }
        ids
    }

    fn encode_rendered(
        &self,
        tokenizer: &Tokenizer,
        messages: &[Message],
        answer: bool,
    ) -> Result<Vec<u32>, TemplateError> {
        let [mark, hole] = private_chars(messages)?;
        let render = |contents: &[String]| {
            let refs: Vec<&str> = contents.iter().map(String::as_str).collect();
            self.render_contents(messages, &refs, answer)
        };
        let mut contents: Vec<String> =
            messages.iter().map(|m| guarded(&m.content, tokenizer, mark)).collect();
        let mut text = render(&contents)?;
        // A template that deletes from a message, or changes its case, may make a control token of what is left. With a mark
        // behind every character it cannot, though it may not recognise what it looks for.
        let hides = |content: &String| {
            tokenizer.control_tokens().any(|token| {
                let mut bytes = content.bytes();
                token.iter().all(|&wanted| bytes.any(|byte| byte.eq_ignore_ascii_case(&wanted)))
            })
        };
        let behind = |c: char| (!c.is_whitespace()).then_some(mark);
        let marked = |content: &String| match hides(content) {
            true => content.chars().flat_map(|c| [Some(c), behind(c)]).flatten().collect(),
            false => content.clone(),
        };
        let others: Vec<String> = contents.iter().map(marked).collect();
        let controls = |text: &str| {
            let mut ids = Vec::new();
            encode_marked(text, tokenizer, mark, &mut ids);
            ids.retain(|&id| tokenizer.is_control(id));
            ids
        };
        if others != contents {
            let other = render(&others)?;
            if controls(&other) != controls(&text) {
                (contents, text) = (others, other);
            }
        }
        let mut ids = Vec::with_capacity(text.len() / 3);
        let Some(holes) = self.with_holes(messages, &contents, answer, hole, &text) else {
            encode_marked(&text, tokenizer, mark, &mut ids);
            return Ok(ids);
        };
        for (at, part) in holes.split(hole).enumerate() {
            let known =
                part.parse().ok().filter(|_| at % 2 == 1).and_then(|index: usize| messages.get(index));
            match known {
                Some(message) => ids.extend(message.tokens.iter().flatten()),
                None => encode_marked(part, tokenizer, mark, &mut ids),
            }
        }
        Ok(ids)
    }

    /// The rendered conversation with the index of each message whose tokens are known in its place, between two `hole`s.
    /// None where the template looks into these messages, so that leaving them out changes more than their own places.
    fn with_holes(
        &self,
        messages: &[Message],
        contents: &[String],
        answer: bool,
        hole: char,
        expected: &str,
    ) -> Option<String> {
        let known = |index: usize| messages[index].tokens.is_some();
        let markers: Vec<String> = (0..messages.len()).map(|index| format!("{hole}{index}{hole}")).collect();
        let with = |index: usize| if known(index) { &markers[index] } else { &contents[index] };
        if !(0..messages.len()).any(known) || expected.contains(hole) {
            return None;
        }
        let shown: Vec<&str> = (0..messages.len()).map(|index| with(index).as_str()).collect();
        let text = self.render_contents(messages, &shown, answer).ok()?;
        let filled = |content: fn(&str) -> &str| {
            let mut out = text.clone();
            (0..messages.len()).filter(|&i| known(i)).for_each(|i| {
                out = out.replacen(&markers[i], content(&contents[i]), 1);
            });
            out == expected
        };
        (filled(|content| content) || filled(str::trim)).then_some(text)
    }

    fn render_contents(
        &self,
        messages: &[Message],
        contents: &[&str],
        answer: bool,
    ) -> Result<String, TemplateError> {
        let pairs = messages.iter().map(|message| message.role).zip(contents.iter().copied());
        self.jinja.render(pairs, answer, &self.bos_text, &self.eos_text)
    }
}

fn header(role: Role) -> &'static str {
    match role {
        Role::System => "System: ",
        Role::User => "User: ",
        Role::Assistant => "Assistant: ",
        Role::Tool => "Tool: ",
    }
}

fn has(tokenizer: &Tokenizer, control: &str) -> bool {
    tokenizer.token_id(control).is_some_and(|id| tokenizer.is_control(id))
}

/// Two characters of the private planes that occur in no message.
fn private_chars(messages: &[Message]) -> Result<[char; 2], TemplateError> {
    let used: std::collections::BTreeSet<char> =
        messages.iter().flat_map(|message| message.content.chars()).filter(|c| *c >= '\u{f0000}').collect();
    let mut free = ('\u{f0000}'..=char::MAX).filter(|c| !used.contains(c));
    match (free.next(), free.next()) {
        (Some(mark), Some(hole)) => Ok([mark, hole]),
        _ => Err(TemplateError::Private),
    }
}

/// A message with a `mark` in every control token that its text shows, and at its ends where they may be a part of one
/// that the template completes.
fn guarded(content: &str, tokenizer: &Tokenizer, mark: char) -> String {
    let trimmed = content.trim();
    let start = content.len() - content.trim_start().len();
    let end = start + trimmed.len();
    let bytes = trimmed.as_bytes();
    let (mut opens, mut closes) = (false, false);
    for token in tokenizer.control_tokens() {
        let lens = 1..token.len();
        let inside =
            trimmed.len() < token.len() && token.windows(bytes.len().max(1)).any(|part| part == bytes);
        opens |= inside || lens.clone().any(|len| bytes.starts_with(&token[token.len() - len..]));
        closes |= lens.clone().any(|len| bytes.ends_with(&token[..len]));
    }
    let mut out = String::with_capacity(content.len() + 8);
    out.push_str(&content[..start]);
    if opens {
        out.push(mark);
    }
    let mut rest = trimmed;
    while let Some((at, id)) = tokenizer.find_special(rest) {
        let after = at + rest[at..].chars().next().map_or(1, char::len_utf8);
        out.push_str(&rest[..after]);
        if tokenizer.is_control(id) {
            out.push(mark);
        }
        rest = &rest[after..];
    }
    out.push_str(rest);
    if closes {
        out.push(mark);
    }
    out.push_str(&content[end..]);
    out
}

/// Appends the tokens of a rendered text in which all control tokens are the template's.
fn encode_marked(text: &str, tokenizer: &Tokenizer, mark: char, ids: &mut Vec<u32>) {
    let mut rest = text;
    loop {
        let special = tokenizer.find_special(rest);
        let plain = rest[..special.map_or(rest.len(), |(at, _)| at)].replace(mark, "");
        tokenizer.encode_after(ids, &plain, Specials::AsText);
        let Some((at, id)) = special else { return };
        ids.push(id);
        rest = &rest[at + tokenizer.token_bytes(id).map_or(0, <[u8]>::len)..];
    }
}
