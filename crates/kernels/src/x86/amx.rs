//! AMX: tiles of int8, for products of several tokens.
//!
//! `tdpbsud` multiplies 16 tokens x 64 columns of activations by 64 columns x 16 rows of weights and adds the products to
//! 16 x 16 sums. The activations are read where they lie. The codes of a *panel*, 16 units or 64 rows, are unpacked into
//! tiles of bytes: a *step* makes four of them from 16 lines of codes.
//!
//! Rust has no stable intrinsics for tiles. Each instruction is a piece of assembly of its own here. The tiles keep their
//! contents in between, as the compiler has no use for them.

pub(crate) mod compact;
mod few;
pub(crate) mod grouped;
mod many;

use std::arch::asm;
use std::arch::x86_64::{
    __cpuid_count, __m512i, _mm512_and_si512, _mm512_loadu_si512, _mm512_maskz_loadu_epi8, _mm512_set1_epi8,
    _mm512_setzero_si512, _mm512_shuffle_i32x4, _mm512_srli_epi32, _mm512_store_si512, _mm512_unpackhi_epi32,
    _mm512_unpackhi_epi64, _mm512_unpacklo_epi32, _mm512_unpacklo_epi64, _xgetbv,
};
use std::sync::OnceLock;

use crate::{
    TernaryLayout, lanes,
    matmul::Task,
    quantize::{Line, Lines},
    ternary::FIELDS,
};

/// Units of a panel. Each has four rows, so a panel has four tiles of 16 rows.
pub(crate) const PANEL: usize = 16;

/// Rows of a panel.
pub(crate) const ROWS: usize = 4 * PANEL;

/// Tokens of which several panels are computed at a time.
pub(crate) const FEW: usize = TILE;

/// Tokens from which on tiles are faster than vectors, which multiply each token apart.
pub(crate) const FEWEST: usize = 4;

/// Tiles of 64 columns that are unpacked together for many tokens: those of a panel are 32 KiB, which stay in the first-level
/// cache.
const DEPTH: usize = 8;

/// Lines of a tile, and tokens of one at most.
const TILE: usize = 16;

/// How many of `units` are computed at a time.
pub(crate) fn step(units: usize, tokens: usize) -> usize {
    if tokens <= FEW { units.next_multiple_of(PANEL).clamp(PANEL, 16 * PANEL) } else { PANEL }
}

/// Whether this CPU has tiles of int8 and the system lets this process use them.
pub(crate) fn is_available() -> bool {
    static AVAILABLE: OnceLock<bool> = OnceLock::new();
    *AVAILABLE.get_or_init(|| has_tiles() && is_permitted())
}

fn has_tiles() -> bool {
    // AMX-TILE and AMX-INT8.
    const NEEDED: u32 = 1 << 24 | 1 << 25;
    // Tile configuration and tile data.
    const SAVED: u64 = 1 << 17 | 1 << 18;

    #[target_feature(enable = "xsave")]
    fn saved() -> u64 {
        // SAFETY: The system has enabled the instruction, as the caller has checked.
        unsafe { _xgetbv(0) }
    }

    // The detection of `xsave` includes that the system has enabled it.
    if !is_x86_feature_detected!("xsave") {
        return false;
    }
    #[allow(unused_unsafe, reason = "a safe function in newer versions of Rust")]
    // SAFETY: All x86-64 CPUs have the instruction. Leaf 7 exists wherever AVX2 does.
    let features = unsafe { __cpuid_count(7, 0) }.edx;
    // SAFETY: `xsave` was detected.
    features & NEEDED == NEEDED && unsafe { saved() } & SAVED == SAVED
}

/// Asks Linux for the registers of the tiles, which it gives to a process only on demand. It refuses while a thread has a signal
/// stack that is too small for them; vectors are used then.
#[cfg(target_os = "linux")]
fn is_permitted() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_long = 18;
    // SAFETY: The call takes two numbers and changes only what this process may use.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
}

#[cfg(not(target_os = "linux"))]
fn is_permitted() -> bool {
    false
}

/// Loads a tile from rows of 64 bytes or less, a stride apart.
macro_rules! load {
    ($tile:literal, $from:expr, $stride:expr) => {
        asm!(
            concat!("tileloadd tmm", $tile, ", [{from} + {stride}]"),
            from = in(reg) $from,
            stride = in(reg) $stride,
            options(readonly, nostack, preserves_flags),
        )
    };
}

use load;

/// Stores a tile of sums.
macro_rules! store {
    ($tile:literal, $to:expr, $stride:expr) => {
        asm!(
            concat!("tilestored [{to} + {stride}], tmm", $tile),
            to = in(reg) $to,
            stride = in(reg) $stride,
            options(nostack, preserves_flags),
        )
    };
}

use store;

