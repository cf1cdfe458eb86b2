//! A conversation: messages, the sequence that holds their tokens, and what to leave out when the context is full.

use super::{FinishReason, Generated, Sampler, StopConditions, generate};
use crate::text::{ChatTemplate, Message, Role};
use crate::{Engine, Error, SequenceId};
use std::ops::ControlFlow;

/// A conversation with a model. All that the messages have in common with the tokens in the cache is kept, so another
/// question costs only its own tokens.
pub struct Chat {
    template: ChatTemplate,
    sequence: SequenceId,
    messages: Vec<Message>,
}

/// What [`Chat::answer`] did.
///
/// Where an answer filled the context, and went on after old messages were left out, its parts count together.
#[derive(Clone, Debug)]
pub struct Answer {
    /// The tokens and the times.
    pub generated: Generated,
    /// Tokens of the whole conversation up to the answer.
    pub prompt_tokens: usize,
    /// How many of them were in the cache.
    pub cached_tokens: usize,
    /// Messages at the beginning that were left out for good, so that the rest fits in the context.
    pub dropped: usize,
}

impl Chat {
    /// An empty conversation with a sequence of its own.
    pub fn new(engine: &mut Engine, template: ChatTemplate) -> Self {
        Self { template, sequence: engine.open(), messages: Vec::new() }
    }

    /// Ends the sequence.
    pub fn close(self, engine: &mut Engine) {
        engine.close(self.sequence);
    }

    /// The template.
    pub fn template(&self) -> &ChatTemplate {
        &self.template
    }

    /// What was said so far.
    pub fn messages(&self) -> &[Message] {
        &self.messages
    }

    /// Another conversation; what it has in common with the tokens in the cache is kept.
    pub fn set_messages(&mut self, messages: Vec<Message>) {
        self.messages = messages;
    }

    /// The system prompt.
    pub fn system(&self) -> Option<&str> {
        let first = self.messages.first().filter(|message| message.role == Role::System);
        first.map(|message| message.content.as_str())
    }

    /// Sets the system prompt; an empty one is none.
    pub fn set_system(&mut self, text: &str) {
        if self.system().is_some() {
            self.messages.remove(0);
        }
        if !text.is_empty() {
            self.messages.insert(0, Message::new(Role::System, text));
        }
    }

    /// Forgets all but the system prompt.
    pub fn clear(&mut self) {
        self.messages.truncate(self.first());
    }

    /// Adds a question. One that got no answer is replaced.
    pub fn ask(&mut self, text: impl Into<String>) {
        self.messages.pop_if(|message| message.role == Role::User);
        self.messages.push(Message::new(Role::User, text));
    }

    /// Takes the last answer back, so that [`Self::answer`] gives another. False where there is no question.
    pub fn retry(&mut self) -> bool {
        self.messages.pop_if(|message| message.role == Role::Assistant);
        self.messages.last().is_some_and(|message| message.role == Role::User)
    }

    /// The sequence of its tokens.
    pub fn sequence(&self) -> SequenceId {
        self.sequence
    }

    /// Tokens in the cache.
    pub fn cached_tokens(&self, engine: &Engine) -> usize {
        engine.tokens(self.sequence).len()
    }

