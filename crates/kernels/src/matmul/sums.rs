//! The exact sums of some units for all tokens, and the scalar reference that computes them.

use std::cell::{Cell, RefCell};
use std::ops::Range;

use super::{Sink, Task};
use crate::quantize::Line;
use crate::{Isa, Quantized, TernaryLayout, TernaryRef};

/// Bytes of codes that are taken through all tokens before the next ones: they stay in the second-level cache.
const BLOCK_BYTES: usize = 64 << 10;

/// Sums of a block, at most: they stay there too.
const BLOCK_SUMS: usize = 128 << 10;

/// Sums of a cache line.
const LINE: usize = Line::BYTES / size_of::<i32>();

/// Whether products with these activations use the tiles of AMX.
#[cfg(target_arch = "x86_64")]
fn has_tiles(isa: Isa, x: &Quantized) -> bool {
    isa == Isa::Amx && x.tokens() >= crate::x86::amx::FEWEST
}

/// What the units of a task are best a multiple of.
pub(super) fn multiple(isa: Isa, x: &Quantized) -> usize {
    #[cfg(target_arch = "x86_64")]
    if has_tiles(isa, x) {
        return crate::x86::amx::PANEL;
    }
    let _ = (isa, x);
    1
}

/// Lays out the activations as products with a layout need them, on all threads of the team.
pub(super) fn lay_out(isa: Isa, layout: TernaryLayout, x: &Quantized) {
    #[cfg(target_arch = "x86_64")]
    if layout == TernaryLayout::I2s && matches!(isa, Isa::Avx512Vnni | Isa::Amx) {
        x.fields();
    }
    let _ = (isa, layout, x);
}

/// The sums of a block of units for all tokens. They are kept until the block is done, since rows that lie together in the
/// output are those of different units.
///
/// Those of a token are in the order of the output's rows: row by row for I2_S, for quarters one quarter after the other.
pub(super) struct Sums {
    isa: Isa,
    #[cfg(target_arch = "x86_64")]
    has_tiles: bool,
    layout: TernaryLayout,
    /// The most units of a block.
    step: usize,
    tokens: usize,
    buffer: Buffer,
}

/// Memory that a thread keeps for the next block: it is too large to ask the system for each time.
#[derive(Default)]
struct Buffer {
    /// `[tokens, 4, step]` or, for I2_S, `[tokens, step, 4]`, from the first whole line on.
    sums: Vec<i32>,
    /// Unpacked codes.
    #[cfg(target_arch = "x86_64")]
    tiles: Vec<Line>,
}

thread_local! {
    static BUFFERS: RefCell<Vec<Buffer>> = const { RefCell::new(Vec::new()) };
}

impl Drop for Sums {
    fn drop(&mut self) {
        let buffer = std::mem::take(&mut self.buffer);
        // Fails only while the thread ends, which needs no buffer.
        let _ = BUFFERS.try_with(|buffers| buffers.borrow_mut().push(buffer));
    }
}

impl Sums {
    /// Blocks are read from memory once, however many tokens there are.
    pub(super) fn new(isa: Isa, weights: &TernaryRef<'_>, x: &Quantized, units: &Range<usize>) -> Self {
        assert!(isa.is_available(), "this CPU has no {isa}");
        assert_eq!(weights.cols, x.cols, "columns of the weights and the activations");
        let tokens = x.tokens();
        let most = (BLOCK_BYTES / weights.cols).min(BLOCK_SUMS / 4 / tokens.max(1));
        let step = most.clamp(1, units.len().max(1));
        #[cfg(target_arch = "x86_64")]
        let has_tiles = has_tiles(isa, x);
        #[cfg(target_arch = "x86_64")]
        let step = if has_tiles { crate::x86::amx::step(units.len(), tokens) } else { step };
        let mut buffer = BUFFERS.with_borrow_mut(Vec::pop).unwrap_or_default();
        // A line more, of which the first one begins.
        buffer.sums.resize(tokens * 4 * step + LINE, 0);
        Self {
            isa,
            #[cfg(target_arch = "x86_64")]
            has_tiles,
            layout: weights.layout,
            step,
            tokens,
            buffer,
        }
    }

