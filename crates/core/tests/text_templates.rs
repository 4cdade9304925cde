//! Chat templates render as transformers renders them: `fixtures/templates` holds its output, made by `generate.py`.
#![allow(clippy::unwrap_used, reason = "a failure here fails the test, as it should")]

use std::{collections::BTreeMap, fs, sync::LazyLock};

use serde::Deserialize;
use ternion_core::{
    ErrorKind, Message, Result,
    text::{Tokenizer, TokenizerParts},
};
use ternion_test_support::fixtures;

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

static TOKENIZER_JSON: LazyLock<Vec<u8>> =
    LazyLock::new(|| fs::read(fixtures().join("nano-packed/tokenizer.json")).unwrap());

fn with_template(source: &str, special_tokens: BTreeMap<String, String>) -> Result<Tokenizer> {
    Tokenizer::from_parts(
        TokenizerParts::new(TOKENIZER_JSON.clone())
            .with_chat_template(source)
            .with_special_tokens(special_tokens),
    )
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
        "{% block b %}{{ self.b() }}{% endblock %}",
        "{% macro f(m) %}{{ m.f(m) }}{% endmacro %}{{ f({'f': f}) }}",
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
        "{{ 'a'.no_such_method() }}",
        "{{ lipsum() }}",
        "{{ [1] | random }}",
        "{{ 'a' | wordwrap }}",
        "{{ 'a' | urlize }}",
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

/// Templates that nest calls or values as deeply as they may, on a stack as small as that of tokio's threads.
#[test]
fn no_template_overflows_a_small_stack() {
    let repeated =
        |before: &str, part: &str, count: usize, after: &str| [before, &part.repeat(count), after].concat();
    let in_namespace = |value: &str| {
        format!(
            "{{% set ns = namespace(x=[{{}}]) %}}{{% for i in range(90000) %}}{{% set ns.x = {value} %}}{{% endfor %}}"
        )
    };
    let mut sources = vec![
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}".to_owned(),
        "{% macro f() %}{% for i in [1] %}{{ f() ~ '' }}{% endfor %}{% endmacro %}{{ f() }}".to_owned(),
        "{% macro g() %}{{ caller() }}{% endmacro %}{% macro f() %}{% call g() %}{{ f() }}{% endcall %}{% endmacro %}{{ f() }}"
            .to_owned(),
        "{% for x in [1] recursive %}{{ loop([loop]) ~ '' }}{% endfor %}".to_owned(),
        "{% block b %}{{ self.b() }}{% endblock %}".to_owned(),
        repeated("{% set a = [1] %}", "{% set a = [a] %}", 62, "{{ a }}{{ a == a }}{{ a < a }}{{ a | tojson }}"),
        repeated("{{ ", "(", 2000, "1 }}"),
        repeated("{{ 1", " + 1", 2000, " }}"),
        repeated("{{ 1", " ~ 1", 20_000, " }}"),
        repeated("{{ 1", "|abs", 2000, " }}"),
        repeated("{{ ", "not ", 4000, "1 }}"),
        repeated("{{ ", "-", 4000, "1 }}"),
        repeated("{{ ", "1 if 1 else ", 1000, "1 }}"),
        repeated("{% if 1 %}", "{% elif 1 %}", 990, "{% endif %}"),
        repeated("{% if 1 %}", "{% elif 1 %}", 5000, "{% endif %}"),
        repeated("", "{% if 1 %}", 3000, ""),
        repeated("", "{% for x in [1] %}", 140, &"{% endfor %}".repeat(140)),
        repeated("{{ 1 ", "< 1 ", 2000, "}}"),
    ];
    for value in [
        "[ns.x]",
        "(ns.x, 1)",
        "{'a': ns.x}",
        "dict(a=ns.x).values()",
        "[ns.x] | map('default')",
        "ns.x | groupby('a')",
    ] {
        sources.push(in_namespace(value));
    }
    sources.extend(["joiner(ns.x)", "cycler(ns.x)", "ns.x.copy", "loop", "[ns]"].map(in_namespace));
    for source in sources {
        let thread = std::thread::Builder::new().stack_size(1 << 20);
        let thread = thread.spawn(move || drop(render(&source, &[Message::user("x")]))).unwrap();
        thread.join().unwrap();
    }
}

