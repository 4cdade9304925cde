//! The head, which local engines have in common: from hidden states to logits.
//!
//! It is read whole for every token, and in half precision it is more bytes than all ternary weights of BitNet 2B4T. A
//! [`CertifiedHead`] reads half of them, and its leading logits are those of the [`HeadWeights`] by proof.

mod certified;
mod kind;
mod weights;

pub use certified::CertifiedHead;
pub use kind::HeadKind;
pub use weights::HeadWeights;
