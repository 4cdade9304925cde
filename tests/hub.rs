//! Models of a hub: what is downloaded, what is left when something goes wrong, and what Python's library finds.
#![allow(clippy::unwrap_used, reason = "a failure here fails the test, as it should")]

#[path = "cli/common.rs"]
mod common;
#[path = "hub/fake.rs"]
mod fake;
#[path = "hub/proxy.rs"]
mod proxy;

use std::{
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use assert_cmd::Command;
use common::{failure, fixture, stderr, stdout, success, ternion_in};
use fake::{COMMIT, Fake, Fault, Repo, TOKEN, sha256};
use serde_json::{Value, json};
use ternion::{
    ErrorKind,
    hub::{Address, Hub, Settings},
    registry::Progress,
};

/// A hub, an empty cache, and settings that lead to both.
struct Place {
    fake: Fake,
    folder: tempfile::TempDir,
}

impl Place {
    async fn new() -> Self {
        Self { fake: Fake::start().await, folder: tempfile::tempdir().unwrap() }
    }

    fn cache(&self) -> PathBuf {
        self.folder.path().join("hub")
    }

    fn hub(&self) -> Hub {
        let mut settings = Settings::from_env().unwrap();
        settings.cache = self.cache();
        settings.endpoint.clone_from(&self.fake.url);
        settings.token = None;
        settings.offline = false;
        Hub::new(settings)
    }

    fn with_token(&self, token: &str) -> Hub {
        let mut settings = self.hub().settings().clone();
        settings.token = Some(token.to_owned());
        Hub::new(settings)
    }

    fn repo(&self, name: &str) -> PathBuf {
        self.cache().join(format!("models--{}", name.replace('/', "--")))
    }

    /// The command with this hub and this cache.
    fn ternion(&self, args: &[&str]) -> Command {
        let mut command = ternion_in(self.folder.path(), args);
        for variable in
            ["HF_TOKEN", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"]
        {
            command.env_remove(variable);
        }
        command.env("HF_HOME", self.folder.path()).env("HF_ENDPOINT", &self.fake.url);
        command
    }

    /// What the command says, while the fake hub goes on in this runtime.
    async fn run<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        tokio::task::spawn_blocking(work).await.unwrap()
    }
}

fn address(text: &str) -> Address {
    text.parse().unwrap()
}

/// Bytes that no part of which is like another.
fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

/// The small model of the fixtures as a repository, with twins that nobody needs.
fn tiny() -> Repo {
    let folder = fixture("ternion-tiny");
    let mut repo = Repo::of([
        ("README.md", b"# tiny".to_vec()),
        ("pytorch_model.bin", noise(1000)),
        ("onnx/model.onnx", noise(1000)),
    ]);
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() {
            let name = path.file_name().unwrap().to_str().unwrap().to_owned();
            repo.files.insert(name, std::fs::read(path).unwrap().into());
        }
    }
    repo
}

