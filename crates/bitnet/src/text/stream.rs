//! Text as it arrives: whole characters from the bytes of tokens, and stop strings.

/// Turns bytes that may end inside a character into text, character by character.
#[derive(Default, Debug)]
pub struct TextStream {
    /// The start of a character: 3 bytes at most.
    pending: Vec<u8>,
    text: String,
}

impl TextStream {
    /// The text that these bytes complete. Bytes that cannot be UTF-8 become U+FFFD
    /// just as in [`String::from_utf8_lossy`] of the whole stream.
    pub fn push(&mut self, bytes: &[u8]) -> &str {
        self.text.clear();
        self.pending.extend(bytes);
        let mut end = 0;
        for chunk in self.pending.utf8_chunks() {
            self.text.push_str(chunk.valid());
            end += chunk.valid().len();
            if chunk.invalid().is_empty()
                || may_become_char(chunk.invalid()) && end + chunk.invalid().len() == self.pending.len()
            {
                break;
            }
            self.text.push(char::REPLACEMENT_CHARACTER);
            end += chunk.invalid().len();
        }
        self.pending.drain(..end);
        &self.text
    }

    /// The end of the stream: U+FFFD if it ends inside a character. The stream is then as new.
    pub fn finish(&mut self) -> &str {
        self.text.clear();
        if !self.pending.is_empty() {
            self.pending.clear();
            self.text.push(char::REPLACEMENT_CHARACTER);
        }
        &self.text
    }
}

/// Whether bytes that are not UTF-8 only lack an end.
fn may_become_char(bytes: &[u8]) -> bool {
    std::str::from_utf8(bytes).is_err_and(|error| error.error_len().is_none())
}

/// Finds the first of several stop strings in a stream of text, wherever the borders of its parts lie.
///
/// The first is the one that ends first and, of those that end together, the longest.
#[derive(Debug)]
pub struct StopStrings {
    stops: Vec<Stop>,
    /// Text held back, after the `given` bytes that the last push gave out.
    text: String,
    given: usize,
    stopped: Option<usize>,
}

/// A stop string with its Knuth-Morris-Pratt automaton.
#[derive(Debug)]
struct Stop {
    bytes: Vec<u8>,
    /// By length of a start less one: the length of its longest proper end that is a start too.
    borders: Vec<usize>,
    /// Length of the longest start of the stop string that the text so far ends with.
    matched: usize,
}

/// What [`StopStrings::push`] found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stopped<'a> {
    /// Text that is certainly before any stop string.
    pub text: &'a str,
    /// The index of the stop string that was found.
    pub stop: Option<usize>,
}

impl StopStrings {
    /// An empty stop string is never found.
    pub fn new<S: AsRef<str>>(stops: &[S]) -> Self {
        let stops = stops.iter().map(|stop| Stop::new(stop.as_ref())).collect();
        Self { stops, text: String::new(), given: 0, stopped: None }
    }

    /// Takes the next part of the stream, and gives out all text that is not the start of a stop string.
    /// After a stop string nothing more comes.
    pub fn push(&mut self, text: &str) -> Stopped<'_> {
        self.text.drain(..self.given);
        self.given = 0;
        if self.stopped.is_none() {
            let before = self.text.len();
            self.text.push_str(text);
            for (at, byte) in text.bytes().enumerate() {
                self.stops.iter_mut().for_each(|stop| stop.advance(byte));
                let found = self.stops.iter().enumerate().filter(|(_, stop)| stop.is_complete());
                if let Some((index, stop)) = found.max_by_key(|(_, stop)| stop.bytes.len()) {
                    self.text.truncate(before + at + 1 - stop.bytes.len());
                    self.given = self.text.len();
                    self.stopped = Some(index);
                    return Stopped { text: &self.text, stop: self.stopped };
                }
            }
            let held = self.stops.iter().map(|stop| stop.matched).max().unwrap_or(0);
            self.given = self.text.len() - held;
        }
        Stopped { text: &self.text[..self.given], stop: self.stopped }
    }

    /// The end of the stream: the text that was held back. The matcher is then as new.
    pub fn finish(&mut self) -> String {
        self.stops.iter_mut().for_each(|stop| stop.matched = 0);
        self.stopped = None;
        let given = std::mem::take(&mut self.given);
        std::mem::take(&mut self.text).split_off(given)
    }
}

impl Stop {
    fn new(text: &str) -> Self {
        let mut stop = Self { bytes: text.into(), borders: Vec::with_capacity(text.len()), matched: 0 };
        for (at, byte) in text.bytes().enumerate() {
            if at > 0 {
                stop.advance(byte);
            }
            stop.borders.push(stop.matched);
        }
        stop.matched = 0;
        stop
    }

    /// Follows the text by one byte.
    fn advance(&mut self, byte: u8) {
        while self.bytes.get(self.matched).is_some_and(|&next| next != byte) {
            match self.matched.checked_sub(1) {
                Some(last) => self.matched = self.borders[last],
                None => return,
            }
        }
        self.matched = (self.matched + 1).min(self.bytes.len());
    }

    fn is_complete(&self) -> bool {
        self.matched == self.bytes.len() && self.matched > 0
    }
}
