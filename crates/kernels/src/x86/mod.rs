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

/// How many bytes ahead codes are prefetched. The hardware's own prefetching ends at each page.
const AHEAD: usize = 4096;

/// The same for codes with a scale for each group: at 2 KiB their product waits for memory.
const GROUPED_AHEAD: usize = 8192;
