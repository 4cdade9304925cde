//! What the configuration of a model may say to this backend beyond what all backends share.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use ternion_engine::kv::KvType;

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
}
