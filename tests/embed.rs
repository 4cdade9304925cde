//! Embeddings, and tokenizers that are llama.cpp's own: against llama.cpp itself (xllamacpp of PyPI), on random models that
//! `tests/embed/models.py` writes.
#![allow(clippy::unwrap_used, reason = "a failure here fails the test, as it should")]

use std::{
    io::Write as _,
    path::{Path, PathBuf},
    process::Command,
    sync::{Arc, OnceLock},
};

use ternion::{
    EmbedInput, EmbedRequest, ErrorKind, GenerateRequest, LlmBackend, LlmBackendExt, Pooling, Sampling,
    blocking::Model,
    config::{Config, Format, ModelConfig},
    formats::{
        Checkpoint,
        convert::{Options, Target, convert},
    },
    models::Models,
    text::Tokenizer,
};

/// What vectors of the length 1 are held to, absolutely.
const TOLERANCE: f32 = 1e-3;

/// The project's Python, if it has this module.
fn python(module: &str) -> Option<PathBuf> {
    let tools = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/tools");
    let target = std::env::var_os("CARGO_TARGET_DIR").map(|target| Path::new(&target).join("tools"));
    let folders = target.into_iter().chain([tools]);
    let mut programs =
        folders.flat_map(|tools| ["bin/python", "Scripts/python.exe"].map(|name| tools.join(name)));
    let found = programs.find(|python| {
        let import = Command::new(python).args(["-c", &format!("import {module}")]).output();
        import.is_ok_and(|output| output.status.success())
    });
    if found.is_none() {
        // Past the test harness, which keeps the output of tests that pass.
        let _ = writeln!(std::io::stderr(), "skipped: no Python package {module} in target/tools");
    }
    found
}

fn script(python: &Path, name: &str, arguments: &[&str]) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/embed").join(name);
    let output =
        Command::new(python).arg(path).args(arguments).env("GGML_NO_BACKTRACE", "1").output().unwrap();
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{name} {arguments:?}: {out}\n{err}");
    out.lines().last().unwrap_or_default().to_owned()
}

/// The folder with all models.
fn models() -> Option<&'static Path> {
    static MODELS: OnceLock<Option<tempfile::TempDir>> = OnceLock::new();
    let made = MODELS.get_or_init(|| {
        let python = python("gguf")?;
        let folder = tempfile::tempdir().unwrap();
        let qwen3 = ternion_test_support::fixture("dense/qwen3");
        script(&python, "models.py", &[folder.path().to_str().unwrap(), qwen3.to_str().unwrap()]);
        Some(folder)
    });
    made.as_ref().map(tempfile::TempDir::path)
}

/// What llama.cpp itself makes of `inputs`.
#[cfg(feature = "llama-cpp")]
fn llama_cpp<T: serde::de::DeserializeOwned>(
    kind: &str,
    model: &Path,
    inputs: &impl serde::Serialize,
) -> Option<T> {
    let python = python("xllamacpp")?;
    let inputs = serde_json::to_string(inputs).unwrap();
    let answer = script(&python, "llama_cpp.py", &[kind, model.to_str().unwrap(), &inputs]);
    Some(serde_json::from_str(&answer).unwrap())
}

