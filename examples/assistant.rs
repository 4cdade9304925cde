//! An assistant with three functions of its own. `cargo run --release --example assistant -- [MODEL [QUESTION]]`
//!
//! The default model is tiny and has no form of calls: its functions are described in the system message, and its first answer is made
//! a call. A larger model, such as Qwen3, decides by itself.

use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};
use ternion::{
    ChatOptions, Event, GenerateRequest, Message, Result, Sampling, Tool, ToolChoice,
    tools::{FunctionError, RunEvent, ToolLoop},
};

fn tools() -> [Tool; 3] {
    let nothing = json!({ "type": "object", "properties": {}, "additionalProperties": false });
    let numbers = json!({
        "type": "object",
        "properties": {
            "a": { "type": "integer", "minimum": 0, "maximum": 999 },
            "operation": { "enum": ["add", "subtract", "multiply"] },
            "b": { "type": "integer", "minimum": 0, "maximum": 999 },
        },
        "required": ["a", "operation", "b"],
        "additionalProperties": false,
    });
    let folder = json!({
        "type": "object",
        "properties": { "folder": { "enum": [".", "examples", "docs"] } },
        "required": ["folder"],
        "additionalProperties": false,
    });
    [
        Tool::function("clock", "Seconds since 1970.", nothing),
        Tool::function("calculate", "Calculates with two numbers.", numbers),
        Tool::function("files", "The names of the files in a folder.", folder),
    ]
}

fn calculate(arguments: &Value) -> std::result::Result<Value, FunctionError> {
    let number = |key: &str| arguments[key].as_i64().ok_or_else(|| format!("`{key}` is no integer"));
    let (a, b) = (number("a")?, number("b")?);
    match arguments["operation"].as_str() {
        Some("add") => Ok((a + b).into()),
        Some("subtract") => Ok((a - b).into()),
        Some("multiply") => Ok((a * b).into()),
        _ => Err("`operation` is none of add, subtract and multiply".into()),
    }
}

fn files(arguments: &Value) -> std::result::Result<Value, FunctionError> {
    let folder = arguments["folder"].as_str().ok_or("`folder` is no text")?;
    let mut names = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        names.push(entry?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    Ok(json!(names))
}

#[tokio::main]
async fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let model = ternion::open(arguments.next().unwrap_or_else(|| "fixtures/ternion-tiny".into())).await?;
    let question = arguments.next().unwrap_or_else(|| "What is 6 times 7?".into());

    let mut options = ChatOptions::default();
    let capabilities = &model.info().capabilities;
    if capabilities.required_tool_calls {
        options = options.with_tool_choice(ToolChoice::Required).without_parallel_tool_calls();
    }
    let request = GenerateRequest::chat([Message::user(question)])
        .with_chat_options(options)
        .with_sampling(Sampling::greedy())
        .with_max_tokens(200);

    let [clock, calculator, folder] = tools();
    let assistant = ToolLoop::new(model)
        .with_tool(clock, async |_| Ok(SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs().into()))
        .with_tool(calculator, async |arguments| calculate(&arguments))
        .with_tool(folder, async |arguments| files(&arguments))
        .with_max_rounds(4);
    let run = assistant
        .run_with(request, |event| match event {
            RunEvent::Model(Event::Text(piece)) => print!("{}", piece.text),
            RunEvent::Result { call, result, .. } => {
                println!("[{} {} -> {result}]", call.name, call.arguments);
            }
            _ => {}
        })
        .await?;
    println!("\n{} rounds of calls, {} tokens", run.rounds, run.usage.completion_tokens);
    Ok(())
}
