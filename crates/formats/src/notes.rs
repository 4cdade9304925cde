//! What a reader notes about facts that the files leave open.

use ternion_core::{Error, Result};

use crate::CheckpointOptions;

/// The range of a rotary base, in files and as an option.
pub(crate) const ROPE_THETA: std::ops::RangeInclusive<f32> = 1.0..=1e12;

/// The options of a checkpoint, and what is noted while it is read.
#[derive(Debug, Default)]
pub(crate) struct Notes {
    pub(crate) options: CheckpointOptions,
    assumptions: Vec<String>,
    warnings: Vec<String>,
}

impl Notes {
    pub(crate) fn new(options: &CheckpointOptions) -> Result<Self> {
        if let Some(theta) = options.rope_theta.filter(|theta| !ROPE_THETA.contains(theta)) {
            return Err(Error::invalid_config(format!(
                "rope_theta: {theta} is out of range; from {} to {} expected",
                ROPE_THETA.start(),
                ROPE_THETA.end()
            )));
        }
        Ok(Self { options: options.clone(), ..Self::default() })
    }

    /// Notes a fact that no file states, where no sign in the files contradicts it.
    pub(crate) fn assume(&mut self, message: impl Into<String>) {
        push(&mut self.assumptions, message.into());
    }

    /// Notes a contradiction. The message names the option that decides.
    pub(crate) fn warn(&mut self, message: impl Into<String>) {
        push(&mut self.warnings, message.into());
    }

    /// Assumptions and warnings.
    pub(crate) fn finish(self) -> (Vec<String>, Vec<String>) {
        (self.assumptions, self.warnings)
    }
}

fn push(list: &mut Vec<String>, message: String) {
    if !list.contains(&message) {
        list.push(message);
    }
}
