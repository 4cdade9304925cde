//! Calls of tools as a server sends them, in pieces.

use ternion_core::{Error, Event, Result, ToolCallEvent, answer::call_id};

use crate::wire::{Delta, FunctionDelta};

/// Tools that one answer may call. More are a server that is out of order.
const MAX_CALLS: u64 = 1024;

/// The calls of one answer, in the order in which they begin.
#[derive(Default)]
pub(crate) struct Calls(Vec<Call>);

#[derive(Default)]
struct Call {
    /// The number that the server gives it.
    number: u64,
    id: Option<String>,
    name: String,
    /// The name is whole, and the reader has it.
    announced: bool,
    has_arguments: bool,
}

impl Calls {
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Takes the calls of a chunk; adds what is new to `events`.
    ///
    /// # Errors
    /// [`Backend`](ternion_core::ErrorKind::Backend) for a call without a name, or for too many.
    pub(crate) fn push(&mut self, delta: &Delta, events: &mut Vec<Event>) -> Result<()> {
        for call in delta.tool_calls.iter().flatten() {
            if let Some(function) = &call.function {
                self.piece(call.index.unwrap_or(0), call.id.as_deref(), function, events)?;
            }
        }
        match &delta.function_call {
            Some(function) => self.piece(0, None, function, events),
            None => Ok(()),
        }
    }

    fn piece(
        &mut self,
        number: u64,
        id: Option<&str>,
        function: &FunctionDelta,
        events: &mut Vec<Event>,
    ) -> Result<()> {
        if number >= MAX_CALLS {
            return Err(Error::backend(format!("the server sends a tool call with the index {number}")));
        }
        let index = if let Some(index) = self.0.iter().position(|call| call.number == number) {
            index
        } else {
            // A call that begins ends the names before it.
            self.announce(self.0.len(), events)?;
            self.0.push(Call { number, ..Call::default() });
            self.0.len() - 1
        };
        let call = &mut self.0[index];
        if !call.announced {
            call.name += function.name.as_deref().unwrap_or_default();
            call.id = call.id.take().or(id.filter(|id| !id.is_empty()).map(str::to_owned));
        }
        let arguments = function.arguments();
        if !arguments.is_empty() {
            self.announce(index + 1, events)?;
            self.0[index].has_arguments = true;
            events.push(ToolCallEvent::arguments(index, arguments).into());
        }
        Ok(())
    }

    /// The end of the answer.
    ///
    /// # Errors
    /// As [`push`](Self::push).
    pub(crate) fn finish(&mut self, events: &mut Vec<Event>) -> Result<()> {
        self.announce(self.0.len(), events)?;
        let open = self.0.iter_mut().enumerate().filter(|(_, call)| !call.has_arguments);
        events.extend(open.map(|(index, call)| {
            call.has_arguments = true;
            Event::from(ToolCallEvent::arguments(index, "{}"))
        }));
        Ok(())
    }

    /// Tells the reader of the first `count` calls.
    fn announce(&mut self, count: usize, events: &mut Vec<Event>) -> Result<()> {
        for (index, call) in self.0.iter_mut().enumerate().take(count).filter(|(_, call)| !call.announced) {
            if call.name.is_empty() {
                return Err(Error::backend("the server sends a tool call without a name"));
            }
            call.announced = true;
            let id = call.id.take().unwrap_or_else(call_id);
            events.push(ToolCallEvent::start(index, id, call.name.clone()).into());
        }
        Ok(())
    }
}
