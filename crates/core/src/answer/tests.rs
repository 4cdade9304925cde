//! Answers of all forms, cut at every place.

use serde_json::json;

use super::{
    AnswerFormat, AnswerParser, ReasoningTags, Thought, ToolFormat,
    piece::{Meaning, Piece, Pieces},
};
use crate::Tool;

fn format(tools: ToolFormat) -> AnswerFormat {
    AnswerFormat { reasoning: Some(ReasoningTags::new("<think>", "</think>")), tools, describes_tools: false }
}

fn tools() -> Vec<Tool> {
    let weather = json!({
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "units": {"enum": ["C", "F"]},
            "detail": {"$ref": "#/$defs/detail"},
            "tags": {"type": ["array", "null"]},
        },
        "$defs": {"detail": {"type": "boolean"}},
    });
    vec![Tool::function("weather", "The weather.", weather), Tool::function("clock", "The time.", json!({}))]
}

/// The pieces of an answer that comes in these parts. They must make up the answer.
fn pieces(format: &AnswerFormat, thought: Thought, parts: &[&str]) -> Vec<Piece> {
    let mut parser = AnswerParser::new(format, &tools(), thought);
    let mut pieces = Pieces::default();
    for part in parts {
        parser.pieces(part).into_iter().for_each(|piece| pieces.add(&piece.raw, piece.meaning));
    }
    parser.last_pieces().into_iter().for_each(|piece| pieces.add(&piece.raw, piece.meaning));
    let pieces = pieces.take();
    let raw: String = pieces.iter().map(|piece| piece.raw.as_str()).collect();
    assert_eq!(raw, parts.concat(), "something is lost");
    pieces
}

/// The pieces of an answer, which are the same wherever it is cut.
fn parse(format: &AnswerFormat, thought: Thought, answer: &str) -> Vec<Piece> {
    let whole = pieces(format, thought, &[answer]);
    for at in (1..answer.len()).filter(|at| answer.is_char_boundary(*at)) {
        assert_eq!(pieces(format, thought, &[&answer[..at], &answer[at..]]), whole, "{answer:?} cut at {at}");
    }
    let letters: Vec<String> = answer.chars().map(String::from).collect();
    let letters: Vec<&str> = letters.iter().map(String::as_str).collect();
    assert_eq!(pieces(format, thought, &letters), whole, "{answer:?} by letters");
    whole
}

/// Thought, text and calls in one line: `(thought) text name{arguments}`.
fn show(pieces: &[Piece]) -> String {
    let mut shown = String::new();
    for piece in pieces {
        match &piece.meaning {
            Meaning::Syntax => {}
            Meaning::Text => shown += &piece.raw,
            Meaning::Reasoning => shown += &format!("({})", piece.raw),
            Meaning::Call { index, name } => shown += &format!("|{index}:{name}"),
            Meaning::Arguments { delta, .. } => shown += delta,
        }
    }
    shown
}

fn check(tools: ToolFormat, thought: Thought, cases: &[(&str, &str)]) {
    for (answer, expected) in cases {
        assert_eq!(show(&parse(&format(tools), thought, answer)), *expected, "{tools}: {answer:?}");
    }
}

#[test]
fn a_thought_is_told_from_the_answer() {
    check(
        ToolFormat::None,
        Thought::Possible,
        &[
            ("<think>\nOne.\n\nTwo.\n</think>\n\n Three. </think>", "(One.\n\nTwo.)Three. </think>"),
            (" \n<think>a < b</thin</think>c", "(a < b</thin)c"),
            ("<think></think>\n\nx", "x"),
            ("<think>\n\n</think>\n\n", ""),
            ("<think>never ends \n", "(never ends \n)"),
            (" Hello <think>x</think>", " Hello <think>x</think>"),
            ("<thin", "<thin"),
            ("  ", "  "),
            ("", ""),
        ],
    );
    check(
        ToolFormat::None,
        Thought::Open,
        &[("\nOne.</think>Two", "(One.)Two"), ("<think>\nOne.</think>Two", "(One.)Two"), ("</think>x", "x")],
    );
    check(ToolFormat::None, Thought::Closed, &[("<think>x</think>y", "<think>x</think>y")]);
}