/// What `fixtures/templates/semantics.py` made with Jinja2.
#[derive(Deserialize)]
struct Semantics {
    values: Vec<String>,
    unary: Vec<(String, Vec<serde_json::Value>)>,
    binary_values: Vec<String>,
    binary: Vec<(String, Vec<serde_json::Value>)>,
    single: Vec<(String, serde_json::Value)>,
}

/// Templates that render differently here, with the reason.
const DEVIATIONS: [(&str, &str); 18] = [
    ("{{ namespace(a=v)", "a namespace holds no other one, so that no value contains itself"),
    ("{% set v = namespace(a=1) %}{% set ns = namespace() %}{% set ns.x = v %}", "as before"),
    ("{% set v = {1: 'x'} %}{{ namespace(v)", "attributes of a namespace are named by texts"),
    ("{{ v is sameas v", "undefined values and methods have no identity"),
    ("{{ (v)|wordcount", "what Python prints for a function or generator has an address"),
    ("{% set v = dict %}{{ (v) is lower", "as before"),
    ("{% set v = missing %}{{ (v).__class__", "an undefined value has no attributes at all"),
    ("{% set a = -7 %}{% set b = 2.5 %}{{ a ** b", "there are no complex numbers"),
    ("{% set a = -7 %}{% set b = -0.5 %}{{ a ** b", "as before"),
    ("{% set a = -0.5 %}{% set b = 2.5 %}{{ a ** b", "as before"),
    ("{% set a = -0.5 %}{% set b = -0.5 %}{{ a ** b", "as before"),
    ("\\N{BULLET}", "characters cannot be written by their name"),
    ("{{ varargs", "macros have no `varargs`"),
    ("{{ kwargs.x", "macros have no `kwargs`"),
    ("{{ f(missing)", "an undefined argument counts as none, so that the parameter has its default"),
    ("'\u{663}' | int", "digits of other scripts are not read as numbers"),
    ("strftime_now('%')", "an unfinished format is an error"),
    ("{% set loop = 1 %}", "`loop` is reserved"),
];

#[test]
fn all_of_jinja_works_on_values_of_every_type() {
    let json = fs::read(fixtures().join("templates/semantics.json")).unwrap();
    let semantics: Semantics = serde_json::from_slice(&json).unwrap();
    let mut cases: Vec<(String, serde_json::Value)> = semantics.single;
    for (template, outputs) in semantics.unary {
        for (value, output) in semantics.values.iter().zip(outputs) {
            cases.push((format!("{{% set v = {value} %}}{}", template.replace('V', "v")), output));
        }
    }
    let values = &semantics.binary_values;
    for (operation, outputs) in semantics.binary {
        let operation = operation.replace('A', "a").replace('B', "b");
        let pairs = values.iter().flat_map(|a| values.iter().map(move |b| (a, b)));
        for ((a, b), output) in pairs.zip(outputs) {
            cases.push((format!("{{% set a = {a} %}}{{% set b = {b} %}}{{{{ {operation} }}}}"), output));
        }
    }
    assert!(cases.len() > 17_000, "only {} cases", cases.len());

    let tokenizer = tiny_tokenizer();
    let mut failures = Vec::new();
    let mut unused: Vec<&str> = DEVIATIONS.iter().map(|(part, _)| *part).collect();
    for (source, expected) in &cases {
        if expected.is_number() {
            continue;
        }
        let parts = tokenizer.clone();
        let ours = Tokenizer::from_parts(parts.with_chat_template(source.clone()))
            .and_then(|tokenizer| tokenizer.render_chat(&[Message::user("hi")], true));
        if ours.as_ref().ok().map(String::as_str) == expected.as_str() {
            continue;
        }
        let known = DEVIATIONS.iter().find(|(part, _)| source.contains(part));
        match known {
            Some((part, _)) => unused.retain(|other| other != part),
            None => failures.push(format!("{source}\n ours   {ours:?}\n theirs {expected:?}")),
        }
    }
    assert!(failures.is_empty(), "{} differ\n{}", failures.len(), failures.join("\n"));
    assert!(unused.is_empty(), "no longer different: {unused:?}");
}

