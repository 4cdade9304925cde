//! `GET /openapi.json`: the paths with the schemas of their requests, which come from the types that read them.

use std::sync::LazyLock;

use axum::{
    http::header,
    response::{IntoResponse, Response},
};
use schemars::{JsonSchema, SchemaGenerator, generate::SchemaSettings};
use serde_json::{Map, Value, json};

use crate::request::{ChatRequest, CompletionRequest, DetokenizeRequest, EmbeddingsRequest, TokenizeRequest};

static DOCUMENT: LazyLock<String> = LazyLock::new(|| document().to_string());

pub(crate) async fn get() -> Response {
    ([(header::CONTENT_TYPE, "application/json")], DOCUMENT.as_str()).into_response()
}

fn document() -> Value {
    let mut settings = SchemaSettings::draft2020_12();
    settings.definitions_path = "/components/schemas".into();
    let mut schemas = settings.into_generator();
    let mut paths = Map::new();
    let chat = body::<ChatRequest>(&mut schemas, "messages");
    let completion = body::<CompletionRequest>(&mut schemas, "prompt");
    let embeddings = body::<EmbeddingsRequest>(&mut schemas, "input");
    let tokenize = body::<TokenizeRequest>(&mut schemas, "");
    let detokenize = body::<DetokenizeRequest>(&mut schemas, "tokens");
    let chunks = ["application/json", "text/event-stream"];
    let json_only = &chunks[..1];
    for (path, summary, request, kinds) in [
        ("/v1/chat/completions", "Answers a conversation.", chat, &chunks[..]),
        ("/v1/completions", "Continues texts, or scores them.", completion, &chunks[..]),
        ("/v1/embeddings", "Makes vectors of texts.", embeddings, json_only),
        ("/tokenize", "Turns text or a conversation into tokens.", tokenize, json_only),
        ("/detokenize", "Turns tokens into text.", detokenize, json_only),
    ] {
        let operation = json!({ "summary": summary, "requestBody": request, "responses": responses(kinds, true), "security": [{ "key": [] }, {}] });
        paths.insert(path.to_owned(), json!({ "post": operation }));
    }
    for (path, summary, kind, parameters) in [
        ("/v1/models", "Lists the models.", "application/json", json!([])),
        ("/v1/models/{id}", "Describes a model.", "application/json", json!([parameter("id", "path")])),
        (
            "/tokenizer_info",
            "Describes a model's tokenizer.",
            "application/json",
            json!([parameter("model", "query")]),
        ),
        ("/metrics", "Counters and histograms for Prometheus.", "text/plain", json!([])),
        ("/openapi.json", "This document.", "application/json", json!([])),
        ("/health", "Whether the process is alive.", "application/json", json!([])),
        ("/ready", "Whether the default model can answer.", "application/json", json!([])),
        ("/", "A page to chat on.", "text/html", json!([])),
    ] {
        let operation =
            json!({ "summary": summary, "parameters": parameters, "responses": responses(&[kind], false) });
        paths.insert(path.to_owned(), json!({ "get": operation }));
    }
    let mut components = schemas.take_definitions(true);
    components.insert("Error".to_owned(), error_schema());
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "Ternion",
            "version": env!("CARGO_PKG_VERSION"),
            "description": "Language models by the HTTP API of OpenAI. Unknown fields of a request are ignored.",
            "license": { "name": "MIT OR Apache-2.0" },
        },
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": { "key": { "type": "http", "scheme": "bearer" } },
        },
    })
}

/// A request with a JSON body, one field of which must be there.
fn body<T: JsonSchema>(schemas: &mut SchemaGenerator, required: &str) -> Value {
    let mut schema = schemas.subschema_for::<T>().to_value();
    if !required.is_empty() {
        schema = json!({ "allOf": [schema], "type": "object", "required": [required] });
    }
    json!({ "required": true, "content": { "application/json": { "schema": schema } } })
}

fn parameter(name: &str, place: &str) -> Value {
    json!({ "name": name, "in": place, "required": place == "path", "schema": { "type": "string" } })
}

fn responses(kinds: &[&str], reads_body: bool) -> Value {
    let error = |description: &str| {
        json!({
            "description": description,
            "content": { "application/json": { "schema": { "$ref": "#/components/schemas/Error" } } },
        })
    };
    let content: Map<String, Value> = kinds.iter().map(|kind| ((*kind).to_owned(), json!({}))).collect();
    let mut responses = json!({
        "200": { "description": "Done.", "content": content },
        "400": error("A field is wrong; `param` names it."),
        "401": error("The API key is missing or wrong."),
        "403": error("A web page from elsewhere."),
        "404": error("No such model."),
        "503": error("The model cannot answer at the moment."),
    });
    if reads_body {
        responses["408"] = error("The body came too slowly.");
        responses["413"] = error("The body is too large.");
        responses["429"] = error("The queue is full; `retry-after` tells when to try again.");
        responses["504"] = error("The answer took too long.");
    }
    responses
}

fn error_schema() -> Value {
    json!({
        "type": "object",
        "properties": {
            "error": {
                "type": "object",
                "properties": {
                    "message": { "type": "string" },
                    "type": { "type": "string" },
                    "param": { "type": ["string", "null"] },
                    "code": { "type": ["string", "null"] },
                },
                "required": ["message", "type", "param", "code"],
            },
        },
        "required": ["error"],
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reference_of_the_document_leads_somewhere() {
        let document = document();
        let text = document.to_string();
        let mut references = 0;
        for rest in text.split("\"$ref\":\"#").skip(1) {
            let pointer = rest.split('"').next().unwrap();
            assert!(document.pointer(pointer).is_some(), "{pointer}");
            references += 1;
        }
        assert!(references > 10, "{references}");
        let chat = &document["components"]["schemas"]["ChatRequest"]["properties"];
        assert!(chat["temperature"].is_object() && chat["messages"]["items"].is_object());
    }
}