async fn load(path: &Path, change: impl FnOnce(&mut ModelConfig)) -> Arc<dyn LlmBackend> {
    let mut config = ModelConfig::for_path(path);
    config.threads = Some(1);
    change(&mut config);
    let loaded = ternion::load(&Config::single("model", config), None).await;
    loaded.unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

async fn vectors(model: &dyn LlmBackend, inputs: Vec<Vec<u32>>) -> Vec<Vec<f32>> {
    let found = model.embed(EmbedRequest::new(inputs)).await.unwrap();
    found.items.into_iter().map(|item| item.values).collect()
}

fn largest(found: &[Vec<f32>], expected: &[Vec<f32>]) -> f32 {
    assert_eq!(found.len(), expected.len());
    let pairs = found.iter().zip(expected).flat_map(|(a, b)| {
        assert_eq!(a.len(), b.len());
        a.iter().zip(b)
    });
    pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// BERT pools the mean of all tokens, Qwen3 the last one: from GGUF by llama.cpp, from the same weights in safetensors by candle, and
/// Qwen3's GGUF by candle, too.
#[cfg(feature = "llama-cpp")]
#[tokio::test]
async fn vectors_are_those_of_llama_cpp() {
    let Some(folder) = models() else { return };
    let bert: Vec<Vec<u32>> =
        vec![vec![2, 5, 6, 7, 8, 3], vec![2, 14, 3], (0..48).map(|i| 5 + i % 40).collect()];
    let qwen3: Vec<Vec<u32>> = vec![vec![5, 6, 7], vec![496, 300], (0..60).map(|i| (i * 7) % 496).collect()];
    for (file, inputs, places) in [
        ("bert.gguf", bert, vec![("bert.gguf", "llama-cpp"), ("bert", "candle")]),
        (
            "qwen3.gguf",
            qwen3,
            vec![("qwen3.gguf", "llama-cpp"), ("qwen3", "candle"), ("qwen3.gguf", "candle")],
        ),
    ] {
        let Some(expected) = llama_cpp::<Vec<Vec<f32>>>("embeddings", &folder.join(file), &inputs) else {
            return;
        };
        for (path, backend) in places {
            let model = load(&folder.join(path), |config| config.backend = backend.into()).await;
            let found = vectors(&*model, inputs.clone()).await;
            let difference = largest(&found, &expected);
            println!("{path} on {backend}: {difference:.1e}");
            assert!(difference <= TOLERANCE, "{path} on {backend}: {difference}");
        }
    }
}

#[tokio::test]
async fn the_contract_is_kept() {
    let Some(folder) = models() else { return };
    let mut places = vec![("bert", "candle", Pooling::Mean), ("qwen3", "candle", Pooling::Last)];
    if cfg!(feature = "llama-cpp") {
        places
            .extend([("bert.gguf", "llama-cpp", Pooling::Mean), ("qwen3.gguf", "llama-cpp", Pooling::Last)]);
    }
    for (path, backend, pooling) in places {
        let file = folder.join(path);
        let change = |config: &mut ModelConfig| {
            config.backend = backend.into();
            config.context_length = Some(40);
        };
        let model = load(&file, change).await;
        let info = model.info();
        let embedding = info.embedding.clone().unwrap();
        assert_eq!(
            (embedding.pooling, embedding.dimensions, embedding.normalized),
            (pooling, 32, true),
            "{path}"
        );
        assert_eq!(info.limits.context_length, 40);
        for check in ternion_conformance::checks(&*model) {
            check
                .run(&*model)
                .await
                .unwrap_or_else(|failure| panic!("{path} on {backend}: {}: {failure}", check.name));
        }
        let refused = model.generate(GenerateRequest::new("a")).await.err().unwrap();
        assert_eq!(refused.kind(), ErrorKind::Unsupported, "{path}");
    }
}

/// By what the files are; and what sentence-transformers' files say of lengths.
#[tokio::test]
async fn the_backend_is_chosen_by_the_files() {
    let Some(folder) = models() else { return };
    let bert = load(&folder.join("bert"), |_| {}).await;
    assert_eq!((bert.info().backend.as_str(), bert.info().limits.context_length), ("candle", 48));
    assert_eq!(bert.info().embedding.as_ref().unwrap().shortened, Some(vec![8, 16]));
    let short = bert.embed(EmbedRequest::new(["the fox"]).with_dimensions(8)).await.unwrap();
    let norm: f32 = short.items[0].values.iter().map(|x| x * x).sum();
    assert!(short.items[0].values.len() == 8 && (norm - 1.0).abs() < 1e-5);
    assert_eq!(load(&folder.join("qwen3"), |_| {}).await.info().backend, "candle");
    if cfg!(feature = "llama-cpp") {
        assert_eq!(load(&folder.join("bert.gguf"), |_| {}).await.info().backend, "llama-cpp");
    }
    // A model that generates makes embeddings where it is told how to pool.
    let told = |config: &mut ModelConfig| {
        config.options.insert("pooling".into(), "mean".into());
        config.options.insert("matryoshka".into(), true.into());
    };
    let model = load(&ternion_test_support::fixture("dense/qwen3"), told).await;
    assert_eq!(model.info().embedding.as_ref().unwrap().shortened, Some(vec![]));
    let found = model.embed(EmbedRequest::new(["a"]).with_dimensions(5)).await.unwrap();
    assert_eq!(found.items[0].values.len(), 5);
}

/// A ternary one whose projections have norms of their own, as Microsoft publishes them.
#[tokio::test]
async fn a_model_with_a_norm_before_each_projection_is_ternary() {
    let Some(folder) = models() else { return };
    let model = load(&folder.join("bitnet-embedding"), |_| {}).await;
    assert!(model.info().format.contains("masters"), "{}", model.info().format);
    let expected: Vec<Vec<f32>> =
        serde_json::from_slice(&std::fs::read(folder.join("bitnet-embedding/expected.json")).unwrap())
            .unwrap();
    let inputs: Vec<Vec<u32>> = vec![vec![5, 6, 7], vec![300], (0..30).map(|i| (i * 7) % 496).collect()];
    let found = vectors(&*model, inputs.clone()).await;
    let difference = largest(&found, &expected);
    println!("{difference:.1e}");
    assert!(difference <= TOLERANCE, "{difference}");

    // And as GGUF, with the names of Microsoft's converter.
    let checkpoint = Checkpoint::open(folder.join("bitnet-embedding")).unwrap();
    let written = tempfile::tempdir().unwrap();
    for (target, kind) in [(Target::GgufI2s, "I2_S"), (Target::GgufTq2, "TQ2_0")] {
        let path = written.path().join(format!("{kind}.gguf"));
        convert(&checkpoint, &path, &Options::new(target), &mut |_, _| {}).unwrap();
        let bytes = std::fs::read(&path).unwrap();
        let name: &[u8] = b"blk.1.ffn_down_norm_in.weight";
        assert!(bytes.windows(name.len()).any(|window| window == name));
        let model = load(&path, |_| {}).await;
        let info = model.info();
        assert!(info.backend == "candle" && info.format.contains(kind), "{} {}", info.backend, info.format);
        assert_eq!(info.embedding.as_ref().unwrap().pooling, Pooling::Last);
        let difference = largest(&vectors(&*model, inputs.clone()).await, &expected);
        println!("{kind}: {difference:.1e}");
        assert!(difference <= TOLERANCE, "{kind}: {difference}");
    }
}

/// sentence-transformers' modules `Dense`, against the same sums in double precision.
#[tokio::test]
async fn linear_layers_behind_the_pooling_are_computed() {
    let Some(folder) = models() else { return };
    let inputs: Vec<Vec<u32>> = vec![vec![2, 5, 6, 7, 3], vec![2, 14, 3]];
    let raw = |config: &mut ModelConfig| {
        config.options.insert("normalize".into(), false.into());
    };
    let pooled = vectors(&*load(&folder.join("bert"), raw).await, inputs.clone()).await;
    let layers: Vec<serde_json::Value> =
        serde_json::from_slice(&std::fs::read(folder.join("projected/dense.json")).unwrap()).unwrap();
    let expected: Vec<Vec<f32>> = pooled
        .iter()
        .map(|vector| {
            let mut vector: Vec<f64> = vector.iter().map(|x| f64::from(*x)).collect();
            for layer in &layers {
                let weight: Vec<Vec<f64>> = serde_json::from_value(layer["linear.weight"].clone()).unwrap();
                let bias: Option<Vec<f64>> = serde_json::from_value(layer["linear.bias"].clone()).unwrap();
                let product =
                    weight.iter().map(|row| row.iter().zip(&vector).map(|(a, b)| a * b).sum::<f64>());
                vector = match bias {
                    Some(bias) => product.zip(bias).map(|(x, b)| (x + b).tanh()).collect(),
                    None => product.collect(),
                };
            }
            let norm = vector.iter().map(|x| x * x).sum::<f64>().sqrt();
            vector.iter().map(|x| (x / norm) as f32).collect()
        })
        .collect();
    let model = load(&folder.join("projected"), |_| {}).await;
    assert_eq!(model.info().embedding.as_ref().unwrap().dimensions, 24);
    let difference = largest(&vectors(&*model, inputs).await, &expected);
    println!("{difference:.1e}");
    assert!(difference <= 1e-5, "{difference}");
}

/// A model that gives one number for a pair of texts makes no embeddings, however it is asked.
#[tokio::test]
async fn rerankers_are_refused() {
    let Some(folder) = models() else { return };
    let backends: &[&str] =
        if cfg!(feature = "llama-cpp") { &["auto", "candle", "llama-cpp"] } else { &["auto", "candle"] };
    for path in ["reranker.gguf", "reranker"] {
        for backend in backends {
            for pooling in [None, Some("mean")] {
                let mut config = ModelConfig::for_path(folder.join(path));
                config.backend = (*backend).into();
                if let Some(pooling) = pooling {
                    config.options.insert("pooling".into(), pooling.into());
                }
                let error = ternion::load(&Config::single("model", config), None).await.err().unwrap();
                let text = error.to_string();
                println!("{text}");
                assert_eq!(error.kind(), ErrorKind::Unsupported, "{text}");
                assert!(!text.contains('\n') && text.contains("ranks or classifies texts"), "{text}");
            }
        }
    }
}

/// Layers and handles pass embeddings on, and a host without async has them.
#[test]
fn layers_handles_and_the_blocking_api_have_embeddings() {
    let Some(folder) = models() else { return };
    let text = format!(
        "default_model = 'bert'\n[models.bert]\npath = '{}'\nfallback = ['echo']\n[models.bert.layers]\ntracing = true\nmetrics = \
         true\ntimeout.total_ms = 60000\nretry = {{ attempts = 2 }}\nlimit = {{ concurrent = 1, waiting = 3 }}\n\
         [models.echo]\nbackend = 'echo'\n",
        folder.join("bert").display()
    );
    let config = Config::from_str(&text, Format::Toml).unwrap();
    let model = Model::load(&config, None).unwrap();
    let found = model.embed(EmbedRequest::new(["the fox", "hello world"])).unwrap();
    assert_eq!((found.items.len(), found.served_by.unwrap().backend.as_str()), (2, "candle"));
    assert_eq!(found.usage.prompt_tokens, 8);

    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let models = Models::new(config).unwrap();
        let echo = models.get("echo").await.unwrap();
        let refused = echo.embed(EmbedRequest::new(["a"])).await.unwrap_err();
        assert!(refused.kind() == ErrorKind::Unsupported && refused.operation() == "embed", "{refused}");
        // The check before a model takes over makes embeddings.
        let bert = models.get("bert").await.unwrap();
        let mut changed = models.config();
        changed.models.get_mut("bert").unwrap().context_length = Some(32);
        models.reload_with(changed).await.unwrap();
        assert_eq!(bert.info().limits.context_length, 32);
        assert_eq!(bert.embed(EmbedRequest::new(["a"])).await.unwrap().items.len(), 1);
    });
}

