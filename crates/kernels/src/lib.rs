//! TODO-replace