/// Adds the products of signed activations, 16 tokens or less, and unsigned weights, 16 rows, to sums.
macro_rules! multiply {
    ($sums:literal, $values:literal, $weights:literal) => {
        asm!(
            concat!("tdpbsud tmm", $sums, ", tmm", $values, ", tmm", $weights),
            options(nomem, nostack, preserves_flags),
        )
    };
}

use multiply;

/// Adds the products of unsigned weights, 16 rows, and signed activations, 16 tokens, to sums.
macro_rules! multiply_unsigned {
    ($sums:literal, $weights:literal, $values:literal) => {
        asm!(
            concat!("tdpbusd tmm", $sums, ", tmm", $weights, ", tmm", $values),
            options(nomem, nostack, preserves_flags),
        )
    };
}
use multiply_unsigned;

/// Makes a tile 0.
macro_rules! zero {
    ($tile:literal) => {
        asm!(concat!("tilezero tmm", $tile), options(nomem, nostack, preserves_flags))
    };
}
use zero;

/// Computes the exact sums of a task, a panel after the other. Those of a token are in the order that the output's rows have:
/// row by row in I2_S, else one quarter after the other, each with room for `step` units. Those of units beyond the task's
/// are any numbers.
///
/// `unpacked` is a buffer.
///
/// # Panics
/// If `step` is no multiple of [`PANEL`] or less than the task's units, or [`PANEL`] does not suffice for more than [`FEW`]
/// tokens, or `sums` has another length, or the widths of weights and activations differ.
///
/// # Safety
/// [`is_available`] has returned true.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
pub(crate) unsafe fn run(task: &Task<'_>, step: usize, unpacked: &mut Vec<Line>, sums: &mut [i32]) {
    let (tokens, units) = (task.x.tokens(), task.last - task.first);
    assert!(step.is_multiple_of(PANEL) && (1..=step).contains(&units), "{units} units of at most {step}");
    assert!(tokens <= FEW || step == PANEL, "several panels of many tokens");
    assert_eq!(sums.len(), tokens * 4 * step, "sums of the task");
    assert_eq!(task.weights.cols, task.x.cols(), "columns of the weights and the activations");
    unpacked.resize(4 * DEPTH * TILE, Line::EMPTY);
    let panels = Panels::new(task);
    // SAFETY: There are tiles, as the caller promises.
    unsafe {
        if tokens <= FEW {
            panels.few(unpacked, sums, 4 * step);
        } else {
            panels.many(unpacked, sums);
        }
        asm!("tilerelease", options(nomem, nostack, preserves_flags));
    }
}

/// Sets the shapes of the tiles: 0 and 1 are sums of the first tokens, 2 and 3 of the second; 4 and 5 are activations of
/// these; 6 and 7 are weights. Without second tokens all sums are of the first, and 5 is weights.
///
/// # Safety
/// There are tiles, and the numbers of tokens are at most 16.
unsafe fn configure([first, second]: [usize; 2]) {
    let (first, second) = (first as u8, second as u8);
    let rows = match second {
        0 => [first, first, first, first, first, 16, 16, 16],
        _ => [first, first, second, second, first, second, 16, 16],
    };
    // SAFETY: The caller's promise: no tile has more than 16 rows of 64 bytes.
    unsafe { configure_shapes(&rows.map(|rows| (rows, 64))) };
}

/// Sets the rows of tiles and the bytes of each row.
///
/// # Safety
/// There are tiles, at most 8 of them are used, and none has more than 16 rows or 64 bytes.
unsafe fn configure_shapes(shapes: &[(u8, u16)]) {
    /// As the instruction defines it.
    #[repr(C, align(64))]
    struct Config {
        palette: u8,
        start_row: u8,
        reserved: [u8; 14],
        bytes: [u16; 16],
        rows: [u8; 16],
    }
    let mut config = Config { palette: 1, start_row: 0, reserved: [0; 14], bytes: [0; 16], rows: [0; 16] };
    for (i, (rows, bytes)) in shapes.iter().enumerate() {
        (config.rows[i], config.bytes[i]) = (*rows, *bytes);
    }
    // SAFETY: The configuration is valid, as the caller promises, and has the 64 bytes that are read.
    unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const config, options(readonly, nostack, preserves_flags)) };
}

/// Rows of codes that are unpacked together.
struct Rows {
    /// Where the first one begins.
    first: usize,
    /// Bytes from a row to the next.
    apart: usize,
    /// The line of each.
    line: usize,
    /// After how many bytes codes are prefetched.
    ahead: Option<usize>,
}

/// The panels of a task.
struct Panels<'a> {
    layout: TernaryLayout,
    codes: &'a [u8],
    /// Bytes of a row of codes: of a unit or, in I2_S, of one of its four rows.
    width: usize,
    values: Lines<'a>,
    /// What the sums of each token begin with.
    starts: &'a [Line],
}

