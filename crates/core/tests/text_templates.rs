//! Chat templates render as transformers renders them: `fixtures/templates` holds its output, made by `generate.py`.
#![allow(clippy::unwrap_used, reason = "a failure here fails the test, as it should")]

use std::{collections::BTreeMap, fs, path::PathBuf, sync::LazyLock};

use serde::Deserialize;
use ternion_core::{
    ErrorKind, Message, Result,
    text::{Tokenizer, TokenizerParts},
};

#[derive(Deserialize)]
struct Golden {
    special_tokens: BTreeMap<String, String>,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    messages: Vec<Message>,
    add_generation_prompt: bool,
    rendered: Option<String>,
    error: Option<String>,
}

fn fixtures() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../fixtures")
}

static TOKENIZER_JSON: LazyLock<Vec<u8>> =
    LazyLock::new(|| fs::read(fixtures().join("nano-packed/tokenizer.json")).unwrap());

fn with_template(source: &str, special_tokens: BTreeMap<String, String>) -> Result<Tokenizer> {
    Tokenizer::from_parts(TokenizerParts {
        chat_template: Some(source.to_owned()),
        special_tokens,
        ..TokenizerParts::new(TOKENIZER_JSON.clone())
    })
}

fn render(source: &str, messages: &[Message]) -> Result<String> {
    with_template(source, BTreeMap::new())?.render_chat(messages, true)
}

#[test]
fn templates_render_as_in_transformers() {
    let mut failures = Vec::new();
    let mut count = 0;
    for entry in fs::read_dir(fixtures().join("templates")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|e| e != "jinja") {
            continue;
        }
        let golden: Golden = serde_json::from_slice(&fs::read(path.with_extension("json")).unwrap()).unwrap();
        let source = fs::read_to_string(&path).unwrap();
        let tokenizer = with_template(&source, golden.special_tokens).unwrap();
        for (i, case) in golden.cases.iter().enumerate() {
            count += 1;
            let ours = tokenizer.render_chat(&case.messages, case.add_generation_prompt);
            let same = match (&ours, &case.rendered, &case.error) {
                (Ok(ours), Some(theirs), None) => ours == theirs,
                (Err(e), None, Some(theirs)) => {
                    e.kind() == ErrorKind::InvalidRequest
                        && e.message().ends_with(theirs.trim_start_matches("TemplateError: "))
                }
                _ => false,
            };
            if !same {
                let name = path.file_name().unwrap().to_string_lossy().into_owned();
                failures.push(format!(
                    "{name} case {i}:\n ours   {ours:?}\n theirs {:?} {:?}",
                    case.rendered, case.error
                ));
            }
        }
    }
    assert!(count >= 160, "only {count} cases");
    assert!(failures.is_empty(), "{} of {count} differ\n{}", failures.len(), failures.join("\n"));
}

#[test]
fn a_syntax_error_names_the_line() {
    let error = with_template("a\n{% if x %}\n{% endfor %}", BTreeMap::new()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidModel);
    let text = error.to_string();
    assert!(
        text.contains("chat template") && text.contains("chat_template:3") && !text.contains('\n'),
        "{text}"
    );
}

#[test]
fn endless_and_oversized_templates_end_with_an_error() {
    let started = std::time::Instant::now();
    let sources = [
        "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
        "{% for i in range(100000) %}{{ 'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa' }}{% endfor %}",
        "{{ 'a' * 1000000000 }}",
        "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
        "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x | tojson }}",
        "{% set ns = namespace(x=[1]) %}{% for i in range(40) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x | tojson }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% include 'chat_template' %}",
        "{% set ns = namespace() %}{% set ns.x = ns %}{{ ns | tojson }}",
        "{% set ns = namespace(s='aaaaaaaa') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}",
        "{{ messages | tojson(indent=99999999999) }}{{ '' | indent(99999999999) }}{{ 'a'.replace('a', 'b' * 99999999) }}",
        "{{ strftime_now('%9999999999Y') }}",
        "{{ messages[0].content.foo.bar }}",
        "{{ range(1000000000000) | list }}",
    ];
    for source in sources {
        let result = render(source, &[Message::user("x")]);
        let error = result.expect_err(source);
        assert!(
            matches!(error.kind(), ErrorKind::InvalidModel | ErrorKind::Unsupported),
            "{source}: {error}"
        );
        assert!(!error.to_string().contains('\n'), "{error}");
    }
    assert!(started.elapsed().as_secs() < 60, "{:?}", started.elapsed());
}

#[test]
fn limits_grow_with_the_conversation() {
    let messages = vec![Message::user("word ".repeat(2000)); 2000];
    let text =
        render("{% for m in messages %}{{ m.role + m.content | trim }}{% endfor %}", &messages).unwrap();
    assert_eq!(text.len(), 2000 * (4 + 2000 * 5 - 1));
}

#[test]
fn what_minijinja_lacks_is_unsupported() {
    for source in [
        "{{ 'a' | no_such_filter }}",
        "{{ 'a'.swapcase() }}",
        "{{ no_such_function() }}",
        "{{ 1 is no_such }}",
    ] {
        let error = render(source, &[Message::user("x")]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported, "{source}: {error}");
    }
}

#[test]
fn strftime_now_is_local_time() {
    let text = render("{{ strftime_now('%Y-%m-%d %b %B %A %H:%M') }}", &[Message::user("x")]).unwrap();
    assert!(text.starts_with("20") && text.matches('-').count() == 2 && text.contains(':'), "{text}");
}

#[test]
fn no_messages_for_a_template_that_needs_one() {
    let error = render("{{ messages[0].role.upper() }}", &[]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidRequest, "{error}");
    assert_eq!(render("{% for m in messages %}x{% endfor %}>", &[]).unwrap(), ">");
}

#[test]
fn without_a_template_chats_are_unsupported() {
    let tokenizer = Tokenizer::from_parts(TokenizerParts::new(TOKENIZER_JSON.clone())).unwrap();
    assert!(!tokenizer.has_chat_template());
    assert_eq!(
        tokenizer.render_chat(&[Message::user("x")], true).unwrap_err().kind(),
        ErrorKind::Unsupported
    );
    assert_eq!(tokenizer.count_chat(&[Message::user("x")]).unwrap_err().kind(), ErrorKind::Unsupported);
}
