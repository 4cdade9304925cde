//! Which weights stay in memory and which are streamed.
//!
//! Without a limit all do: they lie in the mapped file, and whatever memory they take the kernel may take back. With
//! one, those that fit are copied to memory of our own, which nothing takes away in favour of the rest of the file; the
//! others are streamed. Weights that had to be converted when they were loaded have no place in a file and always stay.

use ternion_core::Result;
use ternion_formats::{Checkpoint, LayerTensors, SharedBytes, Table, Weights};
use ternion_head::HeadWeights;

use crate::stream::Source;

/// Bytes of the head that are one piece, about as much as the largest projection of BitNet 2B4T.
const HEAD_PIECE: usize = 4 << 20;

/// Bytes of weights that may stay in memory. They are given out in the order of a pass, to each that still fits.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Budget(Option<usize>);

impl Budget {
    /// `None`: there is no limit, and nothing is copied.
    pub(crate) fn new(bytes: Option<u64>) -> Self {
        Self(bytes.map(|bytes| usize::try_from(bytes).unwrap_or(usize::MAX)))
    }

    /// Whether these bytes stay in memory.
    fn keeps(&mut self, bytes: &SharedBytes) -> bool {
        let Some(left) = self.0.as_mut().filter(|_| bytes.is_mapped()) else { return true };
        let rest = left.checked_sub(bytes.len());
        *left = rest.unwrap_or(*left);
        rest.is_some()
    }
}

/// Where the bytes of some weights are during a pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    /// Where the tensor says.
    Here,
    /// In this piece of the stream.
    Streamed(usize),
}

/// Collects what is streamed.
pub(crate) struct Placement {
    budget: Budget,
    pieces: Vec<Box<dyn Source>>,
}

impl Placement {
    pub(crate) fn new(budget: Budget) -> Self {
        Self { budget, pieces: Vec::new() }
    }

    /// Decides for the next weights of a pass, and loads them if they stay.
    ///
    /// # Errors
    /// Where they cannot be read, or there is no memory.
    pub(crate) fn place(&mut self, bytes: &mut SharedBytes) -> Result<Place> {
        if !self.budget.keeps(bytes) {
            self.pieces.push(Box::new(bytes.clone()));
            return Ok(Place::Streamed(self.pieces.len() - 1));
        }
        if self.budget.0.is_some() && bytes.is_mapped() {
            *bytes = bytes.to_memory()?;
        }
        Ok(Place::Here)
    }

    /// [`place`](Self::place) for the seven projections of a layer, in their order.
    ///
    /// # Errors
    /// As there.
    pub(crate) fn layer(&mut self, layer: &mut LayerTensors) -> Result<[Place; 7]> {
        let LayerTensors { q, k, v, o, gate, up, down, .. } = layer;
        let mut places = [Place::Here; 7];
        for (place, linear) in places.iter_mut().zip([q, k, v, o, gate, up, down]) {
            *place = match &mut linear.weights {
                Weights::Ternary(ternary) => self.place(&mut ternary.codes)?,
                Weights::Dense(dense) => self.place(&mut dense.bytes)?,
                Weights::Grouped(_) => Place::Here,
            };
        }
        Ok(places)
    }

    /// Whether some weights may have to be streamed.
    pub(crate) fn is_limited(&self) -> bool {
        self.budget.0.is_some()
    }

    /// How many pieces there are so far.
    pub(crate) fn len(&self) -> usize {
        self.pieces.len()
    }

    pub(crate) fn into_pieces(self) -> Vec<Box<dyn Source>> {
        self.pieces
    }
}

/// Rows of the head that are one piece.
pub(crate) fn head_rows(head: &HeadWeights) -> usize {
    let rows = head.shape()[0];
    let row = head.bytes().len() / rows;
    (HEAD_PIECE / row.max(1)).clamp(1, rows)
}

/// What a [`Budget`] makes of a checkpoint, in bytes.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Division {
    /// Ternary projections that stay.
    pub(crate) ternary: u64,
    /// Projections with grouped weights, all of which stay.
    pub(crate) grouped: u64,
    /// Plain projections that stay.
    pub(crate) dense: u64,
    /// The part of the head that stays.
    pub(crate) head: u64,
    /// What of these is copied to memory where there is a limit: those that lie in a file.
    pub(crate) copied: u64,
    /// All that is streamed.
    pub(crate) streamed: u64,
    /// The largest piece of that.
    pub(crate) largest: u64,
}

impl Division {
    /// What [`Placement`] will do, without doing it. `with_head`: the head itself is needed for each pass, not a copy.
    pub(crate) fn of(checkpoint: &Checkpoint, mut budget: Budget, with_head: bool) -> Self {
        let mut division = Self::default();
        for linear in checkpoint.layers.iter().flat_map(LayerTensors::linears) {
            let kept = match linear.bytes() {
                Some(bytes) => division.count(bytes, &mut budget),
                None => linear.size() as u64,
            };
            match linear.weights {
                Weights::Grouped(_) => division.grouped += kept,
                Weights::Ternary(_) => division.ternary += kept,
                Weights::Dense(_) => division.dense += kept,
            }
        }
        if let Table::Grouped(matrix) = checkpoint.head_or_embed() {
            division.head = matrix.bytes() as u64;
        }
        if let Some(head) = HeadWeights::of(checkpoint.head_or_embed()).filter(|_| with_head) {
            let (rows, step) = (head.shape()[0], head_rows(&head));
            for first in (0..rows).step_by(step) {
                let rows = head.rows(first..rows.min(first + step));
                division.head += division.count(rows.bytes(), &mut budget);
            }
        }
        division
    }

    /// Counts weights; returns how many bytes of them stay.
    fn count(&mut self, bytes: &SharedBytes, budget: &mut Budget) -> u64 {
        let length = bytes.len() as u64;
        if budget.keeps(bytes) {
            self.copied += if bytes.is_mapped() { length } else { 0 };
            return length;
        }
        self.streamed += length;
        self.largest = self.largest.max(length);
        0
    }
}
