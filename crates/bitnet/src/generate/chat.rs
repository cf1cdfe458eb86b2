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

    /// Tokens in the cache.
    pub fn cached_tokens(&self, engine: &Engine) -> usize {
        engine.tokens(self.sequence).len()
    }

    /// Answers the last question and adds the answer to the messages; one that was ended before its first word is not
    /// added. The answer ends with a token of `stop` or with the template's own.
    ///
    /// Where a quarter of the context is not left for the answer, the oldest questions and answers go, so many that half
    /// of the context is free. The system prompt and the last question stay.
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
        let (prompt, dropped) = self.fit(engine, stop.max_tokens)?;
        let common = engine.tokens(self.sequence).iter().zip(&prompt).take_while(|(a, b)| a == b).count();
        // The logits of the last token are wanted, so that one is computed anew.
        let cached = common.min(prompt.len().saturating_sub(1));
        engine.truncate(self.sequence, cached);

        let mut stop = stop.clone();
        stop.ids.extend(self.template.end_of_turn());
        let mut text = String::new();
        let mut take = |part: &str| {
            text.push_str(part);
            emit(part)
        };
        let generated = generate(engine, self.sequence, &prompt[cached..], sampler, &stop, &mut take)?;
        let mut tokens = generated.tokens.clone();
        if matches!(generated.finish, FinishReason::StopToken(_)) {
            tokens.pop();
        }
        if !text.is_empty() || generated.finish != FinishReason::Cancelled {
            self.messages.push(match generated.finish {
                // The text ends inside the tokens.
                FinishReason::StopString(_) => Message::new(Role::Assistant, text),
                _ => Message::generated(text, tokens),
            });
        }
        Ok(Answer { generated, prompt_tokens: prompt.len(), cached_tokens: cached, dropped })
    }

    /// The tokens of the messages, after leaving out as many as it takes, and the number of these.
    fn fit(&mut self, engine: &Engine, max_tokens: Option<usize>) -> Result<(Vec<u32>, usize), Error> {
        let model = engine.model();
        let context = engine.options().context;
        let encode = |messages: &[Message]| {
            let ids = self.template.encode(model.tokenizer()?, messages, true);
            ids.map_err(|error| Error::Template { file: model.file().to_owned(), error })
        };
        let mut prompt = encode(&self.messages)?;
        let answer = max_tokens.map_or(context / 4, |max| max.min(context / 4));
        let mut kept = self.messages.clone();
        let mut dropped = 0;
        if prompt.len() + answer > context {
            let first = self.first();
            while prompt.len() > context / 2 && kept.len() > first + 1 {
                let next = kept[first + 1..].iter().position(|message| message.role == Role::User);
                let oldest = first..next.map_or(kept.len() - 1, |at| first + 1 + at);
                dropped += oldest.len();
                kept.drain(oldest);
                prompt = encode(&kept)?;
            }
            if prompt.len() > context {
                return Err(Error::ContextFull { needed: prompt.len(), context });
            }
        }
        self.messages = kept;
        Ok((prompt, dropped))
    }

    /// Where the messages after the system prompt begin.
    fn first(&self) -> usize {
        usize::from(self.system().is_some())
    }
}