/// The parts of a tokenizer that is built quickly.
fn tiny_tokenizer() -> TokenizerParts {
    let json = r#"{"version":"1.0","added_tokens":[],"normalizer":null,"pre_tokenizer":null,"post_processor":null,
        "decoder":null,"model":{"type":"WordLevel","vocab":{"a":0},"unk_token":"a"}}"#;
    TokenizerParts::new(json.as_bytes().to_vec())
}

/// Jinja2 knows only LF: in the text of a template, at its end and within its strings.
#[test]
fn newlines_of_windows_become_those_of_unix() {
    for (source, expected) in [
        ("a\r\nb\rc\r\n", "a\nb\nc"),
        ("{{ 'x\r\ny' }}{% if true %}\r\nz{% endif %}", "x\nyz"),
        ("{{ messages[0].content }}", "u\r\nv"),
    ] {
        assert_eq!(render(source, &[Message::user("u\r\nv")]).unwrap(), expected, "{source:?}");
    }
}

/// Values with more items than there is memory or time for: shared many times over, or without an end.
#[test]
fn values_without_bound_end_with_an_error() {
    let doubled = "{% set ns = namespace(x=[1], y=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% set ns.y = [ns.y, ns.y] %}{% endfor %}";
    let flat = "{% set ns = namespace(x=[1], e=[]) %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% set ns.e = ns.e + ns.e %}{% endfor %}";
    let straight = format!("{{% set a = [1] %}}{}", "{% set a = [a, a] %}".repeat(60));
    let recursive = "{% macro f(x, n) %}{% if n %}{{ f([x, x], n - 1) }}{% else %}{{ x ~ '' }}{% endif %}{% endmacro %}{{ f([1], 60) }}";
    let block = format!("{straight}{{% block b %}}{{% set c = [a, a] ~ '' %}}{{% endblock %}}");
    let uses = [
        "{{ A }}",
        "{{ A ~ '' }}",
        "{{ '' ~ A }}",
        "{{ A == B }}",
        "{{ A != B }}",
        "{{ A < B }}",
        "{{ 0 in [A == B] }}",
        "{{ A in [B] }}",
        "{{ [A] in 'abc' }}",
        "{{ A in 'abc' }}",
        "{{ 1 if A == B == A }}",
        "{{ {A: 1} }}",
        "{{ {'a': 1}[A] }}{{ A }}",
        "{{ {'a': 1}.get(A) }}",
        "{{ [B].index(A) }}",
        "{{ [B].count(A) }}",
        "{{ ', '.join(A) }}",
        "{{ 'a'.replace(A, 'b') }}",
        "{{ A | string }}",
        "{{ A | string | length }}",
        "{{ A | join }}",
        "{{ [A, B] | sort }}",
        "{{ [A, B] | unique | list }}",
        "{{ [A, B] | max }}",
        "{{ A | trim }}",
        "{{ A | upper }}",
        "{{ A | pprint }}",
        "{{ A | urlencode }}",
        "{{ A | tojson }}",
        "{{ [A] | map('string') | list | length }}",
        "{{ [A] | select('equalto', B) | list }}",
        "{{ A is eq(B) }}",
        "{{ A is in([B]) }}",
        "{{ A is sameas(B) }}{{ A }}",
        "{{ '%s' | format(A) }}",
        "{{ A | replace('1', '2') }}",
        "{{ {'a': A} | dictsort(by='value') }}{{ A }}",
        "{{ [{'a': A}, {'a': B}] | groupby('a') }}",
        "{{ raise_exception(A) }}",
        "{% set t %}{{ A }}{% endset %}",
        "{% filter upper %}{{ A }}{% endfilter %}",
        "{{ '' | tojson(separators=[A, A]) }}",
        "{{ [A, B] | sum(start=[]) ~ '' }}",
        "{{ 'a' | default(A) | string | list }}{{ A }}",
        "{{ A.no_such() }}{{ A }}",
        "{{ A - 1 }}",
        "{{ A / A }}",
        "{{ -A }}",
        "{{ A ** A }}",
        "{{ A % A }}",
    ];
    let mut sources: Vec<String> = Vec::new();
    for text in uses {
        let straight_use = text.replace('A', "a").replace('B', "([] + a)");
        sources.push(format!("{straight}{straight_use}"));
        sources.push(format!("{doubled}{}", text.replace('A', "ns.x").replace('B', "ns.y")));
    }
    sources.extend(
        [
            "{% set ns = namespace() %}{% set ns.x = ns %}{{ ns }}",
            "{% set ns = namespace() %}{% set ns.x = [{'a': ns}] %}",
            "{% set ns = namespace() %}{% set m = namespace(x=ns) %}{% set ns.x = m %}{{ ns == m }}",
            "{% set ns = namespace(x=[1]) %}{% for i in range(90000) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x ~ '' }}",
            "{% set ns = namespace(x=[1, 2]) %}{% for i in range(90000) %}{% set ns.x = ns.x[0:] %}{% endfor %}{{ ns.x | length }}{{ range(99999999) }}",
            "{% set ns = namespace(x=['a']) %}{% for i in range(60) %}{% set ns.x = ns.x | zip(ns.x) | list %}{% endfor %}{{ ns.x ~ '' }}",
            "{% set ns = namespace(x=['a']) %}{% for i in range(60) %}{% set ns.x = ns.x | chain(ns.x) %}{% endfor %}{{ ns.x | length }}",
            "{{ [1] * 1000000000000 ~ '' }}",
            "{{ ([1] * 1000000000000) | length }}",
            "{{ 1000000000 * [1] ~ '' }}",
            "{{ [[[[1] * 999] * 999] * 999] * 999 == 1 }}{{ [[[[1] * 999] * 999] * 999] * 999 }}",
            "{% set x = [1] %}{{ x * 1000000000000 ~ '' }}",
            "{{ (1, 2) * 1000000000 }}",
            "{{ debug() }}",
            recursive,
            &block,
        ]
        .map(String::from),
    );
    sources
        .extend(["{{ ns.x | length }}", "{{ ns.x }}", "{{ ns.x[0] }}"].map(|text| format!("{flat}{text}")));
    for source in sources {
        let started = std::time::Instant::now();
        let error = match render(&source, &[Message::user("x")]) {
            Ok(text) => panic!("{source} gives {} bytes after {:?}", text.len(), started.elapsed()),
            Err(error) => error,
        };
        // Without a bound it takes years. On a busy machine seconds mean nothing.
        assert!(started.elapsed().as_secs() < 60, "{source}: {:?}", started.elapsed());
        let message = error.to_string();
        assert!(!message.contains('\n') && message.len() < 1000, "{source}: {message}");
    }
}