    /// Answers the last question and adds the answer to the messages; one that was ended before its first word is not
    /// added. The answer ends with a token of `stop` or with the template's own.
    ///
    /// Where a quarter of the context is not left for the answer, or the answer fills the context, the oldest questions
    /// and answers go, so many that half of the context is free. The system prompt and the last question stay.
    ///
    /// # Errors
    /// [`Error::Template`], [`Error::ContextFull`] where system prompt and question alone fill the context, and as
    /// [`generate`]; the messages are then as they were, but for those left out.
    pub fn answer(
        &mut self,
        engine: &mut Engine,
        sampler: &mut Sampler,
        stop: &StopConditions,
        emit: &mut dyn FnMut(&str) -> ControlFlow<()>,
    ) -> Result<Answer, Error> {
        let mut stop = stop.clone();
        stop.ids.extend(self.template.end_of_turn());
        let (mut text, mut dropped) = (String::new(), 0);
        let mut all: Option<Answer> = None;
        let answer = loop {
            let so_far = all.as_ref().map_or(&[][..], |all| &all.generated.tokens);
            let prompt = self.fit(engine, so_far, stop.max_tokens, &mut dropped)?;
            stop.begun = so_far.len();
            let common = engine.tokens(self.sequence).iter().zip(&prompt).take_while(|(a, b)| a == b).count();
            // The logits of the last token are wanted, so that one is computed anew.
            let cached = common.min(prompt.len().saturating_sub(1));
            engine.truncate(self.sequence, cached);

            // With something to leave out, an answer pauses before the context is full.
            let room = engine.options().context - prompt.len();
            let pause = if self.next_question(self.first()).is_some() { room } else { usize::MAX };
            let (mut count, mut ended, mut paused) = (0, false, false);
            let mut take = |part: &str| {
                // What is held back at a pause comes with the next part.
                if paused {
                    return ControlFlow::Break(());
                }
                text.push_str(part);
                count += 1;
                ended |= emit(part).is_break();
                paused = !ended && count >= pause;
                if ended || paused { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            };
            let generated = generate(engine, self.sequence, &prompt[cached..], sampler, &stop, &mut take)?;
            stop.max_tokens = stop.max_tokens.map(|max| max - generated.tokens.len().min(max));
            let part = Answer { generated, prompt_tokens: prompt.len(), cached_tokens: cached, dropped: 0 };
            let whole = all.take().map_or_else(|| part.clone(), |all| all.and(&part));
            if !paused || part.generated.finish != FinishReason::Cancelled {
                break Answer { dropped, ..whole };
            }
            all = Some(whole);
        };
        let finish = &answer.generated.finish;
        let mut tokens = answer.generated.tokens.clone();
        if matches!(finish, FinishReason::StopToken(_)) {
            tokens.pop();
        }
        if !text.is_empty() || *finish != FinishReason::Cancelled {
            self.messages.push(match finish {
                // The text ends inside the tokens.
                FinishReason::StopString(_) => Message::new(Role::Assistant, text),
                _ => Message::generated(text, tokens),
            });
        }
        Ok(answer)
    }

    /// The tokens of the messages and of the answer so far, after leaving out as many messages as it takes; adds the
    /// number of these to `dropped`.
    fn fit(
        &mut self,
        engine: &Engine,
        so_far: &[u32],
        max_tokens: Option<usize>,
        dropped: &mut usize,
    ) -> Result<Vec<u32>, Error> {
        let model = engine.model();
        let context = engine.options().context;
        let encode = |messages: &[Message]| {
            let ids = self.template.encode(model.tokenizer()?, messages, true);
            let mut ids = ids.map_err(|error| Error::Template { file: model.file().to_owned(), error })?;
            ids.extend(so_far);
            Ok::<_, Error>(ids)
        };
        let mut prompt = encode(&self.messages)?;
        let answer = max_tokens.unwrap_or(usize::MAX).min(context / 4);
        let (first, mut from) = (self.first(), self.first());
        if prompt.len() + answer > context {
            while prompt.len() > context / 2
                && let Some(next) = self.next_question(from)
            {
                from = next;
                prompt = encode(&[&self.messages[..first], &self.messages[from..]].concat())?;
            }
            if prompt.len() > context {
                return Err(Error::ContextFull { needed: prompt.len(), context });
            }
        }
        self.messages.drain(first..from);
        *dropped += from - first;
        Ok(prompt)
    }

    /// The first question after the message `from`.
    fn next_question(&self, from: usize) -> Option<usize> {
        (from + 1..self.messages.len()).find(|&at| self.messages[at].role == Role::User)
    }

    /// Where the messages after the system prompt begin.
    fn first(&self) -> usize {
        usize::from(self.system().is_some())
    }
}

impl Answer {
    /// This part and the one after it.
    fn and(mut self, next: &Self) -> Self {
        let Generated { finish, tokens, prompt_time, decode_time, proposed, accepted, complete } =
            &next.generated;
        self.generated.finish = finish.clone();
        self.generated.complete = *complete;
        self.generated.tokens.extend(tokens);
        self.generated.prompt_time += *prompt_time;
        self.generated.decode_time += *decode_time;
        self.generated.proposed += proposed;
        self.generated.accepted += accepted;
        self.prompt_tokens += next.prompt_tokens;
        self.cached_tokens += next.cached_tokens;
        self
    }
}
