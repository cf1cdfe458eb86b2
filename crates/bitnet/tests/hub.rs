//! Downloads from a server in the test that cuts, stalls, lies, redirects and refuses.
#![cfg(feature = "hub")]
#![allow(clippy::unwrap_used)] // a test fails by panicking

mod hub_server;

use bitnet::hub::{Cached, Content, Hub, HubError, ModelName, Pulled};
use hub_server::{COMMIT, Manners, Server, noise, sha256};
use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tempfile::TempDir;

const FILE: &str = "ggml-model-i2_s.gguf";
const LEN: usize = 1_000_003;

fn hub(server: &Server, cache: &TempDir) -> Hub {
    Hub {
        cache: cache.path().to_owned(),
        endpoint: server.url.clone(),
        token: None,
        offline: false,
        timeout: Duration::from_millis(400),
        pause: Duration::from_millis(1),
        range: 100_000,
    }
}

/// A server of these files, an empty cache, and a hub of the two.
fn start(files: &[(&str, Vec<u8>)], manners: Manners) -> (Server, TempDir, Hub) {
    let (server, cache) = (Server::new(files, manners), tempfile::tempdir().unwrap());
    let hub = hub(&server, &cache);
    (server, cache, hub)
}

fn name() -> ModelName {
    ModelName::parse("hf:owner/model").unwrap().unwrap()
}

fn pull(hub: &Hub) -> Result<Pulled, HubError> {
    let most = AtomicU64::new(0);
    let pulled = hub.pull(&name(), false, &|progress| {
        most.fetch_max(progress.done, Ordering::Relaxed);
        assert!(progress.done <= progress.total);
    })?;
    assert!(pulled.cached || most.into_inner() == pulled.size);
    Ok(pulled)
}

/// Everything below a folder that is a file or a link, without locks.
fn tree(folder: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).into_iter().flatten() {
        let path = entry.unwrap().path();
        if path.ends_with(".locks") {
            continue;
        }
        if path.is_dir() && !path.is_symlink() {
            found.extend(tree(&path));
        } else {
            found.push(path.file_name().unwrap().to_str().unwrap().to_owned());
        }
    }
    found.sort();
    found
}

/// A server with these manners gives the file whole, and the cache looks as it should.
fn succeeds(manners: Manners) -> (Server, TempDir) {
    let bytes = noise(LEN);
    let (server, cache, hub) = start(&[(FILE, bytes.clone()), ("README.md", b"hello".to_vec())], manners);
    let repo = cache.path().join("models--owner--model");
    #[cfg(unix)]
    {
        // What a killed process of the same number left.
        let left = format!(".{}.{}.tmp", sha256(&bytes), std::process::id());
        fs::create_dir_all(repo.join("snapshots").join(COMMIT)).unwrap();
        std::os::unix::fs::symlink("nowhere", repo.join("snapshots").join(COMMIT).join(left)).unwrap();
    }
    let pulled = pull(&hub).unwrap();
    assert_eq!((pulled.size, pulled.cached), (LEN as u64, false));
    assert_eq!(pulled.path, repo.join("snapshots").join(COMMIT).join(FILE));
    assert!(fs::read(&pulled.path).unwrap() == bytes);
    let digest = sha256(&bytes);
    #[cfg(unix)]
    assert_eq!(fs::read_link(&pulled.path).unwrap(), Path::new(&format!("../../blobs/{digest}")));
    assert_eq!(fs::read_to_string(repo.join("refs/main")).unwrap(), COMMIT);
    assert_eq!(tree(cache.path()), [digest, FILE.to_owned(), "main".to_owned()]);
    (server, cache)
}

/// A server with these manners is refused, and nothing that looks like a model is left.
fn fails(manners: Manners) -> HubError {
    let (_server, cache, hub) = start(&[(FILE, noise(LEN))], manners);
    let error = pull(&hub).unwrap_err();
    let left = tree(cache.path());
    assert!(left.iter().all(|name| name.ends_with(".incomplete")), "{left:?}");
    assert_eq!(hub.find(&name(), true).unwrap(), None);
    assert!(!error.to_string().contains('\n'));
    error
}

#[test]
fn a_file_arrives_in_ranges_and_is_found_without_network() {
    let (server, cache) = succeeds(Manners::default());
    let mut starts = server.starts();
    starts.sort_unstable();
    assert_eq!(starts, (0..11).map(|i| i * 100_000).collect::<Vec<_>>());

    let offline = Hub { offline: true, endpoint: "http://127.0.0.1:1".into(), ..hub(&server, &cache) };
    let found = offline.find(&name(), false).unwrap().unwrap();
    assert_eq!(fs::read(found).unwrap().len(), LEN);
    assert!(matches!(pull(&offline), Err(HubError::Offline(_))));
    // A second pull asks whether there is something new, and loads nothing.
    let gets = server.starts().len();
    assert!(pull(&hub(&server, &cache)).unwrap().cached);
    assert_eq!(server.starts().len(), gets);
}

