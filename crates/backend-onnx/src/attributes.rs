//! The attributes of the operators of the fast variant, bounded before anything is computed with them.
//!
//! Every bound is far above what a real model has and far below where a product of sizes could overflow, so that all further
//! arithmetic on them is safe without checks.

use ternion_formats::Activation;
use ternion_formats::onnx::fast;
use ternion_kernels::{self as kernels, TernaryLayout};

/// The most layers, heads, and elements of a head.
pub(crate) const MOST: i64 = 1 << 20;

/// The most elements of all heads of a token.
pub(crate) const MOST_WIDTH: usize = 1 << 24;

/// The most matrices of a ternary operator: those of query, key and value.
const MOST_MATRICES: usize = 3;

type Result<T> = std::result::Result<T, String>;

/// An integer that is a size or a count.
pub(crate) fn size(name: &str, value: Option<i64>) -> Result<usize> {
    match value {
        Some(value @ 0..=MOST) => Ok(value as usize),
        Some(value) => {
            Err(format!("the attribute `{name}` is {value}, expected an integer from 0 to {MOST}"))
        }
        None => Err(format!("the attribute `{name}` is missing, expected an integer from 0 to {MOST}")),
    }
}

/// Added to a mean square.
pub(crate) fn epsilon(value: f32) -> Result<f32> {
    if value.is_finite() && value >= 0.0 {
        return Ok(value);
    }
    Err(format!("the attribute `epsilon` is {value}, expected a finite number that is not negative"))
}

/// What cosines and sines are multiplied by.
pub(crate) fn factor(value: f32) -> Result<f32> {
    if value.is_finite() {
        return Ok(value);
    }
    Err(format!("the attribute `factor` is {value}, expected a finite number"))
}

/// What the integer products of each matrix are multiplied by.
pub(crate) fn scales(values: Option<Vec<f32>>) -> Result<Vec<f32>> {
    let values = values.ok_or("the attribute `scales` is missing, expected a number for each matrix")?;
    if values.is_empty() || values.len() > MOST_MATRICES {
        return Err(format!(
            "the attribute `scales` has {} numbers, expected 1 to {MOST_MATRICES}",
            values.len()
        ));
    }
    match values.iter().find(|scale| !scale.is_finite() || **scale == 0.0) {
        None => Ok(values),
        Some(bad) => Err(format!("the attribute `scales` holds {bad}, expected finite numbers other than 0")),
    }
}

/// The layout of codes.
pub(crate) fn layout(name: &str) -> Result<TernaryLayout> {
    let found = fast::LAYOUTS.iter().find(|(_, known)| *known == name);
    found.map(|(layout, _)| *layout).ok_or_else(|| {
        let known = fast::LAYOUTS.map(|(_, name)| name).join(", ");
        format!("the attribute `layout` is {name:?}; known: {known}")
    })
}

/// The activation of a gated unit.
pub(crate) fn activation(name: &str) -> Result<Activation> {
    let known = [Activation::Relu2, Activation::Silu];
    known.into_iter().find(|activation| fast::activation_name(*activation) == name).ok_or_else(|| {
        format!(
            "the attribute `activation` is {name:?}; known: {}",
            known.map(fast::activation_name).join(", ")
        )
    })
}

/// The heads of an attention, with products of sizes that cannot overflow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Heads {
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
    /// Elements of the queries of a token.
    pub(crate) width: usize,
    /// Elements of the keys of a token.
    pub(crate) kv_width: usize,
}

