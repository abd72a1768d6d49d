//! Every refusal, by its message: it names the argument, says what it was and what it must be.

use crate::case::Op;
use crate::run::MODES;
use candle_core::{DType, Device, Result, Tensor};
use candle_linear_attn::{Options, Output, State};
use candle_linear_attn::{delta_rule, gated_delta_rule, gla, kda, linear_attn, retention, rwkv7, simple_gla};

const B: usize = 2;
const T: usize = 6;
const H: usize = 2;
const K: usize = 4;
const V: usize = 5;

fn zeros(shape: &[usize], dtype: DType) -> Tensor {
    Tensor::zeros(shape, dtype, &Device::Cpu).unwrap()
}

/// Well-formed arguments, to be spoiled one at a time.
#[derive(Clone)]
struct Given {
    op: Op,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    beta: Tensor,
    a: Tensor,
    b: Tensor,
    opts: Options,
}

fn args(op: Op) -> Given {
    with_batch(op, B)
}

fn with_batch(op: Op, b: usize) -> Given {
    let gate = match op {
        Op::Gla | Op::Kda | Op::Rwkv7 => zeros(&[b, T, H, K], DType::F32),
        Op::Retention => zeros(&[H], DType::F32),
        _ => zeros(&[b, T, H], DType::F32),
    };
    Given {
        op,
        q: zeros(&[b, T, H, K], DType::F32),
        k: zeros(&[b, T, H, K], DType::F32),
        v: zeros(&[b, T, H, V], DType::F32),
        gate,
        beta: zeros(&[b, T, H], DType::F32),
        a: zeros(&[b, T, H, K], DType::F32),
        b: zeros(&[b, T, H, K], DType::F32),
        opts: Options::default(),
    }
}

fn call(a: &Given, opts: &Options) -> Result<Output> {
    match a.op {
        Op::LinearAttn => linear_attn(&a.q, &a.k, &a.v, opts),
        Op::Retention => retention(&a.q, &a.k, &a.v, &a.gate, opts),
        Op::SimpleGla => simple_gla(&a.q, &a.k, &a.v, &a.gate, opts),
        Op::Gla => gla(&a.q, &a.k, &a.v, &a.gate, opts),
        Op::DeltaRule => delta_rule(&a.q, &a.k, &a.v, &a.beta, opts),
        Op::GatedDeltaRule => gated_delta_rule(&a.q, &a.k, &a.v, &a.gate, &a.beta, opts),
        Op::Kda => kda(&a.q, &a.k, &a.v, &a.gate, &a.beta, opts),
        Op::Rwkv7 => rwkv7(&a.q, &a.k, &a.v, &a.a, &a.b, &a.gate, opts),
    }
}

/// The name that stands alone in a message, so that `k` is not found in "rank".
fn has_word(message: &str, word: &str) -> bool {
    let is_name = |c: char| c.is_alphanumeric() || c == '_';
    message.match_indices(word).any(|(at, _)| {
        let before = message[..at].chars().next_back();
        let after = message[at + word.len()..].chars().next();
        !before.is_some_and(is_name) && !after.is_some_and(is_name)
    })
}

/// Spoils the arguments of `op` and expects, in every mode, an error that has all of `words` in it.
fn refused(op: Op, words: &[&str], spoil: impl Fn(&mut Given)) {
    refused_of(args(op), words, spoil);
}

fn refused_of(mut a: Given, words: &[&str], spoil: impl Fn(&mut Given)) {
    call(&a, &a.opts).expect("well-formed before it is spoiled");
    spoil(&mut a);
    for mode in MODES {
        let message = match call(&a, &a.opts.clone().with_mode(mode)) {
            Ok(_) => panic!("{:?} {mode:?} accepted what {words:?} should refuse", a.op),
            Err(error) => error.to_string(),
        };
        for word in words {
            let found = has_word(&message, word);
            assert!(found, "{:?}: no {word:?} in the message: {message}", a.op);
        }
        let first = message.chars().next().unwrap();
        assert!(!first.is_uppercase(), "messages are lower-case: {message}");
    }
}

fn state(n: usize, hv: usize, k: usize, v: usize) -> State {
    State { kv: zeros(&[n, hv, k, v], DType::F32), z: None }
}

