//! The source of a template, made ready for the parser of minijinja.

use std::borrow::Cow;

use minijinja::{
    machinery::{Token, tokenize},
    syntax::SyntaxConfig,
};

use super::{Result, fail, literals};

/// Tokens of one tag, and `elif` tags of one template. They bound the recursion of the parser and the compiler.
const MAX_TOKENS: usize = 4096;
const MAX_ELIFS: usize = 1000;

/// Stack for the parser at its own limit of nesting, in a build without optimization.
const STACK_BASE: usize = 4 << 20;
/// Stack for one level of a chain of operators, and for one `elif`.
const STACK_PER_TOKEN: usize = 8 << 10;
const STACK_PER_ELIF: usize = 32 << 10;

/// Jinja2 turns CR LF and CR into LF before all else, within texts too.
pub(super) fn with_unix_newlines(source: &str) -> Cow<'_, str> {
    if source.contains('\r') {
        source.replace("\r\n", "\n").replace('\r', "\n").into()
    } else {
        source.into()
    }
}

/// `{% generation %}` only marks what an assistant said, for training. A `with` block without variables does the same
/// to the output: nothing, in a scope of its own.
pub(super) fn without_generation_tags(source: &str) -> String {
    let mut result = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find("{%") {
        let (before, tag) = rest.split_at(at + 2);
        result.push_str(before);
        rest = tag;
        let inner = tag.trim_start_matches(['-', '+']);
        let sign = &tag[..(tag.len() - inner.len()).min(1)];
        let inner = tag[sign.len()..].trim_start();
        for (name, block) in [("endgeneration", "endwith"), ("generation", "with")] {
            let Some(end) = inner.strip_prefix(name) else { continue };
            let end = end.trim_start();
            if end.starts_with("%}") || end.starts_with("-%}") || end.starts_with("+%}") {
                result.push_str(sign);
                result.push(' ');
                result.push_str(block);
                result.push(' ');
                rest = end;
            }
            break;
        }
    }
    result.push_str(rest);
    result
}

/// The same template in the syntax of minijinja: it has no unary plus and fewer escapes, and its tuples need
/// parentheses.
///
/// # Errors
/// For what minijinja accepts and Jinja2 does not.
pub(super) fn as_minijinja_writes_it<'a>(source: &'a str, syntax: &SyntaxConfig) -> Result<Cow<'a, str>> {
    let mut edits: Vec<Edit<'_>> = Vec::new();
    let mut tag = Tag::default();
    let mut expects_operand = true;
    // Whether the last two names were `is` and that of a test.
    let (mut behind_is, mut behind_test) = (false, false);
    for token in tokenize(source, false, syntax.clone()) {
        // What has no tokens is refused when it is parsed, with the line.
        let Ok((token, span)) = token else { break };
        let (start, end) = (span.start_offset as usize, span.end_offset as usize);
        let text = source.get(start..end).unwrap_or_default();
        match &token {
            Token::Plus if expects_operand => {
                // Both negations refuse what is no number.
                edits.push((start, end, "--".into()));
                continue;
            }
            Token::Str(_) | Token::String(_) if text.contains('\\') => {
                edits.push((start, end, literals::string(text)?.into()));
            }
            Token::Int(_) | Token::Int128(_) | Token::Float(_) => literals::check_number(text)?,
            Token::Ident("is") if behind_test => return Err(fail("tests cannot be chained with `is`")),
            _ => {}
        }
        behind_test = behind_is && matches!(token, Token::Ident(name) if name != "not");
        behind_is =
            matches!(token, Token::Ident("is")) || (behind_is && matches!(token, Token::Ident("not")));
        expects_operand = !matches!(
            token,
            Token::Str(_)
                | Token::String(_)
                | Token::Int(_)
                | Token::Int128(_)
                | Token::Float(_)
                | Token::ParenClose
                | Token::BracketClose
                | Token::BraceClose
        ) && !matches!(token, Token::Ident(name) if !OPERATORS.contains(&name));
        tag.token(&token, start, end, &mut edits);
    }
    if edits.is_empty() {
        return Ok(source.into());
    }
    edits.sort_by_key(|(start, end, _)| (*start, *end));
    let mut result = String::with_capacity(source.len() + edits.len());
    let mut done = 0;
    for (start, end, text) in edits {
        let before = source.get(done..start).ok_or_else(|| fail("the template cannot be read"))?;
        result.push_str(before);
        result.push_str(&text);
        done = end;
    }
    result.push_str(source.get(done..).unwrap_or_default());
    Ok(result.into())
}

