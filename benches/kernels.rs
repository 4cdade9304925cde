//! Speed of the kernels on the shapes of BitNet b1.58 2B4T, per thread count and instruction set.
//!
//! `cargo bench -p ternion-kernels` prints giga-operations per second: multiply-adds for products, bytes for those that
//! memory bounds. `memory/read` is what reading alone reaches, to compare with.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use ternion_kernels::{
    ActivationType, Attention, CompactBits, CompactMatrix, DenseRef, GroupedInput, GroupedKind,
    GroupedMatrix, GroupedProduct, Isa, Quantized, Team, TernaryLayout, TernaryRef, WeightsError, attention,
    dense_matmul, for_each_mut, grouped_matmul, grouped_matmul_f32,
    kv::{BLOCK, Factors, KeyRotation, KvBlock, KvLayout, KvType, append, append_sums, kv_blocks},
    matmul_with,
};

fn team(threads: usize) -> Team {
    Team::new(threads).expect("threads can be started")
}

fn thread_counts() -> Vec<usize> {
    let all = std::thread::available_parallelism().map_or(1, usize::from);
    if all == 1 { vec![1] } else { vec![1, all] }
}

fn activations(tokens: usize, cols: usize) -> Vec<f32> {
    (0..tokens * cols).map(|i| ((i * 7919) % 1000) as f32 / 500.0 - 1.0).collect()
}

fn ternary(c: &mut Criterion) {
    let shapes = [(2560, 2560), (13824, 2560), (2560, 6912)];
    let layouts = [("ternary", TernaryLayout::Quarters), ("i2_s", TernaryLayout::I2s)];
    for ((rows, cols), (name, layout)) in shapes.into_iter().flat_map(|s| layouts.map(|l| (s, l))) {
        let codes: Vec<u8> = (0..rows / 4 * cols).map(|i| [0x92, 0x19, 0x55, 0x64][i * 31 % 4]).collect();
        let weights = TernaryRef::new(layout, &codes, rows, cols).expect("a valid shape");
        let mut group = c.benchmark_group(format!("{name}/{rows}x{cols}"));
        for isa in Isa::available() {
            for tokens in [1, 8, 128, 512] {
                if isa == Isa::Scalar && tokens > 1 {
                    continue;
                }
                let mut x = Quantized::default();
                x.quantize(&activations(tokens, cols), cols);
                let mut out = vec![0.0; tokens * rows];
                group.throughput(Throughput::Elements((rows * cols * tokens) as u64));
                for threads in thread_counts() {
                    let id = BenchmarkId::new(format!("{isa}/{threads} threads"), tokens);
                    group.bench_function(id, |b| {
                        team(threads)
                            .install(|| b.iter(|| matmul_with(isa, weights, 0.5, &x, &mut out, rows)));
                    });
                }
            }
        }
    }
}

/// All the ternary weights of a model, one after the other, as decoding reads them: from memory, not from caches.
fn decode(c: &mut Criterion) {
    let (rows, cols, matrices) = (2560, 6912, 100);
    let size = rows / 4 * cols;
    let codes: Vec<u8> = (0..size * matrices).map(|i| [0x92, 0x19, 0x55, 0x64][i * 31 % 4]).collect();
    let mut x = Quantized::default();
    x.quantize(&activations(1, cols), cols);
    let mut out = vec![0.0; rows];
    let mut group = c.benchmark_group("memory");
    group.sample_size(10).throughput(Throughput::Bytes(codes.len() as u64));
    for threads in thread_counts() {
        let team = team(threads);
        group.bench_function(BenchmarkId::new("ternary", threads), |b| {
            team.install(|| {
                b.iter(|| {
                    for codes in codes.chunks_exact(size) {
                        let weights = TernaryRef::new(TernaryLayout::Quarters, codes, rows, cols)
                            .expect("a valid shape");
                        matmul_with(Isa::detect(), weights, 0.5, &x, &mut out, rows);
                    }
                });
            });
        });
        group.bench_function(BenchmarkId::new("read", threads), |b| {
            let sum = |part: &[u8]| {
                part.as_chunks().0.iter().fold(0u64, |s, w: &[u8; 8]| s ^ u64::from_le_bytes(*w))
            };
            team.install(|| {
                b.iter(|| {
                    let mut parts: Vec<_> = codes.chunks(1 << 20).map(|part| (part, 0)).collect();
                    for_each_mut(&mut parts, |_, (part, result)| *result = sum(part));
                    black_box(parts);
                });
            });
        });
    }
    let (rows, cols) = (128_256, 2560);
    let head = vec![0x3fu8; rows * cols * 2];
    let x = activations(8, cols);
    let mut out = vec![0.0; 8 * rows];
    for (bits, name) in [(CompactBits::Eight, "int8"), (CompactBits::Four, "int4")] {
        let copy = CompactMatrix::of(bits, DenseRef::Bf16(&head), rows, cols);
        group.throughput(Throughput::Bytes(copy.bytes() as u64));
        for threads in thread_counts() {
            let team = team(threads);
            for tokens in [1, 8] {
                group.bench_function(BenchmarkId::new(format!("{name} head of {tokens}"), threads), |b| {
                    team.install(|| b.iter(|| copy.matmul(&x[..tokens * cols], &mut out, rows)));
                });
            }
        }
    }
    group.throughput(Throughput::Bytes(head.len() as u64));
    for threads in thread_counts() {
        let team = team(threads);
        for tokens in [1, 8] {
            group.bench_function(BenchmarkId::new(format!("head of {tokens}"), threads), |b| {
                team.install(|| {
                    b.iter(|| {
                        let x = &x[..tokens * cols];
                        dense_matmul(DenseRef::Bf16(&head), rows, cols, x, &mut out, rows);
                    });
                });
            });
        }
    }
}