#[test]
fn broken_and_silent_connections_are_taken_up_where_they_ended() {
    for manners in [
        Manners { cut: Some(33_333), times: 6, ..Manners::default() },
        Manners { cut: Some(0), times: 3, ..Manners::default() },
        Manners { stall: Some(50_000), times: 2, ..Manners::default() },
        Manners { cut: Some(500_000), times: 1, no_ranges: true, ..Manners::default() },
        Manners { no_ranges: true, ..Manners::default() },
    ] {
        let cut = manners.cut;
        let (server, _) = succeeds(manners);
        if cut == Some(33_333) {
            assert!(server.starts().iter().any(|start| start % 100_000 == 33_333));
        }
    }
}

#[test]
fn a_download_that_failed_is_resumed() {
    let bytes = noise(LEN);
    let (server, cache, hub) = start(&[(FILE, bytes.clone())], Manners::default());
    let repo = cache.path().join("models--owner--model");
    fs::create_dir_all(repo.join("blobs")).unwrap();
    let partial = repo.join("blobs").join(format!("{}.incomplete", sha256(&bytes)));
    for (len, first) in [(300_001, 300_001), (LEN, 0)] {
        fs::write(&partial, &bytes[..len]).unwrap();
        server.seen.lock().unwrap().clear();
        assert!(fs::read(pull(&hub).unwrap().path).unwrap() == bytes);
        assert!(server.starts().iter().all(|start| *start >= first), "{:?}", server.starts());
        fs::remove_dir_all(repo.join("snapshots")).unwrap();
        fs::remove_file(repo.join("blobs").join(sha256(&bytes))).unwrap();
    }
    // A beginning that is wrong or too long costs a second download, not a failure.
    for wrong in [vec![7; 300_001], vec![7; LEN + 5]] {
        fs::write(&partial, wrong).unwrap();
        assert!(fs::read(pull(&hub).unwrap().path).unwrap() == bytes);
        fs::remove_file(repo.join("blobs").join(sha256(&bytes))).unwrap();
    }
}

#[test]
fn what_was_received_before_a_failure_is_kept() {
    let bytes = noise(LEN);
    let manners = Manners { cut: Some(700_000), times: 1, then: Some(403), ..Manners::default() };
    let (server, _cache, hub) = start(&[(FILE, bytes.clone())], manners);
    let hub = Hub { range: LEN as u64, ..hub };
    assert!(matches!(pull(&hub), Err(HubError::Status { status: 403, .. })));
    assert_eq!(hub.list()[0].size, 700_000);
    *server.manners.lock().unwrap() = Manners::default();
    assert!(fs::read(pull(&hub).unwrap().path).unwrap() == bytes);
    assert_eq!(server.starts().last(), Some(&700_000));
}

#[test]
fn passing_refusals_are_waited_out() {
    for statuses in [vec![(500, None), (502, None), (503, Some(0))], vec![(429, Some(1))], vec![(408, None)]]
    {
        let begin = std::time::Instant::now();
        let asked: u64 = statuses.iter().filter_map(|s| s.1).sum();
        succeeds(Manners { statuses, ..Manners::default() });
        assert!(begin.elapsed() >= Duration::from_secs(asked));
    }
}

#[test]
fn refusals_say_what_to_do() {
    for (status, count, word) in [
        (401, 1, "HF_TOKEN"),
        (403, 1, "HF_TOKEN"),
        (404, 1, "no such repository"),
        (429, 9, "too many"),
        (503, 9, "later"),
    ] {
        let error = fails(Manners { statuses: vec![(status, None); count], ..Manners::default() });
        assert!(matches!(&error, HubError::Status { status: found, .. } if *found == status), "{error}");
        assert!(error.to_string().contains(word), "{error}");
    }
    // Nobody waits for a day.
    let error = fails(Manners { statuses: vec![(429, Some(86_400))], ..Manners::default() });
    assert!(matches!(error, HubError::Status { status: 429, .. }));
    assert!(
        error.to_string().ends_with("or set HF_TOKEN for a larger share; it asks to wait for 86400 s"),
        "{error}"
    );
    for (status, problem) in
        [(401, "the token is wrong or gives no access"), (429, "too many requests: try again later")]
    {
        let manners = Manners { statuses: vec![(status, None); 9], ..Manners::default() };
        let (_server, _cache, hub) = start(&[], manners);
        let hub = Hub { token: Some("secret".into()), ..hub };
        let error = pull(&hub).unwrap_err().to_string();
        assert!(error.contains(problem) && !error.contains("set HF_TOKEN"), "{error}");
    }
}