    /// Sums of a token, those included that a smaller block leaves as they are.
    pub(super) fn width(&self) -> usize {
        4 * self.step
    }

    pub(super) fn blocks(&self, units: Range<usize>) -> impl Iterator<Item = Range<usize>> + use<> {
        let step = self.step;
        units.clone().step_by(step).map(move |first| first..units.end.min(first + step))
    }

    /// Computes a block.
    pub(super) fn fill(&mut self, weights: TernaryRef<'_>, x: &Quantized, block: &Range<usize>) {
        let task = Task { weights, x, first: block.start, last: block.end };
        let (layout, step, width) = (self.layout, self.step, self.width());
        let sums = self.places();
        let sums = &mut self.buffer.sums[sums];
        #[cfg(target_arch = "x86_64")]
        if self.has_tiles {
            // SAFETY: `has_tiles` says that AMX is used, and `new` checked that it is available.
            return unsafe { crate::x86::amx::run(&task, step, &mut self.buffer.tiles, sums) };
        }
        let sums = Cell::from_mut(sums).as_slice_of_cells();
        let sink = |unit: usize, token: usize, four: [i32; 4]| {
            let (sums, unit) = (&sums[token * width..][..width], unit - block.start);
            match layout {
                TernaryLayout::I2s => (0..4).for_each(|i| sums[4 * unit + i].set(four[i])),
                TernaryLayout::Quarters => (0..4).for_each(|i| sums[i * step + unit].set(four[i])),
            }
        };
        match self.isa {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `isa` is available, which `new` checked.
            Isa::Avx2 => unsafe { crate::x86::avx2::run(&task, &sink) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: As above.
            Isa::AvxVnni => unsafe { crate::x86::avx_vnni::run(&task, &sink) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: As above.
            Isa::Avx512Vnni | Isa::Amx => unsafe { crate::x86::avx512::run(&task, &sink) },
            #[cfg(target_arch = "aarch64")]
            // SAFETY: As above.
            Isa::NeonDot => unsafe { crate::aarch64::dot::run(&task, &sink) },
            #[cfg(target_arch = "aarch64")]
            // SAFETY: As above.
            Isa::NeonI8mm => unsafe { crate::aarch64::i8mm::run(&task, &sink) },
            // The others are not available here.
            _ => scalar(&task, &sink),
        }
    }

    /// What was computed for a token.
    pub(super) fn of(&self, token: usize) -> &[i32] {
        &self.buffer.sums[self.places()][token * self.width()..][..self.width()]
    }

    /// For each stretch of rows of a block the first one and where they lie in the sums of a token.
    pub(super) fn rows(
        &self,
        weights: &TernaryRef<'_>,
        block: &Range<usize>,
    ) -> impl Iterator<Item = (usize, Range<usize>)> + use<> {
        let (count, rows, between) = match self.layout {
            TernaryLayout::I2s => (1, 4 * block.len(), 0),
            TernaryLayout::Quarters => (4, block.len(), self.step),
        };
        let (first, quarter) = (weights.row_of(block.start, 0), weights.rows / 4);
        (0..count).map(move |i| (first + i * quarter, i * between..i * between + rows))
    }

    /// Where the sums lie in the buffer.
    fn places(&self) -> Range<usize> {
        let first = self.buffer.sums.as_ptr().align_offset(Line::BYTES);
        first..first + self.tokens * self.width()
    }
}

fn scalar(task: &Task<'_>, sink: &impl Sink) {
    let weights = task.weights;
    for u in task.first..task.last {
        let codes = weights.unit(u);
        for token in 0..task.x.tokens() {
            let values = task.x.values(token);
            let sums = std::array::from_fn(|i| {
                let weight = |k| {
                    let (byte, shift) = weights.place(i, k);
                    i32::from((codes[byte] >> shift) & 3) - 1
                };
                values.iter().enumerate().map(|(k, &value)| weight(k) * i32::from(value)).sum()
            });
            sink(u, token, sums);
        }
    }
}