/// Keys and values of `layers` layers up to `length`; what the numbers are does not matter.
fn cache(kv_type: KvType, layout: &KvLayout, length: usize) -> Vec<KvBlock> {
    let width = layout.kv_heads * layout.head_dim;
    let sums: Vec<f32> = (0..BLOCK * width).map(|i| ((i * 7919) % 4001) as f32 - 2000.0).collect();
    let factors = Factors { keys: &[1.0; BLOCK], values: &[1.0; BLOCK] };
    let block = |_| {
        let mut block = KvBlock::new(layout, kv_type).expect("there is memory");
        for layer in 0..layout.layers {
            match kv_type {
                KvType::Exact => append_sums(&mut [&mut block], layer, 0, (&sums, &sums), factors),
                _ => append(&mut [&mut block], layer, 0, &sums, &sums),
            }
        }
        block
    };
    (0..length.div_ceil(BLOCK)).map(block).collect()
}

/// Attention of one token over 16 layers, which are more than fits into the caches, and of chunks over one layer.
fn attend(c: &mut Criterion) {
    let mut group = c.benchmark_group("attention");
    let (heads, kv_heads, head_dim) = (20, 5, 128);
    let rotation = KeyRotation::new(&[0.8; BLOCK * 64], &[0.6; BLOCK * 64]);
    for (past, tokens) in [(511_usize, 1), (3839, 1), (0, 512), (3584, 512)] {
        let layout = KvLayout { layers: if tokens == 1 { 16 } else { 1 }, kv_heads, head_dim };
        let rotations = vec![rotation.clone(); (past + tokens).div_ceil(BLOCK)];
        let q = activations(tokens, heads * head_dim);
        let mut out = vec![0.0; q.len()];
        let shape = Attention { heads, kv_heads, head_dim, past, scale: 1e-6 };
        let products = 2 * heads * head_dim * tokens * (past + tokens / 2) * layout.layers;
        group.throughput(Throughput::Elements(products as u64));
        for kv_type in [KvType::F32, KvType::Exact, KvType::F16, KvType::Int8] {
            let blocks = cache(kv_type, &layout, past + tokens);
            for threads in thread_counts() {
                let team = team(threads);
                let id = format!("{kv_type}/{tokens} tokens after {past}");
                group.bench_function(BenchmarkId::new(id, threads), |b| {
                    let mut all_layers = || {
                        for layer in 0..layout.layers {
                            let kv = kv_blocks(blocks.iter(), &layout, kv_type, layer);
                            attention(shape, &q, &kv.with_rotations(&rotations), &mut out);
                        }
                    };
                    team.install(|| b.iter(&mut all_layers));
                });
            }
        }
    }
    group.finish();
    let mut group = c.benchmark_group("quantize");
    let x = activations(512, 6912);
    group.throughput(Throughput::Elements(x.len() as u64));
    let mut quantized = Quantized::default();
    for threads in thread_counts() {
        let team = team(threads);
        group.bench_function(BenchmarkId::from_parameter(threads), |b| {
            team.install(|| b.iter(|| quantized.quantize(&x, 6912)));
        });
    }
}

/// Weights with a scale for each 128 columns, more than the caches hold, in the shapes of a Qwen3 of 1.7B: one token and a
/// chunk of a prompt.
fn grouped(c: &mut Criterion) {
    let (rows, cols) = (6144, 2048);
    for kind in [GroupedKind::Ternary, GroupedKind::Binary] {
        let matrices: Vec<GroupedMatrix> = (0..24)
            .map(|seed| {
                GroupedMatrix::new(kind, [rows, cols], 128, |row, words, scales| {
                    let count = words.len();
                    for (i, word) in words.iter_mut().enumerate() {
                        let noise = ((row * count + i) as u32 ^ seed).wrapping_mul(2_654_435_761);
                        // Without the code 3.
                        *word = noise & !(noise >> 1 & 0x5555_5555);
                    }
                    scales.fill(0.5);
                    Ok::<(), WeightsError>(())
                })
                .expect("the codes are valid")
            })
            .collect();
        for tokens in [1, 128] {
            let x = activations(tokens, cols);
            let mut out = vec![0.0; tokens * rows];
            let matrices = &matrices[..if tokens == 1 { 24 } else { 2 }];
            let mut group = c.benchmark_group(format!("grouped/{kind:?}/{tokens}"));
            if tokens == 1 {
                group.throughput(Throughput::Bytes(matrices.iter().map(|m| m.bytes() as u64).sum()));
            } else {
                group.throughput(Throughput::Elements((matrices.len() * tokens * rows * cols) as u64));
            }
            for threads in thread_counts() {
                let team = team(threads);
                for activations in [ActivationType::F32, ActivationType::Int8, ActivationType::Int8x2] {
                    let mut input = GroupedInput::default();
                    group.bench_function(BenchmarkId::new(activations.name(), threads), |b| {
                        team.install(|| {
                            b.iter(|| {
                                for weights in matrices {
                                    let products = [GroupedProduct { weights, offset: 0 }];
                                    if activations == ActivationType::F32 {
                                        grouped_matmul_f32(&products, &x, &mut out, rows);
                                    } else {
                                        input.quantize(&x, weights, activations);
                                        grouped_matmul(&products, &input, &mut out, rows);
                                    }
                                }
                            });
                        });
                    });
                }
            }
            group.finish();
        }
    }
}

criterion_group!(benches, ternary, decode, attend, grouped);
criterion_main!(benches);
