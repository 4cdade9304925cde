//! Facts about a checkpoint that its files may not state, set by hand.

use std::path::Path;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use ternion_core::Result;
use ternion_core::text::{Tokenizer, TokenizerParts};

use crate::{Access, Activation, Checkpoint, Progress};

/// How to read a checkpoint whose files leave something open. Each option that is set wins over what the files say and over
/// what is concluded from them. The default leaves everything to the files.
///
/// ```
/// use ternion_formats::{Activation, CheckpointOptions, I2sLayout};
///
/// let options = CheckpointOptions::default()
///     .with_activation(Activation::Relu2)
///     .with_i2s_layout(I2sLayout::Arm);
/// assert_eq!(options.activation, Some(Activation::Relu2));
/// ```
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
#[non_exhaustive]
pub struct CheckpointOptions {
    /// The activation of the feed-forward network.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub activation: Option<Activation>,
    /// Whether there is an RMS norm before `o_proj` and one before `down_proj`. `true` requires their tensors, `false`
    /// ignores them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sub_norms: Option<bool>,
    /// The base of the rotary embedding's frequencies.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1.0))]
    pub rope_theta: Option<f32>,
    /// The order of weights in the I2_S tensors of a GGUF file. Left out: `x86`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub i2s_layout: Option<I2sLayout>,
    /// Whether the tokenizer puts a BOS before a text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub add_bos: Option<bool>,
    /// The id of the BOS.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bos: Option<u32>,
    /// The rule by which the tokenizer of a GGUF file splits a text, by a name of `tokenizer.ggml.pre`: `llama-bpe`, `qwen2`
    /// and so on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pre_tokenizer: Option<String>,
}

/// The order of weights in an I2_S tensor. bitnet.cpp writes one of three, depending on how it was built; the file does not
/// say which, and every order is valid in every other reading.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[non_exhaustive]
pub enum I2sLayout {
    /// 128 weights of a row in 32 bytes: byte `j` holds weights `j`, `32 + j`, `64 + j` and `96 + j`, the first in the highest
    /// bits. The official file of BitNet b1.58 2B4T, and bitnet.cpp on x86 with `ACT_PARALLEL`, its default.
    #[default]
    #[serde(rename = "x86")]
    X86,
    /// 64 weights of a row in 16 bytes: byte `j` holds weights `j`, `16 + j`, `32 + j` and `48 + j`. bitnet.cpp on ARM.
    #[serde(rename = "arm")]
    Arm,
    /// One column of four rows in a byte, the first row in the highest bits. bitnet.cpp on x86 without `ACT_PARALLEL`.
    #[serde(rename = "x86-4rows")]
    X86FourRows,
}

impl I2sLayout {
    /// All layouts.
    pub const ALL: [Self; 3] = [Self::X86, Self::Arm, Self::X86FourRows];

    /// Its name in configurations.
    pub fn name(self) -> &'static str {
        match self {
            Self::X86 => "x86",
            Self::Arm => "arm",
            Self::X86FourRows => "x86-4rows",
        }
    }
}

impl CheckpointOptions {
    /// Sets the activation of the feed-forward network.
    #[must_use]
    pub fn with_activation(mut self, activation: Activation) -> Self {
        self.activation = Some(activation);
        self
    }

    /// Sets whether there are sub-norms.
    #[must_use]
    pub fn with_sub_norms(mut self, sub_norms: bool) -> Self {
        self.sub_norms = Some(sub_norms);
        self
    }

    /// Sets the base of the rotary frequencies.
    #[must_use]
    pub fn with_rope_theta(mut self, theta: f32) -> Self {
        self.rope_theta = Some(theta);
        self
    }

    /// Sets the order of weights in I2_S tensors.
    #[must_use]
    pub fn with_i2s_layout(mut self, layout: I2sLayout) -> Self {
        self.i2s_layout = Some(layout);
        self
    }