/// Texts for tokenizers: words, spaces, other scripts, control characters, what looks like special tokens.
#[cfg(feature = "llama-cpp")]
fn texts() -> Vec<String> {
    let mut texts: Vec<String> = [
        "The quick brown fox jumps over the lazy dog.",
        "the quick brown fox",
        " hello world ",
        "hello  world   with    spaces",
        "日本語のテキスト",
        "naïve café ÉÈ",
        "a\nb\r\nc\td",
        "1234 5678.90, -3!",
        "emoji 🦊🐶 and \u{1F468}\u{200D}\u{1F469}",
        "</s> <|user|> <pad> [CLS] [SEP] <extra_0>",
        "x",
        "   ",
        "\u{0}\u{7}\u{200B}",
        "THE QUICK",
        "don't won't it's",
        "def f(x):\n    return x * 2\n",
    ]
    .map(str::to_owned)
    .to_vec();
    // All short mixtures of a few pieces.
    let pieces = ["the", " ", "fox", "é", "日本", "?", "\n", "s"];
    for a in pieces {
        texts.extend(pieces.iter().map(|b| format!("{a}{b}the{a}")));
    }
    // Random mixtures of scripts, numbers, marks, punctuation, emoji and kinds of white space.
    let parts: Vec<&str> = "a|Z|ab|abc|...|ﬁ|①|Ａ|fox|THE|é|e\u{301}|ß|İ|ǅ|Я|ж|Ω|ا|ع|א|ह|ि|ก|ำ|中|漢字|の|カ|한|𐐀|0|7|12|345|½|Ⅷ|٣|²|'s|'LL|'re|don't|!|?|...|-|_|$|+|<=>|^|~~|||#|@|\\|`|¿|«|»|、|。|—|€|©|🦊|👨\u{200d}👩|🇪🇺|👍🏽|\u{fe0f}|\u{200b}|\u{feff}|\u{ad}|\u{0}|\u{7f}|\u{85}|\u{2028}| |  |     |\t|\n|\r\n|\n\n\n|\u{a0}|\u{3000}|\u{e000}|\u{10ffff}"
        .split('|')
        .filter(|part| !part.is_empty())
        .collect();
    let mut state = 88_172_645_463_325_252u64;
    let mut next = |below: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state % below as u64) as usize
    };
    for _ in 0..400 {
        let count = 1 + next(12);
        texts.push((0..count).map(|_| parts[next(parts.len())]).collect());
    }
    texts
}

