//! The arithmetic of ternary language models on the CPU.
//!
//! * [`matmul`]: W1.58A8 products of packed ternary weights with int8 activations, exact in int32. The weights are read
//!   where they lie in a mapped file, in the packed layout of Hugging Face transformers or in I2_S of GGUF; nothing is
//!   repacked.
//! * [`grouped_matmul`]: products of ternary or binary weights with a scale for each group of a row ([`GroupedMatrix`]), with
//!   activations in int8 ([`GroupedInput`]) or in f32 ([`grouped_matmul_f32`]).
//! * [`Quantized`]: activations as the products take them.
//! * [`kv`]: how the KV cache lays out keys and values in blocks, for those who write them and for [`attention`].
//! * [`CompactMatrix`]: a copy of plain weights in 8 or 4 bits.
//! * [`BoundedMatrix`]: an int8 copy whose products have proven bounds.
//! * [`dense_matmul`], [`rms_norm`], [`relu2_glu`], [`silu_glu`], [`rotate`], [`attention`]: the float operations of a
//!   decoder.
//!
//! Which instructions are used is decided at run time ([`Isa`]): AVX2, AVX-VNNI, AVX-512 with VNNI or AMX on x86-64, NEON with
//! dot products or I8MM on aarch64, and portable Rust elsewhere. Products of ternary weights are the same to the last
//! bit on every [`Isa`]. All results are the same to the last bit whatever the number of threads and however many tokens
//! are computed at once, so that a prompt gives the same logits whole, in chunks or on a kept prefix.
//!
//! Work is divided over the threads of the [`Team`] that the caller runs in. An engine with threads of its own calls
//! [`matmul_part`] and [`dense_matmul_part`] on each of them instead.
//!
//! This is the only crate of Ternion with vector instructions; every `unsafe` block says what it relies on.
#![allow(
    clippy::inline_always,
    reason = "a body is compiled once for each set of instructions, which only inlining into the caller does"
)]
#![allow(
    clippy::needless_range_loop,
    reason = "loops over lanes of several vectors become vector instructions"
)]

#[cfg(target_arch = "aarch64")]
mod aarch64;
mod affinity;
mod attention;
mod bounded;
mod compact;
mod dense;
#[cfg(test)]
mod every_isa;
mod float;
mod grouped;
mod isa;
pub mod kv;
mod lanes;
mod leading;
mod master;
mod matmul;
mod quantize;
mod rotary;
mod stream;
mod team;
mod ternary;
mod vector;
#[cfg(target_arch = "x86_64")]
mod x86;

pub use affinity::{Confined, allowed_cpus, confine};
pub use attention::{
    Attention, AttentionSequence, CellFloats, CellRows, VisibleCells, attention, attention_all,
    attention_with, cells_attention_part,
};
pub use bounded::{BoundedMatrix, InputBound};
pub use compact::{CompactBits, CompactMatrix};
pub use dense::{DenseRef, dense_matmul, dense_matmul_part};
pub use float::{add, relu2_glu, relu2_part, rms_norm, rms_norm_here, silu_glu};
pub use grouped::{
    ActivationType, GroupedInput, GroupedKind, GroupedMatrix, GroupedProduct, grouped_matmul,
    grouped_matmul_all, grouped_matmul_f32, grouped_matmul_f32_part, grouped_matmul_part,
    grouped_matmul_with, is_group_scale,
};
pub use isa::Isa;
pub use leading::leading;
pub use master::{pack_quantized, quantize_master};
pub use matmul::{
    GatedUnit, Product, accumulate, gated_matmul, gated_matmul_with, matmul, matmul_all, matmul_part,
    matmul_with,
};
pub use quantize::Quantized;
pub use rotary::{norm_heads, rotate, rotate_queries};
pub use stream::read_through;
pub use team::{Team, default_threads, for_each_mut};
pub use ternary::{MAX_COLS, TernaryLayout, TernaryRef, WeightsError, find_invalid_code, pack, unpack};
