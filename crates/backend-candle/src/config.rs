//! What the configuration of a model may say to this backend beyond what all backends share.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The table `options` of a model that runs on the backend `candle`. There is nothing to set yet that other backends
/// do not have too; a key that does not exist is an error all the same.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct CandleOptions {}
