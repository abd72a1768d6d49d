//! The CPU operators beside the same thing written in Candle ops, in one run.
//!
//! `RAYON_NUM_THREADS=1 cargo bench --bench cpu` is for one thread. Throughput is in tokens x heads a second; its
//! inverse is the time a token and head that `docs/performance.md` has.

mod delta;
#[path = "common/given.rs"]
mod given;

use std::hint::black_box;
use std::time::Duration;

use candle_core::{D, Device, Result, Tensor, Var};
use candle_linear_attn::{Mode, Options, gla, linear_attn, retention, simple_gla};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use given::Given;

const HEADS: usize = 16;
const DIM: usize = 128;
const MODES: [(&str, Mode); 3] =
    [("fused_chunk", Mode::FusedChunk), ("chunk", Mode::Chunk), ("recurrent", Mode::Recurrent)];

fn randn(shape: &[usize]) -> Tensor {
    Tensor::randn(0f32, 1., shape, &Device::Cpu).expect("random numbers")
}

/// q, k, v as `[1, T, H, D]`.
fn inputs(tokens: usize) -> [Tensor; 3] {
    [(); 3].map(|()| randn(&[1, tokens, HEADS, DIM]))
}

/// Log decays as gated models have them: most a few hundredths a token.
fn gates(shape: &[usize]) -> Tensor {
    randn(shape).abs().and_then(|g| g * -0.05).expect("gates")
}

fn heads_first(x: &Tensor) -> Tensor {
    x.transpose(1, 2).and_then(|x| x.contiguous()).expect("a transposition")
}

fn operators(c: &mut Criterion) {
    let tokens = 2048;
    let [q, k, v] = inputs(tokens);
    let mut group = c.benchmark_group(format!("forward/{tokens}"));
    group.throughput(Throughput::Elements((tokens * HEADS) as u64));
    for (name, mode) in MODES {
        let opts = Options::default().with_mode(mode);
        group.bench_function(BenchmarkId::new("linear_attn", name), |b| {
            b.iter(|| linear_attn(black_box(&q), &k, &v, &opts))
        });
    }
    let opts = Options::default();
    group.bench_function("linear_attn/normalized", |b| {
        let opts = opts.clone().with_normalize(true);
        b.iter(|| linear_attn(black_box(&q), &k, &v, &opts))
    });
    for dtype in [candle_core::DType::BF16, candle_core::DType::F16] {
        let [q, k, v] = [&q, &k, &v].map(|x| x.to_dtype(dtype).expect("a cast"));
        group.bench_function(BenchmarkId::new("linear_attn", dtype.as_str()), |b| {
            b.iter(|| linear_attn(black_box(&q), &k, &v, &opts))
        });
    }
    let of_head = gates(&[HEADS]);
    group.bench_function("retention", |b| b.iter(|| retention(black_box(&q), &k, &v, &of_head, &opts)));
    let scalar = gates(&[1, tokens, HEADS]);
    group.bench_function("simple_gla", |b| b.iter(|| simple_gla(black_box(&q), &k, &v, &scalar, &opts)));
    let channel = gates(&[1, tokens, HEADS, DIM]);
    group.bench_function("gla", |b| b.iter(|| gla(black_box(&q), &k, &v, &channel, &opts)));
    group.finish();
}

fn gradients(c: &mut Criterion) {
    let tokens = 2048;
    let [q, k, v] = inputs(tokens).map(|x| Var::from_tensor(&x).expect("a variable"));
    let g = Var::from_tensor(&gates(&[1, tokens, HEADS, DIM])).expect("a variable");
    let mut group = c.benchmark_group(format!("backward/{tokens}"));
    group.throughput(Throughput::Elements((tokens * HEADS) as u64));
    let grad = randn(&[1, tokens, HEADS, DIM]);
    // Candle hands the loss's gradient down through a product: a cheap way to an arbitrary one.
    let backward = |out: &Tensor| out.mul(&grad)?.sum_all()?.backward();
    for (name, mode) in MODES {
        let opts = Options::default().with_mode(mode);
        let out = linear_attn(&q, &k, &v, &opts).expect("forward").out;
        group.bench_function(BenchmarkId::new("linear_attn", name), |b| b.iter(|| backward(&out)));
    }
    let scalar = Var::from_tensor(&gates(&[1, tokens, HEADS])).expect("a variable");
    let out = simple_gla(&q, &k, &v, &scalar, &Options::default()).expect("forward").out;
    group.bench_function("simple_gla", |b| b.iter(|| backward(&out)));
    let out = gla(&q, &k, &v, &g, &Options::default()).expect("forward").out;
    group.bench_function("gla", |b| b.iter(|| backward(&out)));
    // What the above spend outside the operator.
    let out = q.apply_op3(&k, &v, Given([(); 3].map(|()| grad.clone()))).expect("an op");
    group.bench_function("candle_alone", |b| b.iter(|| backward(&out)));
    group.finish();
}

