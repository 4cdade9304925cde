//! Keys and values as integer sums: attention gives the bits that it gives for the floats which the sums stand for.

use ternion_kernels::{
    Attention, AttentionSequence, Team, attention, attention_all,
    kv::{BLOCK, Factors, KeyRotation, KvBlock, KvLayout, KvType, MAX_SUM, append, append_sums, kv_blocks},
    rotate, rotate_queries,
};

/// A sequence in both forms.
struct Case {
    shape: Attention,
    layout: KvLayout,
    /// Rotated queries, `[length, heads, head_dim]`.
    queries: Vec<f32>,
    floats: Vec<KvBlock>,
    sums: Vec<KvBlock>,
    rotations: Vec<KeyRotation>,
}

/// Sums up to `most` at a few places, and of 12 bits elsewhere. Written in pieces of `step` positions.
fn case(shape: Attention, length: usize, most: i32, step: usize) -> Case {
    let Attention { heads, kv_heads, head_dim, .. } = shape;
    let mut state = length as u32 ^ most as u32;
    let mut random = move || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as i32 - (1 << 23)
    };
    let (width, kv_width, half) = (heads * head_dim, kv_heads * head_dim, head_dim / 2);
    let row = width + 2 * kv_width;
    let factors: Vec<f32> = (0..2 * length).map(|_| (random().abs() % 1000 + 1) as f32 * 1e-6).collect();
    let (key_factors, value_factors) = factors.split_at(length);
    let mut qkv = Vec::with_capacity(length * row);
    for token in 0..length {
        for i in 0..row {
            let factor = if i < width + kv_width { key_factors[token] } else { value_factors[token] };
            let bound = if random() % 997 == 0 { most + 1 } else { 4096 };
            qkv.push((random() % bound) as f32 * factor);
        }
    }
    let angle = |position: usize, i: usize| position as f32 * 10_000f32.powf(-(i as f32) / half as f32);
    let whole = length.next_multiple_of(BLOCK);
    let angles = |f: fn(f32) -> f32| -> Vec<f32> {
        (0..whole).flat_map(|p| (0..half).map(move |i| f(angle(p, i)))).collect()
    };
    let (cos, sin) = (angles(f32::cos), angles(f32::sin));
    let block = BLOCK * half;
    let rotations =
        cos.chunks_exact(block).zip(sin.chunks_exact(block)).map(|(c, s)| KeyRotation::new(c, s)).collect();
    let of_tokens = (&cos[..length * half], &sin[..length * half]);
    let (mut q, mut k, mut v) =
        (vec![0.0; length * width], vec![0.0; length * kv_width], vec![0.0; length * kv_width]);
    let layout = KvLayout { layers: 2, kv_heads, head_dim };
    let blocks = |kv_type| -> Vec<KvBlock> {
        (0..length.div_ceil(BLOCK))
            .map(|_| KvBlock::new(&layout, kv_type).expect("there is memory"))
            .collect()
    };
    let (mut floats, mut sums) = (blocks(KvType::F32), blocks(KvType::Exact));
    rotate(&shape, &qkv, of_tokens, &mut q, &mut k, &mut v);
    for start in (0..length).step_by(step) {
        let end = length.min(start + step);
        let part = start * kv_width..end * kv_width;
        let mut to: Vec<&mut KvBlock> = floats[start / BLOCK..end.div_ceil(BLOCK)].iter_mut().collect();
        append(&mut to, 1, start % BLOCK, &k[part.clone()], &v[part]);
    }
    rotate_queries(&shape, &qkv, of_tokens, &mut q, &mut k, &mut v);
    for start in (0..length).step_by(step) {
        let end = length.min(start + step);
        let part = start * kv_width..end * kv_width;
        let factors = Factors { keys: &key_factors[start..end], values: &value_factors[start..end] };
        let mut to: Vec<&mut KvBlock> = sums[start / BLOCK..end.div_ceil(BLOCK)].iter_mut().collect();
        append_sums(&mut to, 1, start % BLOCK, (&k[part.clone()], &v[part]), factors);
    }
    Case { shape, layout, queries: q, floats, sums, rotations }
}

impl Case {
    /// The attention of the queries `from..to`.
    fn of(&self, kv_type: KvType, threads: usize, from: usize, to: usize) -> Vec<f32> {
        let width = self.shape.heads * self.shape.head_dim;
        let blocks = if kv_type == KvType::F32 { &self.floats } else { &self.sums };
        let kv = kv_blocks(blocks.iter(), &self.layout, kv_type, 1).with_rotations(&self.rotations);
        let mut out = vec![0.0; (to - from) * width];
        let shape = Attention { past: from, ..self.shape };
        let team = Team::new(threads).expect("threads can be started");
        team.install(|| attention(shape, &self.queries[from * width..to * width], &kv, &mut out));
        out
    }
}