#[test]
fn hermes() {
    let call = "<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"Zürich \\\"\\n{\", \"days\": [1, {}]}}\n</tool_call>";
    let shown = "|0:weather{\"city\": \"Zürich \\\"\\n{\", \"days\": [1, {}]}";
    let clock = "<tool_call>{\"arguments\": {\"a\": 1}, \"name\": \"clock\"}</tool_call>";
    check(
        ToolFormat::Hermes,
        Thought::Possible,
        &[
            (call, shown),
            (&format!("Let me see.\n{call}\n{clock}\n"), &format!("Let me see.{shown}|1:clock{{\"a\": 1}}")),
            (&format!("<think>\nHm.\n</think>\n\n{call}\n\nDone."), &format!("(Hm.){shown}Done.")),
            (&format!("a {clock} b"), "a|0:clock{\"a\": 1} b"),
            // Calls without arguments, with a string of arguments, and with line breaks in a string.
            ("<tool_call>{\"name\": \"clock\"}</tool_call>", "|0:clock{}"),
            ("<tool_call>{\"name\": \"clock\", \"arguments\": null, \"x\": [1]}</tool_call>", "|0:clock{}"),
            ("<tool_call>{\"name\": \"c\", \"arguments\": \"{\\\"a\\\": 1}\"}</tool_call>", "|0:c{\"a\": 1}"),
            (
                "<tool_call>{\"name\":\"c\",\"parameters\":{\"a\":\"1\n2\"}}</tool_call>",
                "|0:c{\"a\":\"1\\n2\"}",
            ),
            // The end of the answer within a call.
            ("<tool_call>{\"name\": \"c\", \"arguments\": {\"a", "|0:c{\"a"),
            ("<tool_call>{\"name\": \"c\", \"arguments\": {}}", "|0:c{}"),
            ("<tool_call>{\"name\": \"c\"", "<tool_call>{\"name\": \"c\""),
            // No calls.
            ("x <tool_call> y", "x <tool_call> y"),
            ("<tool_call>{\"name\": 3}</tool_call>", "<tool_call>{\"name\": 3}</tool_call>"),
            ("<tool_call>{\"arguments\": {}}</tool_call>", "<tool_call>{\"arguments\": {}}</tool_call>"),
            ("<tool_call>{}</tool_call>", "<tool_call>{}</tool_call>"),
            ("<tool_call>{\"name\": \"\"}</tool_call>", "<tool_call>{\"name\": \"\"}</tool_call>"),
            ("<tool_cal", "<tool_cal"),
            (&format!("<tool_call>{call}"), &format!("<tool_call>{shown}")),
            // What breaks after the name was told leaves the rest as text.
            (
                "<tool_call>{\"name\": \"c\", \"arguments\": {\"a\": x}}</tool_call>",
                "|0:c{\"a\": x}}</tool_call>",
            ),
        ],
    );
    // In a thought a call is a thought.
    check(ToolFormat::Hermes, Thought::Open, &[(&format!("{call}</think>x"), &format!("({call})x"))]);
}