#[test]
fn wrong_rank() {
    for op in Op::ALL {
        refused(op, &["q", "[2, 6, 4]"], |a| a.q = zeros(&[B, T, K], DType::F32));
        refused(op, &["k", "[2, 6, 4]"], |a| a.k = zeros(&[B, T, K], DType::F32));
        refused(op, &["v", "[2, 6, 5]"], |a| a.v = zeros(&[B, T, V], DType::F32));
        refused(op, &["v", "[2, 6, 2, 5, 1]"], |a| a.v = zeros(&[B, T, H, V, 1], DType::F32));
        refused(op, &["q", "[]"], |a| a.q = zeros(&[], DType::F32));
    }
    refused(Op::Retention, &["log_decay", "[1, 2]"], |a| a.gate = zeros(&[1, H], DType::F32));
    refused(Op::SimpleGla, &["g", "[2, 6, 2, 4]"], |a| a.gate = zeros(&[B, T, H, K], DType::F32));
    for op in [Op::Gla, Op::Kda, Op::Rwkv7] {
        refused(op, &["g", "[2, 6, 2]"], |a| a.gate = zeros(&[B, T, H], DType::F32));
    }
    refused(Op::GatedDeltaRule, &["g", "[2, 6, 2, 4]"], |a| a.gate = zeros(&[B, T, H, K], DType::F32));
    for op in WITH_BETA {
        refused(op, &["beta", "[2, 6, 2, 4]"], |a| a.beta = zeros(&[B, T, H, K], DType::F32));
    }
    refused(Op::Rwkv7, &["a", "[2, 6, 2]"], |a| a.a = zeros(&[B, T, H], DType::F32));
    refused(Op::Rwkv7, &["b", "[2, 6, 2]"], |a| a.b = zeros(&[B, T, H], DType::F32));
}

const WITH_BETA: [Op; 3] = [Op::DeltaRule, Op::GatedDeltaRule, Op::Kda];

#[test]
fn shapes_that_disagree() {
    for op in Op::ALL {
        // Each dimension of k against q, and of v against q.
        refused(op, &["k", "[1, 6, 2, 4]"], |a| a.k = zeros(&[1, T, H, K], DType::F32));
        refused(op, &["k", "[2, 7, 2, 4]"], |a| a.k = zeros(&[B, 7, H, K], DType::F32));
        refused(op, &["k", "[2, 6, 1, 4]"], |a| a.k = zeros(&[B, T, 1, K], DType::F32));
        refused(op, &["k", "[2, 6, 2, 3]"], |a| a.k = zeros(&[B, T, H, 3], DType::F32));
        refused(op, &["v", "[1, 6, 2, 5]"], |a| a.v = zeros(&[1, T, H, V], DType::F32));
        refused(op, &["v", "[2, 1, 2, 5]"], |a| a.v = zeros(&[B, 1, H, V], DType::F32));
    }
    // The gate follows v's heads; a gate that would broadcast is refused too.
    refused(Op::Retention, &["log_decay", "[3]"], |a| a.gate = zeros(&[3], DType::F32));
    refused(Op::Retention, &["log_decay", "[1]"], |a| a.gate = zeros(&[1], DType::F32));
    refused(Op::SimpleGla, &["g", "[2, 6, 1]"], |a| a.gate = zeros(&[B, T, 1], DType::F32));
    refused(Op::SimpleGla, &["g", "[2, 2, 6]"], |a| a.gate = zeros(&[B, H, T], DType::F32));
    refused(Op::Gla, &["g", "[2, 6, 2, 5]"], |a| a.gate = zeros(&[B, T, H, V], DType::F32));
    refused(Op::Gla, &["g", "[2, 6, 2, 1]"], |a| a.gate = zeros(&[B, T, H, 1], DType::F32));
    for op in WITH_BETA {
        refused(op, &["beta", "[2, 6, 1]"], |a| a.beta = zeros(&[B, T, 1], DType::F32));
        refused(op, &["beta", "[2, 6, 2]"], |a| {
            a.v = zeros(&[B, T, 2 * H, V], DType::F32);
            if op != Op::DeltaRule {
                let gate = if op == Op::Kda { vec![B, T, 2 * H, K] } else { vec![B, T, 2 * H] };
                a.gate = zeros(&gate, DType::F32);
            }
        });
    }
    refused(Op::Rwkv7, &["a", "[2, 6, 2, 5]"], |a| a.a = zeros(&[B, T, H, V], DType::F32));
    refused(Op::Rwkv7, &["b", "[2, 5, 2, 4]"], |a| a.b = zeros(&[B, 5, H, K], DType::F32));
    // a, b and g of RWKV-7 are those of key heads.
    refused(Op::Rwkv7, &["g", "[2, 6, 4, 4]", "H, K]"], |a| {
        a.v = zeros(&[B, T, 2 * H, V], DType::F32);
        a.gate = zeros(&[B, T, 2 * H, K], DType::F32);
    });
    // With grouped values, a gate for each key head is one for too few heads.
    refused(Op::SimpleGla, &["g", "[2, 6, 2]"], |a| a.v = zeros(&[B, T, 2 * H, V], DType::F32));
}