/// All files below a folder that are no links, with their lengths.
fn incomplete_files(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() && !path.is_symlink() {
            found.extend(incomplete_files(&path));
        } else if path.to_string_lossy().ends_with(".incomplete") {
            found.push(path);
        }
    }
    found
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_model_is_downloaded_once_and_only_what_it_needs() {
    let place = Place::new().await;
    place.fake.add("test/tiny", Repo { gated: true, ..tiny() });
    let hub = place.with_token(TOKEN);
    let fetched = hub.fetch(&address("hf://test/tiny"), &Progress::none()).await.unwrap();
    let mut names: Vec<&str> = fetched.files.iter().map(|file| file.name.as_str()).collect();
    names.sort_unstable();
    assert!(names.contains(&"config.json") && names.contains(&"model.safetensors"), "{names:?}");
    let twins = ["pytorch_model.bin", "onnx/model.onnx", "README.md"];
    assert!(!names.iter().any(|name| twins.contains(name)));
    assert!(fetched.files.iter().all(|file| file.is_new));
    // The token is for the hub alone, not for the host that it redirects to.
    let asked = place.fake.asked();
    assert!(asked.iter().any(|request| request.at_cdn));
    assert!(asked.iter().all(|request| request.token.is_some() != request.at_cdn), "{asked:#?}");
    assert!(!asked.iter().any(|request| request.path.contains(twins[0])));

    // The layout of the hub's own library.
    let repo = place.repo("test/tiny");
    assert_eq!(std::fs::read_to_string(repo.join("refs/main")).unwrap(), COMMIT);
    let weights = repo.join("snapshots").join(COMMIT).join("model.safetensors");
    let bytes = std::fs::read(fixture("ternion-tiny/model.safetensors")).unwrap();
    #[cfg(unix)]
    assert_eq!(std::fs::read_link(&weights).unwrap(), Path::new("../../blobs").join(sha256(&bytes)));
    assert_eq!(std::fs::read(&weights).unwrap(), bytes);
    assert!(incomplete_files(&place.cache()).is_empty());

    // A second time it is asked which commit it is, and nothing more.
    let again = hub.fetch(&address("hf://test/tiny"), &Progress::none()).await.unwrap();
    assert!(again.files.iter().all(|file| !file.is_new));
    assert_eq!(place.fake.asked().len(), 1);
    // A commit never changes, so nobody is asked.
    let pinned = address(&format!("hf://test/tiny@{COMMIT}"));
    assert_eq!(hub.resolve(&pinned, &Progress::none()).await.unwrap(), fetched.path);
    assert!(place.fake.asked().is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_command_pulls_lists_loads_offline_and_removes() {
    let place = Place::new().await;
    place.fake.add("test/tiny", tiny());
    let pull = place.ternion(&["pull", "hf://renamed/tiny@v1"]);
    let said = place.run(move || success(pull)).await;
    let path = PathBuf::from(stdout(&said).trim());
    assert!(path.join("config.json").is_file(), "{}", path.display());
    assert!(
        stderr(&said).contains("download: ") && stderr(&said).contains("commit 01234567"),
        "{}",
        stderr(&said)
    );

    // `renamed/tiny` redirects to `test/tiny`, and is in the cache under the name that was asked for.
    let list = success(place.ternion(&["list"]));
    assert!(stdout(&list).starts_with("hf://renamed/tiny "), "{}", stdout(&list));
    assert!(stdout(&list).contains("v1 (01234567)"), "{}", stdout(&list));
    let listed: Value = serde_json::from_str(&stdout(&success(place.ternion(&["list", "--json"])))).unwrap();
    let sizes: u64 =
        std::fs::read_dir(&path).unwrap().map(|e| std::fs::metadata(e.unwrap().path()).unwrap().len()).sum();
    assert_eq!(listed["models"][0]["size"], sizes);

    let offline = |args: &[&str]| {
        let mut command = place.ternion(args);
        command.env("HF_HUB_OFFLINE", "1").env("HF_ENDPOINT", "http://127.0.0.1:9");
        command
    };
    place.fake.asked();
    let model = "hf://renamed/tiny@v1";
    let ask = ["--max-tokens", "4", "--temperature", "0", "How many days are in a week?"];
    let there = success(offline(&[&["chat", "--model", model][..], &ask].concat()));
    let local = success(
        place.ternion(&[&["chat", "--model", fixture("ternion-tiny").to_str().unwrap()][..], &ask].concat()),
    );
    assert_eq!(stdout(&there), stdout(&local));
    let counted = stdout(&success(offline(&["count", "--model", model, "a week"])));
    assert!(counted.trim().parse::<usize>().unwrap() > 0);
    let inspected: Value =
        serde_json::from_slice(&success(offline(&["inspect", "--json", "--model", model])).stdout).unwrap();
    assert_eq!(inspected["name"], "tiny", "not the commit, which is the folder's name");
    assert!(place.fake.asked().is_empty());
    failure(
        offline(&["chat", "--model", "hf://test/other", "hi"]),
        3,
        &["not in the cache and HF_HUB_OFFLINE is set"],
    );
    failure(offline(&["pull", model]), 3, &["HF_HUB_OFFLINE is set"]);

    // A configuration names it too, and the facade finds it.
    let config =
        "[models.tiny]\npath = \"hf://renamed/tiny@v1\"\n[models.other]\npath = \"hf://renamed/tiny@v1\"\n";
    std::fs::write(place.folder.path().join("ternion.toml"), format!("default_model = \"tiny\"\n{config}"))
        .unwrap();
    let configured = success(offline(&[&["chat"][..], &ask].concat()));
    assert_eq!(stdout(&configured), stdout(&local));

    // Without a network, but not told so, what is there is used, with a warning.
    let mut unreachable = place.ternion(&[&["chat", "--model", model][..], &ask].concat());
    unreachable.env("HF_ENDPOINT", "http://127.0.0.1:9");
    let warned = success(unreachable);
    assert!(stderr(&warned).contains("the model in the cache is used"), "{}", stderr(&warned));

    let removed = success(place.ternion(&["rm", "hf://renamed/tiny"]));
    assert!(stderr(&removed).contains("removed") && !place.repo("renamed/tiny").exists());
    failure(place.ternion(&["rm", "hf://renamed/tiny"]), 3, &["not in the cache"]);
    failure(place.ternion(&["rm", "bitnet"]), 2, &["is no model of the hub", "bitnet-2b4t"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn errors_say_what_is_wrong() {
    let place = Place::new().await;
    place.fake.add("test/gated", Repo { gated: true, ..tiny() });
    place.fake.add("test/two", Repo::of([("m-Q1.gguf", noise(1500)), ("m-Q2.gguf", noise(2_000_000))]));
    place.fake.add("test/vast", Repo { claimed_size: Some(1 << 60), ..Repo::of([("m.gguf", noise(100))]) });
    let error = async |hub: Hub, text: &str| {
        let error = hub.fetch(&address(text), &Progress::none()).await.unwrap_err();
        (error.kind(), error.to_string())
    };
    for (hub, text, kind, words) in [
        (place.hub(), "hf://test/gated", ErrorKind::InvalidConfig, "set HF_TOKEN"),
        (
            place.with_token("hf_wrong"),
            "hf://test/gated",
            ErrorKind::InvalidConfig,
            "the token gives no access",
        ),
        (place.hub(), "hf://test/none", ErrorKind::NotFound, "no such repository"),
        (place.hub(), "hf://test/two@v9", ErrorKind::NotFound, "no such revision"),
        (
            place.hub(),
            "hf://test/two/m-Q3.gguf",
            ErrorKind::NotFound,
            "it has: `m-Q1.gguf` (1.5 kB), `m-Q2.gguf` (2.0 MB)",
        ),
        (
            place.hub(),
            "hf://test/two",
            ErrorKind::Unsupported,
            "holds 2 models; add the name of one to the address: `m-Q1.gguf`",
        ),
        (place.hub(), "hf://test/vast", ErrorKind::Io, "are needed; free space"),
    ] {
        let (found, said) = error(hub, text).await;
        assert_eq!(found, kind, "{said}");
        assert!(said.contains(words) && said.contains(text) && !said.contains('\n'), "{said}");
    }
    let mut nowhere = place.hub().settings().clone();
    "http://127.0.0.1:9".clone_into(&mut nowhere.endpoint);
    let (kind, said) = error(Hub::new(nowhere), "hf://test/two").await;
    assert_eq!(kind, ErrorKind::Io);
    assert!(said.contains("the hub cannot be reached") && said.contains("127.0.0.1:9"), "{said}");
    let command = place.ternion(&["pull", "hf://test/two"]);
    place.run(move || failure(command, 3, &["`m-Q2.gguf` (2.0 MB)"])).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_breaks_goes_on_where_it_broke() {
    let place = Place::new().await;
    let bytes = noise(30 << 20);
    place.fake.add("test/large", Repo::of([("m.gguf", bytes.clone())]));
    let faults =
        [Fault::Cut(3 << 20), Fault::Status(500), Fault::Status(429), Fault::Cut(0), Fault::Cut(1 << 20)];
    place.fake.fail(faults);
    let path = place.hub().resolve(&address("hf://test/large/m.gguf"), &Progress::none()).await.unwrap();
    assert!(std::fs::read(path).unwrap() == bytes);
    // A piece that was on its way when a connection broke may have been sent twice.
    assert!(place.fake.served() < (30 << 20) + (1 << 20), "{}", place.fake.served());
    // A small file begins again, since the hub sends no parts of it.
    place.fake.add("test/small", Repo::of([("m.gguf", noise(300_000))]));
    place.fake.fail([Fault::Cut(100_000), Fault::Status(503)]);
    let path = place.hub().resolve(&address("hf://test/small"), &Progress::none()).await.unwrap();
    assert!(std::fs::read(path).unwrap() == noise(300_000));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wrong_hash_is_never_shown() {
    let place = Place::new().await;
    let bytes = noise(9 << 20);
    let repo = Repo::of([("m.gguf", bytes.clone())]);
    place.fake.add("test/wrong", Repo { claimed_hash: Some(sha256(b"something else")), ..repo.clone() });
    let error = place.hub().resolve(&address("hf://test/wrong"), &Progress::none()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidModel);
    assert!(error.to_string().contains("has the hash"), "{error}");
    assert!(place.hub().cached(&address("hf://test/wrong")).is_err());
    assert!(incomplete_files(&place.cache()).is_empty());

    // A beginning that is damaged is noticed at the end, and the file is fetched anew.
    place.fake.add("test/right", repo);
    let blobs = place.repo("test/right").join("blobs");
    std::fs::create_dir_all(&blobs).unwrap();
    std::fs::write(blobs.join(format!("{}.incomplete", sha256(&bytes))), vec![7; 5 << 20]).unwrap();
    let path = place.hub().resolve(&address("hf://test/right"), &Progress::none()).await.unwrap();
    assert!(std::fs::read(path).unwrap() == bytes);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn two_downloads_of_one_file_are_one() {
    let place = Place::new().await;
    let bytes = noise(20 << 20);
    place.fake.add("test/both", Repo::of([("m.gguf", bytes.clone())]));
    place.fake.slow_down(Duration::from_millis(1));
    let pull = || {
        let hub = place.hub();
        tokio::spawn(async move { hub.resolve(&address("hf://test/both"), &Progress::none()).await.unwrap() })
    };
    let (a, b) = (pull(), pull());
    // A process that is not in this one waits too.
    let other = place.ternion(&["pull", "hf://test/both"]);
    let other = place.run(move || success(other));
    let (a, b, other) = tokio::join!(a, b, other);
    assert_eq!(a.unwrap(), b.unwrap());
    assert!(std::fs::read(stdout(&other).trim()).unwrap() == bytes);
    assert_eq!(place.fake.served(), 20 << 20);
}

/// `TERNION_HUB_BYTES` makes the file larger.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_download_that_is_killed_goes_on() {
    let place = Place::new().await;
    let size = std::env::var("TERNION_HUB_BYTES").map_or(160 << 20, |text| text.parse().unwrap());
    let bytes = noise(size);
    place.fake.add("test/killed", Repo::of([("m.gguf", bytes.clone())]));
    let mut resumed = 0;
    for kill in 1..=5 {
        place.fake.slow_down(Duration::from_millis(1));
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_ternion"));
        command.args(["pull", "hf://test/killed"]).stdout(Stdio::null()).stderr(Stdio::null());
        command.env("HF_HOME", place.folder.path()).env("HF_ENDPOINT", &place.fake.url);
        let mut child = command.spawn().unwrap();
        let until = (size as u64) * kill / 6;
        while place.fake.served() < until {
            assert!(child.try_wait().unwrap().is_none(), "it has ended before it was killed");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        // SIGKILL.
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(place.hub().cached(&address("hf://test/killed")).is_err(), "nothing incomplete is shown");
        let begun: u64 =
            incomplete_files(&place.cache()).iter().map(|path| path.metadata().unwrap().len()).sum();
        assert!(begun >= resumed, "{begun} after {resumed}");
        resumed = begun;
    }
    assert!(resumed > 0);
    place.fake.slow_down(Duration::ZERO);
    let command = place.ternion(&["pull", "hf://test/killed"]);
    let said = place.run(move || success(command)).await;
    assert!(std::fs::read(stdout(&said).trim()).unwrap() == bytes);
    // Each kill costs the parts that were on their way, at most.
    let part = (size as u64 / 256).clamp(2 << 20, 16 << 20);
    let limit = size as u64 + 5 * (5 * part + (4 << 20));
    assert!(place.fake.served() <= limit, "{} of {limit}", place.fake.served());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn proxies_are_those_of_the_environment() {
    let place = Place::new().await;
    place.fake.add("test/tiny", tiny());
    let proxy = proxy::Proxy::start(place.fake.url.trim_start_matches("http://")).await;
    let host = format!("http://{}", proxy::HOST);
    let pull = |endpoint: &str, variables: &[(&str, &str)]| {
        let mut command = place.ternion(&["pull", "hf://test/tiny"]);
        for variable in ["HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"] {
            command.env_remove(variable).env_remove(variable.to_lowercase());
        }
        command.env("HF_ENDPOINT", endpoint).envs(variables.iter().copied());
        command
    };
    // Without a proxy nobody knows the host. What is asked through one is the whole address.
    let direct = pull(&host, &[]);
    place.run(move || failure(direct, 4, &["the hub cannot be reached"])).await;
    let through = pull(&host, &[("HTTP_PROXY", &proxy.url)]);
    let said = place.run(move || success(through)).await;
    assert!(Path::new(stdout(&said).trim()).join("model.safetensors").is_file());
    let asked = proxy.asked();
    let to = |host: &str| asked.iter().filter(|line| line.contains(host)).count();
    assert!(to(&format!("GET {host}/api/models/test/tiny")) > 0, "{asked:#?}");
    assert!(to("http://127.0.0.1:") > 0, "the host that the hub redirects to: {asked:#?}");
    success(place.ternion(&["rm", "hf://test/tiny"]));

    // Hosts that are excepted, a hub on this machine, and the proxy for the other scheme are not asked that way.
    for (endpoint, variables) in [
        (&host, vec![("HTTP_PROXY", proxy.url.as_str()), ("NO_PROXY", "other.invalid,.invalid")]),
        (&host, vec![("HTTPS_PROXY", proxy.url.as_str())]),
    ] {
        let command = pull(endpoint, &variables);
        place.run(move || failure(command, 4, &["the hub cannot be reached"])).await;
        assert!(proxy.asked().is_empty(), "{variables:?}");
    }
    let local =
        pull(&place.fake.url, &[("HTTP_PROXY", "http://127.0.0.1:9"), ("ALL_PROXY", "http://127.0.0.1:9")]);
    place.run(move || success(local)).await;

    // HTTPS asks for a tunnel, so that the proxy sees no token.
    for variable in ["HTTPS_PROXY", "ALL_PROXY"] {
        let mut secure = pull(&format!("https://{}", proxy::HOST), &[(variable, &proxy.url)]);
        secure.env("HF_TOKEN", TOKEN).env("HF_HUB_CACHE", place.folder.path().join("empty"));
        place.run(move || failure(secure, 4, &["the hub cannot be reached"])).await;
        let asked = proxy.asked();
        let tunnel = format!("CONNECT {}:443 HTTP/1.1", proxy::HOST);
        assert!(!asked.is_empty() && asked.iter().all(|line| *line == tunnel), "{asked:?}");
    }
}

/// The project's Python, if it has the hub's library.
fn python() -> Option<PathBuf> {
    let tools = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/tools");
    let python =
        [tools.join("bin/python"), tools.join("Scripts/python.exe")].into_iter().find(|path| path.exists());
    let has = |python: &PathBuf| {
        std::process::Command::new(python)
            .args(["-c", "import huggingface_hub"])
            .status()
            .is_ok_and(|s| s.success())
    };
    let found = python.filter(has);
    if found.is_none() {
        // Past the test harness, which keeps the output of tests that pass.
        use std::io::Write;
        let _ = writeln!(std::io::stderr(), "skipped: no Python package huggingface_hub in target/tools");
    }
    found
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn python_finds_what_was_downloaded_and_the_other_way_round() {
    let Some(python) = python() else { return };
    let place = Place::new().await;
    place.fake.add("test/tiny", tiny());
    place.hub().fetch(&address("hf://test/tiny"), &Progress::none()).await.unwrap();
    let run = |home: &Path, program: &str, offline: &str| {
        let mut command = std::process::Command::new(&python);
        command.args(["-c", program]).env("HF_HOME", home).env("HF_ENDPOINT", &place.fake.url);
        command.env("HF_HUB_OFFLINE", offline).env("NO_PROXY", "127.0.0.1").env_remove("HF_HUB_CACHE");
        place.run(move || {
            let output = command.output().unwrap();
            assert!(output.status.success(), "{}", stderr(&output));
            serde_json::from_str::<Value>(stdout(&output).lines().last().unwrap()).unwrap()
        })
    };
    let found = run(
        place.folder.path(),
        "import json, os
from huggingface_hub import scan_cache_dir, snapshot_download, hf_hub_download
info = scan_cache_dir()
[repo] = info.repos
[revision] = repo.revisions
path = snapshot_download('test/tiny')
assert hf_hub_download('test/tiny', 'config.json') == os.path.join(path, 'config.json')
print(json.dumps({'warnings': len(info.warnings), 'repo': repo.repo_id, 'size': repo.size_on_disk, 'commit': revision.commit_hash,
                  'refs': sorted(revision.refs), 'files': sorted(os.listdir(path))}))",
        "1",
    )
    .await;
    assert_eq!((&found["warnings"], &found["repo"]), (&json!(0), &json!("test/tiny")));
    assert_eq!((&found["commit"], &found["refs"][0]), (&json!(COMMIT), &json!("main")));
    let listed = &place.hub().list().unwrap()[0];
    assert_eq!(found["size"], listed.size);
    assert_eq!(found["files"].as_array().unwrap().len(), listed.revisions[0].files);

    // What Python has downloaded is loaded without another download.
    let home = tempfile::tempdir().unwrap();
    let names: Vec<String> = listed_names(&place.repo("test/tiny").join("snapshots").join(COMMIT));
    let program = format!(
        "import json
from huggingface_hub import hf_hub_download
print(json.dumps([hf_hub_download('test/tiny', name) for name in {names:?}]))"
    );
    let paths = run(home.path(), &program, "0").await;
    let mut settings = place.hub().settings().clone();
    settings.cache = home.path().join("hub");
    place.fake.asked();
    let hub = Hub::new(settings);
    let fetched = hub.fetch(&address("hf://test/tiny"), &Progress::none()).await.unwrap();
    assert!(fetched.files.iter().all(|file| !file.is_new));
    assert_eq!(place.fake.asked().len(), 1);
    let first = Path::new(paths[0].as_str().unwrap());
    assert_eq!(first.parent().unwrap().canonicalize().unwrap(), fetched.path.canonicalize().unwrap());
    assert_eq!(hub.cached(&address("hf://test/tiny")).unwrap(), fetched.path);
}

fn listed_names(folder: &Path) -> Vec<String> {
    std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect()
}