#[test]
fn qwen_xml() {
    let xml = |inside: &str| format!("<tool_call>\n{inside}\n</tool_call>");
    check(
        ToolFormat::QwenXml,
        Thought::Possible,
        &[
            (
                &xml(
                    "<function=weather>\n<parameter=city>\nZürich \"a\"\n</b>\n\n</parameter>\n<parameter=days>\n3\n</parameter>\n</function>",
                ),
                "|0:weather{\"city\": \"Zürich \\\"a\\\"\\n</b>\\n\", \"days\": 3}",
            ),
            (
                &xml(
                    "<function=weather><parameter=units>C</parameter><parameter=detail>True</parameter></function>",
                ),
                "|0:weather{\"units\": \"C\", \"detail\": true}",
            ),
            // Values that are not of their type, and parameters that the tool does not have.
            (
                &xml(
                    "<function=weather><parameter=days>three</parameter><parameter=city>5</parameter><parameter=x>6</parameter></function>",
                ),
                "|0:weather{\"days\": \"three\", \"city\": \"5\", \"x\": \"6\"}",
            ),
            (
                &xml("<function=weather><parameter=tags>\n[1, \"a\"]\n</parameter></function>"),
                "|0:weather{\"tags\": [1, \"a\"]}",
            ),
            (&xml("<function=clock>\n</function>"), "|0:clock{}"),
            (
                &format!("a\n{}\n{}", xml("<function=clock></function>"), xml("<function=clock></function>")),
                "a|0:clock{}|1:clock{}",
            ),
            ("<tool_call><function=weather><parameter=city>Zü</par", "|0:weather{\"city\": \"Zü</par"),
            ("<tool_call><function=weather><parameter=days>3", "|0:weather{\"days\": 3"),
            (&xml("<function=>"), &xml("<function=>")),
            (&xml("{\"name\": \"clock\"}"), &xml("{\"name\": \"clock\"}")),
            ("<tool_call><function=clock>x", "|0:clockx"),
        ],
    );
}

#[test]
fn llama_and_bare_json() {
    let call = "{\"name\": \"weather\", \"parameters\": {\"city\": \"Bern\"}}";
    let shown = "|0:weather{\"city\": \"Bern\"}";
    let cases = [
        (call.to_owned(), shown.to_owned()),
        (format!("\n\n{call}\n"), shown.to_owned()),
        (format!("{call}; {call}"), format!("{shown}|1:weather{{\"city\": \"Bern\"}}")),
        (format!("{call}\n{{\"name\": \"clock\"}}"), format!("{shown}|1:clock{{}}")),
        (format!("<think>x</think>\n{call}"), format!("(x){shown}")),
        (
            "{\"type\": \"function\", \"name\": \"clock\", \"parameters\": {}}".to_owned(),
            "|0:clock{}".to_owned(),
        ),
        // An answer in JSON, a function that does not exist, and a call that is not at the beginning.
        ("{\"answer\": 3}".to_owned(), "{\"answer\": 3}".to_owned()),
        ("{\"name\": \"Ann\", \"age\": 3}".to_owned(), "{\"name\": \"Ann\", \"age\": 3}".to_owned()),
        (format!("So: {call}"), format!("So: {call}")),
        (format!("{call} x"), format!("{shown}x")),
    ];
    for tools in [ToolFormat::Llama3, ToolFormat::Json] {
        for (answer, expected) in &cases {
            check(tools, Thought::Possible, &[(answer, expected)]);
        }
    }
    check(
        ToolFormat::Llama3,
        Thought::Closed,
        &[
            (&format!("<|python_tag|>{call}"), shown),
            (&format!("See: <|python_tag|>{call}"), &format!("See:{shown}")),
            ("<|python_tag|>print(1)", "<|python_tag|>print(1)"),
            ("<|python_tag|>{\"name\": \"other\", \"parameters\": {}}", "|0:other{}"),
        ],
    );
}

#[test]
fn mistral() {
    check(
        ToolFormat::Mistral,
        Thought::Closed,
        &[
            (
                "[TOOL_CALLS] [{\"name\": \"weather\", \"arguments\": {\"city\": \"Bern\"}, \"id\": \"123456789\"}, {\"name\": \"clock\", \"arguments\": {}}]",
                "|0:weather{\"city\": \"Bern\"}|1:clock{}",
            ),
            ("Hm. [TOOL_CALLS]weather[ARGS]{\"a\": \"b c\"}", "Hm.|0:weather{\"a\": \"b c\"}"),
            (
                "[TOOL_CALLS]weather[CALL_ID]123456789[ARGS]{\"a\": 1}[TOOL_CALLS]clock{}",
                "|0:weather{\"a\": 1}|1:clock{}",
            ),
            ("[TOOL_CALLS][]", "[TOOL_CALLS][]"),
            ("[TOOL_CALLS]?", "[TOOL_CALLS]?"),
            ("[TOOL_CALLS]weather[ARGS]x", "[TOOL_CALLS]weather[ARGS]x"),
            ("[TOOL_CALLS] [{\"name\": \"clock\", \"arguments\": {}}, x", "|0:clock{} x"),
            ("[TOOL", "[TOOL"),
        ],
    );
}