#[test]
fn value_heads_that_are_no_multiple_of_the_key_heads() {
    for op in Op::ALL {
        refused(op, &["v", "3", "2", "multiple"], |a| a.v = zeros(&[B, T, 3, V], DType::F32));
        refused(op, &["v", "1", "2", "multiple"], |a| a.v = zeros(&[B, T, 1, V], DType::F32));
    }
}

#[test]
fn mixed_dtypes() {
    for op in Op::ALL {
        refused(op, &["k", "BF16", "F32"], |a| a.k = a.k.to_dtype(DType::BF16).unwrap());
        refused(op, &["v", "F16", "F32"], |a| a.v = a.v.to_dtype(DType::F16).unwrap());
    }
    // Gates may be f32 or what q is, nothing else.
    for (op, name) in Op::GATED.map(|op| (op, if op == Op::Retention { "log_decay" } else { "g" })) {
        refused(op, &[name, "BF16", "F32"], |a| a.gate = a.gate.to_dtype(DType::BF16).unwrap());
        refused(op, &[name, "F16"], |a| {
            for x in [&mut a.q, &mut a.k, &mut a.v] {
                *x = x.to_dtype(DType::BF16).unwrap();
            }
            a.gate = a.gate.to_dtype(DType::F16).unwrap()
        });
    }
    for op in WITH_BETA {
        refused(op, &["beta", "F16", "F32"], |a| a.beta = a.beta.to_dtype(DType::F16).unwrap());
    }
    refused(Op::Rwkv7, &["a", "BF16", "F32"], |a| a.a = a.a.to_dtype(DType::BF16).unwrap());
    refused(Op::Rwkv7, &["b", "BF16", "F32"], |a| a.b = a.b.to_dtype(DType::BF16).unwrap());
}

#[test]
fn unsupported_dtype() {
    for op in Op::ALL {
        for (dtype, name) in
            [(DType::U32, "U32"), (DType::F64, "F64"), (DType::I64, "I64"), (DType::U8, "U8")]
        {
            refused(op, &["q", name], |a| {
                for x in [&mut a.q, &mut a.k, &mut a.v] {
                    *x = x.to_dtype(dtype).unwrap();
                }
            });
        }
    }
    for (op, name) in [(Op::Retention, "log_decay"), (Op::Gla, "g")] {
        refused(op, &[name, "F64"], |a| a.gate = a.gate.to_dtype(DType::F64).unwrap());
    }
}

#[test]
fn scale_that_is_not_finite() {
    for op in Op::ALL {
        for (scale, name) in [(f64::NAN, "NaN"), (f64::INFINITY, "inf"), (f64::NEG_INFINITY, "-inf")] {
            refused(op, &["scale", name, "finite"], |a| a.opts = Options::default().with_scale(scale));
        }
    }
}

#[test]
fn cu_seqlens_that_do_not_pack_the_sequence() {
    for op in Op::ALL {
        let refused = |ends: &[u32], words: &[&str]| {
            refused_of(with_batch(op, 1), words, |a| a.opts = Options::default().with_cu_seqlens(ends));
        };
        refused(&[1, 3, 6], &["cu_seqlens", "1", "0"]);
        refused(&[0, 4, 3, 6], &["cu_seqlens", "4", "3"]);
        refused(&[0, 3, 5], &["cu_seqlens", "5", "6"]);
        refused(&[0, 3, 7], &["cu_seqlens", "7", "6"]);
        refused(&[0, u32::MAX, 6], &["cu_seqlens"]);
        refused(&[0, u32::MAX], &["cu_seqlens", "4294967295"]);
        refused(&[0], &["cu_seqlens"]);
        refused(&[], &["cu_seqlens", "empty"]);
    }
}

