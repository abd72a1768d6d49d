//! The delta families beside ggml's loop order and beside the same thing written in Candle ops.

use std::hint::black_box;

use candle_core::{D, Result, Tensor, Var};
use candle_linear_attn::{Options, delta_rule, gated_delta_rule, kda, rwkv7, simple_gla};
use criterion::{BenchmarkId, Criterion, Throughput};
use pulp::{Arch, Simd, WithSimd};

use crate::{DIM, HEADS, MODES, gates, heads_first, inputs, randn};

/// q, keys of length 1, v, a number for each token and head below 0 and one between 0 and 1.
fn delta_inputs(tokens: usize) -> Result<[Tensor; 5]> {
    let [q, k, v] = inputs(tokens);
    let k = k.broadcast_div(&k.sqr()?.sum_keepdim(D::Minus1)?.sqrt()?)?;
    let beta = candle_nn::ops::sigmoid(&randn(&[1, tokens, HEADS]))?;
    Ok([q, k, v, gates(&[1, tokens, HEADS]), beta])
}

pub fn forward(c: &mut Criterion) {
    let tokens = 2048;
    let [q, k, v, g, beta] = delta_inputs(tokens).expect("inputs");
    let channel = gates(&[1, tokens, HEADS, DIM]);
    let (a, b) = (k.neg().expect("a"), k.affine(0.5, 0.).expect("b"));
    let mut group = c.benchmark_group(format!("delta_forward/{tokens}"));
    group.throughput(Throughput::Elements((tokens * HEADS) as u64));
    let opts = Options::default();
    // For comparison: the same state without the delta rule.
    group.bench_function("simple_gla", |bench| bench.iter(|| simple_gla(black_box(&q), &k, &v, &g, &opts)));
    group
        .bench_function("delta_rule", |bench| bench.iter(|| delta_rule(black_box(&q), &k, &v, &beta, &opts)));
    for (name, mode) in MODES {
        let opts = Options::default().with_mode(mode);
        group.bench_function(BenchmarkId::new("gated_delta_rule", name), |bench| {
            bench.iter(|| gated_delta_rule(black_box(&q), &k, &v, &g, &beta, &opts))
        });
    }
    group.bench_function("kda", |bench| bench.iter(|| kda(black_box(&q), &k, &v, &channel, &beta, &opts)));
    group.bench_function("rwkv7", |bench| {
        bench.iter(|| rwkv7(black_box(&q), &k, &v, &a, &b, &channel, &opts))
    });
    let [qf, kf, vf, gf, bf] = [&q, &k, &v, &g, &beta]
        .map(|x| heads_first(x).flatten_all().and_then(|x| x.to_vec1::<f32>()).expect("numbers"));
    group.bench_function("ggml_order", |bench| {
        bench.iter(|| {
            Arch::new().dispatch(FourPasses { q: black_box(&qf), k: &kf, v: &vf, g: &gf, beta: &bf })
        })
    });
    let found = [
        delta_rule(&q, &k, &v, &beta, &opts),
        gated_delta_rule(&q, &k, &v, &g, &beta, &opts),
        kda(&q, &k, &v, &channel, &beta, &opts),
        rwkv7(&q, &k, &v, &a, &b, &channel, &opts),
    ];
    let [q, k, v, g, beta, channel, a, b] = [&q, &k, &v, &g, &beta, &channel, &a, &b].map(heads_first);
    let delta = Write::Delta { beta: &beta };
    let loops = [
        ("delta_rule", None, delta),
        ("gated_delta_rule", Some(&g), delta),
        ("kda", Some(&channel), delta),
        ("rwkv7", Some(&channel), Write::LowRank { a: &a, b: &b }),
    ];
    for ((name, g, write), found) in loops.into_iter().zip(found) {
        let composed = composed_loop(&q, &k, &v, g, write).expect("a loop");
        let difference =
            found.and_then(|x| (heads_first(&x.out) - composed)?.abs()?.max_all()?.to_scalar::<f32>());
        assert!(difference.is_ok_and(|x| x < 1e-3), "the loop is not {name}");
        group.bench_function(BenchmarkId::new("candle_token_loop", name), |bench| {
            bench.iter(|| composed_loop(black_box(&q), &k, &v, g, write))
        });
    }
    group.finish();
}