#[test]
fn lies_are_found_out() {
    let other = sha256(b"other");
    assert!(matches!(fails(Manners { corrupt: true, ..Manners::default() }), HubError::Checksum { .. }));
    assert!(matches!(fails(Manners { etag: Some(other), ..Manners::default() }), HubError::Checksum { .. }));
    let full = fails(Manners { size: Some(u64::MAX), ..Manners::default() });
    assert!(!cfg!(unix) || full.to_string().contains("the disk has"), "{full}");
    for lie in [
        Manners { etag: Some("../../../evil".into()), ..Manners::default() },
        Manners { etag: Some("abc".into()), ..Manners::default() },
        Manners { size: Some(LEN as u64 - 1), ..Manners::default() },
        Manners { size: Some(LEN as u64 + 200_000), no_ranges: true, ..Manners::default() },
        Manners { total: Some(5), ..Manners::default() },
        Manners { circle: true, ..Manners::default() },
        Manners { redirect: Some("http://x@127.0.0.1".into()), ..Manners::default() },
        Manners { redirect: Some("file:///etc".into()), ..Manners::default() },
    ] {
        let error = fails(lie.clone());
        assert!(matches!(error, HubError::Server { .. }), "{lie:?}: {error}");
    }
}

#[test]
fn names_that_lead_out_of_the_folder_are_not_files() {
    let names = [
        "../../evil.gguf",
        "/etc/evil.gguf",
        "a/../../evil.gguf",
        "..\\evil.gguf",
        "C:evil.gguf",
        "a\n.gguf",
    ];
    let names = names.map(str::to_owned).to_vec();
    succeeds(Manners { names: names.clone(), ..Manners::default() });
    let (_server, _cache, hub) = start(&[], Manners { names, ..Manners::default() });
    assert!(matches!(pull(&hub), Err(HubError::Repo { .. })));
    assert!(ModelName::parse("hf:a/b:../../evil.gguf").is_err());
}

#[test]
fn the_token_goes_to_the_hub_alone() {
    let bytes = noise(LEN);
    let other = Server::new(&[(FILE, bytes.clone())], Manners::default());
    let (server, _cache, hub) =
        start(&[(FILE, bytes)], Manners { redirect: Some(other.url.clone()), ..Manners::default() });
    pull(&Hub { token: Some("secret".into()), ..hub }).unwrap();
    let authorised = |server: &Server| {
        let seen = server.seen.lock().unwrap();
        seen.iter().map(|seen| seen.headers.get("authorization").cloned()).collect::<Vec<_>>()
    };
    assert!(authorised(&server).iter().all(|token| token.as_deref() == Some("Bearer secret")));
    let elsewhere = authorised(&other);
    assert!(!elsewhere.is_empty() && elsewhere.iter().all(Option::is_none));
    // The hub is not asked for every range: the first ones find the place at the same time, the rest know it.
    assert!(server.requests("GET").len() <= 1 + 8 && elsewhere.len() == 11);
}

#[test]
fn one_of_several_files_is_taken_where_the_name_says_which() {
    let files =
        [("a-f16.gguf", vec![1; 10]), ("a-i2_s.gguf", vec![2; 10]), ("sub/a-tq1_0.gguf", vec![3; 10])];
    let (_server, cache, hub) = start(&files, Manners::default());
    assert_eq!(fs::read(pull(&hub).unwrap().path).unwrap(), [2; 10]);
    let named = ModelName::parse("hf:owner/model:sub/a-tq1_0.gguf").unwrap().unwrap();
    assert_eq!(fs::read(hub.pull(&named, false, &|_| {}).unwrap().path).unwrap(), [3; 10]);
    let missing = ModelName::parse("hf:owner/model:b.gguf").unwrap().unwrap();
    assert!(matches!(hub.pull(&missing, false, &|_| {}), Err(HubError::Status { status: 404, .. })));

    let list = hub.list();
    let files: Vec<_> = list.iter().map(|c| (c.repo.as_str(), c.content.clone(), c.size)).collect();
    let gguf = |name: &str| ("owner/model", Content::Gguf(name.into()), 10);
    assert_eq!(files, [gguf("a-i2_s.gguf"), gguf("sub/a-tq1_0.gguf")]);
    assert_eq!(hub.remove(&named).unwrap(), Some(10));
    assert_eq!(hub.remove(&named).unwrap(), None);
    assert_eq!(hub.list().len(), 1);
    assert_eq!(hub.remove(&name()).unwrap(), Some(10));
    assert_eq!(tree(cache.path()), [""; 0]);
    assert_eq!(hub.remove(&name()).unwrap(), None);

    let (_server, _cache, hub) = start(&[("a.gguf", vec![1]), ("b.gguf", vec![2])], Manners::default());
    let error = pull(&hub).unwrap_err().to_string();
    assert!(error.contains("hf:owner/model:a.gguf") && error.contains("b.gguf"), "{error}");
}