#[test]
fn cu_seqlens_with_a_batch() {
    for op in Op::ALL {
        refused(op, &["cu_seqlens", "2", "1"], |a| a.opts = Options::default().with_cu_seqlens(&[0, 2, 6]));
    }
}

#[test]
fn states_of_the_wrong_number_or_shape() {
    for op in Op::ALL {
        for (n, hv, k, v, shape) in [
            (3, H, K, V, "[3, 2, 4, 5]"),
            (1, H, K, V, "[1, 2, 4, 5]"),
            (B, 1, K, V, "[2, 1, 4, 5]"),
            (B, H, V, K, "[2, 2, 5, 4]"),
            (B, H, K, 1, "[2, 2, 4, 1]"),
        ] {
            refused(op, &["kv", shape, "[2, 2, 4, 5]"], |a| {
                a.opts = Options::default().with_initial_state(&state(n, hv, k, v))
            });
        }
        // One state for each packed sequence, empty ones too.
        refused_of(with_batch(op, 1), &["kv", "[1, 2, 4, 5]", "[3, 2, 4, 5]"], |a| {
            a.opts = Options::default().with_cu_seqlens(&[0, 2, 2, 6]).with_initial_state(&state(1, H, K, V))
        });
        refused(op, &["kv", "[2, 4, 5]"], |a| {
            let kv = zeros(&[2, K, V], DType::F32);
            a.opts = Options::default().with_initial_state(&State { kv, z: None })
        });
    }
}

#[test]
fn states_that_are_not_f32() {
    for op in Op::ALL {
        for (dtype, name) in [(DType::BF16, "BF16"), (DType::F64, "F64")] {
            refused(op, &["kv", name, "F32"], |a| {
                let kv = zeros(&[B, H, K, V], dtype);
                a.opts = Options::default().with_initial_state(&State { kv, z: None })
            });
        }
    }
    refused(Op::LinearAttn, &["z", "F16", "F32"], |a| {
        let z = Some(zeros(&[B, H, K], DType::F16));
        let kv = zeros(&[B, H, K, V], DType::F32);
        a.opts = Options::default().with_normalize(true).with_initial_state(&State { kv, z })
    });
}

#[test]
fn z_where_it_does_not_belong_or_is_missing() {
    let with_z = |shape: &[usize]| State { z: Some(zeros(shape, DType::F32)), ..state(B, H, K, V) };
    for op in Op::ALL {
        refused(op, &["z", "normalize"], |a| {
            a.opts = Options::default().with_initial_state(&with_z(&[B, H, K]))
        });
    }
    let normalized = Options::default().with_normalize(true);
    refused(Op::LinearAttn, &["z", "normalize"], |a| {
        a.opts = normalized.clone().with_initial_state(&state(B, H, K, V))
    });
    for (shape, name) in
        [(vec![1, H, K], "[1, 2, 4]"), (vec![B, H, V], "[2, 2, 5]"), (vec![B, H, K, 1], "[2, 2, 4, 1]")]
    {
        refused(Op::LinearAttn, &["z", name, "[2, 2, 4]"], |a| {
            a.opts = normalized.clone().with_initial_state(&with_z(&shape))
        });
    }
}

#[test]
fn normalize_where_it_does_not_exist() {
    for op in Op::GATED.into_iter().chain([Op::DeltaRule]) {
        refused(op, &["normalize", "linear_attn"], |a| a.opts = Options::default().with_normalize(true));
    }
}

/// An error must not depend on there being tokens to process.
#[test]
fn empty_problems_are_checked_too() {
    for op in Op::ALL {
        let mut empty = with_batch(op, 1);
        for x in [
            &mut empty.q,
            &mut empty.k,
            &mut empty.v,
            &mut empty.gate,
            &mut empty.beta,
            &mut empty.a,
            &mut empty.b,
        ] {
            if x.rank() > 1 {
                *x = x.narrow(1, 0, 0).unwrap();
            }
        }
        let refused = |words: &[&str], opts: Options| {
            refused_of(empty.clone(), words, |a| a.opts = opts.clone());
        };
        refused(&["scale"], Options::default().with_scale(f64::NAN));
        refused(&["cu_seqlens"], Options::default().with_cu_seqlens(&[0, 1]));
        refused(&["kv"], Options::default().with_initial_state(&state(2, H, K, V)));
    }
}