#[test]
fn without_tools_calls_are_text() {
    let mut parser = AnswerParser::new(&format(ToolFormat::Hermes), &[], Thought::Closed);
    let text = "<tool_call>{\"name\": \"clock\"}</tool_call>";
    assert_eq!(parser.push(text), [crate::Event::text(text)]);
    assert!(parser.is_plain() && parser.finish().is_empty());
}

/// Answers put together at random of what the forms are made of: nothing is lost, and cuts change nothing.
#[test]
fn nothing_is_lost_of_any_answer() {
    const PARTS: [&str; 33] = [
        "<think>",
        "</think>",
        "<tool_call>",
        "</tool_call>",
        "<function=weather>",
        "</function>",
        "<parameter=city>",
        "<parameter=days>",
        "</parameter>",
        "<|python_tag|>",
        "[TOOL_CALLS]",
        "[ARGS]",
        "[CALL_ID]",
        "[",
        "]",
        "{",
        "}",
        "<tool_call>{\"name\": \"clock\"}",
        "<function=clock>",
        "[TOOL_CALLS]clock{}",
        "{\"name\": \"weather\"",
        ", \"arguments\": {",
        "\"parameters\"",
        ": ",
        "\"clock\"",
        "\"a\": \"x\\\"\"",
        ",",
        "1",
        "\n",
        " ",
        "é",
        "x",
        "<",
    ];
    let mut state = 7_u64;
    let mut random = |below: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % below
    };
    let forms =
        [ToolFormat::Hermes, ToolFormat::QwenXml, ToolFormat::Llama3, ToolFormat::Mistral, ToolFormat::Json];
    let mut called = 0;
    for _ in 0..4000 {
        let answer: String = (0..random(14)).map(|_| PARTS[random(PARTS.len())]).collect();
        let thought = [Thought::Open, Thought::Possible, Thought::Closed][random(3)];
        let format = format(forms[random(forms.len())]);
        let whole = pieces(&format, thought, &[&answer]);
        called += whole.iter().filter(|piece| matches!(piece.meaning, Meaning::Call { .. })).count();
        let cut = (0..=random(answer.len() + 1).min(answer.len())).rfind(|at| answer.is_char_boundary(*at));
        let (before, after) = answer.split_at(cut.unwrap_or(0));
        assert_eq!(pieces(&format, thought, &[before, after]), whole, "{format:?} {answer:?}");
    }
    assert!(called > 20, "only {called} calls");
}

#[test]
fn the_form_is_found_in_the_template() {
    let found = |text: &str| {
        let format = AnswerFormat::detect(text, true);
        (format.tools, format.reasoning.map(|tags| tags.end))
    };
    assert_eq!(found("{{ '<tool_call>' }}"), (ToolFormat::Hermes, None));
    assert_eq!(
        found("<tool_call><function=x><parameter=y> content.split('</think>')"),
        (ToolFormat::QwenXml, Some("</think>".to_owned()))
    );
    assert_eq!(found("[TOOL_CALLS] [THINK]x[/THINK]"), (ToolFormat::Mistral, Some("[/THINK]".to_owned())));
    assert_eq!(found("{\"name\": function name, \"parameters\": dictionary}"), (ToolFormat::Llama3, None));
    assert_eq!(found("{{ tools | tojson }}"), (ToolFormat::None, None));
    let other = AnswerFormat::detect("{{ messages }}", false);
    assert_eq!((other.tools, other.describes_tools), (ToolFormat::Json, true));
}
