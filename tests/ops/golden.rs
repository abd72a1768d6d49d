//! The golden cases.

use crate::compare::relative_error;
use crate::files::{CASES, check_on, load};
use candle_core::Device;

/// All modes at 1e-5 for o and the states and 2e-5 for the gradients.
fn check(name: &str) {
    check_on(&Device::Cpu, name, [1e-5, 2e-5]);
}

/// The files hold f32, so the reference can be held against them to the rounding of an f32.
#[test]
fn the_reference_reproduces_every_case() {
    for name in CASES {
        let golden = load(name);
        let want = golden.expected();
        let got = golden.case.expected(&golden.inputs, golden.graph().loss).unwrap();
        let pairs = (got.outputs.iter().zip(&want.outputs)).chain(got.grads.iter().zip(&want.grads));
        for (i, (x, want)) in pairs.enumerate() {
            let error = relative_error(x, want);
            assert!(want.is_empty() || error < 1e-7, "{name}, number {i}: {error:.3e}");
        }
    }
}

#[test]
fn linear_attn_with_the_default_scale() {
    check("linear_attn-scale_none");
}

#[test]
fn linear_attn_with_scale_one_half() {
    check("linear_attn-scale_half");
}

#[test]
fn linear_attn_with_scale_minus_one() {
    check("linear_attn-scale_minus1");
}

#[test]
fn linear_attn_normalized() {
    check("linear_attn-normalize");
}

#[test]
fn linear_attn_varlen() {
    check("linear_attn-varlen");
}

#[test]
fn retention() {
    check("retention");
}

#[test]
fn simple_gla() {
    check("simple_gla");
}

#[test]
fn gla() {
    check("gla");
}

#[test]
fn gla_with_strong_decay() {
    check("gla-strong_decay");
}

#[test]
fn delta_rule() {
    check("delta_rule");
}

#[test]
fn gated_delta_rule_with_grouped_values() {
    check("gated_delta_rule-gva");
}

#[test]
fn kda() {
    check("kda");
}

#[test]
fn rwkv7() {
    check("rwkv7");
}
