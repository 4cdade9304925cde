//! Ternary products and vectors of floats on x86-64.

pub(crate) mod amx;
pub(crate) mod avx2;
pub(crate) mod avx512;
pub(crate) mod avx_vnni;
pub(crate) mod compact;
pub(crate) mod compact_avx2;
pub(crate) mod grouped_avx2;
pub(crate) mod grouped_avx512;
pub(crate) mod vector;
