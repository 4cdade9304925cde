//! Grammars by llguidance: one factory for each model, one grammar for each request.
//!
//! A grammar is made by strangers. The module `compile` bounds the time of its compilation, and the limits below its size, its
//! memory and the time of each step.

use std::{
    fmt::Write,
    sync::{Arc, OnceLock},
};

use llguidance::{Matcher, ParserFactory, api::TopLevelGrammar, toktrie::TokEnv};
use ternion_core::{Constraint, Error, Result, text::Tokenizer};

use super::{
    compile::{self, Compilations},
    schema,
    vocabulary::Vocabulary,
};

/// The most bytes of a grammar or a regular expression.
const MAX_BYTES: usize = 1 << 20;

/// The most bytes of a text that an answer must have. Each byte may take a state of the lexer.
pub(super) const MAX_TEXT: usize = 32 << 10;

/// States of the lexer, each of 1 to 2 kB. Not a bound on the answer's length: states are used again.
const MAX_LEXER_STATES: usize = 100_000;

/// What llguidance says where one of the limits is reached.
const LIMITS: [&str; 7] = [
    "too many expressions",
    "too many states",
    "too many items",
    "Too many items",
    "fuel exhausted",
    "precomputation failed",
    // A table of the grammar is full.
    "panic: assertion",
];

/// Compiles constraints for one model.
pub(crate) struct Grammars {
    tokenizer: Arc<Tokenizer>,
    vocab_size: usize,
    end_tokens: Vec<u32>,
    /// Made for the first constraint, since it takes a moment for a large vocabulary.
    factory: OnceLock<std::result::Result<Arc<Factory>, String>>,
}

pub(super) struct Factory {
    vocabulary: Arc<Vocabulary>,
    pub(super) parsers: ParserFactory,
    pub(super) compilations: Compilations,
}

impl Grammars {
    pub(crate) fn new(tokenizer: Arc<Tokenizer>, vocab_size: usize, end_tokens: &[u32]) -> Self {
        Self { tokenizer, vocab_size, end_tokens: end_tokens.to_vec(), factory: OnceLock::new() }
    }

    /// Whether the tokens of this tokenizer can follow a grammar.
    pub(crate) fn is_supported(tokenizer: &Tokenizer) -> bool {
        tokenizer.has_token_bytes()
    }

    /// A JSON schema as it stands within another grammar.
    ///
    /// # Errors
    /// [`InvalidRequest`](ternion_core::ErrorKind::InvalidRequest) for a schema that is too large, too deep, or takes too long to
    /// compile.
    pub(crate) fn prepared(schema: &serde_json::Value) -> Result<serde_json::Value> {
        schema::prepare(schema)
    }

    /// Compiles a constraint, unless the grammar is still there from an earlier request. May take some hundred milliseconds, and for
    /// a model's first constraint longer.
    ///
    /// # Errors
    /// [`InvalidRequest`](ternion_core::ErrorKind::InvalidRequest) for what cannot be understood, enforced or satisfied, and for
    /// what exceeds the limits or the time; [`Busy`](ternion_core::ErrorKind::Busy) while too many compilations run.
    pub(crate) fn compile(&self, constraint: &Constraint) -> Result<Grammar> {
        let factory = self.factory()?;
        let matcher = compile::compile(factory, constraint, compile::PATIENCE)?;
        Ok(Grammar { matcher, vocabulary: Arc::clone(&factory.vocabulary) })
    }

    pub(super) fn factory(&self) -> Result<&Arc<Factory>> {
        let made = self.factory.get_or_init(|| {
            let tokenizer = Arc::clone(&self.tokenizer);
            let vocabulary = Arc::new(Vocabulary::new(tokenizer, self.vocab_size, &self.end_tokens));
            let env: TokEnv = Arc::clone(&vocabulary) as TokEnv;
            let mut parsers = ParserFactory::new_simple(&env).map_err(|e| e.to_string())?;
            parsers.quiet();
            let limits = parsers.limits_mut();
            limits.max_lexer_states = MAX_LEXER_STATES;
            limits.verbose_errors = false;
            Ok(Arc::new(Factory { vocabulary, parsers, compilations: Compilations::default() }))
        });
        made.as_ref().map_err(|reason| {
            Error::unsupported(format!("constraint: the model's tokenizer cannot be used: {reason}"))
        })
    }
}

pub(super) fn top_level(constraint: &Constraint) -> Result<TopLevelGrammar> {
    let within = |text: &str, what: &str| {
        if text.len() <= MAX_BYTES {
            return Ok(());
        }
        let message = format!("constraint: {what} has {} bytes; at most {MAX_BYTES} expected", text.len());
        Err(Error::invalid_request(message))
    };
    match constraint {
        Constraint::JsonSchema(schema) => Ok(TopLevelGrammar::from_json_schema(schema::prepare(schema)?)),
        Constraint::JsonObject => {
            let object = serde_json::json!({ "type": "object" });
            Ok(TopLevelGrammar::from_json_schema(schema::prepare(&object)?))
        }
        Constraint::Regex(regex) => {
            within(regex, "the regular expression")?;
            if schema::needs_too_much(regex) {
                return Err(refused(constraint, &schema::too_much()));
            }
            Ok(TopLevelGrammar::from_regex(without_anchors(regex)))
        }
        Constraint::Choice(texts) => {
            if let Some(text) = texts.iter().find(|text| text.len() > MAX_TEXT) {
                let message =
                    format!("constraint: a choice has {} bytes; at most {MAX_TEXT} expected", text.len());
                return Err(Error::invalid_request(message));
            }
            let grammar = choice(texts);
            within(&grammar, "the choice")?;
            Ok(TopLevelGrammar::from_lark(grammar))
        }
        Constraint::Lark(grammar) => {
            within(grammar, "the grammar")?;
            Ok(TopLevelGrammar::from_lark(grammar.clone()))
        }
        _ => Err(Error::unsupported("constraint: this kind is not known")),
    }
}