/// Texts that are the product of two long ones.
#[test]
fn texts_without_bound_end_with_an_error() {
    let set = "{% set s = 'a' * 1000000 %}{% set t = 'b' * 1000000 %}{% set l = range(90000) | list %}";
    for text in [
        "{{ s.replace('a', t) | length }}",
        "{{ s.replace('', t) | length }}",
        "{{ s | replace('a', t) | length }}",
        "{{ t.join(l) | length }}",
        "{{ t.join(s) | length }}",
        "{{ l | join(t) | length }}",
        "{{ s | list | join(t) | length }}",
        "{{ '%999999999s' | format('a') | length }}",
        "{{ ('%s' * 20000) | format(*([t] * 20000)) | length }}",
        "{{ '{:>9999999999}'.format(1) | length }}",
        "{{ ('{0}' * 20000).format(t) | length }}",
        "{{ '{:{}}'.format('a', 9999999999) }}",
        "{{ '{:{w}}'.format('a', w=9999999999) }}",
        "{{ '{:.9999999999f}'.format(1.5) }}",
        "{{ 'a'.zfill(9999999999) }}{{ 'a'.ljust(9999999999) }}{{ 'a'.center(9999999999) }}",
        "{{ ('\\n' * 1000000) | indent(1000000) | length }}",
        "{{ l | map('replace', '0', t) | list | length }}",
        "{{ l | map('default', t) | map('string') | join(t) | length }}",
        "{{ l | map('join', t) | list | length }}",
        "{{ [l] * 90000 | join }}",
    ] {
        let started = std::time::Instant::now();
        let result = render(&format!("{set}{text}"), &[Message::user("x")]);
        assert!(result.is_err(), "{text} gives {result:?} after {:?}", started.elapsed());
        assert!(started.elapsed().as_secs() < 60, "{text}: {:?}", started.elapsed());
    }
}

