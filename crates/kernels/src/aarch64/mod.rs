//! Products and vectors of floats on aarch64.
//!
//! NEON itself is part of the architecture; dot products and matrix products of bytes are looked for at run time. Their
//! intrinsics are not stable in Rust, so these few instructions are written as assembly.

pub(crate) mod compact;
pub(crate) mod dot;
pub(crate) mod i8mm;
pub(crate) mod vector;
