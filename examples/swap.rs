//! A host that swaps its model by changing its configuration file and nothing else.
//!
//! ```console
//! $ cargo run --release -p ternion --example swap -- examples/hosts/bitnet.toml
//! $ cargo run --release -p ternion --example swap -- examples/hosts/llama.yaml
//! $ TERNION_DEFAULT_MODEL=parrot cargo run --release -p ternion --example swap -- examples/hosts/bitnet.toml
//! ```

use std::sync::Arc;

use ternion::{LlmBackend, LlmBackendExt, Message};

/// All that the host knows of a model.
struct Host {
    model: Arc<dyn LlmBackend>,
}

impl Host {
    async fn answer(&self, question: &str) -> ternion::Result<String> {
        let messages = vec![Message::system("Answer in one sentence."), Message::user(question)];
        Ok(self.model.chat(messages).await?.text)
    }
}

#[tokio::main]
async fn main() -> ternion::Result<()> {
    let path = std::env::args().nth(1).unwrap_or_else(|| "examples/hosts/bitnet.toml".into());
    let host = Host { model: ternion::load_file(&path).await? };
    let info = host.model.info();
    println!("{path}: `{}` on `{}` from {}", info.name, info.backend, info.format);
    println!("{}", host.answer("How many days are in a week?").await?);
    Ok(())
}
