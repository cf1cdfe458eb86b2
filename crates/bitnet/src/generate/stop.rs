//! When a generation ends.

use super::{Constraint, Speculation};
use crate::text::{StopStrings, TextStream};
use std::sync::Arc;

/// Why a generation ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// The model chose this token, one of [`StopConditions::ids`]. It is not part of the text.
    StopToken(u32),
    /// The text reached this string, one of [`StopConditions::strings`]. It is not part of the text.
    StopString(String),
    /// [`StopConditions::max_tokens`] tokens were generated.
    Length,
    /// There is no room for another token in the context.
    ContextFull,
    /// The text has the form of [`StopConditions::constraint`], and nothing can be added to it.
    Complete,
    /// The caller ended it.
    Cancelled,
}

/// What ends a generation besides a full context. The default ends none.
///
/// Stop strings are matched where text comes out, by [`StopStrings`](crate::text::StopStrings).
#[derive(Clone, Debug, Default)]
pub struct StopConditions {
    /// Tokens that end it, such as the end of text and the end of a turn.
    pub ids: Vec<u32>,
    /// Texts that end it, without empty ones.
    pub strings: Vec<String>,
    /// Most tokens to generate.
    pub max_tokens: Option<usize>,
    /// The form of the text. The tokens that end it are only chosen where it is complete, other control tokens never.
    pub constraint: Option<Arc<dyn Constraint>>,
    /// How many tokens at the end of the prompt belong to the text, for the constraint and the stop strings. What was held back
    /// of their text comes now.
    pub begun: usize,
    /// How it gets there; this changes nothing but the time.
    pub speculation: Speculation,
}

impl StopConditions {
    /// Whether the token `id` ends the generation, of which it is the `generated`-th token, counted from 1.
    /// A stop token counts as such even where the length would end it too.
    pub fn check(&self, id: u32, generated: usize) -> Option<FinishReason> {
        if self.ids.contains(&id) {
            Some(FinishReason::StopToken(id))
        } else if self.max_tokens.is_some_and(|max| generated >= max) {
            Some(FinishReason::Length)
        } else {
            None
        }
    }
}

/// The text of a generation as it comes, up to a stop string, which is named by its index.
pub(super) struct Output {
    text: TextStream,
    stops: StopStrings,
}

impl Output {
    pub(super) fn new(stops: &[String]) -> Self {
        Self { text: TextStream::default(), stops: StopStrings::new(stops) }
    }

    /// What the bytes of another token bring to light.
    pub(super) fn push(&mut self, bytes: &[u8]) -> (&str, Option<usize>) {
        self.stops.push(self.text.push(bytes))
    }

    /// What was held back: the start of a stop string that did not come, an unfinished character.
    pub(super) fn finish(&mut self) -> (String, Option<usize>) {
        let (tail, matched) = self.stops.push(self.text.finish());
        let mut tail = tail.to_owned();
        if matched.is_none() {
            tail.push_str(&self.stops.finish());
        }
        (tail, matched)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_come_before_length() {
        let stop = StopConditions { ids: vec![7, 9], max_tokens: Some(3), ..Default::default() };
        assert_eq!(stop.check(1, 2), None);
        assert_eq!(stop.check(1, 3), Some(FinishReason::Length));
        assert_eq!(stop.check(9, 1), Some(FinishReason::StopToken(9)));
        assert_eq!(stop.check(7, 3), Some(FinishReason::StopToken(7)));
        assert_eq!(StopConditions::default().check(7, usize::MAX), None);
    }
}