/// Linear attention from Candle's matrix products, chunk by chunk; q, k, v as `[1, H, T, D]`.
fn composed_chunks(q: &Tensor, k: &Tensor, v: &Tensor, mask: &Tensor) -> Result<Tensor> {
    let (b, h, t, d) = q.dims4()?;
    let chunk = mask.dim(0)?;
    let mut state = Tensor::zeros((b, h, d, d), q.dtype(), q.device())?;
    let mut out = Vec::with_capacity(t / chunk);
    for from in (0..t).step_by(chunk) {
        let [q, k, v] = [q, k, v].map(|x| x.narrow(2, from, chunk).and_then(|x| x.contiguous()));
        let (q, k, v) = ((q? * (d as f64).powf(-0.5))?, k?, v?);
        let k = k.transpose(2, 3)?;
        let scores = q.matmul(&k)?.broadcast_mul(mask)?;
        out.push((scores.matmul(&v)? + q.matmul(&state)?)?);
        state = (state + k.matmul(&v)?)?;
    }
    Tensor::cat(&out, 2)
}

/// Linear attention a token at a time, as Candle's recurrent models are written.
fn composed_loop(q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
    let (b, h, t, d) = q.dims4()?;
    let mut state = Tensor::zeros((b, h, d, d), q.dtype(), q.device())?;
    let mut out = Vec::with_capacity(t);
    for at in 0..t {
        let q = (q.narrow(2, at, 1)? * (d as f64).powf(-0.5))?;
        let k = k.narrow(2, at, 1)?.transpose(2, 3)?;
        state = (state + k.broadcast_mul(&v.narrow(2, at, 1)?)?)?;
        out.push(q.matmul(&state)?);
    }
    Tensor::cat(&out, 2)
}

/// Causal softmax attention; `mask` is 0 where a query may look and -inf elsewhere.
fn softmax_attention(q: &Tensor, k: &Tensor, v: &Tensor, mask: &Tensor) -> Result<Tensor> {
    let scale = (q.dim(D::Minus1)? as f64).powf(-0.5);
    let scores = (q.matmul(&k.transpose(2, 3)?)? * scale)?.broadcast_add(mask)?;
    candle_nn::ops::softmax_last_dim(&scores)?.matmul(v)
}

fn causal_mask(tokens: usize) -> Result<Tensor> {
    let at = Tensor::arange(0f32, tokens as f32, &Device::Cpu)?;
    let later = at.reshape((1, tokens))?.broadcast_gt(&at.reshape((tokens, 1))?)?;
    let zeros = Tensor::zeros((tokens, tokens), candle_core::DType::F32, &Device::Cpu)?;
    later.where_cond(&zeros.affine(0., f64::NEG_INFINITY)?, &zeros)
}

fn peers(c: &mut Criterion) {
    for tokens in [512, 1024, 2048, 4096, 8192, 16384] {
        let [q, k, v] = inputs(tokens);
        let [qh, kh, vh] = [&q, &k, &v].map(heads_first);
        let mut group = c.benchmark_group(format!("peers/{tokens}"));
        group.throughput(Throughput::Elements((tokens * HEADS) as u64)).sample_size(10);
        group.bench_function("linear_attn", |b| {
            b.iter(|| linear_attn(black_box(&q), &k, &v, &Options::default()))
        });
        let mask = Tensor::tril2(64, candle_core::DType::F32, &Device::Cpu).expect("a mask");
        group
            .bench_function("candle_chunks", |b| b.iter(|| composed_chunks(black_box(&qh), &kh, &vh, &mask)));
        if tokens <= 2048 {
            group.bench_function("candle_token_loop", |b| b.iter(|| composed_loop(black_box(&qh), &kh, &vh)));
        }
        // 16 heads of scores are 17 GB at 16384 tokens: there a head at a time.
        let heads = if tokens > 4096 { 1 } else { HEADS };
        let one = |x: &Tensor| x.narrow(1, 0, heads).expect("heads");
        let (qh, kh, vh) = (one(&qh), one(&kh), one(&vh));
        let mask = causal_mask(tokens).expect("a mask");
        group.throughput(Throughput::Elements((tokens * heads) as u64));
        group.bench_function("candle_softmax", |b| {
            b.iter(|| softmax_attention(black_box(&qh), &kh, &vh, &mask))
        });
        group.finish();
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default().warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(3)).sample_size(10);
    targets = operators, gradients, delta::forward, delta::gradients, peers
}
criterion_main!(benches);