/// Unigram, RWKV, WordPiece, Gemma 4 and PLaMo 2, of which the tokenizers crate has no equal, and byte-level BPE without the name of a
/// rule: the same ids, and the text back.
#[cfg(feature = "llama-cpp")]
#[tokio::test]
async fn tokenizers_of_llama_cpp_are_used_where_there_is_no_equal() {
    let Some(folder) = models() else { return };
    let texts = texts();
    for (name, keeps_text) in [
        ("unigram", false),
        ("charsmap", false),
        ("rwkv", true),
        ("wordpiece", false),
        ("gemma4", true),
        ("plamo2", true),
        ("bpe-missing", true),
        ("bpe-default", true),
    ] {
        let path = folder.join(format!("{name}.gguf"));
        let Some(expected) = llama_cpp::<Vec<Vec<u32>>>("tokens", &path, &texts) else { return };
        let on_llama_cpp = |config: &mut ModelConfig| config.backend = "llama-cpp".into();
        let model = load(&path, on_llama_cpp).await;
        if !name.starts_with("bpe") {
            assert_eq!(load(&path, |_| {}).await.info().backend, "llama-cpp", "{name}");
        }
        let tokenizer = model.tokenizer().unwrap();
        assert!(tokenizer.to_json().is_err(), "{name}: the tokenizer is ours");
        for (text, expected) in texts.iter().zip(&expected) {
            let (before, after) = tokenizer.added_around();
            let plain = tokenizer.encode_plain(text).unwrap();
            assert_eq!([before, &plain, after].concat(), *expected, "{name}: {text:?}");
            let whole = tokenizer.decode(&plain, true).unwrap();
            assert_eq!(streamed(&tokenizer, &plain), whole, "{name}: {text:?}");
            if keeps_text {
                // PLaMo 2 leaves out a byte order mark.
                let kept = if name == "plamo2" { text.strip_prefix('\u{feff}') } else { None };
                assert_eq!(whole, kept.unwrap_or(text), "{name}");
            }
        }
        let request = GenerateRequest::new("the quick").with_max_tokens(5).with_sampling(Sampling::greedy());
        let answer = model.generate(request).await.unwrap().collect().await.unwrap();
        assert!(answer.usage.completion_tokens >= 1, "{name}");
        assert_eq!(
            model.count_tokens("the quick").unwrap(),
            tokenizer.encode_plain("the quick").unwrap().len()
        );
    }
    // The regular expressions of llama.cpp recurse once for each of these characters.
    for name in ["bpe-missing", "bpe-default"] {
        let path = folder.join(format!("{name}.gguf"));
        let tokenizer = load(&path, |config| config.backend = "llama-cpp".into()).await.tokenizer().unwrap();
        assert_eq!(tokenizer.warnings().is_empty(), name == "bpe-default", "{:?}", tokenizer.warnings());
        for text in ["!".repeat(200_000), "7".repeat(50_000), "漢".repeat(50_000), " ".repeat(50_000)] {
            assert_eq!(tokenizer.decode(&tokenizer.encode_plain(&text).unwrap(), true).unwrap(), text);
        }
        let error = tokenizer.encode_plain(&"!".repeat(2_000_000)).unwrap_err();
        assert!(error.to_string().contains("2000000 characters without white space"), "{error}");
        // A rule that is named is ours.
        let named = |config: &mut ModelConfig| {
            config.backend = "llama-cpp".into();
            config.options.insert("pre_tokenizer".into(), "llama-bpe".into());
        };
        assert!(load(&path, named).await.tokenizer().unwrap().to_json().is_ok());
    }
    // Special tokens in trusted text are control tokens, and in messages they are text.
    let unigram = load(&folder.join("unigram.gguf"), |_| {}).await.tokenizer().unwrap();
    let user = unigram.token_id("<|user|>").unwrap();
    assert!(unigram.is_special(user) && unigram.encode("<|user|>the", false).unwrap().contains(&user));
    assert!(!unigram.encode_plain("<|user|>the").unwrap().contains(&user));
    let chat = unigram.encode_chat(&[ternion::Message::user("the <|user|> fox")], false).unwrap();
    assert_eq!(chat.iter().filter(|id| **id == user).count(), 1, "{chat:?}");
    assert!(unigram.to_json().is_err());
}