    /// Sets whether a BOS stands before a text.
    #[must_use]
    pub fn with_add_bos(mut self, add_bos: bool) -> Self {
        self.add_bos = Some(add_bos);
        self
    }

    /// Sets the id of the BOS.
    #[must_use]
    pub fn with_bos(mut self, id: u32) -> Self {
        self.bos = Some(id);
        self
    }

    /// Sets the rule by which the tokenizer of a GGUF file splits a text.
    #[must_use]
    pub fn with_pre_tokenizer(mut self, name: impl Into<String>) -> Self {
        self.pre_tokenizer = Some(name.into());
        self
    }

    /// The tokenizer's parts with what these options say about it.
    pub(crate) fn applied_to(&self, mut parts: TokenizerParts, has_rule: bool) -> TokenizerParts {
        parts.add_bos_token = self.add_bos.or(parts.add_bos_token);
        parts.bos_id = self.bos.or(parts.bos_id);
        if self.pre_tokenizer.is_some() && !has_rule {
            parts.warnings.push(
                "the option `pre_tokenizer` is set, but the tokenizer has a rule of its own, which is used"
                    .to_owned(),
            );
        }
        for warning in &parts.warnings {
            tracing::warn!("tokenizer: {warning}");
        }
        parts
    }

    /// The name of an option about the decoder that is set.
    pub fn decoder_option(&self) -> Option<&'static str> {
        [
            ("activation", self.activation.is_some()),
            ("sub_norms", self.sub_norms.is_some()),
            ("rope_theta", self.rope_theta.is_some()),
            ("i2s_layout", self.i2s_layout.is_some()),
        ]
        .into_iter()
        .find_map(|(name, is_set)| is_set.then_some(name))
    }

    /// [`Checkpoint::open_with`] with these options.
    ///
    /// # Errors
    /// Those of [`Checkpoint::open`], and [`InvalidConfig`](ternion_core::ErrorKind::InvalidConfig) for an option that is out of
    /// range.
    pub fn open(&self, path: impl AsRef<Path>, progress: &mut Progress<'_>) -> Result<Checkpoint> {
        Checkpoint::open_as(path.as_ref(), self, progress)
    }

    /// [`Checkpoint::open_within`] with these options.
    ///
    /// # Errors
    /// Those of [`Checkpoint::open_within`] and [`open`](Self::open).
    pub fn open_within(
        &self,
        path: impl AsRef<Path>,
        memory: u64,
        progress: &mut Progress<'_>,
    ) -> Result<Checkpoint> {
        Checkpoint::open_within_as(path.as_ref(), memory, self, progress)
    }

    /// [`Checkpoint::open_with_tokenizer`] with these options.
    ///
    /// # Errors
    /// Those of [`Checkpoint::open_with_tokenizer`] and [`open`](Self::open).
    pub fn open_with_tokenizer(
        &self,
        path: impl AsRef<Path>,
        access: Access,
        progress: &mut Progress<'_>,
    ) -> Result<(Checkpoint, Tokenizer)> {
        Checkpoint::open_with_tokenizer_as(path.as_ref(), access, self, progress)
    }

    /// [`Checkpoint::tokenizer_parts_at`] with these options.
    ///
    /// # Errors
    /// Those of [`Checkpoint::tokenizer_parts_at`].
    pub fn tokenizer_parts(&self, path: impl AsRef<Path>) -> Result<TokenizerParts> {
        Checkpoint::tokenizer_parts_as(path.as_ref(), self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layouts_are_named_as_in_configurations() {
        for layout in I2sLayout::ALL {
            assert_eq!(serde_json::to_value(layout).unwrap(), layout.name());
        }
        let options: CheckpointOptions =
            serde_json::from_str(r#"{"activation": "relu2", "i2s_layout": "arm", "kv_type": "f16"}"#)
                .unwrap();
        assert_eq!((options.activation, options.i2s_layout), (Some(Activation::Relu2), Some(I2sLayout::Arm)));
    }
}