#[test]
fn a_checkpoint_comes_as_a_folder() {
    let git = |bytes: &[u8]| {
        use sha1::Digest;
        let hash =
            sha1::Sha1::new_with_prefix(format!("blob {}\0", bytes.len())).chain_update(bytes).finalize();
        hash.iter().map(|b| format!("{b:02x}")).collect::<String>()
    };
    let config = br#"{"quantization_config":{"quant_method":"bitnet"}}"#.to_vec();
    let files =
        [("config.json", config.clone()), ("model.safetensors", config.clone()), ("README.md", vec![1])];
    let (_server, _cache, hub) = start(&files, Manners { etag: Some(git(&config)), ..Manners::default() });
    let error = pull(&hub).unwrap_err().to_string();
    assert!(error.contains("bitnet convert"), "{error}");
    let folder = hub.pull(&name(), true, &|_| {}).unwrap().path;
    // Until its commit is what the revision means, only some of its files are there.
    let main = folder.join("../../refs/main");
    fs::rename(&main, folder.join("main")).unwrap();
    assert!(hub.find(&name(), true).unwrap().is_none() && hub.list().is_empty());
    fs::rename(folder.join("main"), &main).unwrap();
    assert_eq!(fs::read(folder.join("config.json")).unwrap(), config);
    assert!(!folder.join("README.md").exists());
    assert_eq!(hub.find(&name(), true).unwrap(), Some(folder.clone()));
    let repo = name().repo;
    let checkpoint =
        Cached { repo, content: Content::Checkpoint, size: 2 * config.len() as u64, path: folder };
    assert_eq!(hub.list(), [checkpoint]);
    assert_eq!(hub.find(&name(), false).unwrap(), None);
}

#[test]
fn without_a_server_the_error_names_it() {
    let (_server, _cache, hub) = start(&[], Manners::default());
    let hub = Hub { endpoint: "http://127.0.0.1:1".into(), ..hub };
    let error = pull(&hub).unwrap_err();
    assert!(matches!(error, HubError::Unreachable { .. }), "{error}");
    assert!(error.to_string().contains("127.0.0.1:1") && error.to_string().contains("refused"), "{error}");
}

#[test]
fn the_environment_is_that_of_hugging_face() {
    let from = |vars: &[(&str, &str)]| {
        Hub::from_env(|name| vars.iter().find(|(n, _)| *n == name).map(|(_, v)| (*v).to_owned()))
    };
    assert!(from(&[]).is_none());
    let hub = from(&[("HOME", "/h")]).unwrap();
    assert_eq!(hub.cache, Path::new("/h/.cache/huggingface/hub"));
    assert_eq!((hub.endpoint.as_str(), hub.token, hub.offline), ("https://huggingface.co", None, false));
    let cache = |vars| from(vars).unwrap().cache;
    assert_eq!(cache(&[("HOME", "/h"), ("XDG_CACHE_HOME", "/x")]), Path::new("/x/huggingface/hub"));
    assert_eq!(cache(&[("HOME", "/h"), ("HF_HOME", "~/f")]), Path::new("/h/f/hub"));
    assert_eq!(cache(&[("HF_HOME", "/f"), ("HF_HUB_CACHE", "/c")]), Path::new("/c"));
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("token"), "stored\n").unwrap();
    let home = folder.path().to_str().unwrap();
    assert_eq!(from(&[("HF_HOME", home)]).unwrap().token.as_deref(), Some("stored"));
    assert_eq!(from(&[("HF_HOME", home), ("HF_TOKEN", "set")]).unwrap().token.as_deref(), Some("set"));
    let hub = from(&[("HF_HOME", home), ("HF_ENDPOINT", "http://mirror/"), ("HF_HUB_OFFLINE", "1")]).unwrap();
    assert_eq!((hub.endpoint.as_str(), hub.offline), ("http://mirror", true));
}
