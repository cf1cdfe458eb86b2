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
    stops: Vec<String>,
    /// Text held back, after the `given` bytes that the last push gave out.
    text: String,
    given: usize,
    stopped: Option<usize>,
}

impl StopStrings {
    /// An empty stop string is never found.
    pub fn new(stops: &[String]) -> Self {
        Self { stops: stops.to_vec(), text: String::new(), given: 0, stopped: None }
    }

    /// Takes the next part of the stream, and gives out all text that is certainly before any stop string, and the index of the
    /// one that was found. After that nothing more comes.
    pub fn push(&mut self, text: &str) -> (&str, Option<usize>) {
        self.text.drain(..self.given);
        self.given = 0;
        if self.stopped.is_none() {
            self.text.push_str(text);
            let stops = self.stops.iter().enumerate().filter(|(_, stop)| !stop.is_empty());
            let found = stops.clone().filter_map(|(index, stop)| {
                let start = self.text.find(stop)?;
                Some((start + stop.len(), start, index))
            });
            if let Some((_, start, index)) = found.min() {
                self.text.truncate(start);
                self.stopped = Some(index);
            }
            let starts = stops.filter(|_| self.stopped.is_none()).filter_map(|(_, stop)| {
                stop.char_indices().rev().map(|(len, _)| len).find(|&len| self.text.ends_with(&stop[..len]))
            });
            self.given = self.text.len() - starts.max().unwrap_or(0);
        }
        (&self.text[..self.given], self.stopped)
    }

    /// The end of the stream: the text that was held back. The matcher is then as new.
    pub fn finish(&mut self) -> String {
        self.stopped = None;
        let given = std::mem::take(&mut self.given);
        std::mem::take(&mut self.text).split_off(given)
    }
}
