//! Random problems: sizes, options, what is tracked and what the loss sees.

use crate::case::{ARGS, Case, Gates, HEAD_SIZES, LENGTHS, Op, SCALES};
use crate::run::Graph;
use candle_core::DType;
use proptest::prelude::*;
use proptest::sample::select;
use proptest::test_runner::RngSeed;

/// The same cases every time: a failure here is the change's, not the day's.
pub fn config(cases: u32) -> ProptestConfig {
    ProptestConfig {
        cases,
        rng_seed: RngSeed::Fixed(47),
        failure_persistence: None,
        max_shrink_iters: 60,
        ..ProptestConfig::default()
    }
}

fn gates() -> impl Strategy<Value = Gates> {
    select(vec![Gates::Mild, Gates::Strong, Gates::Forgets, Gates::Huge, Gates::Zero, Gates::Positive])
}

/// Either a batch of whole sequences or packed ones, empty and single-token ones among them.
fn packing() -> impl Strategy<Value = (usize, usize, Option<Vec<u32>>)> {
    let batch = (1..=3usize, select(LENGTHS.to_vec())).prop_map(|(b, t)| (b, t, None));
    let lengths = prop::collection::vec(select(vec![0u32, 1, 2, 15, 16, 33, 64, 65]), 1..6);
    let packed = lengths.prop_map(|lengths| {
        let mut ends = vec![0];
        ends.extend(lengths.iter().scan(0, |end, n| {
            *end += n;
            Some(*end)
        }));
        let t = ends[ends.len() - 1] as usize;
        (1, t, Some(ends))
    });
    prop_oneof![2 => batch, 1 => packed]
}

prop_compose! {
    fn sizes()(
        h in 1..=3usize,
        group in 1..=3usize,
        k in select(HEAD_SIZES.to_vec()),
        v in select(HEAD_SIZES.to_vec()),
    ) -> (usize, usize, usize, usize) {
        (h, group, k, v)
    }
}

prop_compose! {
    fn case(op: Op)(
        (b, t, cu_seqlens) in packing(),
        (h, group, k, v) in sizes(),
        scale in select(SCALES.to_vec()),
        gates in gates(),
        normalize in prop::bool::weighted(0.4),
        initial_state: bool,
        seed: u64,
    ) -> Case {
        let case = Case {
            op, b, t, h, group, k, v, scale, gates, initial_state, cu_seqlens, seed,
            normalize: normalize && op == Op::LinearAttn,
            ..Case::default()
        };
        let mut case = case.with_gradients_above_rounding();
        // The largest problems add time, not coverage.
        while case.work() > 4_000_000 && (case.b > 1 || case.group > 1 || case.h > 1) {
            match case {
                Case { b: 2.., .. } => case.b -= 1,
                Case { group: 2.., .. } => case.group -= 1,
                _ => case.h -= 1,
            }
        }
        case
    }
}

prop_compose! {
    fn graph()(loss: [bool; 3], tracked: [bool; 9], leaves: bool) -> Graph {
        Graph { loss, tracked, leaves }
    }
}

macro_rules! agrees_with_the_reference {
    ($($name:ident: $op:expr;)*) => {
        proptest! {
            #![proptest_config(config(120))]
            $(
                #[test]
                fn $name(case in case($op), graph in graph()) {
                    case.check_modes(graph).map_err(|e| TestCaseError::fail(e.to_string()))?;
                }
            )*
        }
    };
}

agrees_with_the_reference! {
    linear_attn_on_random_problems: Op::LinearAttn;
    retention_on_random_problems: Op::Retention;
    simple_gla_on_random_problems: Op::SimpleGla;
    gla_on_random_problems: Op::Gla;
    delta_rule_on_random_problems: Op::DeltaRule;
    gated_delta_rule_on_random_problems: Op::GatedDeltaRule;
    kda_on_random_problems: Op::Kda;
    rwkv7_on_random_problems: Op::Rwkv7;
}

proptest! {
    #![proptest_config(config(120))]

    #[test]
    fn sixteen_bit_on_random_problems(
        case in select(Op::ALL.to_vec()).prop_flat_map(case),
        half: bool,
        f32_gate: bool,
    ) {
        let dtype = if half { DType::F16 } else { DType::BF16 };
        // The gradient of a decay that all tokens share can pass f16's largest number, 65504.
        let f32_gate = f32_gate || (half && case.op == Op::Retention);
        let gate_dtype = if f32_gate { DType::F32 } else { dtype };
        let case = Case { dtype, gate_dtype, ..case };
        // A relative RMS error says little about the rounding of a handful of numbers.
        prop_assume!(case.b * case.t * case.h * case.k.min(case.v) >= 128);
        case.check_modes(Graph::ALL).map_err(|e| TestCaseError::fail(e.to_string()))?;
    }
}

/// Which inputs are variables and which outputs the loss sees, one by one: every path through the graph must work when
/// it is the only one.
#[test]
fn each_input_alone_for_each_loss() {
    let losses = [
        [true, false, false],
        [false, true, false],
        [false, false, true],
        [false, true, true],
        [true, true, true],
    ];
    for op in Op::ALL {
        for normalize in [false, op == Op::LinearAttn] {
            for loss in losses {
                for only in 0..ARGS.len() {
                    for leaves in [true, false] {
                        let tracked = std::array::from_fn(|i| i == only);
                        Case { op, normalize, t: 70, k: 5, v: 9, group: 2, ..Case::default() }
                            .check_modes(Graph { loss, tracked, leaves })
                            .unwrap();
                    }
                }
            }
        }
    }
}

/// Head sizes that no vector width divides, K and V apart.
#[test]
fn every_pair_of_head_sizes() {
    for (i, op) in Op::ALL.into_iter().cycle().take(HEAD_SIZES.len()).enumerate() {
        for j in 0..HEAD_SIZES.len() {
            Case {
                op,
                k: HEAD_SIZES[i],
                v: HEAD_SIZES[(i + j) % HEAD_SIZES.len()],
                t: 67,
                h: 1,
                ..Case::default()
            }
            .check_modes(Graph::ALL)
            .unwrap();
        }
    }
}
