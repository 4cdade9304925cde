//! The contract of `LlmBackend` on a real server, where the environment names one:
//!
//! ```console
//! $ TERNION_OPENAI_URL=http://127.0.0.1:8080 TERNION_OPENAI_TOKENIZER=smollm2 \
//!       cargo test -p ternion-backend-openai --test conformance
//! ```
//!
//! The model should be small, with a context of some hundred tokens and a few slots: the checks fill both.

use std::process::ExitCode;

use serde_json::json;
use ternion_backend_openai::OpenAiFactory;
use ternion_conformance::Suite;
use ternion_core::{
    config::ModelConfig,
    registry::{BackendFactory, Progress},
};

fn main() -> ExitCode {
    let suite = Suite::new();
    let Ok(url) = std::env::var("TERNION_OPENAI_URL") else {
        return suite.skip("openai", "TERNION_OPENAI_URL names no server").run();
    };
    let mut config = ModelConfig::default();
    "openai".clone_into(&mut config.backend);
    config.max_queued = Some(4);
    config.max_sequences = std::env::var("TERNION_OPENAI_SEQUENCES").ok().and_then(|n| n.parse().ok());
    config.options.insert("url".to_owned(), json!(url));
    for (key, variable) in [("tokenizer", "TERNION_OPENAI_TOKENIZER"), ("model", "TERNION_OPENAI_MODEL")] {
        if let Ok(value) = std::env::var(variable) {
            config.options.insert(key.to_owned(), json!(value));
        }
    }
    suite.backend("openai", async move || OpenAiFactory.load("model", &config, Progress::none()).await).run()
}
