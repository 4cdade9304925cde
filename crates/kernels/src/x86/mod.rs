//! Ternary products and vectors of floats on x86-64.

pub(crate) mod avx2;
pub(crate) mod avx512;
pub(crate) mod compact;
pub(crate) mod compact_avx2;
pub(crate) mod vector;
