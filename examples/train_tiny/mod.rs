//! The parts of the example `train_tiny`.

pub(crate) mod attention;
pub(crate) mod batch;
pub(crate) mod checkpoint;
pub(crate) mod evaluate;
pub(crate) mod export;
pub(crate) mod master;
pub(crate) mod model;
pub(crate) mod ops;
pub(crate) mod optimizer;
pub(crate) mod questions;
pub(crate) mod text;
pub(crate) mod tokenizer;
pub(crate) mod train;

#[cfg(test)]
mod gradients;
