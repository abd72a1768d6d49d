//! What layers do beside their operator, and the same thing written in Candle ops, in one run.
//!
//! `RAYON_NUM_THREADS=1 cargo bench --bench layers` is for one thread. Throughput is in tokens x heads a second.

use std::hint::black_box;
use std::time::Duration;

use candle_core::{D, DType, Device, Result, Tensor, Var};
use candle_linear_attn::nn::{RmsNorm, ShortConvOptions, short_conv};
use candle_nn::VarBuilder;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};

const TOKENS: usize = 2048;
const HEADS: usize = 16;
const DIM: usize = 128;
const WIDTH: usize = 4;

fn variable(shape: &[usize]) -> Var {
    Var::randn(0f32, 1., shape, &Device::Cpu).expect("random numbers")
}

fn backward(ys: Result<Tensor>) -> Result<candle_core::backprop::GradStore> {
    ys?.sum_all()?.backward()
}

/// A sum and a product for every tap, then SiLU.
fn composed_conv(xs: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let (batch, tokens, channels) = xs.dims3()?;
    let before = Tensor::zeros((batch, WIDTH - 1, channels), DType::F32, xs.device())?;
    let padded = Tensor::cat(&[&before, xs], 1)?;
    let taps = weight.squeeze(1)?.t()?.contiguous()?;
    let mut ys = padded.narrow(1, 0, tokens)?.broadcast_mul(&taps.get(0)?)?;
    for tap in 1..WIDTH {
        ys = (ys + padded.narrow(1, tap, tokens)?.broadcast_mul(&taps.get(tap)?)?)?;
    }
    ys.silu()
}

fn composed_norm(xs: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let mean_square = xs.sqr()?.mean_keepdim(D::Minus1)?;
    xs.broadcast_div(&(mean_square + 1e-6)?.sqrt()?)?.broadcast_mul(weight)
}

fn layers(c: &mut Criterion) {
    let xs = variable(&[1, TOKENS, HEADS * DIM]);
    let weight = variable(&[HEADS * DIM, 1, WIDTH]);
    let opts = ShortConvOptions { silu: true, ..Default::default() };
    let conv = |xs: &Tensor, weight: &Tensor| Ok(short_conv(xs, weight, None, &opts)?.0);
    let heads = Var::from_tensor(&xs.reshape((1, TOKENS, HEADS, DIM)).expect("heads")).expect("a variable");
    let scale = variable(&[DIM]);
    let named = [("weight".to_string(), scale.as_tensor().clone())].into();
    let vb = VarBuilder::from_tensors(named, DType::F32, &Device::Cpu);
    let norm = RmsNorm::new(DIM, 1e-6, true, vb).expect("a norm");

    let mut group = c.benchmark_group("layers");
    group.throughput(Throughput::Elements((TOKENS * HEADS) as u64));
    let (x, w) = (xs.detach(), weight.detach());
    group.bench_function("short_conv/forward", |b| b.iter(|| conv(black_box(&x), &w)));
    group.bench_function("candle_conv/forward", |b| b.iter(|| composed_conv(black_box(&x), &w)));
    group.bench_function("short_conv/both", |b| b.iter(|| backward(conv(black_box(&xs), &weight))));
    group.bench_function("candle_conv/both", |b| b.iter(|| backward(composed_conv(black_box(&xs), &weight))));
    let (x, w) = (heads.detach(), scale.detach());
    group.bench_function("rms_norm/forward", |b| b.iter(|| norm.forward(black_box(&x))));
    group.bench_function("candle_norm/forward", |b| b.iter(|| composed_norm(black_box(&x), &w)));
    group.bench_function("rms_norm/both", |b| b.iter(|| backward(norm.forward(black_box(&heads)))));
    group.bench_function("candle_norm/both", |b| {
        b.iter(|| backward(composed_norm(black_box(&heads), &scale)))
    });
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default().warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(3)).sample_size(10);
    targets = layers
}
criterion_main!(benches);
