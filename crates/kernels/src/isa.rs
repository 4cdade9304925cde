//! Which vector instructions this CPU has.

use std::{fmt, sync::OnceLock};

/// A set of instructions that the kernels have a path for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Isa {
    /// Portable Rust; the reference for the others.
    Scalar,
    /// x86-64 with AVX2, FMA and F16C.
    Avx2,
    /// The same with AVX-VNNI: Intel's CPUs since the 12th generation, AMD's since the fifth of Zen.
    AvxVnni,
    /// x86-64 with AVX-512 (F, BW, VL, DQ) and VNNI.
    Avx512Vnni,
    /// The same with tiles of int8 (AMX) for products of several tokens: Intel's servers since Sapphire Rapids. On Linux
    /// only, which has to be asked for the tiles' registers.
    Amx,
    /// aarch64 with dot products (FEAT_DotProd): Apple's from the M1 on, most others since 2018.
    NeonDot,
    /// aarch64 with dot products and matrix products of bytes (FEAT_I8MM): Apple's from the M2 on.
    NeonI8mm,
}

impl Isa {
    /// The best one that this CPU has.
    pub fn detect() -> Self {
        static BEST: OnceLock<Isa> = OnceLock::new();
        #[cfg(test)]
        if let Some(isa) = FORCED.get() {
            return isa;
        }
        *BEST.get_or_init(|| Self::available().last().copied().unwrap_or(Self::Scalar))
    }

    /// All that this CPU has, the slowest first.
    pub fn available() -> Vec<Self> {
        let all = [
            Self::Scalar,
            Self::Avx2,
            Self::AvxVnni,
            Self::Avx512Vnni,
            Self::Amx,
            Self::NeonDot,
            Self::NeonI8mm,
        ];
        all.into_iter().filter(|isa| isa.is_available()).collect()
    }

    /// Whether this CPU has it.
    pub fn is_available(self) -> bool {
        match self {
            Self::Scalar => true,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => {
                is_x86_feature_detected!("avx2")
                    && is_x86_feature_detected!("fma")
                    && is_x86_feature_detected!("f16c")
            }
            #[cfg(target_arch = "x86_64")]
            Self::AvxVnni => Self::Avx2.is_available() && is_x86_feature_detected!("avxvnni"),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Vnni => {
                Self::Avx2.is_available()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vnni")
            }
            #[cfg(target_arch = "x86_64")]
            Self::Amx => Self::Avx512Vnni.is_available() && crate::x86::amx::is_available(),
            #[cfg(target_arch = "aarch64")]
            Self::NeonDot => {
                cfg!(target_endian = "little") && std::arch::is_aarch64_feature_detected!("dotprod")
            }
            #[cfg(target_arch = "aarch64")]
            Self::NeonI8mm => Self::NeonDot.is_available() && std::arch::is_aarch64_feature_detected!("i8mm"),
            // Those of other architectures.
            _ => false,
        }
    }
}

#[cfg(test)]
thread_local! {
    /// What [`Isa::detect`] returns on this thread.
    static FORCED: std::cell::Cell<Option<Isa>> = const { std::cell::Cell::new(None) };
}

#[cfg(test)]
impl Isa {
    /// Runs `work` as if this were the best one that the CPU has, on this thread. Threads of a team are not affected.
    pub(crate) fn force<R>(self, work: impl FnOnce() -> R) -> R {
        struct Restore(Option<Isa>);
        impl Drop for Restore {
            fn drop(&mut self) {
                FORCED.set(self.0);
            }
        }
        assert!(self.is_available(), "this CPU has no {self}");
        let _restore = Restore(FORCED.replace(Some(self)));
        work()
    }

    /// Whether [`multiversion!`] compiles a function with fused multiply-adds for it.
    pub(crate) fn is_fused(self) -> bool {
        self != Self::Scalar || cfg!(any(target_arch = "aarch64", target_feature = "fma"))
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Scalar => "scalar",
            Self::Avx2 => "AVX2",
            Self::AvxVnni => "AVX-VNNI",
            Self::Avx512Vnni => "AVX-512-VNNI",
            Self::Amx => "AMX",
            Self::NeonDot => "NEON-DotProd",
            Self::NeonI8mm => "NEON-I8MM",
        })
    }
}

/// Compiles a function of portable Rust once for each [`Isa`] and calls the best one that the CPU has.
///
/// The body is generic over `const FMA: bool`: whether fused multiply-adds are instructions.
macro_rules! multiversion {
    ($(#[$meta:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) = $body:ident;) => {
        $(#[$meta])*
        $vis fn $name($($arg: $ty),*) {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")]
                fn avx512($($arg: $ty),*) {
                    $body::<true>($($arg),*)
                }
                #[target_feature(enable = "avx2,fma")]
                fn avx2($($arg: $ty),*) {
                    $body::<true>($($arg),*)
                }
                match $crate::isa::Isa::detect() {
                    // SAFETY: `detect` returns only what the CPU has, which includes these features.
                    $crate::isa::Isa::Avx512Vnni | $crate::isa::Isa::Amx => return unsafe { avx512($($arg),*) },
                    // SAFETY: As above.
                    $crate::isa::Isa::Avx2 | $crate::isa::Isa::AvxVnni => return unsafe { avx2($($arg),*) },
                    _ => {}
                }
            }
            $body::<{ cfg!(any(target_arch = "aarch64", target_feature = "fma")) }>($($arg),*)
        }
    };
}
pub(crate) use multiversion;

/// As [`multiversion!`], for a body that is generic over the [`Vector`](crate::vector::Vector) of the instructions; they
/// are named by the first argument.
macro_rules! vectorized {
    (fn $name:ident($isa:ident: Isa, $($arg:ident: $ty:ty),* $(,)?) = $body:ident;) => {
        fn $name($isa: $crate::isa::Isa, $($arg: $ty),*) {
            assert!($isa.is_available(), "this CPU has no {}", $isa);
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
                fn avx512($($arg: $ty),*) {
                    $body::<$crate::x86::vector::Avx512>($($arg),*)
                }
                #[target_feature(enable = "avx2,fma,f16c")]
                fn avx2($($arg: $ty),*) {
                    $body::<$crate::x86::vector::Avx2>($($arg),*)
                }
                match $isa {
                    // SAFETY: The CPU has these instructions, as was asserted.
                    $crate::isa::Isa::Avx512Vnni | $crate::isa::Isa::Amx => return unsafe { avx512($($arg),*) },
                    // SAFETY: As above.
                    $crate::isa::Isa::Avx2 | $crate::isa::Isa::AvxVnni => return unsafe { avx2($($arg),*) },
                    _ => {}
                }
            }
            #[cfg(target_arch = "aarch64")]
            if $isa != $crate::isa::Isa::Scalar {
                return $body::<$crate::aarch64::vector::Neon>($($arg),*);
            }
            $body::<
                $crate::vector::Portable<{ cfg!(any(target_arch = "aarch64", target_feature = "fma")) }>,
            >($($arg),*)
        }
    };
}
pub(crate) use vectorized;