pub fn gradients(c: &mut Criterion) {
    let tokens = 2048;
    let inputs = delta_inputs(tokens).expect("inputs");
    let [q, k, v, g, beta] = inputs.map(|x| Var::from_tensor(&x).expect("a variable"));
    let mut group = c.benchmark_group(format!("delta_backward/{tokens}"));
    group.throughput(Throughput::Elements((tokens * HEADS) as u64));
    let grad = randn(&[1, tokens, HEADS, DIM]);
    for (name, mode) in MODES {
        let opts = Options::default().with_mode(mode);
        let out = gated_delta_rule(&q, &k, &v, &g, &beta, &opts).expect("forward").out;
        group.bench_function(BenchmarkId::new("gated_delta_rule", name), |bench| {
            bench.iter(|| out.mul(&grad)?.sum_all()?.backward())
        });
    }
    let variable = |x: Result<Tensor>| x.and_then(|x| Var::from_tensor(&x)).expect("a variable");
    let channel = variable(Ok(gates(&[1, tokens, HEADS, DIM])));
    let (a, b) = (variable(k.neg()), variable(k.affine(0.5, 0.)));
    let opts = Options::default();
    let others = [
        ("delta_rule", delta_rule(&q, &k, &v, &beta, &opts)),
        ("kda", kda(&q, &k, &v, &channel, &beta, &opts)),
        ("rwkv7", rwkv7(&q, &k, &v, &a, &b, &channel, &opts)),
        // For comparison.
        ("simple_gla", simple_gla(&q, &k, &v, &g, &opts)),
    ];
    for (name, output) in others {
        let out = output.expect("forward").out;
        group.bench_function(name, |bench| bench.iter(|| out.mul(&grad)?.sum_all()?.backward()));
    }
    group.finish();
}

/// The gated delta rule in the order of ggml's loops, four passes over the state a token: it fades, is read with the key, is
/// written, is read with the query. All inputs with heads first; one thread, the vectors that the machine has.
struct FourPasses<'a> {
    q: &'a [f32],
    k: &'a [f32],
    v: &'a [f32],
    g: &'a [f32],
    beta: &'a [f32],
}

impl WithSimd for FourPasses<'_> {
    type Output = Vec<f32>;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> Vec<f32> {
        let mut out = vec![0.; self.v.len()];
        let (mut state, mut u) = (vec![0f32; DIM * DIM], [0f32; DIM]);
        let scale = (DIM as f32).powf(-0.5);
        let tokens = self.g.len() / HEADS;
        for (t, (out, v)) in out.chunks_exact_mut(DIM).zip(self.v.chunks_exact(DIM)).enumerate() {
            if t % tokens == 0 {
                state.fill(0.);
            }
            let (q, k) = (&self.q[t * DIM..][..DIM], &self.k[t * DIM..][..DIM]);
            let decay = simd.splat_f32s(self.g[t].exp());
            S::as_mut_simd_f32s(&mut state).0.iter_mut().for_each(|s| *s = simd.mul_f32s(*s, decay));
            u.fill(0.);
            for (row, k) in state.chunks_exact(DIM).zip(k) {
                add(simd, &mut u, *k, row);
            }
            u.iter_mut().zip(v).for_each(|(u, v)| *u = (v - *u) * self.beta[t]);
            for (row, k) in state.chunks_exact_mut(DIM).zip(k) {
                add(simd, row, *k, &u);
            }
            for (row, q) in state.chunks_exact(DIM).zip(q) {
                add(simd, out, q * scale, row);
            }
        }
        out
    }
}

/// `y += a x`
#[inline(always)]
fn add<S: Simd>(simd: S, y: &mut [f32], a: f32, x: &[f32]) {
    let a = simd.splat_f32s(a);
    for (y, x) in S::as_mut_simd_f32s(y).0.iter_mut().zip(S::as_simd_f32s(x).0) {
        *y = simd.mul_add_e_f32s(a, *x, *y);
    }
}

/// What a token writes: what its value has beside what the state has for its key, or its value and what `a` reads.
#[derive(Clone, Copy)]
enum Write<'a> {
    Delta { beta: &'a Tensor },
    LowRank { a: &'a Tensor, b: &'a Tensor },
}

/// A token at a time, as Candle's recurrent models are written; all inputs with heads first.
fn composed_loop(q: &Tensor, k: &Tensor, v: &Tensor, g: Option<&Tensor>, write: Write) -> Result<Tensor> {
    let (b, h, t, d) = q.dims4()?;
    let by_row = |x: &Tensor| if x.rank() == 3 { x.unsqueeze(3) } else { Ok(x.clone()) };
    let decay = g.map(|g| by_row(&g.exp()?)).transpose()?;
    let mut state = Tensor::zeros((b, h, d, d), q.dtype(), q.device())?;
    let mut out = Vec::with_capacity(t);
    for at in 0..t {
        let row = |x: &Tensor| x.narrow(2, at, 1)?.contiguous();
        let column = |x: &Tensor| row(x)?.transpose(2, 3)?.contiguous();
        let faded = match &decay {
            Some(decay) => state.broadcast_mul(&column(decay)?)?,
            None => state.clone(),
        };
        let v = row(v)?;
        let written = match write {
            Write::Delta { beta } => {
                let u = (v - row(k)?.matmul(&faded)?)?.broadcast_mul(&row(&by_row(beta)?)?)?;
                column(k)?.matmul(&u)?
            }
            Write::LowRank { a, b } => {
                (column(k)?.matmul(&v)? + column(b)?.matmul(&row(a)?.matmul(&state)?)?)?
            }
        };
        state = (faded + written)?;
        out.push((row(q)? * (d as f64).powf(-0.5))?.matmul(&state)?);
    }
    Tensor::cat(&out, 2)
}
