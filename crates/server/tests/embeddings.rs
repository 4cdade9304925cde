//! `/v1/embeddings`, by the client `openai` of PyPI and by the backend `openai`.
#![allow(clippy::unwrap_used, reason = "a failure here fails the test, as it should")]

mod common;

use std::path::{Path, PathBuf};

use common::Running;
use serde_json::{Value, json};
use ternion::{
    EmbedRequest, ErrorKind, InputTruncation, LlmBackend as _,
    config::{Config, ModelConfig},
};
use ternion_server::ServerOptions;

/// A model that generates, and its hidden states pooled.
async fn server() -> Running {
    let qwen3 = common::fixture("dense/qwen3");
    let text = format!(
        "default_model = 'embedder'\n[models.embedder]\npath = '{}'\nthreads = 1\ncontext_length = 128\n[models.embedder.options]\n\
         pooling = 'last'\nmatryoshka = true\n[models.echo]\nbackend = 'echo'\n",
        qwen3.display()
    );
    Running::start(common::config(&text), ServerOptions::default()).await
}

fn python() -> Option<PathBuf> {
    let tools = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/tools");
    let target = std::env::var_os("CARGO_TARGET_DIR").map(|target| Path::new(&target).join("tools"));
    let mut programs = target
        .into_iter()
        .chain([tools])
        .flat_map(|tools| ["bin/python", "Scripts/python.exe"].map(|name| tools.join(name)));
    let has = |python: &PathBuf| {
        let import = std::process::Command::new(python).args(["-c", "import openai"]).output();
        import.is_ok_and(|output| output.status.success())
    };
    programs.find(has)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_client_of_openai_gets_vectors() {
    let server = server().await;
    let Some(python) = python() else { return };
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/python/embeddings_client.py");
    let mut command = std::process::Command::new(python);
    command.arg(script).arg(&server.url);
    let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{out}\n{err}");
    let found: Value = serde_json::from_str(out.lines().last().unwrap()).unwrap();
    assert_eq!(found["dimensions"], 32);
    let expected = json!({
        "empty": [400, "input", "invalid_value"],
        "mixed": [400, "input", "invalid_value"],
        "unknown token": [400, "input", "invalid_value"],
        "too long": [400, "input", "context_length_exceeded"],
        "dimensions": [400, "dimensions", "invalid_value"],
        "no embedder": [400, null, "unsupported_value"],
    });
    assert_eq!(found["refused"], expected);
    let own = server.models.get("embedder").await.unwrap();
    let own = own.embed(EmbedRequest::new(["One, two, three."])).await.unwrap();
    let theirs: Vec<f32> = serde_json::from_value(found["vector"].clone()).unwrap();
    assert!(own.items[0].values.iter().zip(&theirs).all(|(a, b)| (a - b).abs() < 1e-6));
    server.ended().await;
}

/// What the model is comes over the wire, and a request gives the same vectors.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_backend_openai_is_the_other_end() {
    let server = server().await;
    let own = server.models.get("embedder").await.unwrap();
    let remote = async |change: &dyn Fn(&mut ModelConfig)| {
        let mut config = ModelConfig::default();
        config.backend = "openai".into();
        config.options.insert("url".into(), json!(format!("{}/v1", server.url)));
        config.options.insert("model".into(), "embedder".into());
        change(&mut config);
        ternion::load(&Config::single("remote", config), None).await.unwrap()
    };
    let model = remote(&|_| {}).await;
    assert_eq!(model.info().embedding, own.info().embedding);
    assert_eq!(model.info().limits.context_length, 128);
    let long = "one two three ".repeat(200);
    let texts = ["One, two, three.", "The quick brown fox.", long.as_str()];
    let request = EmbedRequest::new(texts).with_truncation(InputTruncation::End).with_dimensions(16);
    let (here, there) = (own.embed(request.clone()).await.unwrap(), model.embed(request).await.unwrap());
    assert_eq!(here.usage, there.usage);
    for (a, b) in here.items.iter().zip(&there.items) {
        assert!(a.values.len() == 16 && a.values.iter().zip(&b.values).all(|(a, b)| (a - b).abs() < 1e-6));
    }
    let refused = model.embed(EmbedRequest::new([long.as_str()])).await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::ContextOverflow, "{refused}");
    // A server that tells nothing: one vector is asked for.
    let plain = remote(&|config| {
        config.options.insert("dialect".into(), "openai".into());
        config.options.insert("embeddings".into(), true.into());
    });
    let plain = plain.await;
    let info = plain.info();
    assert_eq!(info.embedding.as_ref().unwrap().pooling, ternion::Pooling::Unknown);
    assert_eq!(info.embedding.as_ref().map(|e| (e.dimensions, e.normalized)), Some((32, true)));
    server.ended().await;
}
