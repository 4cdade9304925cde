//! From the source of a template to instructions that can run many times.

use std::collections::BTreeMap;

use minijinja::{
    AutoEscape, Environment, Value,
    machinery::{CodeGenerator, Instructions, eval, make_string_output, parse},
    syntax::SyntaxConfig,
};
use self_cell::self_cell;

use super::{
    Result, fail, rewrite,
    source::{as_minijinja_writes_it, stack_size, with_unix_newlines, without_generation_tags},
};

const NAME: &str = "chat_template";

self_cell! {
    struct Cell {
        owner: String,
        #[not_covariant]
        dependent: Compiled,
    }
}

struct Compiled<'source> {
    instructions: Instructions<'source>,
    blocks: BTreeMap<&'source str, Instructions<'source>>,
}

/// A compiled template.
pub(in crate::text) struct Program(Cell);

impl Program {
    /// Compiles on a thread of its own, whose stack has the size that the source needs.
    ///
    /// # Errors
    /// Where the source is not valid Jinja or too complex.
    pub(in crate::text) fn new(source: &str) -> Result<Self> {
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?;
        let source = with_unix_newlines(source);
        let source = without_generation_tags(&source);
        let source = as_minijinja_writes_it(&source, &syntax)?.into_owned();
        let stack = stack_size(&source, &syntax)?;
        let compile = move || {
            Cell::try_new(source, |source| {
                let tree = parse(source, NAME, syntax)?;
                let tree = rewrite::statement(&tree)?;
                let mut generator = CodeGenerator::new(NAME, source);
                generator.compile_stmt(&tree);
                let (instructions, blocks) = generator.finish();
                Ok(Compiled { instructions, blocks })
            })
            .map(Self)
        };
        std::thread::scope(|scope| {
            let thread = std::thread::Builder::new()
                .name("chat-template".to_owned())
                .stack_size(stack)
                .spawn_scoped(scope, compile)
                .map_err(|e| fail("no thread to compile the template").with_source(e))?;
            thread.join().unwrap_or_else(|_| Err(fail("the template engine panicked")))
        })
    }

    /// Runs the template with the fuel of the environment and appends its output to `prompt`.
    pub(in crate::text) fn run(
        &self,
        environment: &Environment<'static>,
        context: Value,
        prompt: &mut String,
    ) -> Result<()> {
        self.0.with_dependent(|_, Compiled { instructions, blocks }| {
            let mut output = make_string_output(prompt);
            eval(environment, instructions, context, blocks, &mut output, AutoEscape::None).map(drop)
        })
    }
}
