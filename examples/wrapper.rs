//! A wrapper of your own: it puts a system message before every chat. `cargo run --example wrapper`

use std::sync::Arc;

use ternion::{
    BackendWrapper, GenerateRequest, GenerateStream, LlmBackend, LlmBackendExt, Message, Prompt, Result,
    async_trait,
};

struct Polite(Arc<dyn LlmBackend>);

#[async_trait]
impl BackendWrapper for Polite {
    fn inner(&self) -> &dyn LlmBackend {
        &*self.0
    }

    async fn generate(&self, mut request: GenerateRequest) -> Result<GenerateStream> {
        if let Prompt::Chat(messages) = &mut request.params.prompt {
            messages.insert(0, Message::system("Answer politely."));
        }
        self.0.generate(request).await
    }
}

#[tokio::main]
async fn main() -> Result<()> {
    let path = std::env::args().nth(1).unwrap_or_else(|| "fixtures/ternion-tiny".into());
    let model: Arc<dyn LlmBackend> = Arc::new(Polite(ternion::open(path).await?));
    println!("{}", model.chat(vec![Message::user("How many days are in a week?")]).await?.text);
    Ok(())
}