impl<'a> Panels<'a> {
    fn new(task: &Task<'a>) -> Self {
        let (weights, x) = (task.weights, task.x);
        let (width, values) = match weights.layout {
            TernaryLayout::Quarters => (weights.cols, x.lines()),
            TernaryLayout::I2s => (weights.cols / FIELDS, x.fields()),
        };
        Self {
            layout: weights.layout,
            codes: &weights.codes[task.first * weights.cols..task.last * weights.cols],
            width,
            values,
            starts: x.starts(),
        }
    }

    /// Lines of a row of codes.
    fn lines(&self) -> usize {
        self.width.div_ceil(Line::BYTES)
    }

    /// Unpacks a line of rows into four tiles, `apart` lines apart: one for each field of the codes. Rows beyond the task's
    /// become zeros, which stand for weights of -1.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
    #[inline]
    fn unpack(&self, rows: &Rows, tiles: &mut [Line], apart: usize) {
        let at = rows.line * Line::BYTES;
        let used = Line::BYTES.min(self.width - at);
        let behind_first = self.codes.len().checked_sub(rows.first + self.width);
        let count = behind_first.map_or(0, |behind| TILE.min(1 + behind / rows.apart));
        assert!(tiles.len() >= (FIELDS - 1) * apart + TILE);
        let from = self.codes.as_ptr().wrapping_add(rows.first + at);
        let mut words = [_mm512_setzero_si512(); TILE];
        if count == TILE && used == Line::BYTES {
            for row in 0..TILE {
                let from = from.wrapping_add(row * rows.apart);
                if let Some(ahead) = rows.ahead {
                    lanes::prefetch(from.wrapping_add(ahead));
                }
                // SAFETY: All 16 rows lie in `codes` with their `width` bytes, and 64 of these begin here.
                words[row] = unsafe { _mm512_loadu_si512(from.cast()) };
            }
        } else {
            let mask = !0 >> (Line::BYTES - used);
            for row in 0..count {
                let from = from.wrapping_add(row * rows.apart);
                // SAFETY: The row lies in `codes`, and the mask has as many bits as bytes are left of it. A masked load touches
                // no other byte.
                words[row] = unsafe { _mm512_maskz_loadu_epi8(mask, from.cast()) };
            }
        }
        transpose(&mut words);
        let three = _mm512_set1_epi8(3);
        for row in 0..TILE {
            let word = words[row];
            let codes = [
                word,
                _mm512_srli_epi32::<2>(word),
                _mm512_srli_epi32::<4>(word),
                _mm512_srli_epi32::<6>(word),
            ];
            for field in 0..FIELDS {
                // SAFETY: There are so many lines, as was asserted, each of 64 bytes and aligned to them.
                unsafe {
                    let to = tiles.as_mut_ptr().add(field * apart + row);
                    _mm512_store_si512(to.cast(), _mm512_and_si512(codes[field], three));
                }
            }
        }
    }
}

/// Transposes 16 x 16 words.
#[target_feature(enable = "avx512f")]
#[inline]
fn transpose(rows: &mut [__m512i; TILE]) {
    // Pairs of rows, then pairs of pairs: word `c` of rows `4 * q..4 * q + 4` in each lane of 128 bits.
    let mut quads = [[_mm512_setzero_si512(); 4]; 4];
    for (q, quad) in quads.iter_mut().enumerate() {
        let [a, b, c, d] = [rows[4 * q], rows[4 * q + 1], rows[4 * q + 2], rows[4 * q + 3]];
        let (ab, cd) = (_mm512_unpacklo_epi32(a, b), _mm512_unpacklo_epi32(c, d));
        quad[0] = _mm512_unpacklo_epi64(ab, cd);
        quad[1] = _mm512_unpackhi_epi64(ab, cd);
        let (ab, cd) = (_mm512_unpackhi_epi32(a, b), _mm512_unpackhi_epi32(c, d));
        quad[2] = _mm512_unpacklo_epi64(ab, cd);
        quad[3] = _mm512_unpackhi_epi64(ab, cd);
    }
    // The lanes of 128 bits are transposed in turn: lane `l` of what was word `c` becomes row `4 * l + c`.
    for c in 0..4 {
        let [a, b, d, e] = [quads[0][c], quads[1][c], quads[2][c], quads[3][c]];
        let (low, high) = (_mm512_shuffle_i32x4::<0x88>(a, b), _mm512_shuffle_i32x4::<0x88>(d, e));
        rows[c] = _mm512_shuffle_i32x4::<0x88>(low, high);
        rows[8 + c] = _mm512_shuffle_i32x4::<0xdd>(low, high);
        let (low, high) = (_mm512_shuffle_i32x4::<0xdd>(a, b), _mm512_shuffle_i32x4::<0xdd>(d, e));
        rows[4 + c] = _mm512_shuffle_i32x4::<0x88>(low, high);
        rows[12 + c] = _mm512_shuffle_i32x4::<0xdd>(low, high);
    }
}