/// A regular expression matches as a whole anyway.
fn without_anchors(regex: &str) -> &str {
    let regex = regex.strip_prefix('^').unwrap_or(regex);
    match regex.strip_suffix('$') {
        // An odd number of backslashes makes the last character a literal.
        Some(rest) if (rest.len() - rest.trim_end_matches('\\').len()).is_multiple_of(2) => rest,
        _ => regex,
    }
}

/// A grammar of these texts, as one terminal: a lexer follows thousands of them, a parser does not.
fn choice(texts: &[String]) -> String {
    let mut grammar = String::from("start: CHOICE\nCHOICE: ");
    for (i, text) in texts.iter().enumerate() {
        if i > 0 {
            grammar.push_str(" | ");
        }
        grammar.push('"');
        for c in text.chars() {
            match c {
                '"' | '\\' => grammar.extend(['\\', c]),
                '\0'..='\u{1f}' | '\u{7f}' => {
                    // Writing to a string does not fail.
                    let _ = write!(grammar, "\\u{:04x}", u32::from(c));
                }
                _ => grammar.push(c),
            }
        }
        grammar.push('"');
    }
    grammar
}

/// The error for a constraint that llguidance refuses for this reason.
pub(super) fn refused(constraint: &Constraint, reason: &str) -> Error {
    let reason = &one_line(reason);
    let message = match constraint {
        Constraint::JsonSchema(schema) => schema::refused(schema, reason),
        Constraint::Regex(_) => format!("the regular expression cannot be enforced: {reason}"),
        Constraint::Lark(_) => format!("the grammar cannot be enforced: {reason}"),
        _ => reason.clone(),
    };
    Error::invalid_request(format!("constraint: {message}"))
}

/// The reason on one line, without the middle of a long one. What comes after its first line shows the grammar or the parser's
/// state, but for the cause of a regular expression's error.
fn one_line(reason: &str) -> String {
    const ENDS: usize = 120;
    if reason.starts_with("NoExtension") {
        return "nothing satisfies it".to_owned();
    }
    if LIMITS.iter().any(|limit| reason.contains(limit)) {
        return "it takes too much memory or time to follow; a simpler one expected".to_owned();
    }
    let mut line = reason.lines().next().unwrap_or_default().trim().to_owned();
    if let Some(cause) = reason.lines().find_map(|line| line.trim().strip_prefix("error: ")) {
        line = format!("{line} {cause}");
    }
    let count = line.chars().count();
    if count <= 2 * ENDS {
        return line;
    }
    let start: String = line.chars().take(ENDS).collect();
    let end: String = line.chars().skip(count - ENDS).collect();
    format!("{start} ... {end}")
}

/// A grammar and where in it an answer is. A clone goes its own way.
pub(crate) struct Grammar {
    /// Boxed, for it has more than a thousand bytes.
    matcher: Box<Matcher>,
    vocabulary: Arc<Vocabulary>,
}

impl Clone for Grammar {
    fn clone(&self) -> Self {
        Self { matcher: self.matcher.clone(), vocabulary: Arc::clone(&self.vocabulary) }
    }
}

impl Grammar {
    /// Forbids the tokens that cannot come next. The tokens that end an answer may come where the grammar is complete.
    ///
    /// # Errors
    /// Where the grammar reaches one of its limits.
    pub(crate) fn restrict(&mut self, logits: &mut [f32]) -> Result<()> {
        let mask = self.matcher.compute_mask_or_eos().map_err(|e| failed(&e.to_string()))?;
        for (allowed, logits) in mask.as_slice().iter().zip(logits.chunks_mut(u32::BITS as usize)) {
            match *allowed {
                0 => logits.fill(f32::NEG_INFINITY),
                u32::MAX => {}
                bits => {
                    for (i, logit) in logits.iter_mut().enumerate() {
                        if bits & (1 << i) == 0 {
                            *logit = f32::NEG_INFINITY;
                        }
                    }
                }
            }
        }
        Ok(())
    }

    /// Follows a token.
    ///
    /// # Errors
    /// Where it is not allowed, and where the grammar reaches one of its limits.
    pub(crate) fn push(&mut self, id: u32) -> Result<()> {
        self.matcher.consume_token(id).map_err(|e| failed(&e.to_string()))
    }

    /// Whether this token may come next.
    pub(crate) fn allows(&mut self, id: u32) -> bool {
        self.matcher.validate_tokens(&[id]).is_ok_and(|valid| valid == 1)
    }

    /// The tokens that must come next, in their order; none where there is a choice.
    pub(crate) fn forced(&mut self) -> Vec<u32> {
        self.matcher.compute_ff_tokens()
    }

    /// Whether the answer may end here.
    pub(crate) fn can_end(&mut self) -> bool {
        self.matcher.is_accepting().unwrap_or(false)
    }

    /// Whether nothing can follow.
    pub(crate) fn must_end(&self) -> bool {
        self.matcher.is_stopped()
    }

    /// The tokens that begin with `text` and go on.
    pub(crate) fn tokens_beyond(&self, text: &str) -> Vec<u32> {
        self.vocabulary.tokens_beyond(text)
    }

    /// The tokens of one or two line feeds.
    pub(crate) fn line_breaks(&self) -> &[u32] {
        self.vocabulary.line_breaks()
    }
}

/// The error for a grammar that fails within an answer.
fn failed(reason: &str) -> Error {
    let reason = one_line(reason);
    Error::invalid_request(format!("constraint: the answer cannot go on: {reason}"))
}
