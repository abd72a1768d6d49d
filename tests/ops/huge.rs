//! Sizes that no machine has the memory for, or no number the elements: tensors that are views of one element. Each is an
//! error that says so, before anything is allocated.

use crate::case::Op;
use crate::run::MODES;
use candle_core::{Device, Result, Tensor, Var};
use candle_linear_attn::{Options, Output};
use candle_linear_attn::{delta_rule, gated_delta_rule, gla, kda, linear_attn, retention, rwkv7, simple_gla};

/// `[B, T, H, HV, K, V]`
type Sizes = [usize; 6];

fn call(op: Op, [b, t, h, hv, k, v]: Sizes, tracked: bool, opts: &Options) -> Result<Output> {
    let one = Tensor::full(0.5f32, (1, 1, 1, 1), &Device::Cpu)?;
    let one = if tracked { Var::from_tensor(&one)?.into_inner() } else { one };
    let expanded = |dims: &[usize]| {
        let ones = vec![1; dims.len()];
        one.reshape(ones)?.broadcast_as(dims)
    };
    let (q, v) = (expanded(&[b, t, h, k])?, expanded(&[b, t, hv, v])?);
    match op {
        Op::LinearAttn => linear_attn(&q, &q, &v, opts),
        Op::Retention => retention(&q, &q, &v, &expanded(&[hv])?, opts),
        Op::SimpleGla => simple_gla(&q, &q, &v, &expanded(&[b, t, hv])?, opts),
        Op::Gla => gla(&q, &q, &v, &expanded(&[b, t, hv, k])?, opts),
        Op::DeltaRule => delta_rule(&q, &q, &v, &expanded(&[b, t, hv])?, opts),
        Op::GatedDeltaRule => {
            let x = expanded(&[b, t, hv])?;
            gated_delta_rule(&q, &q, &v, &x, &x, opts)
        }
        Op::Kda => kda(&q, &q, &v, &expanded(&[b, t, hv, k])?, &expanded(&[b, t, hv])?, opts),
        Op::Rwkv7 => rwkv7(&q, &q, &v, &q, &q, &q, opts),
    }
}

fn refused_of(op: Op, sizes: Sizes, opts: &Options, words: &[&str]) {
    for mode in MODES {
        for tracked in [false, true] {
            let message = match call(op, sizes, tracked, &opts.clone().with_mode(mode)) {
                Ok(_) => panic!("{op:?} {mode:?} accepted {sizes:?}"),
                Err(error) => error.to_string(),
            };
            for word in words {
                assert!(message.contains(word), "{op:?} {sizes:?}: no {word:?} in the message: {message}");
            }
        }
    }
}

fn refused(sizes: Sizes, words: &[&str]) {
    Op::ALL.into_iter().for_each(|op| refused_of(op, sizes, &Options::default(), words));
}

#[test]
fn an_output_of_terabytes() {
    refused([1, 1 << 20, 1 << 11, 1 << 11, 128, 128], &["V = 128", "GiB of memory"]);
    refused([1 << 20, 1 << 20, 1, 1, 1, 1], &["B = 1048576", "GiB of memory"]);
    refused([1, 1 << 31, 1, 1 << 9, 1, 1], &["T = 2147483648", "GiB of memory"]);
    let normalized = Options::default().with_normalize(true);
    refused_of(Op::LinearAttn, [1, 1 << 20, 1 << 11, 1 << 11, 128, 128], &normalized, &["GiB of memory"]);
}

#[test]
fn a_state_of_terabytes() {
    refused([1, 1, 1, 1, 1 << 20, 1 << 20], &["K = 1048576", "GiB of memory"]);
    refused([1, 1, 1, 1, 1 << 40, 1], &["K = 1099511627776", "GiB of memory"]);
    let with_states = Options::default().with_final_state(true);
    for op in Op::ALL {
        refused_of(op, [1 << 20, 0, 1, 1, 1024, 1024], &with_states, &["B = 1048576", "GiB of memory"]);
    }
}

#[test]
fn elements_without_number() {
    for sizes in [
        [1 << 32, 1 << 32, 1, 1, 1, 1],
        [1, 1 << 20, 1 << 20, 1 << 20, 1 << 20, 1],
        [1, 1 << 20, 1, 1, 1, usize::MAX],
        [usize::MAX, 1, 1, 1, 1, 1],
        [1, 1, 1, 1, 1 << 32, 1 << 32],
    ] {
        refused(sizes, &["B = ", "addressed"]);
    }
}

/// Without tokens there is nothing to compute, but sizes are sizes.
#[test]
fn nothing_of_much() {
    refused([1 << 45, 0, 1, 1, 1, 1], &["B is 35184372088832", "GiB of memory"]);
    refused([1, 0, 1 << 45, 1 << 45, 1, 1], &["HV = 35184372088832", "GiB of memory"]);
    refused([0, 0, 1, 1, 1, usize::MAX], &["V = 18446744073709551615", "addressed"]);
    refused([usize::MAX, 0, 1, 1, 1, 1], &["B = 18446744073709551615", "addressed"]);
}

/// What is large and still fits is not refused by the way.
#[test]
fn a_long_sequence_of_small_heads() {
    for op in [Op::LinearAttn, Op::SimpleGla] {
        let out = call(op, [1, 1 << 22, 1, 1, 1, 1], false, &Options::default()).unwrap().out;
        assert_eq!(out.dims(), [1, 1 << 22, 1, 1]);
    }
}