fn same(a: &[f32], b: &[f32]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits())
}

#[test]
fn sums_give_the_bits_of_floats() {
    for (heads, kv_heads, head_dim, length) in
        [(4, 2, 16, 70), (20, 5, 128, 130), (6, 2, 72, 66), (3, 1, 100, 200), (2, 1, 2, 3), (4, 2, 32, 1100)]
    {
        let shape = Attention { heads, kv_heads, head_dim, past: 0, scale: 0.01 };
        for (most, step) in [(4096, 1), (32_768, 50), (MAX_SUM as i32, 64), (MAX_SUM as i32, 33)] {
            let case = case(shape, length, most, step);
            for (from, to) in [(0, length), (length / 2, length), (length - 1, length)] {
                let expected = case.of(KvType::F32, 1, from, to);
                assert!(expected.iter().all(|x| x.is_finite()));
                for threads in [1, 3] {
                    let found = case.of(KvType::Exact, threads, from, to);
                    assert!(
                        same(&found, &expected),
                        "{heads} heads of {head_dim}, {from} to {to}, up to {most}"
                    );
                }
            }
        }
    }
}

/// A query has the same result alone, with others, beside other sequences, and on any number of threads: also where its
/// positions are several segments.
#[test]
fn results_do_not_depend_on_what_is_computed_beside() {
    let shape = Attention { heads: 6, kv_heads: 2, head_dim: 16, past: 0, scale: 0.3 };
    let width = shape.heads * shape.head_dim;
    for kv_type in [KvType::F32, KvType::Exact] {
        let cases = [1200, 3, 600].map(|length| case(shape, length, 70_000, 64));
        let whole = cases.each_ref().map(|case| case.of(kv_type, 1, 0, case.queries.len() / width));
        let long = &cases[0];
        for position in [0, 511, 512, 513, 1023, 1024, 1199] {
            for threads in [1, 2, 5] {
                let one = long.of(kv_type, threads, position, position + 1);
                let expected = &whole[0][position * width..(position + 1) * width];
                assert!(same(&one, expected), "{kv_type} {position} on {threads}");
            }
        }
        // The last queries of all, in one step.
        let last = |case: &Case| case.queries.len() / width - 2..case.queries.len() / width;
        let blocks = |case: &Case| if kv_type == KvType::F32 { 0 } else { case.sums.len() };
        let sequences: Vec<AttentionSequence<'_>> = cases
            .iter()
            .map(|case| {
                let stored = if blocks(case) == 0 { &case.floats } else { &case.sums };
                let kv = kv_blocks(stored.iter(), &case.layout, kv_type, 1).with_rotations(&case.rotations);
                AttentionSequence { past: last(case).start, tokens: 2, kv }
            })
            .collect();
        let of_last = |x: &[f32], case: &Case| x[last(case).start * width..last(case).end * width].to_vec();
        let queries: Vec<f32> = cases.iter().flat_map(|case| of_last(&case.queries, case)).collect();
        let expected: Vec<f32> =
            cases.iter().zip(&whole).flat_map(|(case, out)| of_last(out, case)).collect();
        for threads in [1, 2, 7] {
            let mut out = vec![0.0; queries.len()];
            Team::new(threads).unwrap().install(|| attention_all(&shape, &sequences, &queries, &mut out));
            assert!(same(&out, &expected), "{kv_type} on {threads}");
        }
    }
}

/// A token whose activations are not finite has factors that are not, which is seen in the result.
#[test]
fn factors_that_are_not_numbers_are_passed_on() {
    let layout = KvLayout { layers: 1, kv_heads: 1, head_dim: 4 };
    for broken in [f32::NAN, f32::INFINITY] {
        let mut block = KvBlock::new(&layout, KvType::Exact).unwrap();
        let factors = Factors { keys: &[broken], values: &[1.0] };
        append_sums(&mut [&mut block], 0, 0, (&[broken; 4], &[1.0; 4]), factors);
        let rotations = [KeyRotation::new(&[1.0; 2 * BLOCK], &[0.0; 2 * BLOCK])];
        let kv = kv_blocks([&block].into_iter(), &layout, KvType::Exact, 0).with_rotations(&rotations);
        let shape = Attention { heads: 1, kv_heads: 1, head_dim: 4, past: 0, scale: 1.0 };
        let mut out = [0.0; 4];
        attention(shape, &[1.0; 4], &kv, &mut out);
        assert!(out.iter().all(|x| x.is_nan()), "{broken}: {out:?}");
    }
}
