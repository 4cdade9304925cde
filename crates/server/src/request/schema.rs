//! JSON schemas of types that the core library reads by hand.

use schemars::{Schema, SchemaGenerator, json_schema};

/// A list of messages.
pub(super) fn messages(_: &mut SchemaGenerator) -> Schema {
    let part = serde_json::json!({
        "type": "object",
        "properties": { "type": { "enum": ["text", "input_text"] }, "text": { "type": "string" } },
        "required": ["type", "text"],
    });
    let call = serde_json::json!({
        "type": "object",
        "properties": {
            "id": { "type": ["string", "null"] },
            "type": { "const": "function" },
            "function": {
                "type": "object",
                "properties": { "name": { "type": "string" }, "arguments": { "type": ["string", "object", "null"] } },
                "required": ["name"],
            },
        },
        "required": ["function"],
    });
    json_schema!({
        "type": "array",
        "minItems": 1,
        "items": {
            "type": "object",
            "properties": {
                "role": { "type": "string", "minLength": 1 },
                "content": { "anyOf": [{ "type": ["string", "null"] }, { "type": "array", "items": part }] },
                "name": { "type": ["string", "null"] },
                "tool_calls": { "type": ["array", "null"], "items": call },
                "tool_call_id": { "type": ["string", "null"] },
                "reasoning_content": { "type": ["string", "null"] },
                "reasoning": { "type": ["string", "null"] },
            },
            "required": ["role"],
        },
    })
}

/// A list of tools.
pub(super) fn tools(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": ["array", "null"],
        "items": {
            "type": "object",
            "properties": {
                "type": { "const": "function" },
                "function": {
                    "type": "object",
                    "properties": {
                        "name": { "type": "string", "minLength": 1 },
                        "description": { "type": ["string", "null"] },
                        "parameters": { "type": ["object", "null"] },
                    },
                    "required": ["name"],
                },
            },
            "required": ["type", "function"],
        },
    })
}

/// Whether a tool is called.
pub(super) fn tool_choice(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "anyOf": [
            { "enum": ["auto", "none", "required", null] },
            {
                "type": "object",
                "properties": {
                    "type": { "const": "function" },
                    "function": {
                        "type": "object",
                        "properties": { "name": { "type": "string" } },
                        "required": ["name"],
                    },
                },
                "required": ["type", "function"],
            },
        ],
    })
}
