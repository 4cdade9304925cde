//! Conformance (placeholder until the suite is merged).
pub mod compare;
