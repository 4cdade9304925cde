//! What the configuration of a model may say to this backend beyond what all backends share.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use ternion_engine::kv::KvType;
use ternion_head::HeadKind;
use ternion_kernels::ActivationType;

/// The table `options` of a model that runs on the backend `onnx`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct OnnxOptions {
    /// ONNX Runtime's library, such as `/opt/onnxruntime/lib/libonnxruntime.so`. A relative path is relative to the working
    /// directory. Left out: what the variable `ORT_DYLIB_PATH` names, else the system's. A process has one: the first
    /// model that is loaded decides.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub library: Option<PathBuf>,
    /// How keys and values are stored. Only models of the fast variant leave it open; in others it is the graph's choice, and
    /// anything but `f32` is refused.
    pub kv_type: KvType,
    /// How activations are represented in products with weights that have a scale for each group of a row (Qwen3 in ternary and
    /// binary forms): `f32` as they are, `int8` in 8 bits, `int8x2`, the default, as the sum of two of these. Only models of the
    /// fast variant leave it open; others refuse it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub activations: Option<ActivationType>,
    /// What logits are computed from. Only models of the fast variant leave it open; others refuse anything but `auto`.
    pub head: HeadKind,
}