#[test]
fn operations_on_lists_and_maps_are_those_of_jinja() {
    for (source, expected) in [
        ("{{ ([1, 2] * 2 + [3])[1:] }} {{ 2 * [1] }}", "[2, 1, 2, 3] [1, 1]"),
        (
            "{{ {'b': [1], 'a': {'c': none}} }} {{ {} }} {{ {'a': 1, 'a': 2} }}",
            "{'b': [1], 'a': {'c': None}} {} {'a': 2}",
        ),
        (
            "{{ [1, [2]] == [1, [2]] }} {{ {'a': 1} != {'a': 1} }} {{ 1 < 2 < 3 }} {{ [1] in [[1]] }}",
            "True False True True",
        ),
        (
            "{% set ns = namespace(l=[]) %}{% for m in messages %}{% set ns.l = ns.l + [m.role] %}{% endfor %}{{ ns.l | join('+') }}",
            "user+user",
        ),
        (
            "{{ messages[1:] | map(attribute='content') | list }}{{ messages | selectattr('content', 'in', ['x']) | list | length }}",
            "['y']1",
        ),
        (
            "{% for m in messages[::-1] if m.content != 'x' %}{{ loop.index * 2 }}{{ m.content ~ 1 }}{% else %}none{% endfor %}",
            "2y1",
        ),
        (
            "{% macro f(a, b=2) %}{{ a * b }}{{ caller() if caller }}{% endmacro %}{{ f(3) }}{% call f(*[1, 2]) %}c{% endcall %}",
            "62c",
        ),
        (
            "{% for x in [1, [2, [3]]] recursive %}{{ loop(x) if x is iterable else x }},{% endfor %}",
            "1,2,3,,,",
        ),
        (
            "{{ '=' * 3 }}{{ 2 ** 3 * 2 }}{{ -2 * 3 }}{{ 'a,b'.split(',')[1] }}{{ (1, 2) * 2 }}",
            "===16-6b(1, 2, 1, 2)",
        ),
        ("{% block b %}{{ [1] + [2] }}{% endblock %}{{ 'x' in messages[0].values() }}", "[1, 2]True"),
        ("{{ messages[0].get('role') }}{{ 'ab'.startswith('a') }}{{ 'ab' is in('bab') }}", "userTrueTrue"),
    ] {
        let messages = [Message::user("x"), Message::user("y")];
        assert_eq!(render(source, &messages).expect(source), expected, "{source}");
    }
}