impl Heads {
    /// Reads `heads`, `kv_heads` and `head_dim` by `integer`, which returns an attribute by its name.
    pub(crate) fn new(integer: impl Fn(&'static str) -> Option<i64>) -> Result<Self> {
        let positive = |name| match size(name, integer(name))? {
            0 => Err(format!("the attribute `{name}` is 0, expected at least 1")),
            size => Ok(size),
        };
        let (heads, kv_heads, head_dim) = (positive("heads")?, positive("kv_heads")?, positive("head_dim")?);
        if !head_dim.is_multiple_of(2) {
            return Err(format!("the attribute `head_dim` is {head_dim}, expected an even number"));
        }
        if !heads.is_multiple_of(kv_heads) {
            return Err(format!(
                "the attribute `heads` is {heads}, expected a multiple of `kv_heads`, which is {kv_heads}"
            ));
        }
        // At least as large as that of the keys, since `heads` is a multiple of `kv_heads`.
        let width = heads.checked_mul(head_dim).filter(|width| *width <= MOST_WIDTH).ok_or_else(|| {
            format!("the attributes `heads` ({heads}) and `head_dim` ({head_dim}) are more than {MOST_WIDTH} together")
        })?;
        Ok(Self { heads, kv_heads, head_dim, width, kv_width: kv_heads * head_dim })
    }

    /// The attention behind `past` positions.
    pub(crate) fn attention(self, past: usize) -> kernels::Attention {
        let Self { heads, kv_heads, head_dim, .. } = self;
        kernels::Attention { heads, kv_heads, head_dim, past, scale: 1.0 / (head_dim as f32).sqrt() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The first makes `heads * head_dim` wrap to the width that is expected.
    const BAD: [i64; 9] = [
        288_230_376_151_711_748,
        i64::MAX,
        i64::MIN,
        -1,
        MOST + 1,
        1 << 32,
        (1 << 32) + 4,
        1 << 62,
        i64::MAX - 63,
    ];

    fn heads(values: [i64; 3]) -> Result<Heads> {
        let names = ["heads", "kv_heads", "head_dim"];
        Heads::new(|name| names.iter().position(|n| *n == name).map(|at| values[at]))
    }

    #[test]
    fn sizes_are_bounded() {
        for value in BAD {
            let error = size("layer", Some(value)).unwrap_err();
            assert!(error.contains("`layer`") && error.contains(&value.to_string()), "{error}");
        }
        assert!(size("layer", None).unwrap_err().contains("missing"));
        assert_eq!((size("layer", Some(0)), size("layer", Some(MOST))), (Ok(0), Ok(MOST as usize)));
    }

    #[test]
    fn heads_are_bounded_one_by_one_and_together() {
        let good = [4, 1, 64];
        assert_eq!(heads(good), Ok(Heads { heads: 4, kv_heads: 1, head_dim: 64, width: 256, kv_width: 64 }));
        for (at, name) in ["heads", "kv_heads", "head_dim"].into_iter().enumerate() {
            for value in BAD.into_iter().chain([0]) {
                let mut values = good;
                values[at] = value;
                let error = heads(values).unwrap_err();
                assert!(error.contains(&format!("`{name}` is {value}")), "{error}");
            }
        }
        for (values, words) in [
            ([4, 3, 64], "`heads` is 4, expected a multiple of `kv_heads`"),
            ([4, 1, 63], "`head_dim` is 63, expected an even number"),
            ([MOST, 1, 64], "`heads` (1048576) and `head_dim` (64)"),
            ([MOST, MOST, MOST], "more than 16777216 together"),
        ] {
            let error = heads(values).unwrap_err();
            assert!(error.contains(words), "{error}");
        }
    }

    #[test]
    fn floats_are_finite() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -1e-5] {
            assert!(epsilon(bad).unwrap_err().contains("`epsilon`"), "{bad}");
        }
        assert_eq!((epsilon(0.0), epsilon(1e-5)), (Ok(0.0), Ok(1e-5)));
        for bad in [f32::NAN, f32::INFINITY] {
            assert!(factor(bad).unwrap_err().contains("`factor`"), "{bad}");
        }
        assert_eq!(factor(1.25), Ok(1.25));
        for bad in [
            None,
            Some(vec![]),
            Some(vec![1.0; 4]),
            Some(vec![1.0, f32::NAN]),
            Some(vec![f32::INFINITY]),
            Some(vec![1.0, 2.0, 0.0]),
        ] {
            assert!(scales(bad.clone()).unwrap_err().contains("`scales`"), "{bad:?}");
        }
        assert_eq!(scales(Some(vec![1.0, -2.0])), Ok(vec![1.0, -2.0]));
    }

    #[test]
    fn names_are_known() {
        assert_eq!(layout("i2s"), Ok(TernaryLayout::I2s));
        assert_eq!(activation("silu"), Ok(Activation::Silu));
        for bad in ["", "I2S", "relu"] {
            assert!(layout(bad).unwrap_err().contains("`layout`"));
            assert!(activation(bad).unwrap_err().contains("`activation`"));
        }
    }
}
