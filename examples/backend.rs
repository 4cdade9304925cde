//! A backend of your own: it answers with the words of the prompt in reverse. `cargo run --example backend -- "one two"`

use std::sync::Arc;

use ternion::{
    DoneEvent, Event, FinishReason, GenerateRequest, GenerateStream, LlmBackend, ModelInfo, Result, Timing,
    Usage, async_trait, config::Config, config::Format, config::ModelConfig, models::Models,
    registry::BackendFactory, registry::Progress, validate,
};

struct Reverse(Arc<ModelInfo>);

#[async_trait]
impl LlmBackend for Reverse {
    fn info(&self) -> Arc<ModelInfo> {
        Arc::clone(&self.0)
    }

    async fn generate(&self, request: GenerateRequest) -> Result<GenerateStream> {
        validate::request(&request, &self.0, None).await?;
        let text = request.params.prompt.text().unwrap_or_default().into_owned();
        let words: Vec<String> = text.split(' ').rev().map(str::to_owned).collect();
        let usage = Usage::new(words.len(), words.len());
        let done = DoneEvent::new(FinishReason::EndOfSequence, usage, Timing::default());
        let pieces = words.into_iter().map(|word| Event::text(word + " "));
        Ok(GenerateStream::from_events(pieces.chain([done.into()]).map(Ok)))
    }
}

struct ReverseFactory;

#[async_trait]
impl BackendFactory for ReverseFactory {
    fn name(&self) -> &'static str {
        "reverse"
    }

    fn description(&self) -> &'static str {
        "the words of the prompt in reverse"
    }

    async fn load(&self, name: &str, _: &ModelConfig, _: Progress) -> Result<Arc<dyn LlmBackend>> {
        Ok(Arc::new(Reverse(Arc::new(ModelInfo::new(name, "reverse")))))
    }
}

#[tokio::main]
async fn main() -> Result<()> {
    let mut registry = ternion::registry();
    registry.register(ReverseFactory);
    let config = Config::from_str("[models.mirror]\nbackend = 'reverse'", Format::Toml)?;
    let model = Models::with_registry(config, registry)?.get("mirror").await?;
    let prompt = std::env::args().nth(1).unwrap_or_else(|| "one two three".to_owned());
    println!("{}", model.generate(GenerateRequest::new(prompt)).await?.collect().await?.text);
    Ok(())
}