#[cfg(feature = "llama-cpp")]
fn streamed(tokenizer: &Arc<Tokenizer>, ids: &[u32]) -> String {
    let mut decoder = tokenizer.decoder();
    let mut text: String = ids.iter().map(|&id| decoder.push(id).unwrap()).collect();
    text.push_str(&decoder.finish().unwrap());
    text
}

/// A name that nobody knows: llama.cpp refuses the file, and candle needs the rule to be said.
#[cfg(feature = "llama-cpp")]
#[tokio::test]
async fn a_rule_that_is_not_known_is_named() {
    let Some(folder) = models() else { return };
    for (backend, kind) in [("llama-cpp", ErrorKind::InvalidModel), ("candle", ErrorKind::Unsupported)] {
        let mut config = ModelConfig::for_path(folder.join("bpe-unknown.gguf"));
        config.backend = backend.into();
        let error = ternion::load(&Config::single("model", config), None).await.err().unwrap();
        println!("{error}");
        assert!(error.kind() == kind && error.to_string().contains("no-such-rule"), "{error}");
    }
}

/// llama.cpp would end the process when a text leads out of the map.
#[cfg(feature = "llama-cpp")]
#[tokio::test]
async fn a_damaged_map_of_characters_is_refused() {
    let Some(folder) = models() else { return };
    for backend in ["llama-cpp", "auto"] {
        let mut config = ModelConfig::for_path(folder.join("damaged-charsmap.gguf"));
        config.backend = backend.into();
        let error = ternion::load(&Config::single("model", config), None).await.err().unwrap();
        assert_eq!(error.kind(), ErrorKind::InvalidModel, "{error}");
        assert!(
            error.to_string().contains("`tokenizer.ggml.precompiled_charsmap` has a replacement"),
            "{error}"
        );
    }
}

/// Of a folder of sentence-transformers the library tokenizes as llama.cpp does of the GGUF file.
#[cfg(feature = "llama-cpp")]
#[tokio::test]
async fn wordpiece_is_the_same_in_both_forms() {
    let Some(folder) = models() else { return };
    let inputs = ["The quick brown fox jumps over the lazy dog.", "hello world", "naive token, one!"];
    let request = || EmbedRequest::new(inputs.map(EmbedInput::from));
    let ours = load(&folder.join("bert"), |_| {}).await.embed(request()).await.unwrap();
    let theirs = load(&folder.join("bert.gguf"), |_| {}).await.embed(request()).await.unwrap();
    let values =
        |found: &ternion::Embeddings| found.items.iter().map(|i| i.values.clone()).collect::<Vec<_>>();
    let difference = largest(&values(&ours), &values(&theirs));
    println!("{difference:.1e}");
    assert!(difference <= TOLERANCE, "{difference}");
}
