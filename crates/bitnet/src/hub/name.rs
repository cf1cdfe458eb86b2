//! Names of models on the hub.

use super::HubError;
use std::fmt;

/// A repository of the hub, and a file in it where one is named.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelName {
    /// `owner/name`.
    pub repo: String,
    /// Path of a file in the repository.
    pub file: Option<String>,
}

/// A model with a short name.
#[derive(Clone, Copy, Debug)]
pub struct Known {
    /// The short name.
    pub short: &'static str,
    /// Its repository.
    pub repo: &'static str,
    /// One line for a person.
    pub about: &'static str,
}

/// Models with short names.
pub const KNOWN: [Known; 11] = {
    const CHECKPOINT: &str = "a checkpoint for `bitnet convert`";
    const fn known(short: &'static str, repo: &'static str, about: &'static str) -> Known {
        Known { short, repo, about }
    }
    [
        known("2b-4t", "microsoft/bitnet-b1.58-2B-4T-gguf", "1.2 GB"),
        known(
            "2b-4t-bf16",
            "microsoft/bitnet-b1.58-2B-4T-bf16",
            "the same as a checkpoint for `bitnet convert`, 4.8 GB",
        ),
        known("falcon-e-1b", "tiiuae/Falcon-E-1B-Instruct-GGUF", "0.7 GB"),
        known("falcon-e-3b", "tiiuae/Falcon-E-3B-Instruct-GGUF", "1.0 GB"),
        known("falcon3-1b", "tiiuae/Falcon3-1B-Instruct-1.58bit-GGUF", "1.4 GB"),
        known("falcon3-3b", "tiiuae/Falcon3-3B-Instruct-1.58bit-GGUF", "2.2 GB"),
        known("falcon3-7b", "tiiuae/Falcon3-7B-Instruct-1.58bit-GGUF", "7 billion weights"),
        known("falcon3-10b", "tiiuae/Falcon3-10B-Instruct-1.58bit-GGUF", "10 billion weights"),
        known("llama3-8b", "HF1BitLLM/Llama3-8B-1.58-100B-tokens", CHECKPOINT),
        known("large", "1bitLLM/bitnet_b1_58-large", CHECKPOINT),
        known("3b", "1bitLLM/bitnet_b1_58-3B", CHECKPOINT),
    ]
};

impl ModelName {
    /// Reads `hf:owner/name[:file]`, `owner/name[:file]`, the address of a repository's page or a short name. None for what
    /// looks like none of them, such as the path of a file.
    ///
    /// # Errors
    /// [`HubError::Name`] for what begins with `hf:` and does not go on as it should, and for a file that is no path
    /// inside a repository.
    pub fn parse(text: &str) -> Result<Option<Self>, HubError> {
        let refuse = |problem: &str| HubError::Name { name: text.to_owned(), problem: problem.to_owned() };
        if let Some(known) = KNOWN.iter().find(|known| known.short.eq_ignore_ascii_case(text)) {
            return Ok(Some(Self { repo: known.repo.to_owned(), file: None }));
        }
        let page = text.strip_prefix("https://huggingface.co/").map(|page| page.trim_end_matches('/'));
        let (prefixed, rest) = match text.strip_prefix("hf:").or(page) {
            Some(rest) => (true, rest),
            None => (false, text),
        };
        let (repo, file) = match rest.split_once(':') {
            Some((repo, file)) => (repo, Some(file)),
            None => (rest, None),
        };
        let good = |part: &str| {
            let fits =
                (1..=96).contains(&part.len()) && !part.starts_with(['.', '-']) && !part.contains("..");
            // Two hyphens stand for the slash in the names of the cache's folders.
            fits && !part.contains("--")
                && part.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
        };
        let is_repo = repo.split_once('/').is_some_and(|(owner, name)| good(owner) && good(name));
        if !is_repo || !prefixed && file.is_none() && rest.to_lowercase().ends_with(".gguf") {
            let expected =
                "expected hf:OWNER/NAME or hf:OWNER/NAME:FILE, such as hf:microsoft/bitnet-b1.58-2B-4T-gguf";
            return if prefixed { Err(refuse(expected)) } else { Ok(None) };
        }
        if let Some(file) = file {
            check_file(file).map_err(refuse)?;
        }
        Ok(Some(Self { repo: repo.to_owned(), file: file.map(str::to_owned) }))
    }
}

impl fmt::Display for ModelName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.file {
            Some(file) => write!(f, "hf:{}:{file}", self.repo),
            None => f.write_str(&self.repo),
        }
    }
}

/// Refuses the name of a file that is no path inside a folder on every system.
pub(super) fn check_file(file: &str) -> Result<(), &'static str> {
    if file.len() > 1024 || file.chars().any(|c| c.is_control() || c == '\\' || c == ':') {
        return Err("this is no name of a file in a repository");
    }
    let good = |part: &str| !part.is_empty() && part != "." && part != ".." && part.len() <= 255;
    if file.split('/').all(good) { Ok(()) } else { Err("the file must lie inside the repository") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_told_from_paths() {
        let name = |text: &str| ModelName::parse(text).unwrap().map(|n| (n.repo, n.file));
        let repo = "microsoft/bitnet-b1.58-2B-4T-gguf".to_owned();
        assert_eq!(name("2b-4t"), Some((repo.clone(), None)));
        assert_eq!(name(&repo), Some((repo.clone(), None)));
        assert_eq!(name(&format!("hf:{repo}")), Some((repo.clone(), None)));
        assert_eq!(name(&format!("https://huggingface.co/{repo}/")), Some((repo, None)));
        assert_eq!(name("hf:a/b:c/d.gguf"), Some(("a/b".into(), Some("c/d.gguf".into()))));
        for path in
            ["model.gguf", "./a/b", "/a/b", "../a", "a/b/c", "a/b.gguf", "a", "", "C:\\a/b", "a/..", "-a/b"]
        {
            assert_eq!(name(path), None, "{path}");
        }
        let all_bad = "hf: hf:a hf:a/b/c hf:../b hf:a/b:../c hf:a/b:/c hf:a/b:c\\d a/b:c//d hf:a--b/c";
        for bad in all_bad.split(' ') {
            assert!(ModelName::parse(bad).is_err(), "{bad}");
        }
    }
}