/// What to write in place of a part of the source.
type Edit<'a> = (usize, usize, Cow<'a, str>);

/// Names behind which an expression begins.
const OPERATORS: [&str; 8] = ["and", "or", "not", "in", "is", "if", "else", "elif"];

/// Where the tuple without parentheses is that a tag may have.
#[derive(Default)]
struct Tag<'a> {
    depth: usize,
    keyword: Option<&'a str>,
    tokens: usize,
    /// Where the expression begins.
    start: Option<usize>,
    end: usize,
    has_comma: bool,
    closed: bool,
}

impl<'a> Tag<'a> {
    fn token(&mut self, token: &Token<'a>, start: usize, end: usize, edits: &mut Vec<Edit<'a>>) {
        match token {
            Token::VariableStart => *self = Self { start: Some(end), end, ..Self::default() },
            Token::BlockStart => *self = Self { end, ..Self::default() },
            Token::VariableEnd | Token::BlockEnd => self.finish(edits),
            _ => {
                if self.tokens == 0 && self.start.is_none() {
                    self.keyword = if let Token::Ident(name) = token { Some(name) } else { None };
                    if matches!(self.keyword, Some("if" | "elif")) {
                        self.start = Some(end);
                    }
                } else if self.depth == 0 && self.keyword == Some("for") {
                    match token {
                        Token::Ident("in") if self.start.is_none() => self.start = Some(end),
                        Token::Ident("if" | "recursive") if self.start.is_some() => self.closed = true,
                        _ => {}
                    }
                }
                match token {
                    Token::ParenOpen | Token::BracketOpen | Token::BraceOpen => self.depth += 1,
                    Token::ParenClose | Token::BracketClose | Token::BraceClose => {
                        self.depth = self.depth.saturating_sub(1);
                    }
                    Token::Comma if self.depth == 0 && self.start.is_some_and(|at| at <= start) => {
                        self.has_comma |= !self.closed;
                    }
                    _ => {}
                }
                self.tokens += 1;
                if !self.closed {
                    self.end = end;
                }
            }
        }
    }

    fn finish(&mut self, edits: &mut Vec<Edit<'a>>) {
        if let (true, Some(start)) = (self.has_comma, self.start) {
            edits.push((start, start, " (".into()));
            edits.push((self.end, self.end, ") ".into()));
        }
    }
}

/// The stack that the parser and the compiler need at most.
pub(super) fn stack_size(source: &str, syntax: &SyntaxConfig) -> Result<usize> {
    let (mut longest, mut current, mut elifs) = (0, 0, 0);
    let mut begins = false;
    for token in tokenize(source, false, syntax.clone()) {
        let Ok((token, _)) = token else { break };
        if matches!(token, Token::VariableStart | Token::BlockStart) {
            current = 0;
        }
        elifs += usize::from(begins && matches!(token, Token::Ident("elif")));
        begins = matches!(token, Token::BlockStart);
        current += 1;
        longest = longest.max(current);
    }
    for (what, count, limit) in
        [("tokens in one tag", longest, MAX_TOKENS), ("`elif` tags", elifs, MAX_ELIFS)]
    {
        if count > limit {
            return Err(fail(format!("has {count} {what}, expected at most {limit}")));
        }
    }
    Ok(STACK_BASE + longest * STACK_PER_TOKEN + elifs * STACK_PER_ELIF)
}
