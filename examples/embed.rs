//! The smallest embedding: load a checkpoint, stream one chat answer.
//!
//! `cargo run --release -p ternion --example embed -- path/to/checkpoint "How many days are in a week?"`

use std::io::Write;

use ternion::{Event, GenerateRequest, Message};

#[tokio::main]
async fn main() -> ternion::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let path = arguments.next().unwrap_or_else(|| "fixtures/tiny-packed".into());
    let question = arguments.next().unwrap_or_else(|| "How many days are in a week?".into());

    let model = ternion::open(path).await?;
    let request = GenerateRequest::chat([Message::user(question)]).with_max_tokens(200);
    let mut answer = model.generate(request).await?;
    while let Some(event) = answer.next().await {
        match event? {
            Event::Text(piece) => print!("{}", piece.text),
            Event::Done(done) => {
                println!();
                if let Some(rate) = done.timing.decode_rate(&done.usage) {
                    eprintln!("{} tokens, {rate:.1} tokens/s", done.usage.completion_tokens);
                }
            }
            _ => {}
        }
        let _ = std::io::stdout().flush();
    }
    Ok(())
}
